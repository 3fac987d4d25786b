"""What a release has: one version everywhere, workflows and templates that name what exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eca_fused.__main__ import COMMANDS
from eca_fused._version import __version__
from helpers.processes import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
EVERY_YAML = sorted(GITHUB.rglob("*.yml"))
PYTHON = "Programming Language :: Python :: "

needs_checkout = pytest.mark.skipif(not GITHUB.is_dir(), reason="needs the source folder")


def names(paths: list[Path]) -> list[object]:
    """The parameters of a test of each file; one that is skipped in an archive without these."""
    return [
        pytest.param(path, id=path.name, marks=needs_checkout) for path in paths or [ROOT / "none"]
    ]


def load(text: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install pyyaml")
    return yaml.safe_load(text)


# ---- the version ----


def version_of(citation: str) -> list[str]:
    """The version of the software in a CITATION.cff; those of its references are indented."""
    return re.findall(r"""^version: ["']?([^\s"']+)["']?$""", citation, re.M)


def test_the_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert version_of(citation) == [__version__]
    assert version_of(citation.replace(f"version: {__version__}", "version: 9")) == ["9"]


@needs_checkout
def test_the_citation_has_what_its_format_asks_for() -> None:
    citation = load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    for entry in (citation, *citation["references"]):
        assert all({"name"} <= set(a) or {"family-names"} <= set(a) for a in entry["authors"])
        assert entry["title"]
        assert entry["type"]
    assert citation["message"]


def wrong_headings(changelog: str, version: str) -> list[str]:
    """The headings of a changelog that are neither of a release nor of what comes next."""
    headings = re.findall(r"^## (.*)$", changelog, re.M)
    release = re.compile(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d")
    wrong = [h for h in headings[1:] if not release.fullmatch(h)]
    newest = headings[0] if headings else ""
    if newest != "[Unreleased]" and not (
        release.fullmatch(newest) and newest.startswith(f"[{version}] ")
    ):
        wrong.append(newest)
    return wrong


@needs_checkout
def test_the_changelog_begins_with_this_version_or_the_next() -> None:
    assert wrong_headings((ROOT / "CHANGELOG.md").read_text(), __version__) == []


@pytest.mark.parametrize(
    ("headings", "wrong"),
    [
        (["[Unreleased]", "[0.1.0] - 2027-01-31"], []),
        (["[0.2.0] - 2027-01-31", "[0.1.0] - 2026-12-31"], []),
        (["[0.1.0] - 2026-12-31"], ["[0.1.0] - 2026-12-31"]),
        (["[Unreleased]", "[0.1.0] - unreleased"], ["[0.1.0] - unreleased"]),
        ([], [""]),
    ],
)
def test_a_wrong_heading_is_found(headings: list[str], wrong: list[str]) -> None:
    text = "".join(f"## {heading}\n" for heading in headings)
    assert wrong_headings(text, "0.2.0") == wrong


# ---- the workflows ----


def steps(workflow: Any) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(path: Path) -> str:
    """The commands of a workflow, or of a shell script."""
    if path.suffix != ".yml":
        return path.read_text()
    return "\n".join(step["run"] for step in steps(load(path.read_text())) if "run" in step)


def rows() -> list[str]:
    """The versions of torch in the table of the supported ones."""
    lines = (ROOT / "tools" / "versions.txt").read_text().splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def missing(text: str) -> list[str]:
    """What commands name and the repository lacks."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    found = [f"make {name}" for name in re.findall(r"\bmake (\w+)", text) if name not in targets]
    files = re.findall(r"(?<![\w/.])(?:tools|tests|benchmarks)/[\w/]+\.(?:sh|py)\b", text)
    found += [file for file in files if not (ROOT / file).is_file()]
    named = re.findall(r"torch==([\w.]+)", text)
    named += " ".join(re.findall(r"tools/versions\.sh((?: [\w.]+)*)", text)).split()
    found += [f"torch {version}" for version in named if version not in rows()]
    found += [f"command {name}" for name, _ in calls(text) if name not in COMMANDS]
    return found


@pytest.mark.parametrize("path", names(EVERY_YAML))
def test_yaml_parses(path: Path) -> None:
    assert isinstance(load(path.read_text()), dict)


@pytest.mark.parametrize("path", names([*WORKFLOWS, ROOT / ".ci" / "run"]))
def test_what_workflows_call_exists(path: Path) -> None:
    assert missing(commands(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "make nothing",
        "tools/nothing.sh",
        'make test ARGS="tests/ops/test_nothing.py"',
        "pip install torch==1.0.0",
        "tools/versions.sh 2.11.0 1.0.0",
        "python -m eca_fused nothing",
    ],
)
@needs_checkout
def test_what_does_not_exist_is_found(text: str) -> None:
    assert len(missing(text)) == 1


@needs_checkout
def test_the_workflows_run_what_a_change_must_pass() -> None:
    must = re.findall(r"\bstep (.+)$", (GITHUB.parent / ".ci" / "run").read_text(), re.M)
    text = "\n".join(map(commands, WORKFLOWS))
    assert len(must) == 5
    assert [command for command in must if command not in text] == []


@pytest.mark.parametrize("path", names(WORKFLOWS))
def test_workflows_may_do_little_and_end(path: Path) -> None:
    workflow = load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert [n for n, job in workflow["jobs"].items() if not job.get("timeout-minutes")] == []
    assert [n for n, job in workflow["jobs"].items() if "permissions" in job] == []
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert [u for u in used if not re.fullmatch(r"actions/[\w-]+@v\d+", u)] == []


@needs_checkout
def test_one_version_of_each_action() -> None:
    used = {s["uses"] for path in WORKFLOWS for s in steps(load(path.read_text())) if "uses" in s}
    assert len(used) == len({name.partition("@")[0] for name in used})


# ---- the matrices ----


def matrices(key: str) -> dict[str, list[str]]:
    """The lists of this name in the matrices of the workflows, by workflow and job."""
    return {
        f"{path.name}: {name}": job["strategy"]["matrix"][key]
        for path in WORKFLOWS
        for name, job in load(path.read_text())["jobs"].items()
        if key in job.get("strategy", {}).get("matrix", {})
    }


@needs_checkout
def test_the_matrices_have_the_pythons_of_the_classifiers() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(rf'"{PYTHON}(3\.\d+)"', project)
    assert f'requires-python = ">={pythons[0]}"' in project
    assert [int(python[2:]) for python in pythons] == list(range(10, 10 + len(pythons)))
    found = matrices("python")
    assert {"ci.yml: test", "wheels.yml: build"} <= set(found)
    assert {name: listed for name, listed in found.items() if listed != pythons} == {}


@needs_checkout
def test_the_matrix_has_the_oldest_torch_and_the_newest() -> None:
    assert matrices("torch") == {"ci.yml: test": [rows()[0], "newest"]}


# ---- the templates of issues ----


def calls(text: str) -> list[tuple[str, list[str]]]:
    """The commands of `python -m eca_fused` in a text, each with its options."""
    found = re.findall(r"python -m eca_fused (\w+)((?: [^`\n\"]+)?)", text)
    return [(name, re.findall(r"--[\w-]+", rest)) for name, rest in found]


@pytest.mark.parametrize("path", names(FORMS))
def test_forms_name_commands_that_exist(path: Path) -> None:
    text = path.read_text()
    assert "doctor" in [name for name, _ in calls(text)]
    assert missing(text) == []
    options = [(name, option) for name, listed in calls(text) for option in listed]
    # Options without their command are those of the only command that has options here.
    others = set(re.findall(r"(?<![\w-])--[\w-]+", text))
    options += [("bench", option) for option in others - {option for _, option in options}]
    wrong = [(name, option) for name, option in options if option not in help_of(name)]
    assert wrong == []


def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "eca_fused", command, "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", names(FORMS))
def test_forms_have_what_their_format_asks_for(path: Path) -> None:
    form = load(path.read_text())
    assert form["name"]
    assert form["description"]
    ids = [item["id"] for item in form["body"]]
    assert len(ids) == len(set(ids))
    for item in form["body"]:
        assert item["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert item["attributes"]["label"]
        assert item.get("validations", {"required": True}) == {"required": True}


@needs_checkout
def test_there_are_workflows_and_forms() -> None:
    """A check of no files would pass."""
    assert [path.stem for path in WORKFLOWS] == ["ci", "cuda", "wheels"]
    assert [path.stem for path in FORMS] == ["bug", "speed"]
    assert "CONTRIBUTING.md" in (GITHUB / "pull_request_template.md").read_text()
