"""The machine code (SASS) of a CUDA kernel, read from what cuobjdump prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

LANES = 32

# One file has all registers: R0 and up, then UR0 and up. The last of each, and the one behind it as
# the upper half of a pair, are zero. Another has all predicates; the last of each is true.
RZ, FIRST_UNIFORM, URZ, REGISTERS = 255, 257, 257 + 63, 257 + 65
PT, UPT, PREDICATES = 7, 15, 16


@dataclass(frozen=True)
class Operand:
    """An operand: its text without signs, and what the text stands for."""

    text: str
    negative: bool  # of a predicate: its opposite
    inverted: bool
    absolute: bool

    @classmethod
    def parse(cls, text: str) -> Operand:
        bare = text.strip().replace(".reuse", "")
        signs = bare[: len(bare) - len(bare.lstrip("-!~+"))]
        bare = bare[len(signs) :]
        absolute = bare.startswith("|")
        negative = "-" in signs or "!" in signs
        return cls(bare.strip("|").removesuffix(".64"), negative, "~" in signs, absolute)

    @cached_property
    def uniform(self) -> bool:
        """One for all threads of a warp."""
        return self.text.startswith("U")

    @cached_property
    def is_predicate(self) -> bool:
        return re.fullmatch(r"U?P[0-6T]", self.text) is not None

    @cached_property
    def place(self) -> int | None:
        """Its row in the file of registers, or of predicates."""
        if self.is_predicate:
            number = self.text[-1]
            return (PT + 1 if self.uniform else 0) + (PT if number == "T" else int(number))
        zeros = {"RZ": RZ, "SRZ": RZ, "URZ": URZ}
        if self.text in zeros:
            return zeros[self.text]
        match = re.fullmatch(r"U?R(\d+)", self.text)
        return (FIRST_UNIFORM if self.uniform else 0) + int(match[1]) if match else None

    @cached_property
    def constant(self) -> int | None:
        """Its place in constant bank 0, in bytes."""
        match = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+|RZ)\]", self.text)
        return None if not match else 0 if match[1] == "RZ" else int(match[1], 16)

    @cached_property
    def number(self) -> int:
        """The bits of an immediate: an integer if it is hexadecimal, else a float."""
        if self.text.startswith("0x"):
            return int(self.text, 16) & 0xFFFFFFFF
        return int(np.float32(self.text.removeprefix("Q")).view(np.uint32))  # QNAN

    @cached_property
    def numbers(self) -> npt.NDArray[np.uint32]:
        return np.full(LANES, self.number, np.uint32)

    @cached_property
    def terms(self) -> list[Operand]:
        """Of an address in shared memory."""
        return [Operand.parse(term) for term in self.text.strip("[]").split("+")]


@dataclass(frozen=True)
class Instruction:
    """An instruction, as cuobjdump prints it."""

    address: int  # from the kernel's first on, in bytes
    text: str

    @cached_property
    def parts(self) -> re.Match[str]:
        match = re.fullmatch(r"(?:@(!?U?P\w) +)?([A-Z]\w*)((?:\.\w+)*) *(.*)", self.text)
        assert match, self
        return match

    @cached_property
    def guard(self) -> Operand | None:
        return Operand.parse(self.parts[1]) if self.parts[1] else None

    @cached_property
    def opcode(self) -> str:
        return self.parts[2]

    @cached_property
    def modifiers(self) -> list[str]:
        return self.parts[3].split(".")[1:]

    @cached_property
    def operands(self) -> list[Operand]:
        return [Operand.parse(text) for text in self.parts[4].split(",")]

    def has(self, *modifiers: str) -> bool:
        """Whether it has one of them."""
        return any(modifier in self.modifiers for modifier in modifiers)


Kernel = dict[int, Instruction]  # by their addresses


def read_kernel(dump: str) -> Kernel:
    """One kernel, from what `cuobjdump -sass` prints."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", dump, re.MULTILINE)
    kernel = {int(address, 16): Instruction(int(address, 16), text) for address, text in found}
    assert kernel, "no kernel"
    assert len(kernel) == len(found), "several kernels"
    return kernel
