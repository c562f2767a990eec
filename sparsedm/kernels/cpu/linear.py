"""The back end "cpu" of `sparse24_linear`: fp32 and any N:M, by the C kernels. And the same call once more.

On a CPU the choice of a kernel is arithmetic on sizes. It costs 0.15 ms, as long as a product of 128 x 128 x 128, and
is therefore made once for each weight and size.
"""

import torch

from sparsedm.kernels.checksum import stamp
from sparsedm.kernels.cpu import products
from sparsedm.kernels.launch import forced_backend, plain
from sparsedm.kernels.pattern import Pattern

MOST = 100  # sizes that are kept of one weight

CONFIGS = ("linear", "few")  # the orders of `products.prepack`


def launch(x, values, offsets, y, *, pattern, config, bias, activation, residual, skip, scale):
    """x (M, K), y (M, N); the others as in `products.linear`."""
    pattern = Pattern.parse(pattern)
    epilogue = {"bias": bias, "activation": activation, "residual": residual, "skip": skip, "scale": scale}
    products.linear(x, (values, offsets), pattern, y.shape[1], few=config == "few", out=y, **epilogue)


def repeated(cache, values, positions, x, bias, activation, residual, skip, scale):
    """y of `sparse24_linear` if an earlier call had the same weight and sizes (see `remember`), else None.

    cache: of `sparse24_linear`. values, positions: the weight; its checksum says whether it is the same.
    """
    calls = None if torch.compiler.is_compiling() else cache.get("calls")
    if calls is None or not _served(values, x, bias, residual, skip, scale):
        return None
    run = calls[1].get(_sizes(x, bias, activation, residual, skip, scale))
    if run is None or calls[0] != stamp(values, positions, held=cache.get("held")):
        return None
    return run(x, bias, activation, residual, skip, scale)


def remember(cache, values, positions, run, x, bias, activation, residual, skip, scale):
    """Let `repeated` compute calls like this one by run(x, bias, activation, residual, skip, scale)."""
    if not _served(values, x, bias, residual, skip, scale):
        return
    calls, current = cache.get("calls"), stamp(values, positions, held=cache.get("held"))
    if calls is None or calls[0] != current or len(calls[1]) >= MOST:
        calls = cache["calls"] = current, {}
    calls[1][_sizes(x, bias, activation, residual, skip, scale)] = run


def _served(values, *tensors):
    dtype = values.dtype
    for t in tensors:
        if t is not None and t.dtype is not dtype:
            return False
    return plain(*tensors) and not (torch.is_autocast_enabled("cpu") or forced_backend()) and values.is_cpu


def _sizes(x, bias, activation, residual, skip, scale):
    return activation, x.shape, *[None if t is None else t.shape for t in (bias, residual, skip, scale)]
