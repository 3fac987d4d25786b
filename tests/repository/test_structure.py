"""The layers of the package and the folders of the tests, as CONTRIBUTING.md has them."""

import ast
import re
from pathlib import Path

import pytest

from helpers.processes import ROOT

PACKAGE = ROOT / "eca_fused"
TESTS = ROOT / "tests"
TABLE = ROOT / "CONTRIBUTING.md"
MOST_LAYERS = 10
# What packaging wants at the top: not layers.
NAMES = {"__init__", "__main__", "_version", "_C"}

needs_checkout = pytest.mark.skipif(not TABLE.is_file(), reason="needs the source folder")


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by their dotted names; a folder has that of its __init__.py."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Which modules of the package each of them imports, also inside functions."""
    files = modules(package)
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                for alias in node.names:
                    if alias.name == "_C":  # compiled: in no layer
                        continue
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in files else node.module)
        found[name] = {target for target in found[name] if target in files and target != name}
    return found


def layer_of(module: str) -> str:
    """The entry at the top of the package that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def climbs(found: dict[str, set[str]], layers: list[str]) -> list[str]:
    """The imports that do not go down: `layers` are in their order, the highest first."""
    height = {layer: number for number, layer in enumerate(layers)}
    height |= {"__init__": -1, "__main__": -1, "_version": len(layers), "_C": len(layers)}
    return [
        f"{module} imports {target}"
        for module, targets in found.items()
        for target in sorted(targets)
        if layer_of(module) != layer_of(target)
        and height[layer_of(target)] <= height[layer_of(module)]
    ]


def circles(found: dict[str, set[str]]) -> list[str]:
    """A circle for each import that closes one."""
    closed, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            closed.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(found[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in found:
        visit(module, [])
    return closed


def layers_of_the_table() -> list[str]:
    """The layers in the order of CONTRIBUTING.md's table, the highest first."""
    (table,) = [part for part in TABLE.read_text().split("\n\n") if part.startswith("| layer |")]
    return re.findall(r"^\| `(\w+)(?:\.py|/)` \|", table, re.MULTILINE)


@needs_checkout
def test_the_table_has_the_layers():
    there = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()
    }
    assert sorted(layers_of_the_table()) == sorted(there - NAMES)
    assert len(there - NAMES) <= MOST_LAYERS


@needs_checkout
def test_every_import_goes_down():
    assert climbs(imports(PACKAGE), layers_of_the_table()) == []


@needs_checkout
def test_no_import_goes_in_a_circle():
    assert circles(imports(PACKAGE)) == []


@needs_checkout
def test_no_command_imports_another():
    """What commands share is in cli/common/."""
    commands = ("bench", "convert", "demo", "doctor", "gates", "plan", "tables")
    crossing = [
        (name, target)
        for name, targets in imports(PACKAGE).items()
        for target in targets
        for command in commands
        if target.startswith(f"eca_fused.cli.{command}")
        and not name.startswith(f"eca_fused.cli.{command}")
    ]
    assert crossing == []


@needs_checkout
def test_what_is_imported_is_seen():
    """A check that finds no imports would pass for any package."""
    found = imports(PACKAGE)
    assert "eca_fused.ops.checks" in found["eca_fused.functional.ways"]
    assert "eca_fused.ops.triton" in found["eca_fused.ops.backend"]  # inside a function
    assert sum(map(len, found.values())) > 100


@pytest.mark.parametrize(
    ("low", "high", "climbing", "circular"),
    [
        ("", "from eca_fused.low import a", 0, 0),
        ("import eca_fused.high", "", 1, 0),
        ("def f():\n    from eca_fused.high import inner", "from eca_fused import low", 1, 1),
    ],
)
def test_climbs_and_circles_are_found(tmp_path, low, high, climbing, circular):
    package = tmp_path / "eca_fused"
    (package / "high").mkdir(parents=True)
    (package / "__init__.py").write_text("from eca_fused import high\n")
    (package / "low.py").write_text(low)
    (package / "high" / "__init__.py").write_text("")
    (package / "high" / "inner.py").write_text(high)
    found = imports(package)
    assert len(climbs(found, ["high", "low"])) == climbing
    assert len(circles(found)) == circular


# ---- the tests ----


@needs_checkout
def test_the_table_of_tests_has_every_folder():
    _, _, after = TABLE.read_text().partition("## The tests\n")
    listed = re.findall(r"^\| `(\w+)/` \|", after.partition("\n## ")[0], re.M)
    there = {path.parent.name for path in TESTS.rglob("*.py")} - {TESTS.name}
    assert sorted(listed) == sorted(there)


def test_no_test_imports_another():
    files = {path.stem for path in TESTS.rglob("*.py") if path.parent.name != "helpers"}
    found = {}
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            if taken := {name.rpartition(".")[2] for name in names} & files:
                found[path.name] = taken
    assert len(files) > 50
    assert found == {}


# ---- sizes ----


@needs_checkout
def test_files_of_a_few_hundred_lines():
    long = {
        path.relative_to(ROOT).as_posix(): length
        for path in PACKAGE.rglob("*.py")
        if (length := len(path.read_text().splitlines())) > 450
    }
    assert long == {}
