"""The compiled module, csrc/module.cpp."""

from typing import TypedDict

class BuildInfo(TypedDict):
    cpu_capability: str
    cuda: bool

def build_info() -> BuildInfo: ...
