#!/usr/bin/env python3
"""Walks the ways to install, each from a fresh copy of the sources, and prints what came of them.

    tools/install_paths.py                        all, in new environments (about forty minutes)
    tools/install_paths.py --quick                those that compile nothing (two minutes)
    tools/install_paths.py --only "pip install ." --write
                                                  one; --write keeps the table in docs/

An environment has torch and nothing else. After each way, `eca-fused doctor` runs in another
folder. Its exit status and the backends that it finds must be those that the way promises.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "install_paths.md"
TOOLKITS = "/usr/local/cuda"
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")


@dataclass(frozen=True)
class Way:
    """A way to install.

    Attributes:
        name: as users would type it, or in words.
        command: for sh, in the folder of the sources, with the environment's bin first on PATH.
        devices: of the compiled kernels that the install must have.
        says: a pattern that the output must have.
        fails: the command must fail.
        packages: what the environment has beside torch.
        variables: of the environment.
        without: "compilers", or "toolkits": what the command must not find.
        compiles: takes minutes.
        torch: the environment has it; "without CUDA" for one whose version names no CUDA.
        toolkit: of CUDA, that CUDA_HOME names; it has headers and an nvcc that does nothing.
        python: its version, if not that of the other ways.
    """

    name: str
    command: str
    devices: tuple[str, ...] = ("cpu",)
    says: str = ""
    fails: bool = False
    packages: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    without: str = ""
    compiles: bool = True
    torch: bool | str = True
    toolkit: str = ""
    python: str = ""


BUILD = ("setuptools>=77,<82", "ninja", "pybind11")
CUDA = {"ECA_FUSED_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
PURE = {"ECA_FUSED_NATIVE": "0"}
# Without a toolkit: with one, the CUDA kernels are compiled too, which takes several times as long.
WAYS = (
    Way("pip install .", "pip install -v .", without="toolkits", says=": CPU kernels"),
    Way(
        "pip install --no-build-isolation .", "pip install -v --no-build-isolation .",
        packages=BUILD, without="toolkits", says=": CPU kernels",
    ),
    Way("pip install -e .", "pip install -v -e .", without="toolkits", says=": CPU kernels"),
    Way(
        "uv pip install .", 'uv pip install --python "$(command -v python)" .', packages=("uv",),
        without="toolkits",
    ),
    Way(
        "python -m build, and its wheel", "python -m build && pip install dist/*.whl",
        packages=("build",), without="toolkits",
    ),
    Way(
        "python -m build --sdist, and that",
        "python -m build --sdist && pip install dist/*.tar.gz",
        packages=("build",), without="toolkits",
    ),
    Way("pip install . without torch", "pip install -v .", without="toolkits", torch=False),
    Way(
        "ECA_FUSED_CUDA=1 pip install .", "pip install -v .", ("cpu", "cuda"), variables=CUDA,
        says="CPU and CUDA kernels",
    ),
    Way(
        "ECA_FUSED_CUDA=1 pip install . without a toolkit", "pip install -v .", ("cpu", "cuda"),
        variables=CUDA, without="toolkits", says="CPU and CUDA kernels",
    ),
    Way(
        "ECA_FUSED_NATIVE=0 pip install .", "pip install -v .", (), variables=PURE, compiles=False,
        says=r"no compiled kernels \(ECA_FUSED_NATIVE=0\)",
    ),
    Way(
        "pip install . without a compiler", "pip install -v .", (), without="compilers",
        compiles=False, says=r"no compiled kernels \(there is no C\+\+ compiler\)",
    ),
    Way(
        "ECA_FUSED_NATIVE=1 pip install . without a compiler", "pip install -v .",
        variables={"ECA_FUSED_NATIVE": "1"}, without="compilers", compiles=False, fails=True,
        says=r"error: ECA_FUSED_NATIVE=1, but there is no C\+\+ compiler\. Install one",
    ),
    Way(
        "pip install --no-build-isolation . without torch",
        "pip install -v --no-build-isolation .", packages=BUILD, torch=False, compiles=False,
        fails=True, says="the build needs PyTorch, which does not import",
    ),
    Way(
        "pip install . with a torch without CUDA", "pip install -v .", torch="without CUDA",
        says=r": CPU kernels \(torch \S+ was built without CUDA\)",
    ),
    Way(
        "ECA_FUSED_CUDA=1 pip install . with a torch without CUDA", "pip install -v .",
        variables=CUDA, torch="without CUDA", compiles=False, fails=True,
        says=r"error: ECA_FUSED_CUDA=1, but torch \S+ was built without CUDA\. Install a torch",
    ),
    Way(
        "pip install . with the toolkit of CUDA 12", "pip install -v .", without="toolkits",
        toolkit="12.4", says=r": CPU kernels \(torch \S+ was built with CUDA .*, but found CUDA 12",
    ),
    Way(
        "ECA_FUSED_CUDA=1 pip install . with the toolkit of CUDA 12", "pip install -v .",
        ("cpu", "cuda"), variables=CUDA, without="toolkits", toolkit="12.4",
        says="CPU and CUDA kernels",
    ),
    Way(
        "ECA_FUSED_CUDA=1 pip install --no-build-isolation . with the toolkit of CUDA 12",
        "pip install -v --no-build-isolation .", packages=BUILD, variables=CUDA,
        without="toolkits", toolkit="12.4", compiles=False, fails=True,
        says=r"error: .*, but found CUDA 12\.4 in .*\(or: pip install 'nvidia-cuda-nvcc==",
    ),
    Way(
        "pip install . with Python 3.9", "pip install -v .", torch=False, python="3.9",
        compiles=False, fails=True, says=r"error: expected Python 3\.10 or newer, got 3\.9",
    ),
)  # fmt: skip


def make_toolkit(home: Path, version: str) -> Path:
    """What setup.py takes for a CUDA toolkit of that version."""
    major, minor = map(int, version.split("."))
    for folder in ("include", "bin"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "include" / "cuda_runtime_api.h").write_text(
        f"#define CUDART_VERSION {1000 * major + 10 * minor}\n"
    )
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return home


def find_python(version: str) -> str | None:
    """A Python of that version, on PATH or under pyenv; None without one."""
    places = [shutil.which(f"python{version}")]
    places += map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for place in filter(None, places):
        # pyenv's commands exist for versions that are not in use, and fail.
        if subprocess.run([place, "-c", "import venv"], capture_output=True).returncode == 0:
            return place
    return None


@dataclass(frozen=True)
class Outcome:
    way: Way
    wrong: str  # "" if all is as promised
    seconds: float
    mebibytes: float | None  # of the installed package


def listed_files() -> list[str]:
    """The sources; without git, as in an unpacked archive, all files of this folder."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]


def copy_sources(folder: Path) -> Path:
    """A copy that git knows nothing of, and where nothing was built."""
    for name in listed_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def path_without(names: tuple[str, ...], folder: Path) -> str:
    """A PATH with links to all commands but these."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for command in sorted(Path(place).glob("*")) if Path(place).is_dir() else ():
            base = re.sub(r"-\d+$|^.*-linux-gnu-", "", command.name)
            if base not in names and not (folder / command.name).exists():
                (folder / command.name).symlink_to(command)
    return str(folder)


def run(command: str, cwd: Path, env: dict[str, str], hidden: bool = False) -> tuple[int, str]:
    """Exit status and output. `hidden`: without the CUDA toolkits of this machine."""
    words = ["sh", "-ec", command]
    if hidden:
        empty = f"mount -t tmpfs none $(readlink -f {TOOLKITS})\n"
        words = ["unshare", "--mount", "sh", "-ec", empty + command]
    done = subprocess.run(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages")).resolve()


# What another environment has, but a new one must not see.
OWN = re.compile(
    r"eca_fused|__editable__|pip\b|setuptools|_distutils_hack|.*\.pth$|torch$|__pycache__"
)


def link_torch(other: Path, environment: Path, with_cuda: bool) -> None:
    """Gives an environment another one's torch, and all packages that it may depend on, in links.

    Without CUDA, its version names none.
    """
    source, target = site_packages(other), site_packages(environment)
    for part in source.iterdir():
        if not OWN.match(part.name) and not (target / part.name).exists():
            (target / part.name).symlink_to(part)
    (target / "torch").mkdir()
    for part in (source / "torch").iterdir():
        if part.name not in ("version.py", "__pycache__"):
            (target / "torch" / part.name).symlink_to(part)
    text = (source / "torch" / "version.py").read_text()
    without, number = re.subn(r"(?m)^(cuda\b[^=\n]*)=.*$", r"\1= None", text)
    assert number == 1, "torch/version.py has another form"
    (target / "torch" / "version.py").write_text(text if with_cuda else without)


class Walk:
    """The environments of a walk.

    Args:
        work: where they and the logs are.
        python: of the new environments.
        torch: what pip installs there.
        given: an environment with torch to link to instead.
    """

    def __init__(self, work: Path, python: str, torch: str, given: Path | None) -> None:
        self.work, self.python, self.torch, self.given = work, python, torch, given
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("ECA_FUSED_")
            and name not in ("PYTHONPATH", "CUDA_HOME", "CUDA_PATH", "CXX", "VIRTUAL_ENV")
        }

    def environment(self, torch: bool | str, version: str = "") -> Path:
        """A new environment, made once for all ways that begin so."""
        name = torch if isinstance(torch, str) else "with_torch" if torch else "empty"
        folder = self.work / f"{name}{version}".replace(" ", "_")
        if folder.exists():
            return folder
        python = find_python(version) if version else self.python
        assert python is not None, f"there is no Python {version}"
        subprocess.run([python, "-m", "venv", folder], check=True)
        if torch == "without CUDA":
            link_torch(self.given or self.environment(torch=True), folder, with_cuda=False)
        elif torch and self.given:
            link_torch(self.given, folder, with_cuda=True)
        elif torch:
            subprocess.run([folder / "bin" / "pip", "install", "-q", self.torch], check=True)
        return folder

    def go(self, way: Way) -> Outcome:
        place = Path(tempfile.mkdtemp(dir=self.work))
        made = self.environment(way.torch, way.python)
        sources, elsewhere = copy_sources(place / "sources"), place / "elsewhere"
        elsewhere.mkdir()
        before = set(self.installed(made))
        path = os.environ["PATH"]
        if way.without == "compilers":
            path = path_without(COMPILERS, place / "bin")
        elif way.without == "toolkits":
            path = path_without(("nvcc",), place / "bin")
        env = {**self.variables, "PATH": f"{made / 'bin'}{os.pathsep}{path}", **way.variables}
        if way.toolkit:
            env["CUDA_HOME"] = str(make_toolkit(place / "toolkit", way.toolkit))
        if way.packages:
            run("pip install -q " + " ".join(map(repr, way.packages)), place, env)
        started = time.monotonic()
        hidden = way.without == "toolkits" and Path(TOOLKITS).exists()
        status, output = run(way.command, sources, env, hidden)
        seconds = time.monotonic() - started
        (self.work / f"{re.sub(r'[^a-zA-Z0-9]+', '-', way.name)}.log").write_text(output)
        wrong, size = self.judge(way, status, output, made, elsewhere)
        added = sorted(set(self.installed(made)) - before)
        if added:
            subprocess.run([made / "bin" / "pip", "uninstall", "-q", "-y", *added], check=True)
        shutil.rmtree(place)
        return Outcome(way, wrong, seconds, size)

    def torch_version(self) -> str:
        python = self.environment(torch=True) / "bin" / "python"
        found = [python, "-c", "import torch; print(torch.__version__)"]
        return subprocess.run(found, check=True, capture_output=True, text=True).stdout.strip()

    def installed(self, made: Path) -> Iterator[str]:
        listed = subprocess.run(
            [made / "bin" / "pip", "list", "--format", "json", "--path", site_packages(made)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return (package["name"] for package in json.loads(listed.stdout))

    def judge(
        self, way: Way, status: int, output: str, made: Path, elsewhere: Path
    ) -> tuple[str, float | None]:
        """What is not as promised, and the size of the package in MiB."""
        if way.says and not re.search(way.says, output):
            return f"its output lacks {way.says!r}: {output.strip()[-300:]}", None
        if way.fails:
            return ("" if status else "it does not fail"), None
        if status:
            return f"exit status {status}: {output.strip()[-300:]}", None
        code, report = run(
            f"'{made / 'bin' / 'eca-fused'}' doctor --json 2>doctor.log", elsewhere, self.variables
        )
        found = json.loads(report)
        info = found["compiled"]["info"]
        devices = ("cpu", "cuda")[: 1 + bool(info.get("cuda_architectures"))] if info else ()
        failed = [one for one in found["self_test"] if not one["passed"]]
        if devices != way.devices:
            return f"expected kernels for {way.devices}, got {devices}", None
        if code or failed or not found["self_test"]:
            return f"doctor ends with {code}: {found['problems']}", None
        where = Path(found["software"]["folder"])
        size = sum(
            file.stat().st_size for file in where.rglob("*") if "__pycache__" not in str(file)
        )
        return "", size / 2**20


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def table(outcomes: list[Outcome]) -> str:
    lines = ["| way | result | seconds | MiB installed |", "|---|---|---|---|"]
    for one in outcomes:
        promised = " and ".join(one.way.devices) or "no"
        right = "the error that it must give" if one.way.fails else f"{promised} kernels"
        size = "" if one.mebibytes is None else f"{one.mebibytes:.1f}"
        result = right if not one.wrong else f"WRONG: {one.wrong}"
        lines.append(f"| `{one.way.name}` | {result} | {one.seconds:.0f} | {size} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only ways that compile nothing")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="only these, by their names")
    parser.add_argument("--python", default=sys.executable, help="of the new environments")
    parser.add_argument("--torch", default="torch", help="what pip installs there")
    parser.add_argument("--environment", type=Path, help="one whose torch to use, by links")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    args = parser.parse_args()
    names = [way.name for way in WAYS]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"expected ways of {names}, got {sorted(unknown)}")
    ways = [w for w in WAYS if w.name in (args.only or names) and not (args.quick and w.compiles)]
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(Path(folder), args.python, args.torch, args.environment)
        for way in ways:
            print(f"==> {way.name}", flush=True)
            if way.without == "toolkits" and os.geteuid() != 0 and Path(TOOLKITS).exists():
                print("    skipped: only root can hide the CUDA toolkits of this machine")
                continue
            if way.python and find_python(way.python) is None:
                print(f"    skipped: there is no Python {way.python} on PATH or under pyenv")
                continue
            outcomes.append(walk.go(way))
            print(f"    {outcomes[-1].wrong or 'right'}, {outcomes[-1].seconds:.0f} s", flush=True)
        version = walk.torch_version() if args.write else ""
    print(table(outcomes))
    if args.write:
        TABLE.write_text(
            "# Ways to install\n\n"
            f"Walked by `tools/install_paths.py` on {date.today()} at commit {commit()}: torch "
            f"{version}, Python {platform.python_version()}, Linux, {os.cpu_count()} cores.\n\n"
            "Each began with a fresh copy of the sources, and ended with `eca-fused doctor` in\n"
            "another folder. The CUDA toolkit of the machine was hidden, but for\n"
            "`ECA_FUSED_CUDA=1 pip install .` and where torch is without CUDA. That torch is the "
            "same one\nwith another version file, and the toolkit of CUDA 12 has headers and an "
            "nvcc that does nothing.\nCUDA kernels were compiled for compute capability 9.0 "
            "alone. The size is that of the installed\npackage.\n\n" + table(outcomes)
        )
    return int(any(one.wrong for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
