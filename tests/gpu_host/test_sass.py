"""The instructions that test_instructions.py executes do what a GPU does."""

import operator
import random

import numpy as np
import pytest

from helpers.sass import count_instructions
from helpers.sass_opcodes import HANDLERS
from helpers.sass_text import LANES, Instruction, Operand, read_kernel
from helpers.sass_warp import Endless, Unknown, Warp

WORD, PAIR = 1 << 32, 1 << 64


def kernel_of(*lines):
    return {16 * i: Instruction(16 * i, line) for i, line in enumerate([*lines, "EXIT"])}


def execute(*lines, **registers):
    """A warp after these instructions, from these values of its registers and predicates."""
    shared = np.zeros(256, np.uint32)
    warp = Warp(kernel_of(*lines), HANDLERS, bytes(4096), shared, block=3, first=0, threads=LANES)
    for name, value in registers.items():
        operand = Operand.parse(name)
        file = warp.predicates if operand.is_predicate else warp.registers
        file[operand.place] = value
    with np.errstate(all="ignore"):
        assert not warp.run()
    return warp


def value(warp, name, lane=0):
    operand = Operand.parse(name)
    file = warp.predicates if operand.is_predicate else warp.registers
    return int(file[operand.place][lane])


def pair(warp, number):
    return value(warp, f"R{number}") + WORD * value(warp, f"R{number + 1}")


def signed(n, size=WORD):
    return n - size if n >= size // 2 else n


def numbers(count, size=WORD):
    """The ends of the range, and others."""
    drawn = random.Random(count)
    ends = [0, 1, size // 2 - 1, size // 2, size - 1]
    return [
        tuple(drawn.choice([*ends, drawn.randrange(size)]) for _ in range(count)) for _ in range(40)
    ]


@pytest.mark.parametrize(("a", "b"), numbers(2, PAIR))
def test_sums_and_differences_of_64_bits(a, b):
    halves = {"R2": a % WORD, "R3": a // WORD, "R4": b % WORD, "R5": b // WORD}
    total = execute("IADD3 R6, P0, R2, R4, RZ", "IADD3.X R7, R3, R5, RZ, P0, !PT", **halves)
    assert pair(total, 6) == (a + b) % PAIR
    less = execute("IADD3 R6, P1, R2, -R4, RZ", "IADD3.X R7, R3, ~R5, RZ, P1, !PT", **halves)
    assert pair(less, 6) == (a - b) % PAIR
    uniform = {"U" + name: half for name, half in halves.items()}
    add = ["UIADD3 UR6, UP0, UR2, UR4, URZ", "UIADD3.X UR7, UR3, UR5, URZ, UP0, !UPT"]
    low_and_high = execute(*add, "MOV R6, UR6", "MOV R7, UR7", **uniform)
    assert pair(low_and_high, 6) == (a + b) % PAIR


@pytest.mark.parametrize(("a", "b", "c"), numbers(3))
def test_a_sum_of_three_has_two_carries(a, b, c):
    warp = execute("IADD3 R5, P0, P1, R2, R3, R4", R2=a, R3=b, R4=c)
    carries = value(warp, "P0") + value(warp, "P1")
    assert value(warp, "R5") + WORD * carries == a + b + c


@pytest.mark.parametrize(("a", "b"), numbers(2))
def test_products(a, b):
    start = {"R2": a, "R3": b, "R4": 5, "R5": 1}
    more = WORD + 5
    wide = execute("IMAD.WIDE.U32 R6, R2, R3, R4", **start)
    assert pair(wide, 6) == (a * b + more) % PAIR
    wide = execute("IMAD.WIDE R6, R2, R3, R4", **start)
    assert pair(wide, 6) == (signed(a) * signed(b) + more) % PAIR
    upper = execute("IMAD.HI.U32 R6, R2, R3, RZ", **start)
    assert value(upper, "R6") == a * b // WORD
    assert value(execute("IMAD R6, R2, R3, -R4", **start), "R6") == (a * b - 5) % WORD
    assert value(execute("IMAD.X R6, R2, R3, R4, P0", P0=True, **start), "R6") == (
        (a * b + 6) % WORD
    )


@pytest.mark.parametrize(("base", "index"), numbers(2, PAIR))
def test_addresses(base, index):
    start = {"R2": index % WORD, "R3": index // WORD, "R4": base % WORD, "R5": base // WORD}
    far = execute("LEA R6, P0, R2, R4, 0x2", "LEA.HI.X R7, R2, R5, R3, 0x2, P0", **start)
    assert pair(far, 6) == (base + 4 * index) % PAIR
    near = execute("LEA R6, P0, R2, R4, 0x2", "LEA.HI.X.SX32 R7, R2, R5, 0x2, P0", **start)
    assert pair(near, 6) == (base + 4 * signed(index % WORD)) % PAIR
    assert value(execute("LEA.HI R6, R2, R4, RZ, 0x1d", **start), "R6") == (
        ((index % WORD << 29) // WORD + base) % WORD
    )


@pytest.mark.parametrize("by", [0, 1, 31, 32, 40, 63, 64])
@pytest.mark.parametrize(("low", "high"), numbers(2)[:8])
def test_shifts(low, high, by):
    start, both = {"R2": low, "R3": high, "R4": by}, low + WORD * high
    most = min(by, 63)
    for line, want in {
        "SHF.L.U32 R5, R2, R4, RZ": low << by,
        "SHF.L.U64.HI R5, R2, R4, R3": (both << most) // WORD,
        "SHF.R.U64 R5, R2, R4, R3": both >> most,
        "SHF.R.U32.HI R5, RZ, R4, R3": high >> by,
        "SHF.R.S32.HI R5, RZ, R4, R3": signed(high) >> by,
    }.items():
        assert value(execute(line, **start), "R5") == want % WORD, line


@pytest.mark.parametrize(("a", "b", "c"), numbers(3)[:10])
def test_logic_by_its_table(a, b, c):
    for table, want in {
        0xC0: a & b,
        0x3C: a ^ b,
        0xFE: a | b | c,
        0xE8: a & b | c & (a | b),
    }.items():
        warp = execute(f"LOP3.LUT P0, R5, R2, R3, R4, {table:#x}, !PT", R2=a, R3=b, R4=c)
        assert value(warp, "R5") == want
        assert value(warp, "P0") == (want != 0)
    flags = {"P0": a & 1, "P1": b & 1, "P2": c & 1}
    warp = execute("PLOP3.LUT P3, P4, P0, P1, P2, 0xe8, 0x3c", **flags)
    assert value(warp, "P3") == (sum(flags.values()) >= 2)
    assert value(warp, "P4") == flags["P0"] ^ flags["P1"]


NAMES = ["LT", "LE", "GT", "GE", "EQ", "NE"]


@pytest.mark.parametrize("name", NAMES)
def test_comparisons(name):
    compare = getattr(operator, name.lower())
    for a, b in numbers(2):
        warp = execute(f"ISETP.{name}.U32.AND P0, P1, R2, R3, PT", R2=a, R3=b)
        assert value(warp, "P0") == compare(a, b)
        assert value(warp, "P1") == (not compare(a, b))
        warp = execute(f"ISETP.{name}.OR P0, PT, R2, R3, P2", R2=a, R3=b)
        assert value(warp, "P0") == compare(signed(a), signed(b))
        assert value(execute(f"ISETP.{name}.OR P0, PT, R2, R3, !P2", R2=a, R3=b), "P0")


@pytest.mark.parametrize("name", NAMES)
def test_comparisons_of_64_bits(name):
    compare = getattr(operator, name.lower())
    lines = [
        f"ISETP.{name}.U32.AND P0, PT, R2, R4, PT",
        f"ISETP.{name}.AND.EX P1, PT, R3, R5, PT, P0",
    ]
    for a, b in [*numbers(2, PAIR), *[(n, n) for n, _ in numbers(2, PAIR)], (WORD, WORD + 1)]:
        halves = {"R2": a % WORD, "R3": a // WORD, "R4": b % WORD, "R5": b // WORD}
        assert value(execute(*lines, **halves), "P1") == compare(signed(a, PAIR), signed(b, PAIR))


def test_floats():
    warp = execute("FADD R3, -|R2|, 1.5", "FFMA R4, R2, R2, 0.5", R2=np.float32(-2).view(np.uint32))
    assert warp.registers[[3, 4], 0].view(np.float32).tolist() == [-0.5, 4.5]
    warp = execute(
        "FSETP.GEU.AND P0, PT, R2, RZ, PT", "FSETP.GE.AND P1, PT, R2, RZ, PT", R2=0x7FC00000
    )
    assert (value(warp, "P0"), value(warp, "P1")) == (1, 0)
    assert (
        value(execute("HFMA2.MMA R2, -RZ, RZ, 1.875, 5.9604644775390625e-08"), "R2") == 0x3F800001
    )


DIVIDED = [(a, b) for a, b in [*numbers(2), (48, 49), (3136, 49), (802816, 784)] if b]


@pytest.mark.parametrize(("a", "b"), DIVIDED)
def test_divisions_by_reciprocals(a, b):
    """As nvcc divides integers, up to its two corrections of a quotient that is too low."""
    warp = execute(
        "I2F.U32.RP R4, R3", "MUFU.RCP R4, R4", "VIADD R4, R4, 0xffffffe",
        "F2I.FTZ.U32.TRUNC.NTZ R7, R4", "IMAD.MOV R4, RZ, RZ, -R7", "IMAD R4, R4, R3, RZ",
        "MOV R6, RZ", "IMAD.HI.U32 R7, R7, R4, R6", "IMAD.HI.U32 R8, R7, R2, RZ", R2=a, R3=b,
    )  # fmt: skip
    assert 0 <= a // b - value(warp, "R8") <= 2


def test_bytes_and_bits():
    start = {"R2": 0x33221100, "R3": 0x77665544}
    for line, want in {
        "PRMT R4, R2, 0x5410, R3": 0x55441100,
        "PRMT R4, R2, 0x7632, R3": 0x77663322,
        "BREV R4, R2": 0x008844CC,
        "FLO.U32.SH R4, R2": 2,
        "FLO.U32.SH R4, RZ": 0xFFFFFFFF,
        "IABS R4, -R2": 0x33221100,
        "SEL R4, R2, R3, !PT": 0x77665544,
        "VIMNMX R4, R2, -0x1, PT": 0xFFFFFFFF,
        "VIMNMX.U32 R4, R2, -0x1, PT": 0x33221100,
        "VIADDMNMX R4, R2, 0x1, R3, !PT": 0x77665544,
        "P2R R4, PR, R3, 0x41": 0x77665505,
    }.items():
        assert value(execute(line, P0=True, **start), "R4") == want, line


def test_lanes():
    lanes = np.arange(LANES)
    warp = execute(
        "S2R R2, SR_TID.X", "S2R R3, SR_CTAID.X", "SHFL.BFLY PT, R4, R2, 0x4, 0x1f",
        "ISETP.LT.AND P0, PT, R2, 0x20, PT", "ISETP.GT.AND P1, PT, R2, 0x1, PT",
        "VOTEU.ALL UP0, P0", "VOTEU.ALL UP1, P1",
    )  # fmt: skip
    assert warp.registers[2].tolist() == lanes.tolist()
    assert value(warp, "R3") == 3
    assert warp.registers[4].tolist() == (lanes ^ 4).tolist()
    assert (value(warp, "UP0"), value(warp, "UP1")) == (1, 0)


def test_a_guard_keeps_an_instruction_from_what_it_does_but_not_from_being_issued():
    warp = execute("@P0 MOV R2, 0x1", "@!P0 MOV R3, 0x1", "@UP0 UMOV UR4, 0x1")
    assert [value(warp, name) for name in ("R2", "R3", "UR4")] == [0, 1, 0]
    assert warp.issued == {"MOV": 2, "UMOV": 1, "EXIT": 1}


def test_both_ways_of_a_branch_are_issued_where_threads_part():
    lines = [
        "S2R R2, SR_TID.X", "ISETP.GE.AND P0, PT, R2, R3, PT", "@P0 BRA 0x50",
        "MOV R4, 0x1", "BRA 0x60", "VIADD R4, R2, 0x1", "NOP",
    ]  # fmt: skip
    for border, moves, sums in ((0, 0, 1), (16, 1, 1), (32, 1, 0)):
        warp = execute(*lines, R3=border)
        assert (warp.issued["MOV"], warp.issued["VIADD"]) == (moves, sums)
        assert warp.issued["BRA"] == 1 + moves
        assert (warp.issued["NOP"], warp.issued["EXIT"]) == (1, 1)  # together again
    assert value(execute(*lines, R3=16), "R4", 15) == 1
    assert value(execute(*lines, R3=16), "R4", 16) == 17


def test_a_loop_runs_as_often_as_the_thread_with_the_most_turns():
    warp = execute(
        "S2R R2, SR_TID.X", "VIADD R2, R2, 0xffffffff", "ISETP.GE.AND P0, PT, R2, RZ, PT",
        "@P0 BRA 0x10",
    )  # fmt: skip
    assert warp.issued["VIADD"] == LANES
    with pytest.raises(Endless, match="BRA 0x0 at 0x0"):
        execute("BRA 0x0")


def test_a_wait_for_another_block_ends():
    warp = execute(
        "LDG.E.STRONG.GPU R2, desc[UR4][R2.64]", "ISETP.GT.AND P0, PT, R2, -0x1, PT", "@P0 BRA 0x0"
    )
    assert warp.issued["LDG"] == 1


def test_warps_share_memory_and_meet_at_barriers():
    # The last warp stores a flag behind a loop; all read it.
    kernel = kernel_of(
        "S2R R2, SR_TID.X", "ISETP.GE.AND P0, PT, R2, 0x20, PT", "LDC R3, c[0x0][0x210]",
        "@P0 STS [R3+0x4], R2", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDS R4, [R3+0x4]",
        "ISETP.EQ.AND P0, PT, R4, 0x3f, PT", "@P0 EXIT", "NOP",
    )  # fmt: skip
    issued = count_instructions(kernel, (64).to_bytes(4, "little"), block=0, blocks=1, threads=64)
    assert issued["NOP"] == 0
    assert issued["BAR"] == 2
    assert issued["S2R"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("FROB.X R1, R2", r"unknown opcode: FROB\.X at 0x10 with operands R1, R2"),
        ("SHF.R.S16 R1, R2, 0x1, R3", r"unknown modifier: SHF\.R\.S16 at 0x10"),
        ("LDS.U16 R1, [R2]", r"unknown width: LDS\.U16 at 0x10"),
        ("MOV R1, c[0x4][0x10]", r"unknown form: MOV at 0x10 with operands R1, c\[0x4\]\[0x10\]"),
        ("S2R R1, SR_CLOCKLO", "unknown register: S2R at 0x10"),
    ],
)
def test_what_is_unknown_is_an_error(line, message):
    with pytest.raises(Unknown, match=message):
        execute("NOP", line)


DUMP = """
\t\tFunction : _Z1kv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 EXIT ;                      /* 0x000000000000894d */
"""


def test_the_dump_is_read():
    kernel = read_kernel(DUMP)
    assert {i.address: i.text for i in kernel.values()} == {
        0: "LDC R1, c[0x0][0x28]", 16: "@!P0 EXIT",
    }  # fmt: skip
    with pytest.raises(AssertionError, match="several kernels"):
        read_kernel(DUMP + DUMP)
    with pytest.raises(AssertionError, match="no kernel"):
        read_kernel("")
