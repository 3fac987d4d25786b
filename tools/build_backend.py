"""The build backend that pyproject.toml names: setuptools, with the torch that is installed.

pip builds in an environment that has only what the build asks for. A torch from the package index
is 3 GB there, and it may belong to another CUDA than the installed one. So this backend looks for
the torch of the environment that pip installs into, and asks for one only if there is none. With
ECA_FUSED_CUDA=1 it also asks for nvcc, if there is no CUDA toolkit that fits that torch.

The names are those of PEP 517 and PEP 660.
"""

import importlib.util
import os
import re
import site
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import which
from typing import NamedTuple

OLDEST_PYTHON = (3, 10)
# pip looks at requires-python after it has called this, and an older Python cannot read setup.py.
if sys.version_info < OLDEST_PYTHON:
    sys.exit(
        f"eca_fused: error: expected Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer, got "
        f"{sys.version.split()[0]} in {sys.prefix}. Make an environment with a newer Python, and "
        "call its pip."
    )

from setuptools import build_meta  # noqa: E402

from setup import (  # noqa: E402
    candidate_homes,
    choose_toolkit,
    leaves_kernels_out,
    nvcc_packages,
    oldest_torch,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Mapping[str, str | list[str] | None] | None


class Torch(NamedTuple):
    folder: Path  # that has to be on sys.path
    version: str
    cuda: str | None  # the version of CUDA that it was built with


def site_folders() -> list[Path]:
    """Where the environment that pip installs into has its packages.

    pip removes these from sys.path for a build. They still belong to this interpreter.
    """
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in folders]


def find_torch(folders: Sequence[Path]) -> Torch | None:
    """The first torch in these folders, without importing it."""
    for folder in folders:
        file = folder / "torch" / "version.py"
        found = next(distributions(name="torch", path=[str(folder)]), None)
        if found is None or not file.is_file():
            continue
        spec = spec_from_file_location("eca_fused_torch_version", file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return Torch(folder, found.version, getattr(module, "cuda", None))
    return None


def is_recent(version: str, oldest: str) -> bool:
    """Whether a version such as 2.14.1+cu130 is `oldest`, such as 2.11, or newer."""
    major, minor = re.findall(r"\d+", version)[:2]
    return (int(major), int(minor)) >= tuple(map(int, oldest.split(".")))


def usable_torch(folders: Sequence[Path]) -> Torch | None:
    """find_torch(), if that is one to build with."""
    torch = find_torch(folders)
    return torch if torch and is_recent(torch.version, oldest_torch()) else None


def requirements(
    environ: Mapping[str, str], folders: Sequence[Path], homes: Sequence[Path]
) -> list[str]:
    """What the build needs besides the requirements of pyproject.toml.

    Args:
        environ: the variables of the environment.
        folders: where torch may be installed.
        homes: where a CUDA toolkit may be, see setup.py.
    """
    if leaves_kernels_out(environ):
        return []
    torch = usable_torch(folders)
    if torch is None:
        return [f"torch>={oldest_torch()}"]
    if environ.get("ECA_FUSED_CUDA") != "1" or torch.cuda is None:
        return []
    toolkit, _ = choose_toolkit(None, homes, torch.version, torch.cuda, has_kernels=True)
    return [] if toolkit else nvcc_packages(torch.cuda)


def _is_isolated() -> bool:
    """Whether pip keeps the packages of the environment from this build."""
    return importlib.util.find_spec("torch") is None


def _missing() -> list[str]:
    if not _is_isolated():
        return []
    return requirements(os.environ, site_folders(), candidate_homes(os.environ, which("nvcc")))


def _see_torch() -> None:
    """Lets this process import the torch that is installed, after the packages of the build."""
    if _is_isolated() and usable_torch(site_folders()):
        sys.path += [str(folder) for folder in site_folders()]
        importlib.invalidate_caches()


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_missing()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_missing()]


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    _see_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    _see_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


# Neither metadata nor an archive of the sources needs torch.
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_sdist = build_meta.build_sdist
