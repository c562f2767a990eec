"""Whether Triton serves a tensor, what is broken here, and the start of a kernel.

Which kernel serves: `sparse24/dispatch.py` and `cpu/rules.py`. Tuning: `tuning.py`.

Kernel files import `tl` and `jit` from here, so that they load without Triton. Without Triton, on a CPU, and on a GPU
without sparse tensor cores, plain torch computes.

The environment variable SPARSEDM_BACKEND forces a back end: torch (no Triton and no C), dense, or a sparse kernel: cpu,
mma, splitk, wgmma.
"""

import functools
import logging
import os
import re
from types import MappingProxyType
from typing import NamedTuple

import torch

from sparsedm.errors import InputError

log = logging.getLogger(__name__)
NO_TRITON = "no Triton"  # or why it does not load
try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError as error:  # other exceptions would end torch's own imports, too
    triton = None
    if type(error) is not ModuleNotFoundError or error.name != "triton":  # installed, but damaged
        NO_TRITON = f"Triton does not load: {error}".splitlines()[0][:300]
        log.warning("%s; torch computes", NO_TRITON)

    class tl:
        constexpr = None  # the only name used while a kernel is defined

    def jit(kernel):
        return kernel


FUSED = {"enable_fp_fusion": True}  # for every launch: Triton 3.9 warns that 3.10 has another default


class Launch(NamedTuple):
    """One start of a kernel, with keyword arguments."""

    kernel: object
    grid: tuple  # of clusters of blocks
    arguments: dict  # at run time
    constants: dict  # at compile time
    num_warps: int
    maps: dict = MappingProxyType({})  # name of a tensor map -> (tensor, box, swizzle in bytes)
    cluster: int = 1  # blocks

    def start(self):
        """Start it in Triton's usual way. Only for kernels without tensor maps and clusters."""
        self.kernel[self.grid](**self.arguments, **self.constants, **FUSED, num_warps=self.num_warps)


BACKENDS = ("torch", "dense", "cpu", "mma", "splitk", "wgmma")


def setting(name, choices, default=None):
    """The value of an environment variable. Raises: InputError if it is neither `default` nor one of `choices`."""
    value = os.environ.get(name) or default
    if value not in (*choices, default):
        raise InputError(f"{name}={value!r} is unknown: it must be one of {', '.join(choices)}")
    return value


# what `os.environ` wraps: `os.environ.get` takes longer than a small product, 5 us on a slow CPU
_environment = getattr(os.environ, "_data", None) if os.supports_bytes_environ else None


def forced_backend():
    """The backend that SPARSEDM_BACKEND forces, or None. Raises InputError if it is not one of BACKENDS."""
    if not torch.compiler.is_compiling() and _environment is not None and b"SPARSEDM_BACKEND" not in _environment:
        return None
    return setting("SPARSEDM_BACKEND", BACKENDS)


def uses_triton(*tensors):
    """Whether an operation on these tensors runs as a Triton kernel: all on one NVIDIA GPU, sm_80 or later.

    False if the kernel of `select_mask` failed to run here: every masked product begins with it.
    Raises: InputError if the tensors are on several devices.
    """
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise InputError(f"all tensors must be on one device, not on {' and '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    served = forced_backend() != "torch" and (capability(device) or (0, 0)) >= (8, 0)
    return served and (SELECT_MASK, "triton", device) not in broken


def capability(device):
    """(major, minor) of an NVIDIA GPU; None for any other device, and without Triton.

    An AMD GPU is also a "cuda" device with a capability, but the kernels use NVIDIA's instructions.
    """
    if device.type != "cuda" or torch.version.hip or triton is None:
        return None
    return torch.cuda.get_device_capability(device)


def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---- what does not run here


SELECT_MASK = "select_mask"
broken = {}  # (operation, back end, device): why it does not run there, known from a call


def runs(operation, backend, device, start, strict=False):
    """Calls `start`, which launches kernels. Returns whether it ran.

    If it fails (for example to compile) and strict=False, it returns False: the caller computes in torch, the failure
    is logged once, and `start` is not called again for this operation, back end and device in this process.
    """
    if not strict and (operation, backend, device) in broken:
        return False
    try:
        start()
        return True
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if strict or capturing() or device_is_lost(device):
            raise
        broken[operation, backend, device] = f"{backend} does not run here: {reason_of(error)}"
        log.warning("%s: %s; torch computes it", operation, broken[operation, backend, device])
        return False


def reason_of(error):
    """One line of an exception, for logs and tables.

    For a compiler's exception: its first line, which names a place, and the cause, which is further below.
    """
    root = error
    while root.__cause__:
        root = root.__cause__
    first, *_ = lines = _lines(error)
    below = (_lines(root) if root is not error else lines)[1:] or _lines(root)
    cause = next((line for line in below if re.search(r"\b(error|fatal)\b", line)), below[-1])
    return _shortened(first if cause in first else f"{first} ... {cause}")


def _shortened(line, most=400):
    """Without its middle: of a failed command, how it ended stands behind all its arguments."""
    half = (most - 5) // 2
    return line if len(line) <= most else f"{line[:half]} ... {line[-half:]}"


def _lines(error):
    return [line for line in map(str.strip, f"{type(error).__name__}: {error}".splitlines()) if line]


def device_is_lost(device=None):
    """Whether a kernel faulted on a GPU (default: the current one). The GPU is then unusable in this process."""
    try:
        if (device is None or device.type == "cuda") and torch.cuda.is_available():
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def capturing():
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def device_name(device):
    """The key of tuned tables, for example 'NVIDIA H200 sm_90'."""
    return f"{torch.cuda.get_device_name(device)} sm_{''.join(map(str, capability(device)))}"
