"""mbarrier, TMA (cp.async.bulk.tensor) and cp.async."""

import functools
import re

import numpy as np

from emulator.errors import EmulatorError
from emulator.memory import RANK_SHIFT, Mbarrier, swizzle
from emulator.operands import active, address, instruction, reader, writer


@instruction("mapa")
def _map_address(ins):
    own, rank, write = reader(ins, ins.args[1], "u32"), reader(ins, ins.args[2], "u32"), writer(ins, ins.args[0])

    def run(block, warp, mask):
        if rank(warp).max() >= len(block.cluster):
            raise EmulatorError(f"rank outside the cluster: {ins.text}")
        write(warp, own(warp) | (rank(warp) + np.uint32(1)) << np.uint32(RANK_SHIFT), mask)

    return run


@instruction("mbarrier")
def _mbarrier(ins):
    action = ins.mods[0]
    if action == "init":
        where, count = address(ins, ins.args[0]), reader(ins, ins.args[1], "u32")

        def run(block, warp, mask):
            for lane in active(mask):
                block.shared.barriers[int(where(warp)[lane])] = Mbarrier(int(count(warp)[lane]))

    elif action == "inval":
        where = address(ins, ins.args[0])

        def run(block, warp, mask):
            for lane in active(mask):
                del block.shared.barriers[int(where(warp)[lane])]

    elif action == "arrive":
        args = [arg for arg in ins.args if arg != "_"]
        where = address(ins, args[0])
        operand = reader(ins, args[1], "u32") if len(args) > 1 else None
        expects = "expect_tx" in ins.mods

        def run(block, warp, mask):
            for lane in active(mask):
                target, own = block.mapped(int(where(warp)[lane]))
                number = 1 if operand is None else int(operand(warp)[lane])
                barrier = target.shared.barrier(own)
                barrier.arrive(1, number) if expects else barrier.arrive(number)
                target.progress += 1

    elif action in ("try_wait", "test_wait"):
        where, parity = address(ins, ins.args[1]), reader(ins, ins.args[2], "u32")
        write = writer(ins, ins.args[0])

        def run(block, warp, mask):
            done = block.shared.barrier(int(where(warp)[0])).phase & 1 != int(parity(warp)[0]) & 1
            write(warp, np.full(32, done), mask)
            warp.spinning = not done
            return None if done else "spin"

    else:
        raise EmulatorError(ins.text)
    return run


@instruction("cp")
def _copy(ins):
    mods = ins.mods
    if mods[:3] == ("async", "bulk", "tensor"):
        loads = "mbarrier::complete_tx::bytes" in mods
        return _tensor_load(ins) if loads else _tensor_store(ins)
    groups = (lambda warp: warp.bulk) if "bulk" in mods else (lambda warp: warp.copies)
    if "commit_group" in mods:
        return lambda block, warp, mask: groups(warp).commit()
    if "wait_group" in mods:
        pending = int(ins.args[0], 0)
        return lambda block, warp, mask: groups(warp).wait(pending)
    if mods[0] == "async" and "shared" in mods:
        return _copy_async(ins)
    raise EmulatorError(ins.text)


def _tensor_arguments(ins, text):
    """'[map, {c0, c1}]' -> function(block, warp, lane) -> (TensorMap, coordinates innermost first)."""
    tensor_map, coordinates = re.match(r"\[\s*(%?\w+)\s*,\s*\{(.*?)\}\s*\]$", text, re.S).groups()
    read_map = reader(ins, tensor_map, "u64")
    reads = [reader(ins, part.strip(), "s32") for part in coordinates.split(",")]

    def read(block, warp, lane):
        where = int(read_map(warp)[lane])
        if where not in block.maps:
            raise EmulatorError(f"no tensor map at {where:#x}: {ins.text}")
        return block.maps[where], [int(r(warp)[lane]) for r in reads]

    return read


def _tensor_load(ins):
    where, barrier = address(ins, ins.args[0]), address(ins, ins.args[2])
    arguments = _tensor_arguments(ins, ins.args[1])
    multicast = reader(ins, ins.args[3], "u16") if "multicast::cluster" in ins.mods else None

    def run(block, warp, mask):
        for lane in active(mask):
            tensor, coordinates = arguments(block, warp, lane)
            target, full = int(where(warp)[lane]), int(barrier(warp)[lane])
            ranks = 1 << block.rank if multicast is None else int(multicast(warp)[lane])
            for rank in range(ranks.bit_length()):
                if ranks >> rank & 1:
                    land = functools.partial(_land, block, rank, tensor, coordinates, target, full)
                    if rank >= len(block.cluster):
                        raise EmulatorError(f"multicast outside the cluster: {ins.text}")
                    land() if block.early else block.incoming.append(land)

    return run


def _land(source, rank, tensor, coordinates, target, full):
    block = source.peer(rank)
    if target % 128:
        raise EmulatorError("TMA needs a destination aligned to 128 bytes")
    indices = swizzle(target + np.arange(tensor.bytes), tensor.swizzle)
    block.shared.async_write(indices, tensor.read(coordinates))
    block.shared.barrier(full).receive(tensor.bytes)
    block.progress += 1


def _tensor_store(ins):
    arguments, where = _tensor_arguments(ins, ins.args[0]), address(ins, ins.args[1])

    def run(block, warp, mask):
        for lane in active(mask):
            tensor, coordinates = arguments(block, warp, lane)
            indices = swizzle(int(where(warp)[lane]) + np.arange(tensor.bytes), tensor.swizzle)
            block.shared.async_read(indices)  # refuses now what the engine may read at once

            def store(tensor=tensor, coordinates=coordinates, indices=indices):
                tensor.write(coordinates, np.ascontiguousarray(block.shared.read(indices)))

            warp.bulk.issue(store, block.early)

    return run


def _copy_async(ins):
    """cp.async.{ca,cg}.shared.global [to], [from], bytes {, bytes to read, zeros after}."""
    to, source, count = address(ins, ins.args[0]), address(ins, ins.args[1]), int(ins.args[2], 0)
    available = reader(ins, ins.args[3], "u32") if len(ins.args) > 3 else None

    def run(block, warp, mask):
        lanes = active(mask)
        targets, sources = to(warp)[lanes], source(warp)[lanes]
        sizes = np.full(len(lanes), count) if available is None else available(warp)[lanes]

        def copy():
            data = np.zeros((len(lanes), count), np.uint8)
            for row, size, start in zip(data, sizes, sources):
                if size:
                    row[:size] = block.memory.bytes(int(start), int(size))
            block.shared.write(targets[:, None] + np.arange(count), data, warp.index)

        if (targets % count).any() or (sources[sizes > 0] % count).any():
            raise EmulatorError(f"misaligned: {ins.text}")
        warp.copies.issue(copy, block.early)

    return run
