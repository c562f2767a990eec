"""The measured limits of this device: the grey lines of the plots.

    copy            bytes read plus bytes written by a copy that no cache can hold
    dense product   the best of a few large square products, by torch
    instructions    tensor-core instructions alone, from registers and shared memory: `instruction_rates.py`

All on random data.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.measure import one_line, time_columns
from bench.providers import HALF
from bench.results import stamp
from bench.timing import interleaved
from sparsedm.kernels.launch import capability
from sparsedm.kernels.tuning import device_is_lost

SUITE = "ceiling"
COPIED, COPIED_QUICK = 1 << 30, 1 << 26  # bytes
SIDES, SIDES_QUICK = (4096, 8192, 12288), (512, 1024)

INSTRUCTIONS = ("mma", "mma.sp", "wgmma", "wgmma.sp")


class Source(NamedTuple):
    """The author of the measured code."""

    name: str
    compiled: bool = False


class Ceiling(NamedTuple):
    """prepare: () -> (the call, microseconds -> the columns of its rate). reason: why it cannot run, or None."""

    name: str
    provider: Source
    columns: dict
    prepare: Callable
    reason: str | None = None


TORCH, OURS = Source("torch"), Source("sparsedm")


def work(session):
    """Yields, for each ceiling of the session's device, the arguments of `Session.do`."""
    for ceiling in ceilings(session):
        yield SUITE, ceiling, "", [ceiling.provider], functools.partial(rows, session, ceiling)


def rows(session, ceiling, missing, starting):
    """Yields the row of one ceiling. If a probe does not run, the others still do."""
    if not starting(ceiling.provider.name):
        return
    dtype = str(session.dtype).removeprefix("torch.")
    row = {"suite": SUITE, "model": SUITE, "dtype": dtype, "shape": ceiling.name, "provider": ceiling.provider.name}
    row |= ceiling.columns
    if ceiling.reason:
        yield [row | {"status": "unsupported", "reason": ceiling.reason}]
        return
    try:
        call, rate = ceiling.prepare()
        timed = session.clock.ready(call)
        session.clock.warm()
        times = interleaved({"only": timed}, **session.limits)["only"]
    except Exception as error:
        yield [row | {"status": "failed", "reason": one_line(error)}]
        if device_is_lost(session.device):
            raise
        return
    yield [row | {"status": "ok"} | rate(times.p50) | time_columns(times, timed.method) | stamp(session.device)]


def ceilings(session):
    size = COPIED_QUICK if session.quick else COPIED
    columns = {"kernel": "copy", "metric": "bandwidth", "unit": "GB/s"}
    yield Ceiling(f"copy of {size >> 20} MiB", TORCH, columns, lambda: copy(session, size))
    for side in SIDES_QUICK if session.quick else SIDES:
        columns = {"kernel": "dense", "metric": "rate", "unit": "TFLOP/s", **dict.fromkeys("MNK", side)}
        yield Ceiling(f"dense {side}", TORCH, columns, functools.partial(dense, session, side))
    for name in INSTRUCTIONS:
        columns = {"kernel": name, "metric": "rate", "unit": "TFLOP/s"}
        prepare = functools.partial(instructions, session, name)
        reason = unsupported(name, session.device, session.dtype)
        yield Ceiling(f"{name} instructions", OURS, columns, prepare, reason)


def copy(session, size):
    source = torch.randn(size // 4, device=session.device)
    target = torch.empty_like(source)

    def rate(microseconds):
        rate = 2 * size / microseconds / 1e3
        return {"value": rate, "gbps": rate}

    return lambda: target.copy_(source), rate


def dense(session, side):
    x, w = (torch.randn(side, side, device=session.device).to(session.dtype) for _ in range(2))
    return lambda: F.linear(x, w), functools.partial(teraflops, 2 * side**3)


def unsupported(name, device, dtype):
    """None, or why the loop `name` cannot run on `device`."""
    if capability(device) is None:
        return "needs an NVIDIA GPU"
    if dtype not in HALF:
        return f"takes bfloat16 and float16, not {str(dtype)[6:]}"
    if capability(device) < (8, 0):
        return "needs sm_80 or later"
    if name.startswith("wgmma") and capability(device) != (9, 0):
        return "needs sm_90a"
    return None


def instructions(session, name):
    from bench import instruction_rates  # Gluon: needs Triton

    call, operations = instruction_rates.prepare(name, session.device, session.dtype)
    return call, functools.partial(teraflops, operations)


def teraflops(operations, microseconds):
    rate = operations / microseconds / 1e6
    return {"value": rate, "dense_equivalent_tflops": rate}
