"""Fresh Python processes, and where the repository's files are."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def path_with(folder: Path) -> str:
    """PYTHONPATH with a folder before what it has."""
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def python(
    code: str, *arguments: object, without: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, with this process's environment and these changes.

    Args:
        code: the code.
        arguments: its sys.argv[1:].
        without: variables that the process does not have.
        env: variables that it has.
    """
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=kept | env,
        capture_output=True,
        text=True,
    )


def two_processes(
    script: Path, *arguments: object, **env: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script in two fresh processes at a time, on one thread each.

    Args:
        script: its path. Its sys.argv[1] is 0 or 1, and sys.argv[2:] the arguments.
        arguments: see script.
        env: variables that the processes have beside those of this one.
    """
    paths = path_with(ROOT / "tests") + os.pathsep + str(ROOT)
    env = (
        os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    )

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(rank), *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(run, (0, 1)))


def run_tests(*arguments: str, **env: str) -> str:
    """Run tests in a fresh process; what pytest printed.

    Args:
        arguments: pytest's; paths are relative to the repository.
        env: variables that the process has beside those of this one.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path_with(ROOT / "tests")} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or " collected" in done.stdout
    return done.stdout
