"""Moves, conversions, integer and floating-point arithmetic."""

import operator

import numpy as np

from emulator.errors import EmulatorError
from emulator.memory import MAP_BASE
from emulator.operands import LANES, TYPES, active, instruction, reader, vector, writer


def bf16_to_f32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values):
    """Round to nearest even, as cvt.rn does."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


@instruction("cvta")
def _cvta(ins):
    """Generic addresses are equal to the others, except addresses of parameters."""
    kind, (target, source) = ins.mods[-1], ins.args
    read, write = reader(ins, source, kind), writer(ins, target)
    base = MAP_BASE if ins.mods[0] == "param" else 0
    return lambda block, warp, mask: write(warp, read(warp) + TYPES[kind].type(base), mask)


@instruction("mov")
def _mov(ins):
    kind, (target, source) = ins.mods[-1], ins.args
    bits = 1 if kind == "pred" else int(kind[1:])
    if target.startswith("{"):
        parts = vector(target)
        read, write = reader(ins, source, f"u{bits}"), [writer(ins, part) for part in parts]

        def split(block, warp, mask):
            pieces = np.ascontiguousarray(read(warp)).view(f"u{bits // 8 // len(parts)}").reshape(32, -1)
            for i, put in enumerate(write):
                put(warp, pieces[:, i], mask)

        return split
    if source.startswith("{"):
        parts = vector(source)
        reads = [reader(ins, part, f"u{bits // len(parts)}") for part in parts]
        write = writer(ins, target)

        def join(block, warp, mask):
            write(warp, np.stack([read(warp) for read in reads], 1).view(f"u{bits // 8}")[:, 0], mask)

        return join
    read, write = reader(ins, source, kind), writer(ins, target)
    return lambda block, warp, mask: write(warp, read(warp), mask)


@instruction("cvt")
def _cvt(ins):
    if "bf16x2" in ins.mods or "f16x2" in ins.mods:
        write, high, low = writer(ins, ins.args[0]), *(reader(ins, a, "f32") for a in ins.args[1:])
        narrow = f32_to_bf16 if "bf16x2" in ins.mods else lambda values: values.astype(np.float16)

        def pack(block, warp, mask):
            with np.errstate(all="ignore"):
                halves = np.stack((narrow(low(warp)), narrow(high(warp))), 1)
            write(warp, halves.view(np.uint32)[:, 0], mask)

        return pack
    to, source = ins.mods[-2], ins.mods[-1]
    read, write = reader(ins, ins.args[1], source), writer(ins, ins.args[0])
    if source == "bf16":
        convert = {"f32": bf16_to_f32}[to]
    elif to == "bf16":
        convert = {"f32": f32_to_bf16}[source]
    else:
        convert = lambda value: value.astype(TYPES[to])  # noqa: E731

    def run(block, warp, mask):
        with np.errstate(all="ignore"):
            write(warp, convert(read(warp)), mask)

    return run


def _elementwise(names, function, with_nan=None):
    """Registers an instruction whose last modifier is the type of all operands. with_nan: its form `.NaN`."""

    @instruction(*names)
    def build(ins):
        _no_bf16(ins)
        reads = [reader(ins, arg, ins.mods[-1]) for arg in ins.args[1:]]
        write = writer(ins, ins.args[0])
        compute = with_nan if "NaN" in ins.mods else function
        if compute is None:
            raise EmulatorError(f"{ins.text} has no form .NaN here")

        def run(block, warp, mask):
            with np.errstate(all="ignore"):
                write(warp, compute(*[read(warp) for read in reads]), mask)

        return run


def _no_bf16(ins):
    """bf16 registers hold integers here: arithmetic would be on their bits."""
    if ins.mods[-1].startswith("bf16"):
        raise EmulatorError(f"arithmetic on bf16 is not emulated: {ins.text}")


def _fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a, b):
    return (a - b * _divide(a, b)).astype(a.dtype)


def _approximate(function, relative_error):
    """The exact function plus the error that the PTX ISA allows; its sign changes from lane to lane."""
    signs = np.where(LANES * 7 % 3 == 0, 1, -1) * np.float32(relative_error)
    return lambda a: (function(a) * (1 + signs)).astype(np.float32)


_elementwise(["add"], operator.add)
_elementwise(["sub"], operator.sub)
_elementwise(["fma"], _fma)
_elementwise(["div"], _divide)
_elementwise(["rem"], _remainder)


def _or_nan(function):
    """`function`, whose NaN are PTX's canonical one."""

    def canonical(a, b):
        found = function(a, b)
        return np.where(np.isnan(found), np.uint32(0x7FFFFFFF).view(np.float32), found)

    return canonical


_elementwise(["min"], np.fmin, _or_nan(np.minimum))
_elementwise(["max"], np.fmax, _or_nan(np.maximum))
_elementwise(["and"], operator.and_)
_elementwise(["or"], operator.or_)
_elementwise(["xor"], operator.xor)
_elementwise(["not"], operator.invert)
_elementwise(["neg"], operator.neg)
_elementwise(["abs"], np.abs)
_elementwise(["sqrt"], np.sqrt)
_elementwise(["copysign"], lambda sign, magnitude: np.copysign(magnitude, sign))
_elementwise(["ex2"], _approximate(np.exp2, 2.0**-22))
_elementwise(["rcp"], _approximate(np.reciprocal, 2.0**-23))
_elementwise(["tanh"], _approximate(np.tanh, 2.0**-11))


@instruction("mul", "mad")
def _multiply(ins):
    _no_bf16(ins)
    kind = ins.mods[-1]
    reads = [reader(ins, arg, kind) for arg in ins.args[1:3]]
    write = writer(ins, ins.args[0])
    wide = "wide" in ins.mods
    addend = reader(ins, ins.args[3], f"{kind[0]}{2 * int(kind[1:])}" if wide else kind) if ins.op == "mad" else None

    def run(block, warp, mask):
        a, b = (read(warp) for read in reads)
        with np.errstate(all="ignore"):
            if wide:
                product = a.astype(f"{a.dtype.kind}{2 * a.dtype.itemsize}") * b
            elif "hi" in ins.mods:
                product = (a.astype(f"{a.dtype.kind}8") * b >> 32).astype(a.dtype)
            else:
                product = a * b
            write(warp, product if addend is None else product + addend(warp), mask)

    return run


@instruction("shl", "shr")
def _shift(ins):
    kind = ins.mods[-1]
    read, count, write = reader(ins, ins.args[1], kind), reader(ins, ins.args[2], "u32"), writer(ins, ins.args[0])
    last = int(kind[1:]) - 1

    def run(block, warp, mask):
        value, by = read(warp), count(warp)
        clamped = np.minimum(by, last).astype(value.dtype)
        shifted = value << clamped if ins.op == "shl" else value >> clamped
        write(warp, shifted if kind[0] == "s" else np.where(by > last, 0, shifted).astype(value.dtype), mask)

    return run


@instruction("bfe")
def _bit_field_extract(ins):
    kind = ins.mods[-1]
    value, position, length = (reader(ins, a, k) for a, k in zip(ins.args[1:], (kind, "u32", "u32")))
    write = writer(ins, ins.args[0])
    if kind != "u32" and kind != "s32":
        raise EmulatorError(ins.text)

    def run(block, warp, mask):
        at, count = position(warp).astype(np.int64) & 255, length(warp).astype(np.int64) & 255
        field = value(warp).astype(np.int64) >> np.minimum(at, 31) & ((1 << np.minimum(count, 32)) - 1)
        if kind[0] == "s":
            field = np.where((count > 0) & (field >> np.maximum(count - 1, 0) & 1 == 1), field - (1 << count), field)
        write(warp, field.astype(TYPES[kind]), mask)

    return run


@instruction("prmt")
def _permute(ins):
    a, b, selector = (reader(ins, arg, "u32") for arg in ins.args[1:])
    write = writer(ins, ins.args[0])

    def run(block, warp, mask):
        pool = np.stack((a(warp), b(warp)), 1).view(np.uint8)
        selectors = selector(warp)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        picked = np.take_along_axis(pool, (selectors & 7).astype(np.int64), 1)
        sign = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
        chosen = np.where(selectors & 8, sign, picked)
        write(warp, np.ascontiguousarray(chosen).view(np.uint32)[:, 0], mask)

    return run


@instruction("lop3")
def _lop3(ins):
    reads, write = [reader(ins, arg, "u32") for arg in ins.args[1:4]], writer(ins, ins.args[0])
    table = int(ins.args[4], 0)

    def run(block, warp, mask):
        values = [read(warp) for read in reads]
        result = np.zeros(32, np.uint32)
        for case in range(8):
            if table >> case & 1:
                terms = [v if case >> bit & 1 else ~v for v, bit in zip(values, (2, 1, 0))]
                result |= terms[0] & terms[1] & terms[2]
        write(warp, result, mask)

    return run


@instruction("selp")
def _select(ins):
    a, b = (reader(ins, arg, ins.mods[-1]) for arg in ins.args[1:3])
    predicate, write = reader(ins, ins.args[3], "pred"), writer(ins, ins.args[0])
    return lambda block, warp, mask: write(warp, np.where(predicate(warp), a(warp), b(warp)), mask)


COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge, "equ": lambda a, b: ~(a < b) & ~(a > b),
    "neu": lambda a, b: ~(a == b), "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


@instruction("setp")
def _compare(ins):
    compare, kind = COMPARE[ins.mods[0]], ins.mods[-1]
    a, b = (reader(ins, arg, kind) for arg in ins.args[1:3])
    write = writer(ins, ins.args[0])
    combine = {"and": operator.and_, "or": operator.or_}.get(ins.mods[1])
    other = reader(ins, ins.args[3].lstrip("!"), "pred") if combine else None

    def run(block, warp, mask):
        result = compare(a(warp), b(warp))
        write(warp, combine(result, other(warp)) if combine else result, mask)

    return run


@instruction("shfl")
def _shuffle(ins):
    read, lane = reader(ins, ins.args[1], "b32"), reader(ins, ins.args[2], "u32")
    write = writer(ins, ins.args[0].split("|")[0])
    source = {"idx": lambda by: by & 31, "bfly": lambda by: LANES ^ by}[ins.mods[1]]
    return lambda block, warp, mask: write(warp, read(warp)[source(lane(warp).astype(np.int64))], mask)


@instruction("redux")
def _reduce(ins):
    read, write = reader(ins, ins.args[1], ins.mods[-1]), writer(ins, ins.args[0])
    if ins.mods[1] != "add":
        raise EmulatorError(ins.text)
    return lambda block, warp, mask: write(warp, np.full(32, read(warp)[active(mask)].sum(dtype=np.int32)), mask)


@instruction("popc")
def _count_bits(ins):
    read, write = reader(ins, ins.args[1], "u32"), writer(ins, ins.args[0])

    def run(block, warp, mask):
        bits = np.unpackbits(np.ascontiguousarray(read(warp)).view(np.uint8).reshape(32, 4), 1)
        write(warp, bits.sum(1, dtype=np.uint32), mask)

    return run


@instruction("elect")
def _elect(ins):
    _, predicate = (part.strip() for part in ins.args[0].split("|"))
    write, chosen = writer(ins, predicate), LANES == 0
    return lambda block, warp, mask: write(warp, chosen, mask)


@instruction("activemask")
def _active_mask(ins):
    write = writer(ins, ins.args[0])
    return lambda block, warp, mask: write(warp, np.full(32, sum(1 << int(i) for i in active(mask)), np.uint32), None)
