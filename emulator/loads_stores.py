"""ld, st, ldmatrix, stmatrix."""

import re

import numpy as np

from emulator.errors import EmulatorError
from emulator.operands import GROUP, THREAD, active, address, instruction, reader, vector, writer


@instruction("ld")
def _load(ins):
    if ins.mods[0] == "param":
        name, offset = re.match(r"\[(\w+)(?:\+(\d+))?\]", ins.args[1]).groups()
        if offset:
            raise EmulatorError(ins.text)
        write = writer(ins, ins.args[0])
        as_bits = lambda value: np.full(32, value & ((1 << 64) - 1), np.uint64)  # noqa: E731
        return lambda block, warp, mask: write(warp, as_bits(block.parameters[name]), mask)
    where, writes, size = _access(ins, ins.args[1], ins.args[0], writer)
    shared = any(mod.startswith("shared") for mod in ins.mods)

    def run(block, warp, mask):
        lanes = active(mask)
        pieces = np.zeros((32, len(writes), size), np.uint8)
        if len(lanes):
            data, indices = _locate(block, ins, where(warp)[lanes], size * len(writes), shared)
            pieces[lanes] = data[indices].reshape(len(lanes), len(writes), size)
        for i, write in enumerate(writes):
            write(warp, np.ascontiguousarray(pieces[:, i]).view(f"u{size}")[:, 0], mask)

    return run


@instruction("st")
def _store(ins):
    kind = f"b{re.sub('[^0-9]', '', ins.mods[-1])}"
    where, reads, size = _access(ins, ins.args[0], ins.args[1], lambda i, text: reader(i, text, kind))
    shared = any(mod.startswith("shared") for mod in ins.mods)

    def run(block, warp, mask):
        lanes = active(mask)
        if not len(lanes):
            return
        stored = np.stack([read(warp) for read in reads], 1)[lanes].view(np.uint8)
        data, indices = _locate(block, ins, where(warp)[lanes], size * len(reads), shared)
        if shared:
            block.shared.write(indices, stored, warp.index)
        else:
            data[indices] = stored

    return run


def _access(ins, where, operands, decode):
    """-> (addresses, one decoded operand for each element of the vector, bytes of an element)."""
    size = int(re.sub(r"\D", "", ins.mods[-1])) // 8
    return address(ins, where), [decode(ins, text) for text in vector(operands)], size


def _locate(block, ins, addresses, count, shared):
    if (addresses % count).any():
        raise EmulatorError(f"misaligned by {int((addresses % count).max())}: {ins.text}")
    if shared:
        return block.shared.data, block.shared.inside(addresses[:, None] + np.arange(count))
    return block.memory.indices(addresses, count)


@instruction("ldmatrix")
def _load_matrix(ins):
    count, transposed = _matrices(ins)
    where, writes = address(ins, ins.args[1]), [writer(ins, text) for text in vector(ins.args[0])]

    def run(block, warp, mask):
        rows = where(warp)[: 8 * count, None] + np.arange(16)
        matrices = block.shared.read(rows).view(np.uint16).reshape(count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1))
        for matrix, write in zip(matrices, writes):
            write(warp, matrix.view(np.uint32)[GROUP, THREAD], None)

    return run


@instruction("stmatrix")
def _store_matrix(ins):
    _, transposed = _matrices(ins)
    where, reads = address(ins, ins.args[0]), [reader(ins, text, "b32") for text in vector(ins.args[1])]

    def run(block, warp, mask):
        for i, read in enumerate(reads):
            matrix = np.empty((8, 4), np.uint32)
            matrix[GROUP, THREAD] = read(warp)
            halves = matrix.view(np.uint16)
            rows = where(warp)[8 * i : 8 * i + 8]
            if (rows % 16).any():
                raise EmulatorError(f"misaligned: {ins.text}")
            stored = np.ascontiguousarray(halves.T if transposed else halves).view(np.uint8)
            block.shared.write(rows[:, None] + np.arange(16), stored, warp.index)

    return run


def _matrices(ins):
    return next(int(mod[1]) for mod in ins.mods if mod in ("x1", "x2", "x4")), "trans" in ins.mods
