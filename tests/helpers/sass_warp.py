"""A warp of a CUDA kernel: its registers, where its threads are, and what it has issued."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from helpers.sass_text import (
    LANES,
    PREDICATES,
    PT,
    REGISTERS,
    RZ,
    UPT,
    URZ,
    Instruction,
    Kernel,
    Operand,
)

ENDLESS = 50_000  # instructions of a warp: our kernels need a tenth

Lanes = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]
Wide = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

Handler = Callable[["Warp", Instruction], None]


class Unknown(Exception):
    """An instruction, or a form of it, that sass_opcodes.py does not have."""

    def __init__(self, instruction: Instruction, what: str = "opcode") -> None:
        opcode, operands = instruction.parts[2] + instruction.parts[3], instruction.parts[4]
        super().__init__(
            f"unknown {what}: {opcode} at {instruction.address:#x} with operands {operands}"
        )


class Endless(Exception):
    """A warp that issues far more instructions than any of our kernels needs."""


class Warp:
    """32 threads: their registers, and where each of them is."""

    def __init__(
        self,
        kernel: Kernel,
        handlers: Mapping[str, Handler],
        constants: bytes,
        shared: Words,
        *,
        block: int,
        first: int,
        threads: int,
    ) -> None:
        """The threads from `first` on, of a block of so many."""
        self.kernel, self.handlers = kernel, handlers
        self.constants, self.shared, self.block = constants, shared, block
        self.thread = np.arange(first, first + LANES, dtype=np.uint32)
        self.registers = np.zeros((REGISTERS, LANES), np.uint32)
        self.predicates = np.zeros((PREDICATES, LANES), np.bool_)
        self.predicates[[PT, UPT]] = True
        self.issued: Counter[str] = Counter()
        self.left = ENDLESS
        self.at = {min(kernel): self.thread < threads}  # threads by address
        self.waits = False
        # Of the instruction under way: threads that execute it, and that go on to the next one.
        self.mask = self.stay = np.zeros(LANES, np.bool_)

    def run(self) -> bool:
        """To the next barrier, or to the end. Whether it is at a barrier."""
        self.waits = False
        while self.at and not self.waits:
            self.step(self.kernel[min(self.at)])
        return self.waits

    def step(self, instruction: Instruction) -> None:
        self.mask = self.stay = self.at.pop(instruction.address)
        if instruction.guard:
            self.mask = self.stay & self.predicate(instruction.guard)
        self.issued[instruction.opcode] += 1
        self.left -= 1
        if self.left < 0:
            raise Endless(f"{instruction.text} at {instruction.address:#x}")
        if self.mask.any():
            try:
                self.handler(instruction)(self, instruction)
            except ValueError as error:
                raise Unknown(instruction, "form") from error
        self.go(instruction.address + 16, self.stay)

    def handler(self, instruction: Instruction) -> Handler:
        opcode = instruction.opcode
        # Uniform instructions do the same, once for a warp.
        found = self.handlers.get(opcode) or self.handlers.get(opcode.removeprefix("U"))
        if found is None:
            raise Unknown(instruction)
        return found

    def go(self, address: int, threads: Lanes) -> None:
        if threads.any():
            self.at[address] = self.at[address] | threads if address in self.at else threads

    # ---- operands ----

    def words(self, operand: Operand, number: int = 0) -> Words:
        """Without signs. Number 1 is the upper half of 64 bits."""
        if operand.place is not None:
            row: Words = self.registers[operand.place + number]
            return row
        if operand.constant is not None:
            at = operand.constant + 4 * number
            word = int.from_bytes(self.constants[at : at + 4], "little")
            return np.full(LANES, word, np.uint32)
        return operand.numbers if number == 0 else np.zeros(LANES, np.uint32)

    def integer(self, operand: Operand) -> Words:
        value = self.words(operand)
        if operand.inverted:
            value = ~value
        return -value if operand.negative else value

    def signed(self, operand: Operand) -> npt.NDArray[np.int32]:
        return self.integer(operand).view(np.int32)

    def addend(self, operand: Operand) -> Wide:
        """In a sum whose bit 32 is the carry: -b is ~b + 1, which carries where b is 0."""
        value = self.words(operand)
        if operand.negative:
            return (~value).astype(np.uint64) + np.uint64(1)
        return self.integer(operand).astype(np.uint64)

    def wide(self, operand: Operand) -> Wide:
        value = join(self.words(operand), self.words(operand, 1))
        return -value if operand.negative else value

    def floats(self, operand: Operand) -> Floats:
        value = self.words(operand).view(np.float32)
        if operand.absolute:
            value = np.abs(value)
        return -value if operand.negative else value

    def predicate(self, operand: Operand) -> Lanes:
        assert operand.is_predicate, operand
        value: Lanes = self.predicates[operand.place]
        return ~value if operand.negative else value

    def shared_words(self, operand: Operand) -> npt.NDArray[np.int64]:
        """Where in shared memory an address is, of the threads that execute the instruction."""
        total = np.zeros(LANES, np.uint32)
        for term in operand.terms:
            total = total + self.integer(term)
        return total[self.mask].astype(np.int64) // 4

    # ---- results ----

    def put(self, target: Operand, value: Array, number: int = 0) -> None:
        """The lower 32 bits of the value."""
        assert target.place is not None, target
        if target.place not in (RZ, URZ):
            row = self.registers[target.place + number]
            self._write(row, target.uniform, value.astype(np.uint32))

    def put_wide(self, target: Operand, value: Array) -> None:
        self.put(target, value)
        self.put(target, value.astype(np.uint64) >> np.uint64(32), 1)

    def put_floats(self, target: Operand, value: Array) -> None:
        self.put(target, value.astype(np.float32).view(np.uint32))

    def put_predicate(self, target: Operand, value: Lanes) -> None:
        assert target.is_predicate, target
        if target.place not in (PT, UPT):
            self._write(self.predicates[target.place], target.uniform, value)

    def _write(self, row: Array, uniform: bool, value: Array) -> None:
        if uniform:
            row[:] = value[self.mask][0]
        else:
            np.copyto(row, value, where=self.mask)


def join(low: Words, high: Words) -> Wide:
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
