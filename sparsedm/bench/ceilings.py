"""What this device can do at most, measured: the grey lines of the plots.

    copy            bytes read plus bytes written by a copy that no cache can hold
    dense product   the best of a few large square products, by torch
    instructions    tensor-core instructions alone, from registers and shared memory: `kernels/instruction_rates.py`

All on random data.
"""

import torch
import torch.nn.functional as F

from sparsedm.bench.environment import stamp
from sparsedm.bench.measure import one_line, time_columns
from sparsedm.bench.timing import interleaved
from sparsedm.kernels import instruction_rates

SUITE = "ceiling"
COPIED, COPIED_QUICK = 1 << 30, 1 << 26  # bytes
SIDES, SIDES_QUICK = (4096, 8192, 12288), (512, 1024)


def run(session):
    """Measure all ceilings of the session's device into its results, unless they are there already."""
    dtype = str(session.dtype).removeprefix("torch.")
    if session.results.matching({"suite": SUITE, "dtype": dtype}):
        return
    rows = [copy_row(session), *dense_rows(session), *instruction_rows(session)]
    now = stamp(session.device)
    session.results.add([{"suite": SUITE, "model": SUITE, "dtype": dtype} | row | now for row in rows])


def times_of(session, call):
    timed = session.clock.ready(call)
    times = interleaved({"only": timed}, **session.limits)["only"]
    return times, time_columns(times, timed.method)


def copy_row(session):
    size = COPIED_QUICK if session.quick else COPIED
    source = torch.randn(size // 4, device=session.device)
    target = torch.empty_like(source)
    times, columns = times_of(session, lambda: target.copy_(source))
    rate = 2 * size / times.p50 / 1e3
    return {"kernel": "copy", "shape": f"copy of {size >> 20} MiB", "provider": "torch", "metric": "bandwidth"} | {
        "status": "ok",
        "gbps": rate,
        "value": rate,
        "unit": "GB/s",
        **columns,
    }


def dense_rows(session):
    for side in SIDES_QUICK if session.quick else SIDES:
        x, w = (torch.randn(side, side, device=session.device).to(session.dtype) for _ in range(2))
        times, columns = times_of(session, lambda x=x, w=w: F.linear(x, w))
        rate = 2 * side**3 / times.p50 / 1e6
        common = {"kernel": "dense", "shape": f"dense {side}", "provider": "torch", "metric": "rate", "unit": "TFLOP/s"}
        sizes = dict.fromkeys("MNK", side)
        yield common | sizes | {"status": "ok", "dense_equivalent_tflops": rate, "value": rate, **columns}


def instruction_rows(session):
    for name in instruction_rates.NAMES:
        row = {"kernel": name, "shape": f"{name} instructions", "provider": "sparsedm", "metric": "rate"}
        if reason := instruction_rates.unsupported(name, session.device, session.dtype):
            yield row | {"status": "unsupported", "reason": reason}
            continue
        try:
            call, operations = instruction_rates.prepare(name, session.device, session.dtype)
            times, columns = times_of(session, call)
        except Exception as error:  # a probe that does not run must not cost the other ceilings
            yield row | {"status": "failed", "reason": one_line(error)}
            continue
        rate = operations / times.p50 / 1e6
        yield row | {"status": "ok", "dense_equivalent_tflops": rate, "value": rate, "unit": "TFLOP/s", **columns}
