"""One problem, several providers: check each against the reference, then time those that are right, in turns."""

import math

import torch

from bench.environment import stamp
from bench.providers import DENSE
from bench.timing import interleaved
from sparsedm.kernels.tuning import device_is_lost


class DeviceLost(RuntimeError):
    """The GPU answers nothing any more, as after an access out of bounds; only a new process can go on. row: whose."""

    def __init__(self, row):
        super().__init__(row["reason"])
        self.row = row


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
    starting=lambda name: True,
):
    """Rows for the results file, one per provider and metric.

    A provider that cannot run (status "unsupported"), raises ("failed") or returns a wrong result ("wrong") gets one
    row that says so, and is not timed. Metrics: "time"; on a GPU "host", what a call costs the CPU that launches it;
    with packing=True also "packing", the time of `prepare`, and "break-even", after how many calls that has paid
    against the fastest dense provider. seconds: roughly how long the rounds may take, after the first. starting: told
    the name of each provider before it runs for the first time, and "" before the rounds; False leaves it out, for lack
    of time. Raises: DeviceLost.
    """
    torch.backends.cudnn.benchmark = True  # or dense convolutions would be the only ones that are not tuned
    common = {"suite": suite, **problem.columns()}
    rows, ready = [], {}
    with clock.stream():
        for provider in providers:
            if not starting(provider.name):
                continue
            row = common | {"provider": provider.name, "metric": "time"}
            try:
                reason = provider.supports(problem)
                if reason:
                    rows.append(row | {"status": "unsupported", "reason": reason})
                    continue
                prepared = provider.prepare(problem)
                bound = provider.bind(problem, prepared)
                row["detail"] = bound.detail
                verdict = checked(problem, bound, provider)
                row |= {"error": verdict.error, "allowed": verdict.allowed}
                if not verdict.right:
                    rows.append(row | {"status": "wrong", "reason": wrong(verdict)})
                    continue
                ready[provider] = (row, bound, prepared is not None, clock.ready(bound.run))
            except Exception as error:  # one implementation that fails must not end the comparison of the others
                rows.append(row | {"status": "failed", "reason": one_line(error)})
                if device_is_lost(problem.device):
                    raise DeviceLost(rows[-1]) from error
        starting("")
        limits = dict(rounds=rounds, per_round=per_round, seconds=seconds)
        clock.warm()
        times = interleaved({provider: timed for provider, (*_, timed) in ready.items()}, **limits)
        now = stamp(problem.device)  # while the device is still warm: clocks and power
        dense = min((times[p].p50 for p in times if p.name in DENSE), default=None)
        for provider, (row, bound, packed, timed) in ready.items():
            again = checked(problem, bound, provider)
            if not again.right:
                rows.append(row | {"status": "wrong", "reason": f"right before it was timed, then {wrong(again)}"})
                continue
            rows.append(row | {"status": "ok", **time_columns(times[provider], timed.method)})
            rows[-1] |= rates(problem, provider, times[provider].p50)
            if host := clock.host(bound.run):
                rows.append(row | {"metric": "host", "status": "ok", **time_columns(host, "perf_counter")})
            if packing and packed:
                rows += packing_rows(row, provider, problem, clock, limits, dense, times[provider].p50)
    order = [provider.name for provider in providers]
    return [row | now for row in sorted(rows, key=lambda row: order.index(row["provider"]))]


def checked(problem, bound, provider):
    problem.poison(provider.sparse)
    return problem.check(bound.run(), provider.sparse, bound.weight)


def wrong(verdict):
    return f"its error is {verdict.error:.3g} and {verdict.allowed:.3g} is allowed"


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def time_columns(times, method):
    return {"p20_us": times.p20, "p50_us": times.p50, "p80_us": times.p80, "samples": times.count, "method": method}


def rates(problem, provider, microseconds):
    seconds = microseconds / 1e6
    rate = {}
    if bytes_moved := provider.traffic(problem):
        rate["gbps"] = bytes_moved / seconds / 1e9
    if problem.operations:
        rate["dense_equivalent_tflops"] = problem.operations / seconds / 1e12
    return rate


def packing_rows(row, provider, problem, clock, limits, dense, sparse):
    """What making the compressed weight costs, and the number of products after which it has paid."""
    row = {key: value for key, value in row.items() if key not in ("error", "allowed", "detail")}
    timed = clock.ready(lambda: provider.prepare(problem))
    times = interleaved({provider: timed}, **limits | {"rounds": 1})[provider]
    rows = [row | {"metric": "packing", "status": "ok", **time_columns(times, timed.method)}]
    if dense and sparse < dense:
        uses = math.ceil(times.p50 / (dense - sparse))
        rows.append(row | {"metric": "break-even", "status": "ok", "value": uses, "unit": "calls"})
    elif dense:
        reason = "never: it is not faster than dense"
        rows.append(row | {"metric": "break-even", "status": "ok", "unit": "calls", "reason": reason})
    return rows


def release(device):
    """Give the memory of the last problem back before the next, which may need all of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
