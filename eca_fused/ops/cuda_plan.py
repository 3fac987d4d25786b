"""plan(): how the CUDA kernels would run a call, and the bytes they would move. Needs no GPU."""

import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from eca_fused.ops import native
from eca_fused.ops.checks import (
    DTYPES,
    MAX_SPATIAL_DIMS,
    check_kernel_size,
    check_wraps_once,
    is_circular,
)
from eca_fused.ops.taps import adaptive_kernel_size

if TYPE_CHECKING:
    from eca_fused._C import Gpu

__all__ = ["Plan", "gpu_limits", "plan", "planner"]

# Keeps the planner's 64-bit counts from overflowing. No GPU holds this much.
MOST_BYTES = 2**42


@dataclass(frozen=True)
class Plan:
    """How the CUDA kernels run one call on one GPU; made by plan().

    Strategies differ in what a block keeps on chip between summing and rescaling. In registers:

    - "rows": whole planes (contiguous) of a tile of channels and its halo; one team of threads
      per plane.
    - "runs": the planes of a tile and its halo (contiguous) as one run of elements; the planes
      need not begin at multiples of 16 bytes.
    - "columns": columns (channels_last), each 16 bytes of channels at every pixel; one more column
      on each side is the halo.
    - "kept": a part of a sample's pixels (channels_last), partly in shared memory; the blocks of a
      sample add up their sums.

    Nothing:

    - "stream": some blocks sum and others rescale out of L2, in one launch.
    - "two_pass": two passes over a few samples at a time; the second reads from the L2 cache if
      the samples fit into half of it. For float64, and for whatever the others cannot do.

    Attributes:
        strategy: One of these.
        vectors: Whether all accesses move 16 bytes.
        tile: Channels that a block stores; all of them for "two_pass", and for "stream" if its
            blocks have parts of planes.
        halo: Channels held on each side of a tile for the taps that reach there; 0 if a tile has
            all channels.
        tiles: Tiles in a sample.
        chunk: Samples in a pair of passes of "two_pass", or that "stream" sums before it rescales
            them; else the batch.
        parts: Parts of a plane (contiguous) or of a sample's pixels (channels_last) that different
            warps or blocks sum, for "two_pass", "kept" and "stream"; 1 for the others.
        threads: Threads in a block.
        depth: 16-byte vectors in a thread's registers; 0 if the strategy keeps none there.
        spare: More such vectors, in shared memory, for "kept"; 0 for the others.
        blocks: Blocks in a launch.
        launches: Kernel launches in the call. Backward, the last makes dweight; for "two_pass" with
            one set of taps, the last two.
        shared_bytes: Shared memory of a block, in bytes.
        occupancy: Blocks that fit on a multiprocessor at a time.
        workspace_bytes: Bytes of temporary GPU memory.
        map_bytes: Bytes of the feature maps, each counted once: x and y, or dy, x and dx.
        dram_bytes: Modelled: bytes read from and written to DRAM.
        l2_bytes: Modelled: bytes requested from the L2 cache, with halos and second passes.
        instructions: Modelled: instructions that warps issue, without the small kernels that make
            gates and dweight. Within 25 % of what the machine code for sm_90 executes;
            "two_pass" is assumed to need as many as "stream" does of whole vectors; where planes do
            not begin at multiples of 16 bytes it needs several times as many.
    """

    strategy: str
    vectors: bool
    tile: int
    halo: int
    tiles: int
    chunk: int
    parts: int
    threads: int
    depth: int
    spare: int
    blocks: int
    launches: int
    shared_bytes: int
    occupancy: int
    workspace_bytes: int
    map_bytes: int
    dram_bytes: int
    l2_bytes: int
    instructions: int

    @property
    def dram_ratio(self) -> float:
        """Modelled DRAM bytes over map_bytes: 1 is the least; NaN for empty maps."""
        return self.dram_bytes / self.map_bytes if self.map_bytes else math.nan

    @property
    def l2_ratio(self) -> float:
        """Modelled L2 bytes over map_bytes: 1 is the least; NaN for empty maps."""
        return self.l2_bytes / self.map_bytes if self.map_bytes else math.nan

    def seconds(self, bandwidth: float, issue_rate: float = math.inf) -> float:
        """Modelled time in seconds: dram_bytes / bandwidth, or instructions / issue_rate if larger.

        This is a lower bound, not a measurement. Launches, barriers and idle multiprocessors add
        to it. Only maps that are already in the L2 cache can be faster.

        Args:
            bandwidth: of DRAM, in bytes per second.
            issue_rate: of the GPU, in warp instructions per second: multiprocessors x 4 x clock, of
                which code that waits for memory issues about 60 %.

        Raises:
            ValueError: bandwidth is not a finite number above 0, or issue_rate not above 0.
        """
        if not (math.isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(
                f"expected bandwidth in bytes per second, finite and above 0, got {bandwidth}; "
                "4.8e12 is 4.8 TB/s"
            )
        if not issue_rate > 0:
            raise ValueError(
                f"expected issue_rate in instructions per second, above 0, got {issue_rate}; "
                "132 multiprocessors x 4 x 1.98e9 are 1.05e12"
            )
        return max(self.dram_bytes / bandwidth, self.instructions / issue_rate)


def plan(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    device: str | torch.device = "sm_90",
    backward: bool = False,
    kernel_size: int | None = None,
    own_taps: bool = False,
    padding_mode: str = "zeros",
) -> Plan:
    """How the CUDA kernels would run eca() on a GPU, and the bytes they would move.

    The plan is for maps as PyTorch allocates them: dense, with the result in a new tensor. A slice,
    or a result written over x, may get another plan. Nothing is run, and no GPU is needed.

    >>> import torch, eca_fused
    >>> found = eca_fused.plan((32, 256, 56, 56), torch.bfloat16, backward=True, device="sm_90:132")
    >>> found.launches, round(found.dram_ratio, 2)
    (2, 1.0)

    Args:
        shape: of x, (N, C, *spatial) with 0 to 3 spatial dimensions.
        dtype: of x and of the taps: float32, float64, float16 or bfloat16.
        memory_format: torch.contiguous_format, or torch.channels_last (channels_last_3d) for
            channels innermost, with any number of spatial dimensions.
        device: a GPU by compute capability and number of multiprocessors as "sm_90:132", or
            "sm_90" for the usual number; or a CUDA device of this machine, as "cuda", "cuda:1" or
            a torch.device.
        backward: plan the backward pass instead of the forward pass.
        kernel_size: k, odd, from 1 up; None is ECALayer's rule for C channels.
        own_taps: separate taps for each channel, (C, 1, k), instead of shared taps.
        padding_mode: "zeros" or "circular".

    Returns:
        The plan, with the modelled traffic.

    Raises:
        TypeError: an argument has the wrong type, or x an unsupported dtype.
        ValueError: a bad shape, memory format, kernel size, padding mode or name of a GPU.
        RuntimeError: the compiled extension is missing, or this machine has no such CUDA device.
    """
    samples, channels, *spatial = _checked_shape(shape)
    if dtype not in DTYPES:
        raise TypeError(
            f"expected dtype as torch.float32, float64, float16 or bfloat16, got {dtype!r}"
        )
    channels_inside = _channels_inside(memory_format)
    circular = is_circular(padding_mode)
    k = adaptive_kernel_size(channels) if kernel_size is None else kernel_size
    check_kernel_size(k)
    check_wraps_once(channels, k, circular)
    pixels = math.prod(spatial)
    elements = max(samples * channels * max(pixels, 1), k * (channels if own_taps else 1))
    if elements * dtype.itemsize > MOST_BYTES:
        raise ValueError(
            f"expected maps and taps of at most {MOST_BYTES >> 40} TiB, more than any GPU holds, "
            f"got shape {tuple(shape)} and k = {k}; use a smaller batch"
        )
    gpu = gpu_limits(device)
    entries: dict[str, Any] = dict(
        planner().plan(
            backward=bool(backward),
            dtype=str(dtype).removeprefix("torch."),
            # The operators' rule: one pixel makes a row of channels, one channel a plane.
            channels_last=pixels == 1 or (channels_inside and channels > 1),
            samples=samples,
            channels=channels,
            pixels=pixels,
            kernel_size=k,
            own_taps=bool(own_taps),
            circular=circular,
            aligned=True,
            in_place=False,
            gpu=gpu,
        )
    )
    return Plan(**{field.name: entries[field.name] for field in fields(Plan)})


def planner() -> Any:
    """The compiled planner, the module eca_fused._C.

    Raises:
        RuntimeError: it does not load.
    """
    try:
        return importlib.import_module(".._C", __package__)
    except ImportError as error:
        raise RuntimeError(
            f"plans need the compiled planner, eca_fused._C, which does not load ({error}); "
            "build it for this Python with `pip install .` in the source folder"
        ) from error


def gpu_limits(device: str | torch.device) -> "Gpu":
    """What the planner knows of a GPU: one by name, or a CUDA device of this machine.

    Raises:
        TypeError: device is neither a string nor a torch.device.
        ValueError: it names no GPU, or one that is too old.
        RuntimeError: the compiled planner is missing, or this machine has no such CUDA device.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"expected device as a str or torch.device, got {device!r}")
    made = planner()
    name = str(device)
    if re.fullmatch(r"sm_\d{1,4}(:\d{1,6})?", name):
        limits: Gpu = made.gpu_by_name(name)
        return limits
    if not re.fullmatch(r"cuda(:\d{1,4})?", name):
        raise ValueError(
            "expected device as a GPU by compute capability and number of multiprocessors, "
            "'sm_90' or 'sm_90:132', or as a CUDA device of this machine, 'cuda' or 'cuda:1', "
            f"got {name!r}"
        )
    if "cuda" not in native.devices:
        raise RuntimeError(
            f"the limits of {name!r} can only be read by the CUDA kernels, which this build of the "
            "extension lacks; name the GPU instead, as 'sm_90:132'"
        )
    count = torch.cuda.device_count()
    index = int(name[5:]) if ":" in name else torch.cuda.current_device() if count else 0
    if index >= count:
        there = f"only {count}" if count else "none"
        raise RuntimeError(
            f"expected a CUDA device of this machine, got {name!r}, and PyTorch finds {there}; "
            "name a GPU instead, as 'sm_90:132'"
        )
    return native.gpu_of_device(index)


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple, or a TypeError or ValueError."""
    try:
        sizes = tuple(shape)
    except TypeError:
        raise TypeError(f"expected shape as (N, C, *spatial), got {shape!r}") from None
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"expected shape as (N, C, *spatial) of ints, got {shape!r}")
    if not 2 <= len(sizes) <= 2 + MAX_SPATIAL_DIMS:
        raise ValueError(
            f"expected shape as (N, C, *spatial) with 0 to {MAX_SPATIAL_DIMS} spatial dimensions, "
            f"got {sizes}"
        )
    if min(sizes) < 0 or 0 in sizes[:2]:
        raise ValueError(
            "expected a shape with N and C from 1 up and spatial sizes from 0 up, "
            f"got {sizes}: without samples or channels no kernel runs"
        )
    return sizes


def _channels_inside(memory_format: torch.memory_format) -> bool:
    """Whether a memory format has the channels innermost; a TypeError or ValueError for others."""
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"expected memory_format as a torch.memory_format, got {memory_format!r}")
    if memory_format == torch.preserve_format:
        raise ValueError(
            "expected memory_format as torch.contiguous_format or torch.channels_last, "
            "got torch.preserve_format, but there is no tensor whose format could be preserved"
        )
    return memory_format != torch.contiguous_format
