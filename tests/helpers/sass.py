"""Executes the machine code (SASS) of a block of a CUDA kernel, and counts its instructions.

A count is what NVIDIA's profilers call inst_executed: one for each instruction that a warp issues,
whatever number of its threads takes part. Integers, predicates and shared memory are computed, from
which the branches of our kernels follow. What is approximate:

- Threads of a warp that have parted. Those at the lowest address go first, and threads meet where
  they are at the same address. A GPU obeys BSSY and BSYNC, which do nothing here.
- Time: there is none. The warps of a block take turns at its barriers.
- Other blocks. Global memory holds the same number everywhere, and stores to it are lost. A loop
  that waits for another block ends at once, and a block is never the last that counts itself.
- Floats: rounding is that of numpy, and no division needs its slow path.
"""

from collections import Counter

import numpy as np

from helpers.sass_opcodes import HANDLERS, IN_MEMORY
from helpers.sass_text import LANES, Kernel
from helpers.sass_warp import Warp

# Constant bank 0 on sm_90, in bytes: the sizes of block and grid, and the kernel's parameters.
THREADS, BLOCKS, PARAMETERS, CONSTANTS = 0x0, 0xC, 0x210, 0x1000
SHARED_BYTES = 228 << 10


def count_instructions(
    kernel: Kernel, parameters: bytes, *, block: int, blocks: int, threads: int
) -> Counter[str]:
    """How often the warps of one block issue each opcode, in a launch of so many blocks."""
    constants = bytearray(CONSTANTS)
    for at, size in ((THREADS, threads), (BLOCKS, blocks)):
        constants[at : at + 12] = np.array([size, 1, 1], "<u4").tobytes()
    constants[PARAMETERS : PARAMETERS + len(parameters)] = parameters
    shared = np.full(SHARED_BYTES // 4, IN_MEMORY, np.uint32)
    warps = [
        Warp(kernel, HANDLERS, bytes(constants), shared, block=block, first=first, threads=threads)
        for first in range(0, threads, LANES)
    ]
    running = warps
    with np.errstate(all="ignore"):
        while running:
            running = [warp for warp in running if warp.run()]
    return sum((warp.issued for warp in warps), Counter())
