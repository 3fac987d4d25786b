"""The planner, csrc/module.cpp."""

from typing import Literal, TypedDict

class Gpu(TypedDict):
    capability: int  # 90 for 9.0
    multiprocessors: int
    shared_per_block: int  # bytes, the most that a block can request
    shared_per_multiprocessor: int  # bytes
    l2: int  # bytes
    threads_per_multiprocessor: int

Strategy = Literal["rows", "runs", "columns", "kept", "stream", "two_pass"]

class PlanEntries(TypedDict):
    strategy: Strategy
    vectors: bool
    tile: int
    halo: int
    tiles: int
    chunk: int
    parts: int
    threads: int
    depth: int
    spare: int
    blocks: int
    launches: int
    shared_bytes: int
    occupancy: int
    workspace_bytes: int
    map_bytes: int
    dram_bytes: int
    l2_bytes: int
    instructions: int

def gpu_by_name(name: str) -> Gpu: ...
def plan(
    *,
    backward: bool,
    dtype: str,
    channels_last: bool,
    samples: int,
    channels: int,
    pixels: int,
    kernel_size: int,
    own_taps: bool,
    circular: bool,
    aligned: bool,
    in_place: bool,
    gpu: Gpu,
    forced: dict[str, str | int] | None = None,  # arguments of native.force_plan()
) -> PlanEntries: ...
