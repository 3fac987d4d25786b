"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on exact-size buffers."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.processes import ROOT

COMPILER = os.environ.get("CXX", "g++")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler: {COMPILER}")
def test_exact_buffers(tmp_path):
    flags = [
        "-std=c++17",
        "-O0",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    flags += ["-Wno-psabi", "-Wno-ignored-attributes"]
    kernels = sorted((ROOT / "csrc/cpu").glob("isa_*.cpp"))
    sources = [ROOT / "tests/ops/exact_buffers.cpp", *kernels]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]

    def compile_one(source, target):
        subprocess.run([COMPILER, *flags, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    program = tmp_path / "exact_buffers"
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 failures" in done.stdout
