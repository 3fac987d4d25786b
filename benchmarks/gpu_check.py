#!/usr/bin/env python3
"""Runs the checks and measurements that need a GPU. GPU.md says how to use it.

    python benchmarks/gpu_check.py OUT first        # correctness, and our own times
    python benchmarks/gpu_check.py OUT second       # 6 minutes: counters, forced plans, rivals
    python benchmarks/gpu_check.py OUT memcheck bench           # single parts
    python benchmarks/gpu_check.py OUT first --device dry-run   # a rehearsal without a GPU

OUT gets log.txt with every line of output as it comes, summary.json with a verdict for each part,
and the results of the parts: at most ten files. A part's verdict is "running" until it ends, so a
run that is killed shows how far it came. A part that fails does not stop the next. The exit status
is 0 if no part failed.

The extension comes from build/gpu (tools/gpu_bundle.sh makes it); if none there loads, it is built
here. Settings of the card are read and never changed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
BUNDLE = ROOT / "build" / "gpu"
CUDA = Path("/usr/local/cuda/bin")

# The tests' own marks say which of them run on any device, and which need a GPU.
COMMON = ["-m", "any_device and not needs_gpu"]
COMPILER = "tests/frameworks/test_compile.py"
CUDA_ALONE = "tests/ops/test_cuda.py"
RESNET50 = [
    "--layers", "resnet50", "--layout", "contiguous", "channels_last", "--dtype", "bfloat16",
]  # fmt: skip

Verdict = Callable[[int, list[str]], str]  # of an exit status and the lines of output


@dataclass
class Part:
    """A command, how to judge its end, and the seconds after which it is stopped."""

    limit: float
    command: list[str]
    rehearsal: list[str]  # the command of a dry run
    verdict: Verdict
    env: dict[str, str] = field(default_factory=dict)
    output: str = ""  # a file for the command's own output, beside the log


# ---- verdicts ----


def last_line(status: int, lines: list[str]) -> str:
    text = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"{'ok' if status == 0 else f'FAILED: status {status}'}: {text}"


def of_pytest(status: int, lines: list[str]) -> str:
    pattern = re.compile(r"(\d+ (passed|failed|skipped|error).*) in [\d.]+s")
    counts = next((m[1] for line in reversed(lines) if (m := pattern.search(line))), "no count")
    if status == 5:
        return f"FAILED: no test was selected ({counts})"
    return f"{'ok' if status == 0 else 'FAILED'}: {counts}"


def of_sanitizer(status: int, lines: list[str]) -> str:
    found = [line for line in lines if re.search("(ERROR|RACECHECK) SUMMARY", line)]
    text = found[-1].strip("= ") if found else last_line(status, lines)
    for line in lines:
        if re.search("device not supported|failed to initialize|unable to find inj", line, re.I):
            return f"not available: {line.strip('= ')}"
    if status == 0 and not found:
        return f"FAILED: the sanitizer did not say what it found; {text}"
    return f"{'ok' if status == 0 else f'FAILED: status {status}'}: {text}"


def of_rows(status: int, lines: list[str]) -> str:
    faults = [line for line in lines if "FAILED" in line]
    if status or faults:
        return f"FAILED: status {status}; {len(faults)} faults; {(faults or lines or ['-'])[-1]}"
    return "ok"


# ---- parts ----


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, f"benchmarks/{name}.py", *arguments]


def probe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lib.gpu_probe", *arguments]


def tests(workers: int, *arguments: str) -> list[str]:
    # -v logs each test as it ends.
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        # A worker that breaks its CUDA context dies, and another one replaces it.
        command += ["-n", str(workers), "--max-worker-restart=30"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=100", "--timeout-method=thread"]
    return [*command, *arguments]


def tool(name: str, *elsewhere: Path) -> str:
    """A tool's path. If it is not found, its bare name: the part then fails and says so."""
    places = [CUDA / name, *elsewhere]
    return shutil.which(name) or next((str(p) for p in places if p.is_file()), name)


def sanitizer_options(program: str) -> list[str]:
    """Options that limit a sanitizer to our kernels, by the names that its version knows."""
    if not Path(program).is_file():
        return []
    text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    names = {"--kernel-name": "kernel_substring=eca", "--kernel-regex": "kns=eca"}
    options = next(([name, names[name]] for name in names if name in text), [])
    return options + (["--report-api-errors", "no"] if "--report-api-errors" in text else [])


def sanitizer(which: str) -> Part:
    small = probe("small")
    watch = [tool("compute-sanitizer"), "--tool", which, "--error-exitcode", "9"]
    # PyTorch's own kernels take long and are not checked. The names of ours contain "eca".
    watch += sanitizer_options(watch[0])
    say = "print('========= ERROR SUMMARY: a rehearsal has none')"
    rehearsal = [sys.executable, "-c", say]
    return Part(
        120, watch + small, rehearsal, of_sanitizer, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )


def profile(out: Path) -> dict[str, Part]:
    from lib.gpu_probe import COUNTERS, FEWEST_COUNTERS, OUR_KERNELS

    nsight = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    calls, rows = str(out / "profiled.json"), str(out / "ncu.csv")
    layers = probe("layers", calls)

    def ncu(names: list[str]) -> list[str]:
        # The clocks stay as they are.
        watch = [tool("ncu", *nsight), "--clock-control", "none", "--profile-from-start", "off"]
        watch += ["--kernel-name", OUR_KERNELS, "--metrics", ",".join(names)]
        return [*watch, "--print-units", "base", "--csv", *layers]

    few = [COUNTERS[name] for name in FEWEST_COUNTERS]
    read = probe("read", calls, rows, str(out / "counters.json"))
    again = [*layers, "--device", "cpu"]
    return {
        "counters": Part(110, ncu(list(COUNTERS.values())), again, last_line, output=rows),
        # A version of ncu that does not know one of the counters reads none of them.
        "few counters": Part(60, ncu(few), again, last_line, output=rows),
        "counted": Part(20, read, read, last_line),
    }


def all_parts(out: Path) -> dict[str, Part]:
    on_cuda = {"ECA_FUSED_TEST_DEVICE": "cuda"}
    sample = tests(2, "tests/ops/test_values.py", "-k", "float32 and contiguous and not circular")
    usual_cuda = "not same_bits and not graph and not not_the_current and not 2_to_the_31"
    dry = ["--device", "dry-run"]
    tiny = ["--shape", "2", "16", "6", "6", *dry]

    def bench(name: str, seconds: int, *arguments: str) -> Part:
        path = str(out / f"{name}.json")
        arguments = ("--output", path, "--seconds", str(seconds), *arguments)
        return Part(
            seconds + 45,
            script("layers", *arguments, "--device", "cuda"),
            script("layers", "--output", path, *tiny, "--rounds", "2", "--contender", "native"),
            of_rows,
        )

    def on_gpu(limit: float, workers: int, *arguments: str) -> Part:
        return Part(limit, tests(workers, *arguments), sample, of_pytest, on_cuda)

    return {
        "facts": Part(
            60, probe("facts"), probe("facts", "--device", "cpu"),
            lambda status, lines: "ok" if status == 0 else last_line(status, lines),
        ),
        "small": Part(
            60, probe("small"), probe("small", "--device", "cpu"),
            last_line,
        ),
        "small triton": Part(
            90, probe("small", "--backend", "triton"),
            probe("small", "--device", "cpu"), last_line,
        ),
        **{name: sanitizer(name) for name in ("memcheck", "racecheck", "initcheck", "synccheck")},
        "plans": on_gpu(110, 3, "-k", usual_cuda, CUDA_ALONE),
        "graphs": on_gpu(
            110, 3, "-m", "needs_gpu",
            "-k", "same_bits or graph or (test_streams and not not_the_current)",
        ),
        "common": on_gpu(130, 6, *COMMON, "-k", "not triton", f"--ignore={COMPILER}"),
        "common triton": on_gpu(150, 8, *COMMON, "-k", "triton", f"--ignore={COMPILER}"),
        "compile": on_gpu(150, 8, COMPILER),
        "large": on_gpu(100, 1, "-k", "2_to_the_31", CUDA_ALONE),
        "devices": on_gpu(60, 1, "-m", "needs_gpu", "-k", "not_the_current"),
        "bench": bench(
            "bench", 75, *RESNET50, "--batch", "256", "32", "1", "--contender", "native"
        ),
        "tails": Part(
            150,
            script("tails", "--device", "cuda", "--batch", "256", "--contender", "native", "eager",
                   "no attention", "--output", str(out / "tails.json")),
            script("tails", *dry, "--batch", "1", "--tail", "norm", "--layout", "contiguous",
                   "--rounds", "2", "--contender", "native", "--output", str(out / "tails.json")),
            of_rows,
        ),
        "compiled tails": Part(
            200,
            script("tails", "--device", "cuda", "--batch", "256", "--layout", "channels_last",
                   "--output", str(out / "compiled_tails.json")),
            script("tails", *dry, "--batch", "1", "--tail", "block", "--layout", "contiguous",
                   "--direction", "forward", "--rounds", "2", "--output",
                   str(out / "compiled_tails.json")),
            of_rows,
        ),
        # The layers of gpu_cases() while time is left; the first few are also compiled.
        "rivals": bench("rivals", 110, "--compile-seconds", "60"),
        **profile(out),
        "tune": Part(
            115,
            script("tune", "--seconds", "90", "--layers", "3", "--output", str(out / "tune.json")),
            script(
                "tune", "--output", str(out / "tune.json"), "--rounds", "2", "--taps", "5", *tiny
            ),
            of_rows,
        ),
        "networks": Part(
            300,
            script("networks", "--device", "cuda", "--network", "resnet50", "--precision",
                   "bfloat16", "--mode", "eager", "compiled", "--output",
                   str(out / "networks.json")),
            script("networks", *dry, "--network", "mobilenetv2", "--pass", "inference", "--batch",
                   "2", "--size", "32", "--output", str(out / "networks.json")),
            of_rows,
        ),
        "calls": Part(
            150,
            script("calls", "--device", "cuda", "--output", str(out / "calls.json")),
            script("calls", *dry, "--output", str(out / "calls.json")),
            of_rows,
        ),
    }  # fmt: skip


# Parts in one list run side by side: they wait for the host more than for the GPU. A part that
# measures times runs alone.
SEQUENCES: dict[str, list[list[str]]] = {
    "first": [
        ["facts"],
        ["small"],
        ["memcheck", "racecheck", "plans", "graphs", "common", "small triton"],
        ["bench"], ["tails"],
    ],
    "second": [
        ["counters"], ["few counters"], ["counted"], ["tune"], ["rivals"],
        ["common triton", "initcheck", "synccheck"], ["large"],
    ],
    "third": [["networks"], ["compiled tails"], ["calls"]],
}  # fmt: skip


# ---- running them ----


class Run:
    """A run of parts: its log and the verdicts, both on disk at any time."""

    def __init__(self, out: Path, dry: bool, seconds: float) -> None:
        self.out, self.dry = out, dry
        self.end = time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.log: TextIO = (out / "log.txt").open("a", buffering=1)
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self.verdicts: dict[str, dict[str, object]] = {}

    def say(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)
            self.log.write(text + "\n")

    def judge(self, name: str, verdict: str, seconds: float) -> None:
        with self.lock:
            self.verdicts[name] = {"seconds": round(seconds, 1), "verdict": verdict[:600]}
            partial = self.out / "summary.partial"
            partial.write_text(json.dumps(self.verdicts, indent=1) + "\n")
            partial.replace(self.out / "summary.json")

    def run(self, name: str, part: Part) -> None:
        command = part.rehearsal if self.dry else part.command
        began = time.monotonic()
        limit = min(part.limit, self.end - began)
        if limit < 5:
            self.judge(name, "not available: no time left", 0)
            return
        self.judge(name, "running", 0)
        self.say(f"#### {name}: {' '.join(command)} (at most {limit:.0f} s)")
        env = {**os.environ, "PYTHONPATH": PATHS, "PYTHONUNBUFFERED": "1"}
        if not self.dry:
            env |= part.env
        try:
            status, lines = self.watch(name, command, env, limit, part.output)
        except OSError as error:
            self.judge(name, f"not available: {error}", 0)
            self.say(f"{name}: not available: {error}")
            return
        verdict = part.verdict(status, lines)
        if status == -signal.SIGKILL:
            verdict = f"FAILED: not done in {limit:.0f} s; {(lines or ['no output'])[-1]}"
        self.judge(name, verdict, time.monotonic() - began)
        self.say(f"#### {name}: {verdict[:300]} ({time.monotonic() - began:.0f} s)")

    def watch(
        self, name: str, command: list[str], env: dict[str, str], limit: float, output: str
    ) -> tuple[int, list[str]]:
        """The exit status of a command and the lines that it printed, all of them in the log."""
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        # Kill the whole group: the children of a sanitizer or of pytest would go on.
        stop = threading.Timer(limit, lambda: os.killpg(child.pid, signal.SIGKILL))
        stop.start()
        lines: list[str] = []
        assert child.stdout
        with open(output or os.devnull, "w", buffering=1) as copy:  # a kill loses no line
            for line in child.stdout:
                text = line.rstrip("\n")
                lines.append(text)
                copy.write(line)
                with self.lock:
                    self.log.write(f"{name}| {text[:400]}\n")
        status = child.wait()
        stop.cancel()
        return status, lines


def loads(python_path: Path = ROOT) -> bool:
    """Whether the extension with CUDA kernels loads."""
    ask = "import sys, eca_fused.ops.native as n; sys.exit('cuda' not in n.devices)"
    env = {**os.environ, "PYTHONPATH": str(python_path)}
    return subprocess.run([sys.executable, "-c", ask], cwd=ROOT, env=env).returncode == 0


def provide_extension(run: Run) -> None:
    """Put the carried extension in its place, or build it here."""
    if (BUNDLE / "commit").is_file():  # the copy of the sources has no history
        os.environ.setdefault("ECA_FUSED_COMMIT", (BUNDLE / "commit").read_text().strip())
    for built in sorted(BUNDLE.glob("*.so")):
        # A new file: this process may have loaded the old one, and would crash with its bytes.
        fresh = shutil.copy2(built, ROOT / "eca_fused" / f"{built.name}.new")
        os.replace(fresh, ROOT / "eca_fused" / built.name)
    if loads():
        run.judge("extension", "ok: carried along", 0)
        return
    part = Part(200, [sys.executable, "setup.py", "build_ext", "--inplace"], [], last_line)
    part.rehearsal = part.command
    os.environ["ECA_FUSED_CUDA"] = "1"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    run.run("extension", part)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"sequences: {', '.join(SEQUENCES)}; or names of parts",
    )
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("what", nargs="+", help="a sequence of parts, or parts in their order")
    parser.add_argument("--device", choices=["cuda", "dry-run"], default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=560, help="stop all parts after this time (default 560)"
    )
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    out = args.out.resolve()
    parts = all_parts(out)
    stages: list[list[str]] = []
    for name in args.what:
        stages += SEQUENCES.get(name, [[name]])
    unknown = [name for stage in stages for name in stage if name not in parts]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join((*SEQUENCES, *parts))}")
    run = Run(out, args.device == "dry-run", args.seconds)
    provide_extension(run)
    for stage in stages:
        if stage == ["few counters"] and not needs_few_counters(run):
            continue
        together = [threading.Thread(target=run.run, args=(n, parts[n])) for n in stage]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
    return show(run)


def needs_few_counters(run: Run) -> bool:
    """Whether the long list of counters gave nothing."""
    from lib.gpu_probe import kernels

    rows = run.out / "ncu.csv"
    return not (rows.is_file() and kernels(rows.read_text(errors="replace").splitlines()))


def show(run: Run) -> int:
    """Print the failed tests, and last the verdicts, which are read first. The exit status."""
    text = (run.out / "log.txt").read_text(errors="replace")
    faults = re.findall(r"(?:FAILED|ERROR) (tests/.*)|(WRONG .*)", text)
    for fault in list(dict.fromkeys(a.split(" - ")[0] or b for a, b in faults))[:40]:
        print(f"FAILED {fault[:200]}")
    for name, found in run.verdicts.items():
        print(f"{name:14} {found['seconds']:6} s  {str(found['verdict'])[:200]}")
    print(f"{time.monotonic() - run.began:.0f} s in all; {run.out}")
    return int(any(str(v["verdict"]).startswith("FAILED") for v in run.verdicts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
