"""Several processes, one run: each computes its share of every batch, and all make the same step (DDP).

    one machine:                   torchrun --nproc-per-node 8 -m -- sparsedm.cli train ...
    each of two, HOST one of them: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
                                            -m -- sparsedm.cli train ...

All randomness is drawn for the whole batch on every process, and then divided: so the number of processes changes the
rounding of a run and nothing else, and a run can be resumed with another one. (Two things differ, as each share draws
its own: dropout, and which images go to which width of a slimmable network.) Of `sample` and `evaluate` each process
draws its share of the images. The first process alone writes; the folder of the run must be visible to all. Outside of
torchrun everything here is without effect.
"""

import contextlib
import hashlib
import itertools
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

from sparsedm.errors import InputError
from sparsedm.sparsity import masks


@contextlib.contextmanager
def process_group(device):
    """Join the other processes that torchrun has started, if it has: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_device() if device.index is None else device)
    # what is agreed on, such as the end of a run, lies on the CPU, and must not wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device():
    """The GPU of this process among those of its machine, the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    """Whether this process is the one that writes."""
    return rank() == 0


def barrier():
    """Until every process is here: what the first one has written can then be read."""
    anywhere(False)


def parallel(network):
    """`network` with gradients that are averaged over all processes; `network` itself where there is one."""
    if world() == 1:
        return network
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 gives the option another name
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def mean(values):
    """The mean of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def anywhere(flag):
    """Whether `flag` is true in any process: a signal may reach one of them a step before the others."""
    if world() == 1:
        return bool(flag)
    flags = torch.tensor(bool(flag), dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def shares(batch_size, accumulate):
    """[(number, slice of the batch)] that this process computes, one after the other, all of one size.

    Raises: InputError if the batch cannot be divided so.
    """
    count = world() * accumulate
    if batch_size % count:
        raise InputError(
            f"a batch of {batch_size} images cannot be divided equally by {world()} processes x {accumulate} parts each"
        )
    size = batch_size // count
    mine = range(rank() * accumulate, (rank() + 1) * accumulate)
    return [(number, slice(number * size, (number + 1) * size)) for number in mine]


def gather(count, batch_size, draw):
    """`draw(0, count)`, of which every process computes a part; in the first one, None in the others.

    draw: (start, stop) -> a tensor (stop - start, ...) on the CPU, computed in batches of `batch_size` from `start` on.
    Parts are whole batches, so that all batches are those of one process and every bit is the same. Where there are
    fewer batches than processes, these get parts of equal size instead, which may change the rounding.
    """
    if world() == 1:
        return draw(0, count)
    size = min(batch_size, -(-count // world()))
    batches = -(-count // size)
    ends = [min(count, size * -(-batches * number // world())) for number in range(world() + 1)]
    parts = [slice(*part) for part in itertools.pairwise(ends)]
    mine = parts[rank()]
    out = draw(mine.start, mine.stop) if mine.start < mine.stop else None
    if not is_main_process():
        if out is not None:
            dist.send(out.contiguous(), 0)
        return None
    whole = torch.cat([out, out.new_empty(count - len(out), *out.shape[1:])])
    for number, part in enumerate(parts[1:], 1):
        if part.start < part.stop:
            dist.recv(whole[part], number)
    return whole


def check_masks(model):
    """Raise InputError unless all processes hold the same masks: where they do not, the run is no longer one."""
    if world() == 1:
        return
    digest = hashlib.blake2b(digest_size=8)
    for mask in masks(model).values():
        digest.update(mask.cpu().numpy().tobytes())
    mine = torch.tensor(int.from_bytes(digest.digest()) >> 1)
    all_of_them = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(all_of_them, mine)
    different = [number for number, theirs in enumerate(all_of_them) if theirs != all_of_them[0]]
    if different:
        raise InputError(
            f"the masks of processes {different} differ from those of process 0: resume from the checkpoint"
        )
