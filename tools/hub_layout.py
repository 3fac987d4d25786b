#!/usr/bin/env python3
"""Lays the sources out as kernel-builder wants them, which builds kernels for Hugging Face's Hub.

    python tools/hub_layout.py [FOLDER]      # by default dist/kernels/eca-fused; or: make hub

The layout has

    build.toml, flake.nix      what kernel-builder compiles, and how it is started
    CARD.md, LICENSE           the page on the Hub
    csrc/                      the sources of the kernels
    torch-ext/eca_fused/       what the package's entry on the Hub needs of the package
    tests/                     what kernel-builder's CI runs

Files come from csrc/ and eca_fused/, and those that only the Hub has from tools/hub/. A file there
takes the place of one with the same path. A kernel of the Hub imports itself by relative imports
alone, because it is loaded under another name, so absolute ones are rewritten.

Only these entries of FOLDER are replaced: it may be a git repository, which is what kernel-builder
names the build after.
"""

import argparse
import ast
import json
import shutil
import sys
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from setup import HOST_FLAGS, PLANNER, architectures, oldest_torch  # noqa: E402

HUB = ROOT / "tools" / "hub"
NAME = "eca-fused"
PACKAGE = "eca_fused"
FOLDER = ROOT / "dist" / "kernels" / NAME
VERSION = 0  # of the interface on the Hub, where 0 says that it may still change
GENERATED = "_ops"  # kernel-builder writes this module
# Its macro names both the extension and the namespace of the operators.
CXX_FLAGS = ["-std=c++20", "-DECA_FUSED_NAMESPACE=TORCH_EXTENSION_NAME", *HOST_FLAGS]
WITH_CUDA = "-DECA_FUSED_WITH_CUDA"


# ---- Python ----


def relative_imports(source: str, depth: int) -> str:
    """The source with relative imports instead of absolute ones of the package.

    Args:
        source: a module of the package.
        depth: how many folders up the package's parent is; 1 for the files in the package's folder.

    Raises:
        SystemExit: it imports the package in a form that has no relative one.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == PACKAGE:
                    sys.exit(f"error: expected `from {alias.name} import ...`, got `import`")
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            top, _, inner = str(node.module).partition(".")
            if top == PACKAGE:
                line, start = lines[node.lineno - 1], node.col_offset
                old, new = f"from {node.module} ", f"from {'.' * depth}{inner} "
                lines[node.lineno - 1] = line[:start] + line[start:].replace(old, new, 1)
    return "".join(lines)


def candidates() -> dict[PurePosixPath, str]:
    """The text of every file that the package on the Hub may have, by its path in the package."""
    found = {}
    package = ROOT / PACKAGE
    for path in [*package.rglob("*.py"), *package.rglob("*.pyi")]:
        name = PurePosixPath(path.relative_to(package).as_posix())
        found[name] = relative_imports(path.read_text(), len(name.parts))
    own = HUB / "torch-ext" / PACKAGE
    for path in own.rglob("*.py"):
        found[PurePosixPath(path.relative_to(own).as_posix())] = path.read_text()
    return found


def file_of(module: PurePosixPath, files: Container[PurePosixPath]) -> PurePosixPath | None:
    """The file of a module or package, given by its path without a suffix."""
    names = (f"{module}/__init__.py", f"{module}.py", f"{module}.pyi")
    return next((path for path in map(PurePosixPath, names) if path in files), None)


def imported(path: PurePosixPath, source: str) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """What a file imports from the package, also inside functions: modules, and names of each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = [path, *path.parents][node.level]
            names = [alias.name for alias in node.names]
            yield folder.joinpath(*(node.module or "").split(".")), names


def package_files() -> dict[PurePosixPath, str]:
    """The files of the package on the Hub: those that its __init__.py needs.

    Raises:
        SystemExit: an import leads nowhere.
    """
    there = candidates()
    files: dict[PurePosixPath, str] = {}
    left = [PurePosixPath("__init__.py")]
    while left:
        path = left.pop()
        if path in files:
            continue
        files[path] = there[path]
        left += [folder / "__init__.py" for folder in path.parents]
        for module, names in imported(path, there[path]):
            if module.name == GENERATED:
                continue
            file = file_of(module, there)
            if file is None:
                sys.exit(f"error: {path} imports {module}, which is not a file of the package")
            left += [file, *(f for name in names if (f := file_of(module / name, there)))]
    return files


# ---- C++ ----


def sources(*suffixes: str) -> list[str]:
    """The files of csrc/ with these suffixes, without those of the planner's module for Python."""
    paths = [path.relative_to(ROOT) for path in sorted((ROOT / "csrc").rglob("*"))]
    return [p.as_posix() for p in paths if p.suffix in suffixes and p != PLANNER[0]]


def build_toml() -> str:
    """What kernel-builder compiles. It sees only the files that are listed here."""
    code, headers = sources(".cpp", ".cu"), sources(".h", ".cuh")
    on_cpu = [path for path in code if not path.startswith("csrc/cuda/")]
    tables: dict[str, dict[str, object]] = {
        "general": {
            "name": NAME,
            "version": VERSION,
            "edition": 5,
            "license": "MIT",
            "backends": ["cpu", "cuda"],
        },
        "torch": {"src": ["torch-ext/torch_binding.cpp"], "stable-abi": oldest_torch()},
        f"kernel.{PACKAGE}_cpu": {
            "backend": "cpu",
            "depends": ["torch"],
            "cxx-flags": CXX_FLAGS,
            "src": on_cpu + headers,
        },
        # It has the kernels for the CPU too.
        f"kernel.{PACKAGE}_cuda": {
            "backend": "cuda",
            "depends": ["torch"],
            "cuda-capabilities": architectures((13, 0)).split(";"),
            "cuda-flags": ["-std=c++20", WITH_CUDA],
            "cxx-flags": [*CXX_FLAGS, WITH_CUDA],
            "src": code + headers,
        },
    }
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )


def toml(value: object) -> str:
    """A string, a number or a list of strings as TOML, which writes them as JSON does."""
    if isinstance(value, list) and len(json.dumps(value)) > 80:
        return "[\n" + "".join(f"  {json.dumps(entry)},\n" for entry in value) + "]"
    return json.dumps(value)


# ---- the layout ----


def lay_out(folder: Path) -> None:
    """Write the layout into a folder, in the place of an earlier one."""
    files: dict[str, str] = {"build.toml": build_toml()}
    for path in ("CARD.md", "flake.nix", "torch-ext/torch_binding.cpp"):
        files[path] = (HUB / path).read_text()
    for path in (HUB / "tests").glob("*.py"):
        files[f"tests/{path.name}"] = path.read_text()
    files["LICENSE"] = (ROOT / "LICENSE").read_text()
    for name in sources(".cpp", ".cu", ".h", ".cuh"):
        files[name] = (ROOT / name).read_text()
    for name, text in package_files().items():
        files[f"torch-ext/{PACKAGE}/{name}"] = text

    for entry in sorted({name.partition("/")[0] for name in files}):
        if (folder / entry).is_dir():
            shutil.rmtree(folder / entry)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    print(f"{folder}: {len(files)} files")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, metavar="FOLDER")
    lay_out(parser.parse_args().folder.resolve())


if __name__ == "__main__":
    main()
