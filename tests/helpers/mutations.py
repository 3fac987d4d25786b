"""Deliberate faults in the CUDA kernels, each of which the tests must find.

    PYTHONPATH=tests python -m helpers.mutations [NAME...]    # all, or those with NAME in theirs

Each fault is written into a copy of the sources. The copy is built for the host and put through a
quick version of gpu_host/test_cuda_kernels.py, or of those for tails, gating and coefficients. This
is not part of the test suite, as every fault needs a build: ten minutes in all on two cores.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers import block_tails, coefficient_passes, gating_passes, tail_passes
from helpers.cases import LAYOUTS, MODES, assert_as_accurate, make_case
from helpers.gpu_host import H200, SANITIZED, Fault, Forced, HostGpu, Refused, check_apart
from helpers.gpu_host_block_tails import BlockTailGpu
from helpers.gpu_host_coefficients import CoefficientGpu
from helpers.gpu_host_gating import GatingGpu
from helpers.gpu_host_tails import TailGpu
from helpers.processes import ROOT


@dataclass
class Mutation:
    name: str
    file: str  # in csrc
    old: str  # occurs once
    new: str
    family: str | None = None  # of FAMILIES, where the file's name does not say it


MUTATIONS = [
    Mutation(
        "halo one channel too short",
        "cuda/registers.h",
        "const int c = begin - halo + h;",
        "const int c = begin - halo + h + (h < halo);",
    ),
    Mutation(
        "wrap-around one channel off",
        "cuda/registers.h",
        "return c < 0 ? c + channels : c - channels;\n  }\n\n  // So many that",
        "return c < 0 ? c + channels - 1 : c - channels;\n  }\n\n  // So many that",
    ),
    Mutation(
        "no barrier between a block's partial sums",
        "cuda/columns.h",
        "  column.put_parts(sums, tiling.held, parts);\n  block_barrier();\n"
        "  for (int h = thread_index(); h < tile.held; h += thread_count()) {\n    const int",
        "  column.put_parts(sums, tiling.held, parts);\n"
        "  for (int h = thread_index(); h < tile.held; h += thread_count()) {\n    const int",
    ),
    Mutation(
        "a copy to shared memory that nobody waits for",
        "cuda/columns.h",
        "    taps.put();\n    finish_fetches();\n    block_barrier();",
        "    taps.put();\n    block_barrier();",
    ),
    Mutation(
        "the last vector of a tile stored whole",
        "cuda/stream_runs.h",
        "return count % kVector<T> == 0 && place_in_line",
        "return place_in_line",
    ),
    Mutation(
        "elements behind a tile read",
        "cuda/runs.h",
        "    if (e < count) v.element[e]",
        "    v.element[e]",
    ),
    Mutation(
        "a batch that forgets its last vectors",
        "cuda/step.h",
        "if (i + u * step < end) use(i + u * step, some[u]);",
        "if (i + (u + 1) * step < end) use(i + u * step, some[u]);",
    ),
    Mutation(
        "a barrier that only some threads reach",
        "cuda/columns.h",
        "    small.put(c, means.get(h), gate);\n  }\n  block_barrier();",
        "    small.put(c, means.get(h), gate);\n  }\n  if (column.channel >= 0) block_barrier();",
    ),
    Mutation(
        "the tail of a plane left out",
        "cuda/step.h",
        "thread, count - vectors * V, threads",
        "thread, count - vectors * V - 1, threads",
    ),
    Mutation(
        "the head of a plane taken for its tail",
        "cuda/step.h",
        "return e < head ? e : e + vectors * V;",
        "return e <= head ? e : e + vectors * V;",
    ),
    Mutation(
        "a vector of two lines taken from the wrong place",
        "cuda/lines.h",
        "words[i] = skip & 4 ? words[i + 1] : words[i];",
        "words[i] = words[i];",
    ),
    Mutation(
        "a run that a slice begins read as if it began with a line",
        "cuda/runs.h",
        "to[i] = load_anywhere<V>(",
        "to[i] = cuda::load<V>(",
    ),
    Mutation(
        "strides of samples and rows swapped",
        "cuda/two_pass.h",
        "sample * map.sample_stride + channel * map.row_stride + begin,",
        "sample * map.row_stride + channel * map.sample_stride + begin,",
    ),
    Mutation(
        "gates made by a block that is not the sample's last",
        "cuda/stream.h",
        "const bool last = fetch_add(arrived_, 1) == uint32_t(parts_ - 1);",
        "const bool last = fetch_add(arrived_, 1) == uint32_t(parts_ > 1 ? parts_ - 2 : 0);",
    ),
    Mutation(
        "taps not mirrored in the gradient",
        "cuda/two_pass.h",
        "return channel_at(c - j + taps.size() / 2, problem.channels, problem.circular);",
        "return channel_at(c + j - taps.size() / 2, problem.channels, problem.circular);",
    ),
    Mutation(
        "a pixel row of a part left out",
        "cuda/two_pass.h",
        "int rows() const { return int(end - begin); }",
        "int rows() const { return int(end - begin) - 1; }",
    ),
    Mutation(
        "one part's sum lost",
        "cuda/two_pass.h",
        "for (int part = lane; part < parts; part += lanes)",
        "for (int part = lane; part < max(1, parts - 1); part += lanes)",
    ),
    Mutation(
        "one part lost of sums without gates",
        "cuda/two_pass.h",
        "for (int part = thread_index() % 32; part < parts; part += 32)",
        "for (int part = thread_index() % 32; part < max(1, parts - 1); part += 32)",
    ),
    Mutation(
        "a tap one channel off in registers",
        "cuda/registers.h",
        "return values.from(place(held) - radius);",
        "return values.from(place(held) - radius + 1);",
    ),
    Mutation(
        "channels that wrap around left out in registers",
        "cuda/registers.h",
        "if (held < pad) values.set(pad + channels + held, value);",
        "if (held < pad) values.set(pad + channels + held, A(0));",
    ),
    Mutation(
        "no barrier between the means and the gates of rows",
        "cuda/rows.h",
        "  block_barrier();\n  const bool own = tile.is_own(row.held);\n",
        "  const bool own = tile.is_own(row.held);\n",
    ),
    Mutation(
        "the last term of a plane left out",
        "cuda/runs.h",
        "min(in_plane - skip, share) : 0;",
        "min(in_plane - skip, share) - 1 : 0;",
    ),
    Mutation(
        "a vector of two planes rescaled by one gate",
        "cuda/runs.h",
        "place.left ? here : next;",
        "place.left ? here : here;",
    ),
    Mutation(
        "a row of pixels left out of a column's sum",
        "cuda/columns.h",
        "for (int r = 0; r < rows; ++r) sum +=",
        "for (int r = 1; r < rows; ++r) sum +=",
    ),
    Mutation(
        "no wait for the gates of a sample",
        "cuda/stream.h",
        "    while (load_acquire(ready_) < kReady) pause();\n",
        "",
    ),
    Mutation(
        "a sample's counter not reset",
        "cuda/stream.h",
        "kReady + uint32_t(parts_ - 1)) fetch_add_alone(ready_, ~passed_before);",
        "kReady + uint32_t(parts_ - 1)) fetch_add_alone(ready_, -passed_before);",
    ),
    Mutation(
        "a part of a plane taken for another",
        "cuda/stream_planes.h",
        "part(here.part - channel * tiling.parts)",
        "part(0)",
    ),
    Mutation(
        "what a thread has in shared memory is not rescaled",
        "cuda/kept.h",
        "  spare.for_each([&](int i, const Vector<T, V>& some) { result.put(i, some, gate); });\n",
        "",
    ),
    Mutation(
        "what a thread has in shared memory is read before it is there",
        "cuda/kept.h",
        "  finish_fetches();\n  spare.add_to(sums);\n",
        "  spare.add_to(sums);\n  finish_fetches();\n",
    ),
    Mutation(
        "a tile's last channels left out of its part of dweight",
        "cuda/dweight.h",
        "for (int c = lane % kChannels; c < own; c",
        "for (int c = lane % kChannels; c < own - 1; c",
    ),
    Mutation(
        "the last parts of dweight left out",
        "cuda/dweight.h",
        "some[u] = i < work.parts ?",
        "some[u] = i < work.parts - 1 ?",
    ),
    Mutation(
        "a sum taken for a mean",
        "cuda/launch.h",
        "r.dy.data ? int64_t(1) : problem.pixels",
        "int64_t(1)",
    ),
    Mutation(
        "shared memory one number short",
        "plan.cpp",
        "place(&shared.gate, strategy == 'R' ? 0 : tiling.held + 1);",
        "place(&shared.gate, strategy == 'R' ? 0 : tiling.held - 3);",
    ),
    Mutation(
        "a tail's next plane with the coefficients of this one",
        "cuda/tail_apply.h",
        "terms = pass.template terms<1>(at.plane(shape) + 1, channel);",
        "terms = pass.template terms<1>(at.plane(shape), channel);",
    ),
    Mutation(
        "bytes of a tail's mask made before all bits are there",
        "cuda/tail_apply.h",
        "    block_barrier();\n    mask.write(pass.mask + int64_t(tile.row)",
        "    mask.write(pass.mask + int64_t(tile.row)",
    ),
    Mutation(
        "bits of the next plane taken from this one",
        "cuda/tail_element.h",
        "if (!kAcross || left >= V) return bits;",
        "return bits;",
    ),
    Mutation(
        "parts of moments merged without the distance of their means",
        "cuda/tail_sums.h",
        "squares += value_at(from.to[1] + i) + between * between * count * more / all;",
        "squares += value_at(from.to[1] + i);",
    ),
    Mutation(
        "the slope of hard swish off beyond its bend",
        "cuda/gated_element.h",
        "upper = v < A(3) ? between",
        "upper = v < A(2) ? between",
    ),
    Mutation(
        "an offset left out of a gated gradient",
        "cuda/gated_element.h",
        "+ k.offset.element[w];",
        ";",
    ),
    Mutation(
        "z of elements that are not there summed",
        "cuda/gated_element.h",
        "kZerosAddNothing = false;  // act(q)",
        "kZerosAddNothing = true;  // act(q)",
    ),
    Mutation(
        "dy of a small plane read from the place of x",
        "cuda/tail_small.h",
        "dy(fetch_run<T>(maps.dy, first, count, at.dy)),",
        "dy(fetch_run<T>(maps.dy, first, count, 0)),",
    ),
    Mutation(
        "bits of half a byte not taken from the other thread",
        "cuda/block_tail.h",
        "bits |= shuffle_xor(has(i) ? bits : 0u, 1) << 4;",
        "bits |= bits << 4;",
    ),
    Mutation(
        "a mask of runs written before all bits are there",
        "cuda/block_tail.h",
        "    block_barrier();\n    bits.write(",
        "    bits.write(",
    ),
    Mutation(
        "sums of a tail's gradient about the next plane's centre",
        "cuda/block_tail_gradients.h",
        "at.channel += 1 + tile.halo - tile.begin;",
        "at.channel += 2 + tile.halo - tile.begin;",
    ),
    Mutation(
        "two sums of columns in one place at the same time",
        "cuda/block_tail_gradients.h",
        "    block_barrier();\n    column.put_parts(sums.by_x",
        "    column.put_parts(sums.by_x",
    ),
    Mutation(
        "two sums of a kept part in one place at the same time",
        "cuda/kept.h",
        "block_barrier();  // all have read the first sums",
        "",
        "block_tail",
    ),
    Mutation(
        "the second sums of a sample read from the place of the first",
        "cuda/stream.h",
        "problem, tiling, second_sums<T, kLayout>(problem, tiling, work), tile.sample, scratch);",
        "problem, tiling, work, tile.sample, scratch);",
        "block_tail",
    ),
    Mutation(
        "half a byte of a column's mask for the other half",
        "cuda/block_tail_gradients.h",
        "bytes[u] >> channel % 8);",
        "bytes[u]);",
    ),
    Mutation(
        "dy in shared memory not masked for its second use",
        "cuda/block_tail_gradients.h",
        "dy.set(first + u, g[u].vector());",
        "if (kAtOnce > 2) dy.set(first + u, g[u].vector());",
    ),
    Mutation(
        "two sums of teams in one place at the same time",
        "cuda/block_tail_gradients.h",
        "if (row.lanes > 32) block_barrier();",
        "",
    ),
    Mutation(
        "sums over samples read before all warps have theirs",
        "cuda/coefficients.cu",
        "  parts.set(thread_index(), sum);\n  block_barrier();",
        "  parts.set(thread_index(), sum);",
    ),
    Mutation(
        "a warp's samples left out of a sum",
        "cuda/coefficients.cu",
        "for (int w = 0; w < kWarps; ++w) sum += parts",
        "for (int w = 0; w < kWarps - 1; ++w) sum += parts",
    ),
    Mutation(
        "planes merged without the distance of their means",
        "cuda/coefficients.cu",
        "return plane(N + n) + between * between * double(t.pixels);",
        "return plane(N + n);",
    ),
    Mutation(
        "a running variance that is biased",
        "cuda/coefficients.cu",
        "updated(r.variance, variance * unbiased)",
        "updated(r.variance, variance)",
    ),
    Mutation(
        "the identity's beta left out of a tail",
        "cuda/coefficients.cu",
        "factor * own.beta + other.beta);",
        "factor * own.beta);",
    ),
    Mutation(
        "the gradient of a gate without its slope",
        "cuda/coefficients.cu",
        "dfactor * scale * gate * (1 - gate));",
        "dfactor * scale * gate);",
    ),
    Mutation(
        "taps not mirrored in a tail's gradient",
        "cuda/coefficients.cu",
        "channel_at(c - j + k / 2, C, p.circular)",
        "channel_at(c + j - k / 2, C, p.circular)",
    ),
    Mutation(
        "the last sample left out of a tail's dweight",
        "cuda/coefficients.cu",
        "n < p.samples; n += 32)",
        "n < p.samples - 1; n += 32)",
    ),
    Mutation(
        "a norm's gradient by the sums of one process",
        "cuda/coefficients.cu",
        "shared ? value_at(shares + c) : all * each",
        "all * each",
    ),
]


SLICED = (2, 43, 49)


def quick_cases() -> Iterator[tuple[tuple[int, ...], int, torch.dtype, str, str, bool]]:
    for layout in LAYOUTS:
        for mode in MODES:
            shapes = [((2, 40, 49), 5), ((2, 64, 16), 7), ((3, 33, 24), 3), ((1, 6, 5000), 3)]
            shapes += [((1, 64, 400), 3), ((2, 5, 14336), 3), (SLICED, 3)]
            for shape, k in shapes:
                for own_taps in (False, True):
                    yield shape, k, torch.float32, layout, mode, own_taps


def check(gpu: HostGpu) -> None:
    """Raises at the first difference or fault."""
    tiny = H200 | {"multiprocessors": 2, "l2": 4 << 10}
    ways = [
        (None, H200), (Forced("two_pass"), tiny), (Forced("two_pass"), H200),
        *((Forced("rows", depth=depth), H200) for depth in (7, 13)),
        *((Forced("columns", depth=depth), H200) for depth in (4, 7)),
        *((Forced("kept", depth=depth), H200) for depth in (6, 0)),
        (Forced("runs", threads=128, depth=8), H200),
        (Forced("columns", tile=16, threads=128, depth=4), H200),
        (Forced("runs", tile=8, threads=128, depth=2), H200),
        (Forced("stream"), tiny),
    ]  # fmt: skip
    for number, (shape, k, dtype, layout, mode, own_taps) in enumerate(quick_cases()):
        case = make_case(shape, k, dtype, layout, mode, own_taps)
        if shape == SLICED:  # whose samples begin and end within lines of 16 bytes
            memory = torch.empty(case.x.numel() + 1)
            case.x = memory[1:].as_strided(case.x.shape, case.x.stride()).copy_(case.x)
        for forced, of in ways:
            how = {"circular": mode == "circular", "channels_last": layout != "contiguous"}
            how |= {"gpu": of, "forced": forced, "seed": number}
            try:
                y, mean, gate = gpu.forward(case.x, case.weight, **how).tensors
                grads = gpu.backward(case.dy, case.x, case.weight, mean, gate, **how).tensors
            except Refused:
                continue
            assert_as_accurate((y, *grads), case)
        if not own_taps and mode == "zeros":
            for of in (tiny, H200):
                check_apart(gpu, case.x, case.dy, layout, of)


# The kernels in csrc/cuda/FAMILY*, how they run on the host, and what finds their faults.
FAMILIES: dict[str, tuple[type[HostGpu], Callable[[Any], None]]] = {
    "block_tail": (BlockTailGpu, block_tails.check),
    "tail_": (TailGpu, tail_passes.check),
    "gated_": (GatingGpu, gating_passes.check),
    "coefficients": (CoefficientGpu, coefficient_passes.check),
    "": (HostGpu, check),
}


def family_of(mutation: Mutation) -> str:
    if mutation.family is not None:
        return mutation.family
    return next(name for name in FAMILIES if mutation.file.startswith(f"cuda/{name}") or not name)


def verdict(mutation: Mutation | None, folder: Path, family: str = "") -> str:
    """What found the mutation in the kernels of a family, "" if nothing did."""
    sources = folder / "sources"
    for part in ("csrc", "tests/gpu_host/simt"):
        shutil.copytree(ROOT / part, sources / part)
    if mutation:
        target = sources / "csrc" / mutation.file
        text = target.read_text()
        if text.count(mutation.old) != 1:
            return f"OUT OF DATE: the code to change occurs {text.count(mutation.old)} times"
        target.write_text(text.replace(mutation.old, mutation.new))
    kind, checked = FAMILIES[family]
    gpu = kind(folder / "build", SANITIZED, sources, dtypes=("float32",))
    try:
        checked(gpu)
    except Fault as fault:
        return str(fault).split("\n")[0][:150]
    except AssertionError as error:
        return f"wrong result: {str(error).splitlines()[0][:100]}"
    finally:
        gpu.close()
    return ""


def main(names: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not names or any(n in m.name for n in names)]
    escaped = []
    with tempfile.TemporaryDirectory() as folder:
        for family in {family_of(mutation) for mutation in chosen}:
            found = verdict(None, Path(folder) / f"none-{family}", family)
            print(f"{'no fault':45s} {found or 'passes'}", flush=True)
            if found:
                return 1
        for i, mutation in enumerate(chosen):
            found = verdict(mutation, Path(folder) / str(i), family_of(mutation))
            print(f"{mutation.name:45s} {found or 'NOT FOUND'}", flush=True)
            if not found or found.startswith("OUT OF DATE"):
                escaped.append(mutation.name)
    print(f"{len(chosen) - len(escaped)} of {len(chosen)} faults found")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
