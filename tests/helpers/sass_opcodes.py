"""What the opcodes of the machine code do. It has those that our kernels execute, on sm_90."""

from collections.abc import Callable

import numpy as np

from helpers.sass_text import LANES, PT, RZ, Instruction, Operand
from helpers.sass_warp import Array, Handler, Lanes, Unknown, Warp, Wide, join

IN_MEMORY = 0x3F803F80  # 1 twice as bfloat16, and nearly 1 as a float
READY = 0x80000000  # what a wait for another block waits for

HANDLERS: dict[str, Handler] = {}


def executes(*opcodes: str) -> Callable[[Handler], Handler]:
    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return enter


def without_carries(operands: list[Operand]) -> tuple[Operand, list[Operand], list[Operand]]:
    """The target, the predicates that get its carries, and the sources."""
    first = next(i for i in range(1, len(operands)) if not operands[i].is_predicate)
    return operands[0], operands[1:first], operands[first:]


def put_sum(warp: Warp, target: Operand, carries: list[Operand], total: Wide) -> None:
    warp.put(target, total)
    for i, carry in enumerate(carries):
        warp.put_predicate(carry, total >> np.uint64(32) > i)


def carried(warp: Warp, carries: list[Operand]) -> Wide:
    """What an addition takes over from those of the lower halves. !PT stands for none."""
    total = np.zeros(LANES, np.uint64)
    return sum((warp.predicate(carry).astype(np.uint64) for carry in carries), total)


@executes(
    "NOP", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "YIELD", "NANOSLEEP",  # threads that part
    "STG", "LDGSTS", "LDGDEPBAR", "DEPBAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL",  # memory
)  # fmt: skip
def nothing(warp: Warp, i: Instruction) -> None:
    pass


@executes("BRA")
def branch(warp: Warp, i: Instruction) -> None:
    if i.has("DIV"):  # to code for a warp whose threads have parted
        return
    taken = warp.mask
    *conditions, target = i.operands
    for condition in conditions:
        taken = taken & warp.predicate(condition)
    warp.stay = warp.stay & ~taken
    warp.go(target.number, taken)


@executes("EXIT")
def leave(warp: Warp, i: Instruction) -> None:
    warp.stay = warp.stay & ~warp.mask


@executes("BAR")
def wait(warp: Warp, i: Instruction) -> None:
    warp.waits = True


@executes("LDG", "ATOMG")
def load_global(warp: Warp, i: Instruction) -> None:
    target = next(operand for operand in i.operands if not operand.is_predicate)
    other_block = i.opcode == "LDG" and i.has("STRONG")
    value = IN_MEMORY & 0xFFFF if i.has("U16") else READY if other_block else IN_MEMORY
    for number in range(count_words(i)):
        warp.put(target, np.full(LANES, value, np.uint32), number)


@executes("LDS")
def load_shared(warp: Warp, i: Instruction) -> None:
    target, address = i.operands
    at, value = warp.shared_words(address), np.zeros(LANES, np.uint32)
    for number in range(count_words(i)):
        if target.place != RZ:
            value[warp.mask] = warp.shared[at + number]
            warp.put(target, value, number)


@executes("STS")
def store_shared(warp: Warp, i: Instruction) -> None:
    address, source = i.operands
    at = warp.shared_words(address)
    for number in range(count_words(i)):
        warp.shared[at + number] = warp.words(source, number)[warp.mask]


def count_words(i: Instruction) -> int:
    if i.opcode in ("LDS", "STS") and i.has("U8", "S8", "U16", "S16"):
        raise Unknown(i, "width")
    return 4 if i.has("128") else 2 if i.has("64") else 1


@executes("LDC")
def load_constant(warp: Warp, i: Instruction) -> None:
    target, source = i.operands
    if source.constant is None:
        raise Unknown(i, "constant")
    if i.has("64"):
        warp.put_wide(target, warp.wide(source))
    else:
        value = warp.words(source)
        warp.put(target, value & np.uint32(0xFF) if i.has("U8") else value)


@executes("S2R", "S2UR")
def special(warp: Warp, i: Instruction) -> None:
    target, source = i.operands
    lane = np.arange(LANES)
    values = {"SR_TID.X": warp.thread, "SR_CTAID.X": warp.block, "SR_CgaCtaId": 0, "SRZ": 0}
    values |= {"SR_LANEID": lane, "SR_LTMASK": (1 << lane) - 1}
    if source.text not in values:
        raise Unknown(i, "register")
    warp.put(target, np.broadcast_to(np.asarray(values[source.text]), LANES))


@executes("MOV", "R2UR")
def move(warp: Warp, i: Instruction) -> None:
    warp.put(i.operands[0], warp.integer(i.operands[1]))


@executes("CS2R")
def clear(warp: Warp, i: Instruction) -> None:
    if i.operands[1].text != "SRZ" or i.modifiers:
        raise Unknown(i, "register")
    warp.put_wide(i.operands[0], np.zeros(LANES, np.uint64))


@executes("SEL", "FSEL")
def select(warp: Warp, i: Instruction) -> None:
    target, a, b, condition = i.operands
    if i.opcode == "FSEL":
        warp.put_floats(target, np.where(warp.predicate(condition), warp.floats(a), warp.floats(b)))
    else:
        warp.put(target, np.where(warp.predicate(condition), warp.integer(a), warp.integer(b)))


@executes("VIADD")
def add(warp: Warp, i: Instruction) -> None:
    target, a, b = i.operands
    warp.put(target, warp.integer(a) + warp.integer(b))


@executes("IADD3")
def add_three(warp: Warp, i: Instruction) -> None:
    target, carries, (a, b, c, *carried_in) = without_carries(i.operands)
    total = warp.addend(a) + warp.addend(b) + warp.addend(c)
    put_sum(warp, target, carries, total + carried(warp, carried_in))


@executes("IMAD")
def multiply_add(warp: Warp, i: Instruction) -> None:
    target, carries, (a, b, c, *carried_in) = without_carries(i.operands)
    if not i.has("WIDE", "HI"):
        if carries:
            raise Unknown(i, "carry")
        total = warp.integer(a) * warp.integer(b) + warp.integer(c)
        warp.put(target, total + carried(warp, carried_in))
        return
    if carried_in:
        raise Unknown(i, "carry")
    if i.has("U32"):
        product = warp.integer(a).astype(np.uint64) * warp.integer(b).astype(np.uint64)
    else:
        product = (warp.signed(a).astype(np.int64) * warp.signed(b)).view(np.uint64)
    sum_of_64_bits = product + warp.wide(c)
    for carry in carries:
        warp.put_predicate(carry, sum_of_64_bits < product)
    if i.has("HI"):
        warp.put(target, sum_of_64_bits >> np.uint64(32))
    else:
        warp.put_wide(target, sum_of_64_bits)


@executes("LEA")
def shift_add(warp: Warp, i: Instruction) -> None:
    target, carries, (a, b, *rest) = without_carries(i.operands)
    if i.has("HI"):
        if i.has("SX32"):
            full = warp.signed(a).astype(np.int64).view(np.uint64)
        else:
            full = join(warp.integer(a), warp.integer(rest.pop(0)))
        shifted = full << np.uint64(rest.pop(0).number) >> np.uint64(32)
    else:
        shifted = (warp.integer(a) << np.uint32(rest.pop(0).number)).astype(np.uint64)
    put_sum(warp, target, carries, shifted + warp.addend(b) + carried(warp, rest))


@executes("SHF")
def shift(warp: Warp, i: Instruction) -> None:
    target, low, count, high = i.operands
    by = warp.integer(count).astype(np.uint64)
    both, most = join(warp.words(low), warp.words(high)), np.uint64(63)
    if i.modifiers == ["L", "U32"]:
        warp.put(target, np.where(by < 32, both << np.minimum(by, most), 0))
    elif i.modifiers == ["L", "U64", "HI"]:
        warp.put(target, both << np.minimum(by, most) >> np.uint64(32))
    elif i.modifiers == ["R", "U64"]:
        warp.put(target, both >> np.minimum(by, most))
    elif i.modifiers == ["R", "S64"]:
        warp.put(target, both.view(np.int64) >> np.minimum(by, most).astype(np.int64))
    elif i.modifiers == ["R", "W", "U32"]:  # by five bits of the count
        warp.put(target, both >> (by & np.uint64(31)))
    elif i.modifiers == ["R", "U32", "HI"]:
        warp.put(target, warp.integer(high).astype(np.uint64) >> np.minimum(by, most))
    elif i.modifiers == ["R", "S32", "HI"]:
        warp.put(target, warp.signed(high) >> np.minimum(by, 31).astype(np.int32))
    else:
        raise Unknown(i, "modifier")


@executes("LOP3")
def logic(warp: Warp, i: Instruction) -> None:
    result = [operand for operand in i.operands[:1] if operand.is_predicate]
    target, *rest = i.operands[len(result) :]
    a, b, c = (warp.integer(operand) for operand in rest[:3])
    value = np.zeros(LANES, np.uint32)
    for case in range(8):
        if rest[3].number >> case & 1:
            value |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    warp.put(target, value)
    for predicate in result:
        warp.put_predicate(predicate, (value != 0) | warp.predicate(rest[4]))


@executes("PLOP3")
def predicate_logic(warp: Warp, i: Instruction) -> None:
    first, second, *sources, table, second_table = i.operands
    a, b, c = (warp.predicate(operand).astype(np.uint32) for operand in sources)
    case = 4 * a + 2 * b + c
    warp.put_predicate(first, np.uint32(table.number) >> case & 1 != 0)
    warp.put_predicate(second, np.uint32(second_table.number) >> case & 1 != 0)


COMPARE: dict[str, Callable[[Array, Array], Lanes]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
    "EQ": np.equal, "NE": np.not_equal,
    # True also where a or b is NaN.
    "LTU": lambda a, b: ~(a >= b), "LEU": lambda a, b: ~(a > b), "GTU": lambda a, b: ~(a <= b),
    "GEU": lambda a, b: ~(a < b), "NEU": np.not_equal,
}  # fmt: skip


def put_comparison(warp: Warp, i: Instruction, value: Lanes) -> None:
    """And its opposite, both combined with another predicate."""
    first, second, _, _, other = i.operands[:5]
    combine = np.logical_or if i.has("OR") else np.logical_and
    if i.has("XOR"):
        raise Unknown(i, "modifier")
    known = warp.predicate(other).copy()  # it may be the first target too
    warp.put_predicate(first, combine(value, known))
    warp.put_predicate(second, combine(~value, known))


@executes("ISETP")
def compare(warp: Warp, i: Instruction) -> None:
    read = warp.integer if i.has("U32") else warp.signed
    a, b = read(i.operands[2]), read(i.operands[3])
    name = i.modifiers[0]
    value = COMPARE[name](a, b)
    if i.has("EX"):  # of upper halves, after the lower ones
        lower = warp.predicate(i.operands[5])
        value = np.where(a == b, lower, name == "NE" if name in ("NE", "EQ") else value)
    put_comparison(warp, i, value)


@executes("FSETP")
def compare_floats(warp: Warp, i: Instruction) -> None:
    a, b = warp.floats(i.operands[2]), warp.floats(i.operands[3])
    put_comparison(warp, i, COMPARE[i.modifiers[0]](a, b))


@executes("FCHK")
def check_division(warp: Warp, i: Instruction) -> None:
    warp.put_predicate(i.operands[0], np.zeros(LANES, np.bool_))


@executes("VOTEU")
def vote(warp: Warp, i: Instruction) -> None:
    target, *none, source = i.operands
    said = warp.predicate(source) & warp.mask
    if i.modifiers == ["ALL"]:
        warp.put_predicate(target, np.full(LANES, (said == warp.mask).all()))
    elif i.modifiers == ["ANY"] and len(none) == 1:
        warp.put(target, np.full(LANES, sum(1 << int(lane) for lane in said.nonzero()[0])))
    else:
        raise Unknown(i, "modifier")


@executes("P2R")
def gather_predicates(warp: Warp, i: Instruction) -> None:
    target, _, source, mask = i.operands
    bits = np.zeros(LANES, np.uint32)
    for number in range(PT):
        bits |= warp.predicates[number].astype(np.uint32) << np.uint32(number)
    chosen = np.uint32(mask.number)
    warp.put(target, warp.integer(source) & ~chosen | bits & chosen)


@executes("SHFL")
def shuffle(warp: Warp, i: Instruction) -> None:
    valid, target, source, distance, _ = i.operands
    if i.modifiers not in (["BFLY"], ["IDX"]):
        raise Unknown(i, "modifier")
    start = np.arange(LANES, dtype=np.uint32) if i.has("BFLY") else np.zeros(LANES, np.uint32)
    from_lane = start ^ warp.integer(distance)
    warp.put_predicate(valid, from_lane < LANES)
    warp.put(target, warp.integer(source)[from_lane % LANES])


@executes("VIMNMX", "VIADDMNMX")
def extreme(warp: Warp, i: Instruction) -> None:
    target, *sources, other, smaller = i.operands
    kind = np.uint32 if i.has("U32") else np.int32
    total = sum((warp.integer(source) for source in sources), np.zeros(LANES, np.uint32))
    a, b = total.view(kind), warp.integer(other).view(kind)
    value = np.where(warp.predicate(smaller), np.minimum(a, b), np.maximum(a, b))
    warp.put(target, value)


@executes("IABS")
def absolute(warp: Warp, i: Instruction) -> None:
    warp.put(i.operands[0], np.abs(warp.signed(i.operands[1])))


@executes("PRMT")
def permute(warp: Warp, i: Instruction) -> None:
    target, low, selector, high = i.operands
    both, choice = join(warp.integer(low), warp.integer(high)), warp.integer(selector)
    if i.modifiers or (choice & np.uint32(0x8888)).any():  # copies of a sign
        raise Unknown(i, "selector")
    value = np.zeros(LANES, np.uint64)
    for byte in range(4):
        source = (choice >> np.uint32(4 * byte) & np.uint32(7)).astype(np.uint64)
        value |= (both >> source * np.uint64(8) & np.uint64(0xFF)) << np.uint64(8 * byte)
    warp.put(target, value)


@executes("BREV")
def reverse_bits(warp: Warp, i: Instruction) -> None:
    value = warp.integer(i.operands[1])
    warp.put(i.operands[0], np.array([int(f"{v:032b}"[::-1], 2) for v in value], np.uint32))


@executes("FLO")
def find_leading_one(warp: Warp, i: Instruction) -> None:
    if i.modifiers not in (["U32", "SH"], ["U32"]):
        raise Unknown(i, "modifier")
    # From the upper end with SH, else from the lower one; all ones where there is none.
    lengths = [int(v).bit_length() for v in warp.integer(i.operands[1])]
    places = [32 - n if i.has("SH") else n - 1 for n in lengths]
    values = [p if n else 0xFFFFFFFF for p, n in zip(places, lengths, strict=True)]
    warp.put(i.operands[0], np.array(values, np.uint32))


@executes("POPC")
def count_ones(warp: Warp, i: Instruction) -> None:
    target, source = i.operands
    warp.put(target, np.array([int(v).bit_count() for v in warp.integer(source)], np.uint32))


@executes("I2F")
def to_float(warp: Warp, i: Instruction) -> None:
    read = warp.integer if i.has("U32") else warp.signed
    exact = read(i.operands[1]).astype(np.float64)
    value = exact.astype(np.float32)
    if i.has("RP"):  # up, as divisions of integers need it
        value = np.where(value < exact, np.nextafter(value, np.float32(np.inf)), value)
    warp.put_floats(i.operands[0], value)


@executes("F2I")
def to_integer(warp: Warp, i: Instruction) -> None:
    if not i.has("U32"):
        raise Unknown(i, "modifier")
    value = np.nan_to_num(warp.floats(i.operands[1]).astype(np.float64), nan=0)
    warp.put(i.operands[0], np.clip(value, 0, 0xFFFFFFFF).astype(np.uint64))


@executes("MUFU")
def approximate(warp: Warp, i: Instruction) -> None:
    functions = {"RCP": np.reciprocal, "EX2": np.exp2}
    if i.modifiers[0] not in functions:
        raise Unknown(i, "function")
    warp.put_floats(i.operands[0], functions[i.modifiers[0]](warp.floats(i.operands[1])))


@executes("FADD", "FMUL", "FFMA")
def calculate(warp: Warp, i: Instruction) -> None:
    a, b, *c = (warp.floats(operand) for operand in i.operands[1:])
    value = a + b if i.opcode == "FADD" else a * b
    if i.opcode == "FFMA":
        value = value + c[0]
    warp.put_floats(i.operands[0], np.clip(value, 0, 1) if i.has("SAT") else value)


@executes("F2FP")
def to_bfloat16(warp: Warp, i: Instruction) -> None:
    if not (i.has("BF16") and i.has("PACK_AB")):
        raise Unknown(i, "modifier")
    target, high, low = i.operands
    upper = warp.floats(high).view(np.uint32) & np.uint32(0xFFFF0000)
    warp.put(target, upper | warp.floats(low).view(np.uint32) >> np.uint32(16))


@executes("HFMA2")
def half_constant(warp: Warp, i: Instruction) -> None:
    target, a, b, *halves = i.operands
    if (a.text, b.text, len(halves)) != ("RZ", "RZ", 2):
        raise Unknown(i, "operand")
    high, low = (warp.floats(half).astype(np.float16).view(np.uint16) for half in halves)
    warp.put(target, high.astype(np.uint32) << np.uint32(16) | low)
