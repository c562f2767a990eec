"""y (M, N) = act([x | skip] (M, K) @ W24^T + b) * s + r by `wgmma.mma_async.sp` (sm_90a): configurations and launch.

The kernels are in `wgmma_kernels.py`.
"""

import functools
import logging

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from sparsedm.kernels.launch import FUSED, Launch, multiprocessors
from sparsedm.kernels.sparse24.ptx import KIND, Epilogue
from sparsedm.kernels.sparse24.wgmma_kernels import linear_flat, linear_specialized
from sparsedm.kernels.sparse24.wgmma_pipeline import Config, boxes, cluster_size, shares_w, shares_x, warps

# The first, without clusters, is the default until these are timed.
CONFIGS = (
    Config(block_n=256, block_m=128, block_k=64, stages=4),
    Config(block_n=256, block_m=128, block_k=64, stages=4, specialized=False),
    Config(block_n=256, block_m=128, block_k=64, stages=4, cluster="w"),
    Config(block_n=128, block_m=256, block_k=64, stages=3, cluster="x"),
    Config(block_n=128, block_m=256, block_k=64, stages=3, cluster="w"),
    Config(block_n=128, block_m=256, block_k=64, stages=3, cluster="xw"),
    Config(block_n=256, block_m=128, block_k=128, stages=2, cluster="w"),
    Config(block_n=256, block_m=128, block_k=64, stages=4, cluster="w", specialized=False),
    Config(block_n=128, block_m=256, block_k=64, stages=3, cluster="x", specialized=False),
    Config(block_n=128, block_m=128, block_k=64, stages=3, cluster="xw", specialized=False, resident=2),
    Config(block_n=128, block_m=128, block_k=64, stages=5),
    # the only one whose epilogue spills nothing where it stores directly
    Config(block_n=128, block_m=64, block_k=64, stages=6),
)


log = logging.getLogger(__name__)
ENDLESS = 1 << 30  # steps of a first source of x that has no second, clusters of a GPU that holds all


def launch(*tensors, **options):
    """Computes y; arguments as `plan`."""
    for step in plan(*tensors, **options):
        start(step)


def plan(x, values, metadata, y, *, bias, activation, residual, skip, scale, config=CONFIGS[0], blocks=None):
    """[Launch] that computes y (M, N) of rows x (M, K), all on one sm_90a device; the weight in the layout "tma".

    bias (N,), residual (M, N), skip (M, K2), scale (G, N) or None; rows of x, skip and residual 16-byte aligned.
    blocks: of the persistent grid at most, by default one on every multiprocessor.
    """
    if skip is not None and x.shape[1] % config.block_k:
        x, skip = torch.cat((x, skip), 1), None  # a TMA box may not straddle the two
    M, N = y.shape
    direct = y.dtype == torch.float32 or N % 8 != 0 or (residual is not None and residual.dtype != y.dtype)
    stored = x if direct else y
    tensors = {
        "w_desc": values,
        "x_desc": x,
        "e_desc": metadata,
        "y_desc": stored,
        "r_desc": stored if residual is None or direct else residual,
        "s_desc": x if skip is None else skip,
    }
    arguments = {
        "y_ptr": y,
        "r_ptr": y if residual is None else residual,
        "stride_r": N if residual is None else residual.stride(0),
        "bias_ptr": y if bias is None else bias.contiguous(),
        "scale_ptr": y if scale is None else scale.contiguous(),
        "rows_per_scale": M if scale is None else M // scale.shape[0],
        "split": ENDLESS if skip is None else x.shape[1] // config.block_k,
        "M": M,
        "N": N,
        "K": 2 * values.shape[1],
    }
    finish = Epilogue(activation, bias is not None, scale is not None, residual is not None, direct)
    constants = {"CONFIG": config, "EPILOGUE": finish, "KIND": KIND[x.dtype], "SKIP": skip is not None}
    kernel = linear_specialized if config.specialized else linear_flat
    cluster = cluster_size(config)
    grid = min((blocks or multiprocessors(x.device) * config.resident) // cluster, count_tiles(M, N, config))
    maps = {name: (tensors[name], *box) for name, box in boxes_of(config).items()}
    return [Launch(kernel, (grid,), arguments, constants, warps(config), maps, cluster)]


def count_tiles(M, N, config):
    """Tiles, or clusters of tiles."""
    tiles_n, tiles_m = -(-N // config.block_n), -(-M // config.block_m)
    return -(-tiles_n // (1 + shares_x(config))) * -(-tiles_m // (1 + shares_w(config)))


@functools.cache
def boxes_of(config):
    """Tensor map -> (box, swizzle in bytes), in the order of the kernel's arguments."""
    rows_x, rows_w, words = boxes(config)
    panel = ((config.block_m, 16 * warps(config)), 128)
    return {
        "w_desc": ((rows_w, config.block_k // 2), config.block_k),
        "x_desc": ((rows_x, 64), 128),
        "e_desc": ((config.block_k // 64, words), 0),
        "y_desc": panel,
        "r_desc": panel,
        "s_desc": ((rows_x, 64), 128),
    }


def descriptor(tensor, box, swizzle):
    """The tensor map's description of a tensor, of which all but the address is remembered.

    No address is kept anywhere, so that nothing is stale after a model was moved, copied or loaded, or while the
    allocator hands out the same memory again.
    """
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(_checked_fields(tensor.shape, tensor.stride(), tensor.dtype, box, swizzle), base=tensor)
    return made


@functools.lru_cache(4096)
def _checked_fields(shape, stride, dtype, box, swizzle):
    """Of a descriptor, built once on any 16-byte aligned address: its checks cost more than all else about it."""
    base = torch.empty(16, dtype=dtype, device="cpu")
    layout = gl.NVMMASharedLayout(swizzle, 8 * base.element_size(), len(box))
    return vars(TensorDescriptor(base, list(shape), list(stride), list(box), layout))


_compiled = {}


def start(step):
    """A Launch in a tenth of the time that Triton takes.

    Integers and alignments are kept out of the specialisation of these kernels (see their decorators), so that the key
    below is all that decides which compiled kernel runs, and Triton need not look at every argument again. A kernel is
    compiled for single blocks, whose layouts know nothing of clusters; the launcher takes the cluster size from
    `packed_metadata`, so that grid (g,) becomes `cluster` g blocks.
    """
    arguments = step.arguments | {name: descriptor(*tensor_map) for name, tensor_map in step.maps.items()}
    tensors = [value for value in step.arguments.values() if isinstance(value, torch.Tensor)]
    key = (step.kernel, *step.constants.values(), *(tensor.dtype for tensor in tensors), tensors[0].device)
    if key not in _compiled:
        options = FUSED | {"num_warps": step.num_warps}
        compiled = step.kernel.warmup(**arguments, **step.constants, **options, grid=(1,))
        num_warps, _, shared = compiled.packed_metadata
        compiled.packed_metadata = (num_warps, step.cluster, shared)
        _compiled[key] = compiled, _most_clusters(compiled, shared, step.cluster)
    compiled, most = _compiled[key]
    values = step.constants | arguments
    compiled[min(step.grid[0], most), 1, 1](*[values[name] for name in step.kernel.arg_names])


def _most_clusters(compiled, shared, size):
    """That run at once. A GPC's multiprocessors are no multiple of four, and a persistent grid must not wait."""
    if size <= 2:
        return ENDLESS
    compiled._init_handles()
    try:  # Triton asks for blocks of 128 threads, whatever the kernel's are, which a driver may refuse
        return max(1, driver.active.utils.cuOccupancyMaxActiveClusters(compiled.function, shared, size))
    except RuntimeError as error:
        log.info("how many clusters of %d run at once is not known: %s", size, error)
        return ENDLESS
