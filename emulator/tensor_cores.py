"""mma.sp.m16n8k32 and wgmma.mma_async.sp.m64nNk32 with bf16 or fp16 operands and an fp32 accumulator.

Products of 16-bit numbers are exact in fp32; sums are numpy's fp32 sums.
"""

import re

import numpy as np

from emulator.arithmetic import bf16_to_f32
from emulator.errors import EmulatorError
from emulator.memory import swizzle
from emulator.operands import GROUP, THREAD, instruction, reader, same_in_all_lanes, vector, writer

TO_F32 = {"bf16": bf16_to_f32, "f16": lambda bits: bits.view(np.float16).astype(np.float32)}


def expand(kept, words):
    """kept (rows, 16), metadata words (rows, 2) uint16 -> dense (rows, 32). Refuses pairs that do not increase."""
    pairs = (words[:, :, None] >> np.arange(0, 16, 4, dtype=np.uint16)).reshape(len(words), 8) & 15
    first, second = pairs & 3, pairs >> 2
    if (first >= second).any():
        raise EmulatorError("sparse metadata with a pair that does not increase")
    dense = np.zeros((len(kept), 8, 4), np.float32)
    positions = np.stack((first, second), -1).astype(np.int64)
    np.put_along_axis(dense, positions, kept.reshape(len(kept), 8, 2), -1)
    return dense.reshape(len(kept), 32)


def metadata_words(registers, selector):
    """One 32-lane register per 16 rows -> (rows, 2) uint16: chunk c of row g comes from lane 4 g + 2 selector + c."""
    halves = registers.view(np.uint16).reshape(-1, 8, 4, 2)  # tile, g, 2 selector + c, row half
    return halves[:, :, 2 * selector : 2 * selector + 2].transpose(0, 3, 1, 2).reshape(-1, 2)


def fragment_a(registers, to_f32):
    """The four A registers (4, 32) of m16n8k32 -> kept values (16, 16)."""
    kept = np.empty((16, 16), np.float32)
    for r, register in enumerate(registers):
        row, column = GROUP + 8 * (r & 1), 2 * THREAD + 8 * (r >> 1)
        kept[row, column], kept[row, column + 1] = to_f32(register.view(np.uint16).reshape(32, 2).T)
    return kept


@instruction("mma")
def _mma(ins):
    if not (ins.mods[0] == "sp::ordered_metadata" and "m16n8k32" in ins.mods and ins.predicate is None):
        raise EmulatorError(ins.text)
    to_f32, selector = TO_F32[ins.mods[-2]], int(ins.args[5], 0)
    writes = [writer(ins, text) for text in vector(ins.args[0])]
    a, b = ([reader(ins, text, "b32") for text in vector(arg)] for arg in ins.args[1:3])
    c, e = [reader(ins, text, "f32") for text in vector(ins.args[3])], reader(ins, ins.args[4], "b32")

    def run(block, warp, mask):
        sparse = expand(fragment_a([read(warp) for read in a], to_f32), metadata_words(e(warp), selector))
        dense = np.empty((32, 8), np.float32)
        for r, read in enumerate(b):
            k = 8 * r + 2 * THREAD
            dense[k, GROUP], dense[k + 1, GROUP] = to_f32(read(warp).view(np.uint16).reshape(32, 2).T)
        with np.errstate(invalid="ignore"):  # NaN of infinities
            product = sparse @ dense
        old = [read(warp) for read in c]
        for i, write in enumerate(writes):
            write(warp, old[i] + product[GROUP + 8 * (i >> 1), 2 * THREAD + (i & 1)], None)

    return run


@instruction("wgmma")
def _wgmma(ins):
    if ins.mods[0] == "fence":
        return lambda block, warp, mask: None
    if ins.mods[0] == "commit_group":
        return lambda block, warp, mask: warp.wgmma.commit()
    if ins.mods[0] == "wait_group":
        pending = int(ins.args[0])
        return lambda block, warp, mask: warp.wgmma.wait(pending)
    return _wgmma_sparse(ins)


def _wgmma_sparse(ins):
    columns = int(re.search(r"\.m64n(\d+)k32\.f32\.", ins.text)[1])
    if ins.mods[1] != "sp" or ins.args[5:] != ("1", "1", "1", "0", "0"):
        raise EmulatorError(ins.text)
    to_f32, selector = TO_F32[ins.mods[-1]], int(ins.args[4], 0)
    accumulator = vector(ins.args[0])
    reads, writes = [reader(ins, t, "f32") for t in accumulator], [writer(ins, t) for t in accumulator]
    descriptors = [reader(ins, text, "b64") for text in ins.args[1:3]]
    metadata = reader(ins, ins.args[3], "b32")

    def run(block, warp, mask):
        # the four warps of a warpgroup execute it together
        arrived = block.wgmma_arrivals.setdefault(warp.index // 4, [])
        arrived.append(warp)
        if len(arrived) < 4:
            warp.waiting = "wgmma"
            return
        if len({other.pc for other in arrived}) > 1:
            raise EmulatorError("the warps of a warpgroup are at different wgmma instructions")
        group = sorted(arrived, key=lambda other: other.index)
        arrived.clear()
        a, b = (same_in_all_lanes(np.concatenate([d(w) for w in group]), "a descriptor") for d in descriptors)
        words = metadata_words(np.concatenate([metadata(w) for w in group]), selector)
        product = []

        def compute():
            kept = to_f32(_operand(block, int(a), 64, 32))
            return expand(kept, words) @ to_f32(_operand(block, int(b), columns, 64)).T

        def accumulate(member, rank):
            if not product:  # the first warp to complete reads shared memory
                tile = compute().reshape(4, 2, 8, columns // 8, 4, 2)  # warp, row half, g, n8, t, pair
                product.append(tile.transpose(0, 3, 1, 5, 2, 4).reshape(4, columns // 2, 32))
            for read, write, part in zip(reads, writes, product[0][rank]):
                write(member, read(member) + part, None)

        for rank, member in enumerate(group):
            member.waiting = None
            member.wgmma.issue(lambda member=member, rank=rank: accumulate(member, rank), block.early)

    return run


def _operand(block, descriptor, rows, count):
    """The K-major operand tile (rows, count / 2) of 16-bit words that a wgmma descriptor names."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    span = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    row = np.arange(rows)[:, None]
    linear = start + row // 8 * stride + row % 8 * span + np.arange(count)
    return np.ascontiguousarray(block.shared.async_read(swizzle(linear, span))).view(np.uint16)
