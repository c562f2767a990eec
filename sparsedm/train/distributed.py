"""Several processes train one run: each computes its share of every batch, and all make the same step (DDP).

    one machine:                   torchrun --nproc-per-node 8 -m -- sparsedm train ...
    each of two, HOST one of them: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
                                            -m -- sparsedm train ...

Every process draws the random numbers of the whole batch and uses its part. So the number of processes changes only
rounding, and a run may be resumed with a different number. Two things do differ, because each share draws its own:
dropout, and the width of a slimmable network for each image. In `sample` and `evaluate` each process draws its share of
the images. Only the first process writes; all processes must see the run folder. Without torchrun nothing here has an
effect.
"""

import contextlib
import hashlib
import itertools
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

from sparsedm.errors import InputError, Stopped
from sparsedm.sparsity import masks


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun started, if there are any: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_device() if device.index is None else device)
    # agreements between processes, such as the end of a run, use CPU tensors and must not wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_device():
    """The GPU of this process on its machine; the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    """Whether this process writes files."""
    return rank() == 0


class Refused(Stopped):
    """The main process has said what is wrong; this is another one."""

    exit_code = 2


def first(work):
    """work() in the main process, while the others wait; files that it wrote can then be read. Returns its result.

    The others get None. Raises: what `work` raises; in the others Refused.
    """
    result = error = None
    if is_main_process():
        try:
            result = work()
        except Exception as raised:
            error = raised
    if anywhere(error is not None):
        raise error or Refused("process 0 refused to go on")
    return result


def parallel(network):
    """`network` with gradients averaged over all processes; `network` itself if there is one process."""
    if world() == 1:
        return network
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renamed the option
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def mean(values):
    """The mean of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def anywhere(flag):
    """Whether `flag` is true in any process. A signal may reach one process a step before the others."""
    if world() == 1:
        return bool(flag)
    flags = torch.tensor(bool(flag), dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def shares(batch_size, accumulate):
    """[(number, slice of the batch)]: the parts of equal size that this process computes one after the other.

    Raises: InputError if the batch cannot be divided equally.
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
    """Compute `draw(0, count)` in parts, one per process. Returns it in the first process, None in the others.

    draw: (start, stop) -> a tensor (stop - start, ...) on the CPU, computed in batches of `batch_size` from `start` on.
    Parts are whole batches, so that the result has the same bits as with one process. If there are fewer batches than
    processes, the parts have equal sizes instead; this may change the rounding.
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
    """Raise InputError unless all processes have the same masks. Otherwise they would train different networks."""
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
