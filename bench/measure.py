"""One problem, several providers: check each against the reference, then time those that are right, in turns."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.providers import OURS, Bound, Configuration, Masked
from bench.results import DENSE, stamp
from bench.timing import Timed, interleaved
from sparsedm.kernels.tuning import device_is_lost

HELD = 4  # so many of our configurations, the fastest, are timed over a second, and everything else
BESIDE = (OURS, Masked.name)  # a compiled provider is timed together with these and the fastest eager dense one


class Ready(NamedTuple):
    """A provider with a right result. row: its columns before it is timed. packed: whether it prepares anything."""

    row: dict
    bound: Bound
    packed: bool
    timed: Timed


def measure(
    suite,
    problem,
    providers,
    clock,
    *,
    rounds=8,
    per_round=5,
    seconds=math.inf,
    packing=True,
    held=False,
    starting: Callable = lambda name, **columns: True,
):
    """Yields lists of rows for the results file: first of all eager providers; then, because compiling may take
    minutes, of each compiled one, with new times of the fastest dense provider, of ours and of the earlier compiled
    ones from the same rounds; with held=True then the rows "held", one by one.

    A provider that cannot run (status "unsupported"), raises ("failed") or returns a wrong result ("wrong") gets one
    row that says so, and is not timed. Metrics: "time"; on a GPU "host", what a call costs the CPU that launches it,
    and with held=True "held", the time of a call in a second without a pause; with packing=True also "packing", the
    time of `prepare`, and "break-even", after how many calls that has paid against the fastest dense provider.
    seconds: about how long the rounds may take, after the first. starting: called with the name of each provider before
    its first run and, with metric="held", before it is held, and with "" before the rounds; if it returns False, the
    provider is left out for lack of time. An error that the GPU does not survive is raised, after the rows that name
    its provider.
    """
    torch.backends.cudnn.benchmark = True  # or dense convolutions would be the only ones that are not tuned
    limits = dict(rounds=rounds, per_round=per_round, seconds=seconds)
    ready, p50 = {}, {}
    eager = [provider for provider in providers if not provider.compiled]
    for group in (eager, *([provider] for provider in providers if provider.compiled)):
        with clock.stream():
            rows = []
            for provider in group:
                if not starting(provider.name):
                    continue
                row = {"suite": suite, **problem.columns(), "provider": provider.name, "metric": "time"}
                try:
                    found = prepared(problem, provider, clock, row)
                except Exception as error:  # one implementation that fails must not end the comparison of the others
                    rows.append(row | {"status": "failed", "reason": one_line(error)})
                    if device_is_lost(problem.device):
                        yield stamped(rows, problem.device)
                        raise
                    continue
                if isinstance(found, dict):
                    rows.append(found)
                else:
                    ready[provider] = found
            fresh = [provider for provider in group if provider in ready]
            if fresh:
                starting("")
                fastest = min((p for p in p50 if p.name in DENSE and not p.compiled), key=p50.get, default=None)
                beside = [p for p in p50 if p is fastest or p.compiled or p.name in BESIDE]
                clock.warm()
                times = interleaved({provider: ready[provider].timed for provider in beside + fresh}, **limits)
                now = stamp(problem.device)  # while the device is still warm: clocks and power
                p50 |= {provider: found.p50 for provider, found in times.items()}
                dense = min((p50[provider] for provider in p50 if provider.name in DENSE), default=None)
                for provider, found in times.items():
                    rows.append(time_row(problem, provider, ready[provider], found))
                    if provider in fresh and rows[-1]["status"] == "ok":
                        rows += further_rows(problem, provider, ready[provider], clock, limits, packing, dense, found)
                rows = [now | row for row in rows]
        order = [provider.name for provider in providers]
        yield stamped(sorted(rows, key=lambda row: order.index(row["provider"])), problem.device)
        right = {row["provider"] for row in rows if row["metric"] == "time" and row["status"] == "ok"}
        for provider in to_hold([p for p in fresh if p.name in right], p50) if held else ():
            if starting(provider.name, metric="held"):
                yield held_rows(problem, ready[provider], clock, times[provider], now)


def to_hold(providers, p50):
    """Our HELD fastest configurations, and all others, the fastest first."""
    ours = sorted((p for p in providers if isinstance(p, Configuration)), key=p50.get)
    others = [p for p in providers if p not in ours]
    return sorted((*others, *ours[:HELD]), key=p50.get)


def stamped(rows, device):
    return [row if "device" in row else row | stamp(device) for row in rows]


def prepared(problem, provider, clock, row):
    """-> Ready, or the row that says why it is not timed."""
    if reason := provider.supports(problem):
        return row | {"status": "unsupported", "reason": reason}
    made = provider.prepare(problem)
    bound = provider.bind(problem, made)
    verdict = checked(problem, bound, provider)
    row = row | {"detail": bound.detail, "error": verdict.error, "allowed": verdict.allowed}
    if not verdict.right:
        return row | {"status": "wrong", "reason": wrong(verdict)}
    return Ready(row, bound, made is not None, clock.ready(bound.run))


def time_row(problem, provider, ready, times):
    again = checked(problem, ready.bound, provider)
    if not again.right:
        return ready.row | {"status": "wrong", "reason": f"right before it was timed, then {wrong(again)}"}
    row = ready.row | {"status": "ok", **time_columns(times, ready.timed.method)}
    if bytes_moved := provider.traffic(problem):
        row["gbps"] = bytes_moved / times.p50 / 1e3
    if problem.operations:
        row["dense_equivalent_tflops"] = problem.operations / times.p50 / 1e6
    return row


def checked(problem, bound, provider):
    problem.poison(provider.sparse)
    return problem.check(bound.run(), provider.sparse, bound.weight)


def wrong(verdict):
    return f"its error is {verdict.error:.3g} and {verdict.allowed:.3g} is allowed"


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def time_columns(times, method):
    return {"p20_us": times.p20, "p50_us": times.p50, "p80_us": times.p80, "samples": times.count, "method": method}


def further_rows(problem, provider, ready, clock, limits, packing, dense, sparse):
    """Host cost of a call; the time of packing the weight, and the number of calls after which it has paid off."""
    rows, row = [], {k: v for k, v in ready.row.items() if k not in ("error", "allowed", "detail")} | {"status": "ok"}
    if host := clock.host(ready.bound.run):
        rows.append(row | {"metric": "host", **time_columns(host, "perf_counter")})
    if not (packing and ready.packed):
        return rows
    timed = clock.ready(lambda: provider.prepare(problem))
    times = interleaved({provider: timed}, **limits | {"rounds": 1})[provider]
    rows.append(row | {"metric": "packing", **time_columns(times, timed.method)})
    even = row | {"metric": "break-even", "unit": "calls"}
    if dense and sparse.p50 < dense:
        rows.append(even | {"value": math.ceil(times.p50 / (dense - sparse.p50))})
    elif dense:
        rows.append(even | {"reason": "never: it is not faster than dense"})
    return rows


def held_rows(problem, ready, clock, times, now):
    found = clock.held(ready.timed.call, times.p50)
    if not found:
        return []
    row = now | ready.row | {"metric": "held", "status": "ok", **time_columns(found[0], ready.timed.method), **found[1]}
    return [row | {"dense_equivalent_tflops": problem.operations / found[0].p50 / 1e6}]


def release(device):
    """Give the memory of the last problem back before the next, which may need all of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
