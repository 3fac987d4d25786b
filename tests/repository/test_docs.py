"""Every code block of the README, of CONTRIBUTING.md and of docs/ runs, as far as time allows.

Python blocks run. So do commands that are quick, or that an option makes so. The programs and the
options of the others must exist.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import ROOT, path_with

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.is_file()]  # an archive of the sources has the first alone
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n+)?^ *```(?P<kind>\w+)\n(?P<code>.*?)^ *```",
    re.M | re.S,
)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source folder")


def blocks(kind: str) -> list[object]:
    """The blocks of a kind, with the packages that they need beside those of the tests."""
    found: list[object] = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match["kind"] == kind:
                line = text[: match.start("code")].count("\n") + 1
                name = f"{page.name}:{line}"
                found.append(pytest.param(match["code"], match["needs"] or "", id=name))
    return found


@pytest.mark.parametrize(("code", "needs"), blocks("python"))
def test_python(code: str, needs: str, tmp_path: Path) -> None:
    for package in filter(None, needs.split(", ")):
        pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    if "timm" in code:
        pytest.importorskip("timm", reason="needs timm: pip install timm")
    env = {
        **os.environ,
        "PYTHONPATH": path_with(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == []


# ---- commands ----


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(code: str) -> list[list[str]]:
    """The words of each command, without comments and settings of the environment."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    return [[w for w in words if not re.match(r"[A-Z_]+=", w)] for words in lines if words]


def wrong(words: list[str]) -> str:
    """What is wrong with a command of a page; "" if nothing is."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    program, *arguments = words
    if program == "eca-fused":
        program, arguments = "python", ["-m", "eca_fused", *arguments]
    if program == "make":
        return "" if arguments and arguments[0] in targets else "no such target"
    if program in ("pip", "pre-commit", "export", "torchrun"):
        return ""
    if program != "python" or not arguments:
        return "" if (ROOT / program).is_file() else "no such program"
    if arguments[:2] == ["-m", "pytest"]:
        missing = [a for a in arguments[2:] if a.endswith(".py") and not (ROOT / a).is_file()]
        return f"no {missing}" if missing else ""
    if arguments[:2] == ["-m", "eca_fused"]:
        named = len(arguments) > 2 and arguments[2][0] != "-"
        command = arguments[:3] if named else [*arguments[:2], "run"]
    else:
        command = arguments[:1]
        if not (ROOT / command[0]).is_file():
            return "no such script"
    text = help_of(*command)
    unknown = [a for a in arguments if a.startswith("--") and a != "--help" and a not in text]
    return f"no option {unknown}" if unknown else ""


# What runs, and with which options more. Training, the whole suite and a GPU's scripts do not.
RUNS: dict[str, list[str]] = {
    "-m eca_fused plan": [],
    "-m eca_fused tables": [],
    "benchmarks/layers.py": ["--rounds", "1", "--batch", "1", "--contender", "native", "eager"],
    "benchmarks/report.py": [],
}


# The results of commands that differ in the name of their output alone: one is run for all.
outputs: dict[str, bytes] = {}


def run(words: list[str], folder: Path) -> str:
    """What a command says if it fails; "" if it does not, or is not one of RUNS."""
    text = shlex.join(words[1:])
    more = next((RUNS[start] for start in RUNS if text.startswith(start)), None)
    if words[0] != "python" or more is None:
        return ""
    arguments = [str(ROOT / a) if a.startswith("benchmarks/") else a for a in words[1:]]
    env = os.environ | {"PYTHONPATH": path_with(ROOT)}
    name = words[words.index("--output") + 1] if "--output" in words else ""
    alike = shlex.join(word for word in words if word != name)
    if alike in outputs:
        (folder / name).write_bytes(outputs[alike])
        return ""
    done = subprocess.run(
        [sys.executable, *arguments, *more], cwd=folder, env=env, capture_output=True, text=True
    )
    if name and done.returncode == 0:
        outputs[alike] = (folder / name).read_bytes()
    # A comparison ends with 1 if something became slower, which one round does not tell.
    fine = (0, 1) if "--compare" in words else (0,)
    return "" if done.returncode in fine else done.stdout[-1000:] + done.stderr[-2000:]


@pytest.mark.xdist_group("docs_commands")  # they share outputs, and texts of --help
@pytest.mark.parametrize(("code", "needs"), blocks("sh"))
def test_commands(code: str, needs: str, tmp_path: Path) -> None:
    found = commands(code)
    assert {shlex.join(c): why for c in found if (why := wrong(c))} == {}
    if any("--plot" in words for words in found):
        pytest.importorskip("matplotlib", reason="draws with it: pip install matplotlib")
    if any("plan" in words for words in found):
        pytest.importorskip("eca_fused._C", reason="needs the compiled extension: make build")
    assert {shlex.join(c): why for c in found if (why := run(c, tmp_path))} == {}


def test_a_command_that_fails_is_found(tmp_path: Path) -> None:
    assert "is no result" in run(["python", "benchmarks/report.py", "nothing.json"], tmp_path)
    assert run(["python", "examples/train.py"], tmp_path) == ""


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "python benchmarks/nothing.py",
        "python benchmarks/report.py --nothing",
        "python -m eca_fused plan --nothing",
        "eca-fused plan --nothing",
        "tools/nothing.sh",
        "python -m pytest tests/test_nothing.py",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    assert wrong(command.split())


def test_there_are_blocks() -> None:
    assert len(blocks("python")) >= 10
    assert len(blocks("sh")) >= 8
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_links_between_pages_and_files() -> None:
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    ]
    assert len(links) > 10
    assert [(p.name, link) for p, link in links if not (p.parent / link).exists()] == []
