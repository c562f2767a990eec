"""Operands of instructions, decoded once into functions of the warp. A register holds one numpy array of 32 lanes."""

import re

import numpy as np

from emulator.errors import EmulatorError
from emulator.memory import SHARED_BASE

LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4  # a lane holds a pair of row GROUP of an 8 x 8 matrix, the THREAD-th pair
TYPES = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "bf16x2": np.uint32},
    "f16x2": np.uint32,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
INSTRUCTIONS = {}  # opcode -> function(instruction) -> function(block, warp, mask)


def instruction(*names):
    def register(build):
        INSTRUCTIONS.update(dict.fromkeys(names, build))
        return build

    return register


def new_registers(slots):
    """Filled with garbage: a program may not depend on a register that it has not written."""
    dtypes = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
    garbage = {bits: np.full(32, 0xDEADBEEFDEADBEEF, np.uint64).astype(dtype) for bits, dtype in dtypes.items()}
    return [garbage[bits] for bits in slots]


def reader(ins, text, kind):
    """-> function(warp) -> array (32,) of the type `kind`. Wider registers are truncated."""
    dtype = np.dtype(TYPES[kind])
    register = ins.scope.register(text)
    if register:
        slot, bits = register
        if kind == "pred":
            return lambda warp: warp.registers[slot]
        if bits == 8 * dtype.itemsize:
            return lambda warp: warp.registers[slot].view(dtype)
        if bits < 8 * dtype.itemsize:
            raise EmulatorError(f"{text} is narrower than .{kind} in: {ins.text}")
        unsigned = UNSIGNED[dtype.itemsize]
        return lambda warp: warp.registers[slot].astype(unsigned).view(dtype)
    if re.match(r"-?\d", text):
        constant = _literal(text, dtype)
        return lambda warp: constant
    if text in ("true", "false"):
        constant = np.full(32, text == "true")
        return lambda warp: constant
    if text == "global_smem":
        constant = np.full(32, SHARED_BASE).astype(dtype)
        return lambda warp: constant
    return lambda warp: np.broadcast_to(warp.special(text), 32).astype(dtype)


def _literal(text, dtype):
    if text[:2] in ("0f", "0d"):
        bits = np.full(32, int(text[2:], 16), np.uint32 if text[1] == "f" else np.uint64)
        return bits.view(dtype) if bits.dtype.itemsize == dtype.itemsize else bits.astype(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype == np.bool_:
        return np.full(32, bool(value))
    return np.full(32, value & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize]).view(dtype)


def writer(ins, text):
    """-> function(warp, array, mask): stores the bits of `array`, zero-extended or cut to the register's width."""
    if text == "_":
        return lambda warp, value, mask: None
    register = ins.scope.register(text)
    if register is None:
        raise EmulatorError(f"{text} is no register in: {ins.text}")
    slot, bits = register
    if bits == 1:
        return lambda warp, value, mask: warp.put(slot, value.astype(np.bool_), mask)
    unsigned = UNSIGNED[bits // 8]

    def write(warp, value, mask):
        value = np.ascontiguousarray(value)
        if value.dtype.itemsize * 8 == bits:
            value = value.view(unsigned)
        else:
            value = value.view(UNSIGNED[value.dtype.itemsize]).astype(unsigned)
        warp.put(slot, value, mask)

    return write


def vector(text):
    """'{a, b}' -> ['a', 'b'], 'a' -> ['a']."""
    return [part.strip() for part in text.strip("{}").split(",")] if text.startswith("{") else [text]


def address(ins, text):
    """'[%rd4+16]' -> function(warp) -> int64 addresses (32,)."""
    match = re.match(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
    if not match:
        raise EmulatorError(f"address {text} in: {ins.text}")
    register = ins.scope.register(match[1])
    base = reader(ins, match[1], f"u{register[1]}" if register else "u64")
    offset = int(match[2] or "0", 0)
    return lambda warp: base(warp).astype(np.int64) + offset


def active(mask):
    """The lanes that take part."""
    return LANES if mask is None else np.nonzero(mask)[0]


def same_in_all_lanes(value, what):
    if not (value == value[0]).all():
        raise EmulatorError(f"{what} differs between the lanes of a warp")
    return value[0]
