"""Which kernels the operators between the passes of a tail launch; as in launch.py.

The tensors are contiguous, and there are channels. Launches, with batch norm and ECA in training:
two forward, and one more for a norm of the identity; five backward.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eca_fused.ops.results import sums_dtype
from eca_fused.ops.triton.coefficient_kernels import (
    channel_totals,
    coefficients,
    gradient_coefficients,
    plane_gradients,
    scale_gradients,
    statistics_of_batch,
)
from eca_fused.ops.triton.launch import CHANNELS, ROWS, ROWS_AT_ONCE, wrap_triton
from eca_fused.ops.triton.plan import ceil_div
from eca_fused.ops.triton.taps import tap_gradients, tap_totals

# Samples and channels of a tile; of a program that adds up all samples, and of one that adds up all
# channels.
TILE = {"BLOCK_N": 8, "BLOCK_C": 64}
COLUMN = {"BLOCK_N": 32, "BLOCK_C": 16}
ROW = {"BLOCK_C": 256}


class NormTensors(NamedTuple):
    """A batch norm's, each (C,) or None."""

    mean: Tensor | None
    variance: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


def _tiles(x: Tensor, planes: bool = True) -> tuple[int]:
    """Programs for all planes of x, or for its channels alone: one tile for each of these."""
    samples = ceil_div(x.shape[0], TILE["BLOCK_N"]) if planes else 0
    return (ceil_div(x.shape[1], TILE["BLOCK_C"]) * max(samples, 1),)


def _columns(channels: int) -> tuple[int]:
    return (ceil_div(channels, COLUMN["BLOCK_C"]),)


def _double(x: Tensor) -> bool:
    return sums_dtype(x) == torch.float64


def taps_flags(weight: Tensor | None, circular: bool) -> dict[str, int | bool]:
    return {
        "K": 1 if weight is None else weight.shape[2],
        "OWN_TAPS": weight is not None and weight.shape[0] != 1,
        "CIRCULAR": circular,
    }


def batch_statistics(planes: Tensor, pixels: int, mean: Tensor, variance: Tensor) -> None:
    """Write mean and variance (C,) of a batch from the moments (2, N, C) of its planes."""
    samples, channels = planes.shape[1:]
    wrap_triton(statistics_of_batch)[_columns(channels)](
        planes, mean, variance, samples, channels, pixels, **COLUMN
    )


def tail_coefficients(
    x: Tensor,
    weight: Tensor | None,
    means: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    norm: NormTensors,
    eps: float,
    identity_norm: NormTensors,
    identity_eps: float,
    circular: bool,
    planes: Tensor | None,
    rows: Tensor,
    made: Tensor | None,
    distance: Tensor | None,
) -> None:
    """Write planes (2, N, C), rows (6, C), the gate of taps and distance (N, C).

    Args: as for TailKernels.tail_coefficients(); None for what is absent or not written.
    """
    wrap_triton(coefficients)[_tiles(x, planes is not None or distance is not None)](
        weight,
        means,
        gate,
        scale,
        *norm,
        *identity_norm,
        planes,
        rows,
        made,
        distance,
        x.shape[0],
        x.shape[1],
        EPS=eps,
        IDENTITY_EPS=identity_eps,
        DOUBLE=_double(x),
        **taps_flags(weight, circular),
        **TILE,
    )


def tail_totals(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    dmean: Tensor | None,
    distance: Tensor | None,
    norm: NormTensors,
    eps: float,
    circular: bool,
    totals: Tensor,
    dgate: Tensor | None,
    dscale: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Write totals (4, C) and the gradients, for a map that has samples.

    Args: as for TailKernels.tail_totals(); None for what is absent or not needed. With taps, dmean
        is written, else it is given.
    """
    n, c = x.shape[:2]
    shape = (n, c) if dweight is not None else None
    dz, inputs = (None if shape is None else sums.new_empty(shape) for _ in range(2))
    if dgate is not None or weight is not None:
        wrap_triton(plane_gradients)[_tiles(x)](
            sums,
            weight,
            gate,
            scale,
            distance,
            *norm,
            dgate,
            None if weight is None else dmean,
            dz,
            inputs,
            n,
            c,
            EPS=eps,
            DOUBLE=_double(x),
            **taps_flags(weight, circular),
            **TILE,
        )
    if dscale is not None:
        wrap_triton(scale_gradients)[(n,)](
            sums, gate, *norm, dscale, n, c, EPS=eps, DOUBLE=_double(x), **ROW
        )
    wrap_triton(channel_totals)[_columns(c)](
        sums, gate, scale, dmean, distance, totals, n, c, IDENTITY_SUM=sums.shape[0] == 3, **COLUMN
    )
    if dz is not None and inputs is not None and weight is not None and dweight is not None:
        taps_gradient(dz, inputs, dweight, taps_flags(weight, circular))


def taps_gradient(
    dz: Tensor, inputs: Tensor, dweight: Tensor, flags: dict[str, int | bool]
) -> None:
    """Write dweight from dz and what the taps are over, both (N, C)."""
    n, c = dz.shape
    own_taps, k = dweight.shape[0] != 1, dweight.shape[2]
    parts = ceil_div(c, CHANNELS) * (1 if own_taps else ceil_div(n, ROWS))
    partial = dweight if own_taps else dz.new_empty((k, parts))
    wrap_triton(tap_gradients)[(k * parts,)](
        dz,
        inputs,
        partial,
        n,
        c,
        parts,
        WIDE=False,
        ROWS=ROWS,
        BLOCK_N=ROWS_AT_ONCE,
        BLOCK_C=CHANNELS,
        **flags,
    )
    if not own_taps:
        wrap_triton(tap_totals)[(k,)](partial, dweight, parts, BLOCK=256)


def tail_gradient_coefficients(
    x: Tensor,
    totals: Tensor | None,
    shares: Tensor | None,
    values: float,
    identity_values: float,
    gate: Tensor | None,
    scale: Tensor | None,
    dmean: Tensor | None,
    norm: NormTensors,
    eps: float,
    identity_norm: NormTensors,
    identity_eps: float,
    planes: Tensor | None,
    rows: Tensor | None,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """Write planes (2, N, C), rows (4, C) and the gradients of the norms' four parameters.

    Args: as for TailKernels.tail_gradient_coefficients(); None for what is absent or not written.
    """
    wrap_triton(gradient_coefficients)[_tiles(x, planes is not None)](
        totals,
        shares,
        gate,
        scale,
        dmean,
        *norm,
        *identity_norm,
        planes,
        rows,
        *gradients,
        int(values),
        int(identity_values),
        x.shape[0],
        x.shape[1],
        math.prod(x.shape[2:]),
        EPS=eps,
        IDENTITY_EPS=identity_eps,
        DOUBLE=_double(x),
        **TILE,
    )
