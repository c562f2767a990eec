"""Which kernel serves a 2:4 product, and with which of its configurations: a rule of thumb until it has been measured.

`choose_backend` is the rule, arithmetic alone. On a GPU `pick` asks the autotuner of `tuning.py`, whose tables hold
what was quickest for the GPU, dtype, epilogue and size; a size that no table has is timed once, torch's dense product
on the decompressed weight beside the sparse kernels, so that where dense is quicker, dense it is. The rule is what runs
where nothing may be timed: SPARSEDM_AUTOTUNE=off, a CUDA graph being captured, a model being traced.
"""

import functools
import importlib
import json
from dataclasses import asdict
from typing import NamedTuple

import torch

from sparsedm.kernels.launch import BACKENDS, exporting, forced_backend
from sparsedm.kernels.tuning import Autotuner, bucket, capturing

NO_GPU = "not an NVIDIA GPU, or no Triton"
SPLITK_ROWS = 64
SMALLEST_GRID, SMALLEST_N = 32, 64
LINEAR, CONV = "sparse24_linear", "sparse24_conv2d"
KERNELS = {  # operation and back end: the module with `launch` and CONFIGS, then the others that hold its code
    (LINEAR, "mma"): ("mma", "ptx"),
    (LINEAR, "splitk"): ("mma_splitk", "mma", "ptx"),
    (LINEAR, "wgmma"): ("wgmma", "wgmma_kernels", "wgmma_pipeline", "ptx"),
    (CONV, "mma"): ("mma_conv", "mma", "ptx"),
    (CONV, "wgmma"): ("wgmma_conv", "wgmma_pipeline", "ptx"),
}


class Choice(NamedTuple):
    """A back end, and the number of its configuration in CONFIGS of its module."""

    backend: str
    config: int = 0


def choose_backend(capability, M, N, K, dtype):
    """Which back end serves y (M, N) = x (M, K) @ W^T, and why.

    capability: the device's compute capability as (major, minor), None where `launch.capability` is.
    Returns (name, reason). The rules are arithmetic, not measurement: none of the kernels has been timed yet.
    SPARSEDM_BACKEND = torch | dense | mma | splitk | wgmma overrules them wherever the named kernel can run.
    """
    forced = forced_backend()
    able, obstacle = _able(capability, K, dtype)
    if forced:
        if forced in able:
            return forced, f"SPARSEDM_BACKEND={forced}"
        return "torch", f"SPARSEDM_BACKEND={forced} cannot run: {obstacle}"
    if "mma" not in able:
        return without_kernels(), obstacle
    if M <= SPLITK_ROWS:
        return "splitk", f"{M} rows: bound by reading the weight, 1.125 bytes instead of 2"
    too_small = smallness(M, N)
    if too_small:
        return "dense", too_small
    tiles = count_tiles(M, N)
    if "wgmma" in able:
        return "wgmma", f"sm_90a, {tiles} tiles of 128 x 128"
    if capability >= (9, 0):
        return "dense", "mma.sp reaches about 0.9 of dense wgmma here, and wgmma.sp needs sm_90a"
    return "mma", f"sm_{capability[0]}{capability[1]}, {tiles} tiles of 128 x 128"


def count_tiles(M, N):
    return -(-M // 128) * -(-N // 128)


def smallness(M, N):
    """Why a product of so many rows and features is too small for the tiles of the kernels; None if it is not."""
    if N < SMALLEST_N:
        return f"{N} features leave most of a tile of 128 x 128 empty"
    tiles = count_tiles(M, N)
    if tiles < SMALLEST_GRID:
        return f"{tiles} tiles of 128 x 128 leave most of the GPU idle: the launch decides, not the arithmetic"
    return None


def without_kernels():
    """What computes where no kernel can: the weight decompressed once; an exported program would then hold it twice."""
    return "torch" if exporting() else "dense"


def _able(capability, K, dtype):
    """The back ends that can run at all, and the sentence about those that cannot."""
    if capability is None:
        return ("torch", "dense"), NO_GPU
    name = f"sm_{capability[0]}{capability[1]}"
    if capability < (8, 0):
        return ("torch", "dense"), f"{name} has no sparse tensor cores (sm_80 and later have)"
    if dtype not in (torch.bfloat16, torch.float16):
        return ("torch", "dense"), f"{str(dtype)[6:]}: the sparse tensor-core kernels take bfloat16 and float16"
    if K % 8:
        return ("torch", "dense"), f"K = {K}: rows must be multiples of 16 bytes, K a multiple of 8"
    if capability != (9, 0):
        return ("torch", "dense", "mma", "splitk"), f"{name} has no wgmma (sm_90a has)"
    return BACKENDS, ""


def stores_directly(N, out_dtype, residual):
    """Whether wgmma has to write y from registers, because TMA cannot: see `epilogue` of `wgmma_pipeline.py`."""
    return out_dtype == torch.float32 or N % 8 != 0 or (residual is not None and residual.dtype != out_dtype)


def rule_of_thumb(backend, directly):
    """The choice that stands for a back end until something is measured."""
    return Choice(backend, -1 if backend == "wgmma" and directly else 0)


@functools.cache
def choices(capability, few, directly, K, dtype, forced):
    """The choices of a linear layer that are timed: dense first, because the others are held against its result.

    few: for up to SPLITK_ROWS rows. directly: see `stores_directly`. forced: the back end that SPARSEDM_BACKEND names,
    of which alone the configurations are timed. () where no kernel can run.
    """
    able, _ = _able(capability, K, dtype)
    if forced:
        return _every(forced, directly) if forced in able else ()
    if "mma" not in able:
        return ()
    if few:
        area = lambda tile: tile.block_n * tile.block_m  # noqa: E731
        smallest = min(every(LINEAR, "mma"), key=lambda choice: area(configs(LINEAR, "mma")[choice.config]))
        return Choice("dense"), *every(LINEAR, "splitk"), smallest
    return Choice("dense"), *_every("wgmma" if "wgmma" in able else "mma", directly)


def _every(backend, directly):
    return (rule_of_thumb(backend, directly),) if backend == "wgmma" and directly else every(LINEAR, backend)


def every(operation, backend):
    """A choice for each configuration of a kernel; () for back ends that are none."""
    if (operation, backend) not in KERNELS:
        return ()
    return tuple(Choice(backend, i) for i in range(len(configs(operation, backend))))


def configs(operation, backend):
    return module(operation, backend).CONFIGS


def module(operation, backend):
    """The module with `launch` and CONFIGS, imported when it is needed: there may be no Triton."""
    return _module(KERNELS[operation, backend][0])


@functools.cache
def _module(name):
    return importlib.import_module(f"sparsedm.kernels.sparse24.{name}")


def pick(operation, offered, rule, run, device, rows, kept, **key):
    """The choice that serves `rows` rows on `device`: the quickest, or `rule` where nothing is known.

    offered: () -> the choices. run(choice) computes the result with one, any number of times. kept: a dict in which the
    caller keeps what was measured. key: whatever else the speed depends on.

    Sizes are known by their power of two (`bucket`). A model that is traced (torch.compile, torch.export) finds what
    `kept` remembers of eager calls, by comparisons, which leave a dynamic number of rows dynamic.
    """
    settings = (operation, device, forced_backend(), *key.values())
    if torch.compiler.is_compiling():
        for (size, *others), choice in kept.items():
            if tuple(others) == settings and rows <= size and (rows > size // 2 or size == 16):
                return choice
        return rule
    known = (bucket(rows), *settings)
    if known in kept:
        return kept[known]
    tuner, described = _tuner(operation, offered(), forced_backend())
    if not described:
        return rule
    best = tuner.best(
        lambda description: run(described[_text(description)]),
        device,
        default=_describe(operation, rule),
        **key,
        m=bucket(rows),
    )
    if not capturing():
        kept[known] = described[_text(best)]
    return described[_text(best)]


def last_choice(kept, rows=None):
    """What `pick` took for the latest new size, or for that of `rows` rows; None where it was never asked."""
    sizes = [known for known in kept if rows is None or known[0] == bucket(rows)]
    return kept[sizes[-1]] if sizes else None


@functools.cache
def _tuner(operation, offered, forced):
    """-> (Autotuner, {description as text: choice})."""
    sources = sorted({name for choice in offered for name in KERNELS.get((operation, choice.backend), ())})
    described = [_describe(operation, choice) for choice in offered]
    name = f"{operation} {forced}" if forced else operation
    tuner = Autotuner(name, described, [_module(source) for source in sources])
    return tuner, dict(zip(map(_text, described), offered))


def _describe(operation, choice):
    """What the tables hold, for example {"backend": "splitk", "programs": 4}."""
    if (operation, choice.backend) not in KERNELS:
        return {"backend": choice.backend}
    return {"backend": choice.backend} | asdict(configs(operation, choice.backend)[choice.config])


def _text(description):
    return json.dumps(description, sort_keys=True)
