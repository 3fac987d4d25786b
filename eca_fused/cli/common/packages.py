"""Packages that the demonstration and the examples need beside torch."""

import importlib.util
from collections.abc import Collection

__all__ = ["PACKAGES_MISSING", "missing_packages", "need"]

PACKAGES_MISSING = 3  # exit status; argparse itself ends with 2
PACKAGES = {"matplotlib": "matplotlib", "PIL": "pillow", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def missing_packages(needed: Collection[str] = PACKAGES) -> list[str]:
    """The needed packages that are not installed, by the names that pip knows them by."""
    found = importlib.util.find_spec
    return [name for module, name in PACKAGES.items() if module in needed and not found(module)]


def need(missing: Collection[str]) -> str:
    """The line that says what to install."""
    return f"error: {', '.join(missing)} not installed; pip install 'eca-fused[demo]'"
