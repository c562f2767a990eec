"""Warps, blocks and clusters, and their order of execution.

In mode "early" asynchronous work (TMA, cp.async, wgmma) completes at once. In mode "late" it completes only when the
program waits for it (TMA loads: when nothing else can continue), in random order. If a wait is missing, one of the two
gives a wrong result. Within a cluster the warps take turns in random order. A program that cannot continue is an error.
"""

import itertools

import numpy as np

from emulator import arithmetic, async_copies, loads_stores, tensor_cores  # noqa: F401  (fill INSTRUCTIONS)
from emulator.errors import EmulatorError
from emulator.memory import MAP_BASE, RANK_SHIFT, SharedMemory, TensorMap
from emulator.operands import INSTRUCTIONS, LANES, instruction, new_registers, reader, same_in_all_lanes
from emulator.parse import Program


class Warp:
    def __init__(self, block, index):
        self.block, self.index, self.pc = block, index, 0
        self.registers = new_registers(block.program.slots)
        self.threads = LANES + 32 * index
        self.waiting = None  # why it cannot continue; "done" at the end
        self.spinning = False
        self.wgmma = Groups()
        self.bulk = Groups()
        self.copies = Groups()

    def put(self, slot, value, mask):
        self.registers[slot] = value if mask is None else np.where(mask, value, self.registers[slot])

    def special(self, name):
        block = self.block
        axes = {"tid": (self.threads, 0, 0), "ntid": (block.program.threads, 1, 1), "ctaid": block.index}
        axes |= {"nctaid": block.grid}
        register, _, axis = name.lstrip("%").partition(".")
        if register in axes:
            return axes[register]["xyz".index(axis)]
        rank = {"cluster_ctarank": block.rank, "cluster_nctarank": len(block.cluster)}
        names = {"laneid": LANES, "warpid": self.index, "WARP_SZ": 32} | rank | block.parameters
        if register not in names:
            raise EmulatorError(f"operand {name}")
        return names[register]

    def finish(self):
        for groups in (self.bulk, self.copies):
            groups.commit()
            groups.wait(0)


class Groups:
    """Asynchronous operations of one warp: issued, committed in groups, completed by waiting."""

    def __init__(self):
        self.open, self.committed = [], []

    def issue(self, complete, early):
        complete() if early else self.open.append(complete)

    def commit(self):
        self.committed.append(self.open)
        self.open = []

    def wait(self, pending):
        while len(self.committed) > pending:
            for complete in self.committed.pop(0):
                complete()


class Block:
    def __init__(self, program, code, parameters, memory, index, grid, early, rank):
        self.program, self.code, self.memory, self.early = program, code, memory, early
        self.index, self.grid, self.rank = index, grid, rank
        self.parameters, self.maps = {}, {}
        for position, ((name, kind), value) in enumerate(zip(program.parameters, parameters, strict=True)):
            if (kind == "map") != isinstance(value, TensorMap):
                raise EmulatorError(f"parameter {name} is a {kind}, not a {type(value).__name__}")
            if kind == "map":
                self.maps[MAP_BASE + 4096 * position] = value
                value = 4096 * position
            self.parameters[name] = value
        self.shared = SharedMemory()
        self.warps = [Warp(self, i) for i in range(program.threads // 32)]
        self.named_barriers = {}
        self.wgmma_arrivals = {}
        self.incoming = []  # TMA loads that have not landed
        self.progress = 0
        self.executed = 0
        self.started = self.exited = False
        self.cluster, self.cluster_barrier = [self], None

    def step(self, warp, limit=200_000):
        """Runs the warp until it waits."""
        for _ in range(limit):
            if warp.waiting is not None:
                return
            predicate, run = self.code[warp.pc]
            warp.pc += 1
            self.executed += 1
            spins = run(self, warp, predicate and predicate(warp))
            if spins == "yield":
                return
            if spins is None:
                self.progress += 1

    def peer(self, rank):
        if rank >= len(self.cluster):
            raise EmulatorError(f"rank {rank} is outside the cluster")
        peer = self.cluster[rank]
        if peer is not self and peer.exited:
            raise EmulatorError(f"block {self.rank} touches block {rank} of the cluster after its exit")
        if peer is not self and not peer.started:
            raise EmulatorError(f"block {self.rank} touches block {rank} before a cluster barrier")
        return peer

    def mapped(self, address):
        """A shared::cluster address -> (block, its own address)."""
        rank = address >> RANK_SHIFT
        return (self if rank == 0 else self.peer(rank - 1)), address & ((1 << RANK_SHIFT) - 1)


def execute(ptx, parameters, memory, grid, *, early=True, cluster=1, seed=0):
    """Runs a kernel. parameters: in the order of the PTX, a TensorMap for each tensor map, integers for the rest.

    grid: blocks as (x, y, z) or fewer; x must be a multiple of cluster. Returns the number of warp instructions.
    """
    program = ptx if isinstance(ptx, Program) else Program(ptx)
    code = [_decode(ins) for ins in program.instructions]
    grid = (*grid, 1, 1)[:3]
    rng = np.random.default_rng(seed)
    executed = 0
    for z, y, x in itertools.product(range(grid[2]), range(grid[1]), range(0, grid[0], cluster)):
        places = [(x + rank, y, z) for rank in range(cluster)]
        blocks = [Block(program, code, parameters, memory, at, grid, early, rank) for rank, at in enumerate(places)]
        _run_cluster(blocks, rng)
        executed += sum(block.executed for block in blocks)
    return executed


def _decode(ins):
    if ins.op not in INSTRUCTIONS:
        raise EmulatorError(f"unknown instruction: {ins.text}")
    if ins.predicate is None:
        return None, INSTRUCTIONS[ins.op](ins)
    predicate = reader(ins, ins.predicate, "pred")
    return (lambda warp: ~predicate(warp)) if ins.negated else predicate, INSTRUCTIONS[ins.op](ins)


def _run_cluster(blocks, rng):
    barrier = {"arrived": set(), "phase": 0}
    for block in blocks:
        block.cluster, block.cluster_barrier, block.started = blocks, barrier, len(blocks) == 1
    while not all(block.exited for block in blocks):
        before = sum(block.progress for block in blocks)
        live = [warp for block in blocks for warp in block.warps if warp.waiting != "done"]
        for i in rng.permutation(len(live)):
            live[i].block.step(live[i])
        for block in blocks:
            if not block.exited and all(warp.waiting == "done" for warp in block.warps):
                for warp in block.warps:
                    warp.finish()
                block.exited = True
                block.progress += 1
        if sum(block.progress for block in blocks) == before:
            waiting = [block for block in blocks if block.incoming]
            if not waiting:
                where = [f"{w.block.rank}.{w.index} at {w.block.program.instructions[w.pc].text[:60]}" for w in live]
                raise EmulatorError("deadlock: " + "; ".join(where))
            incoming = waiting[rng.integers(len(waiting))].incoming
            incoming.pop(rng.integers(len(incoming)))()
    for block in blocks:
        if block.incoming:
            raise EmulatorError(f"block {block.rank} ended with TMA loads in flight")


@instruction("bra")
def _branch(ins):
    target = ins.args[0]

    def run(block, warp, mask):
        taken = mask is None or mask.all()
        if not taken and mask.any():
            raise EmulatorError(f"divergent branch: {ins.text}")
        if taken:
            warp.pc = ins.scope.label(target)
        if warp.spinning:
            warp.spinning = False
            return "yield" if taken else None

    return run


@instruction("brx")
def _indexed_branch(ins):
    index = reader(ins, ins.args[0], "u32")

    def run(block, warp, mask):
        chosen = block.program.targets[ins.args[1]][same_in_all_lanes(index(warp), "a branch index")]
        warp.pc = ins.scope.label(chosen)

    return run


@instruction("ret", "exit")
def _exit(ins):
    def run(block, warp, mask):
        if mask is not None and not mask.all():
            raise EmulatorError("lanes of a warp exit one by one")
        warp.waiting = "done"
        _release_cluster(block)

    return run


@instruction("fence")
def _fence(ins):
    return (lambda block, warp, mask: block.shared.fence(warp.index)) if "proxy" in ins.mods else _nothing(ins)


@instruction("setmaxnreg", "membar", "griddepcontrol", "nanosleep")
def _nothing(ins):
    return lambda block, warp, mask: None


@instruction("bar", "barrier")
def _barrier(ins):
    if "cluster" in ins.mods:
        return _cluster_barrier(ins)
    if "warp" in ins.mods:
        return _nothing(ins)
    number = reader(ins, ins.args[0], "u32")
    count = reader(ins, ins.args[1], "u32") if len(ins.args) > 1 else None

    def run(block, warp, mask):
        arrived = block.named_barriers.setdefault(int(number(warp)[0]), [])
        arrived.append(warp)
        warp.waiting = "barrier"
        if 32 * len(arrived) >= (block.program.threads if count is None else int(count(warp)[0])):
            for other in arrived:
                other.waiting = None
            arrived.clear()

    return run


def _cluster_barrier(ins):
    def arrive(block, warp, mask):
        if warp in block.cluster_barrier["arrived"]:
            raise EmulatorError("a warp arrives twice at the cluster barrier")
        block.cluster_barrier["arrived"].add(warp)
        warp.cluster_phase = block.cluster_barrier["phase"]
        _release_cluster(block)

    def wait(block, warp, mask):
        if warp.cluster_phase == block.cluster_barrier["phase"]:
            warp.waiting = "cluster"

    return arrive if "arrive" in ins.mods else wait


def _release_cluster(block):
    """The barrier opens when every warp of every block has arrived or ended."""
    barrier = block.cluster_barrier
    if all(w in barrier["arrived"] or w.waiting == "done" for b in block.cluster for w in b.warps):
        barrier["arrived"].clear()
        barrier["phase"] += 1
        for other in block.cluster:
            other.started = True
            other.progress += 1
            for warp in other.warps:
                if warp.waiting == "cluster":
                    warp.waiting = None
