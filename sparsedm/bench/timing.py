"""How long a call takes: clocks, interleaved rounds, percentiles, and the choice of the fastest of several ways.

A clock turns a call into a Timed, whose `samples(n)` are n times of one call in microseconds:
    CudaClock   replays of a CUDA graph between two events, the L2 cache flushed before each; where a call cannot be
                captured, the call itself between the events
    CpuClock    perf_counter around as many calls as fill a millisecond
Whatever is compared is measured in turns (`interleaved`), so that a clock that drops with temperature, or a neighbour
on the machine, hits all alike. Reported are the 20th, 50th and 80th percentile, never a mean or a minimum.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

SHORTEST = 1e-3  # seconds that one CPU sample lasts at least


class Times(NamedTuple):
    """Microseconds of one call."""

    p20: float
    p50: float
    p80: float
    count: int


class Timed(NamedTuple):
    """A call made ready to be timed. samples(n): n times in microseconds. method: how they are taken."""

    samples: Callable[[int], list]
    method: str


class CpuClock:
    def __init__(self, now=time.perf_counter):
        self.now = now

    def ready(self, run):
        run()
        calls = max(1, math.ceil(SHORTEST / max(self._seconds(run, 1), 1e-9)))
        return Timed(lambda n: [self._seconds(run, calls) / calls * 1e6 for _ in range(n)], "perf_counter")

    def host(self, run):
        """None: on a CPU the time of a call is its host cost."""

    def _seconds(self, run, calls):
        start = self.now()
        for _ in range(calls):
            run()
        return self.now() - start


class CudaClock:
    """graphs=False times the call as Python makes it, with its launch cost where the device waits for it."""

    def __init__(self, device, graphs=True):
        self.device, self.graphs = torch.device(device), graphs
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flushed = torch.empty(max(4 * cache, 1 << 26), dtype=torch.int8, device=self.device)

    def ready(self, run):
        stream = torch.cuda.Stream(self.device)  # backward passes run on the stream that first used the parameters
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compilation, autotuning, lazy initialisation
                run()
        torch.cuda.synchronize(self.device)
        graph = self._captured(run, stream) if self.graphs else None
        if graph is None:
            return Timed(lambda n: self._samples(run, n), "cuda events")
        return Timed(lambda n: self._samples(graph.replay, n), "cuda graph")

    def host(self, run, calls=20, samples=5):
        """What a call costs the CPU that launches it: calls in a row without waiting for the device."""
        times = []
        for _ in range(samples):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize(self.device)
        return percentiles(times)

    def _captured(self, run, stream):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                run()
        except RuntimeError:  # host synchronisation, autograd on another stream: some calls cannot be captured
            torch.cuda.synchronize(self.device)
            return None
        return graph

    def _samples(self, run, count):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            self.flushed.zero_()  # also keeps the device busy while the host enqueues what follows
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [1e3 * start.elapsed_time(end) for start, end in pairs]


def clock_for(device, graphs=True):
    return CudaClock(device, graphs) if torch.device(device).type == "cuda" else CpuClock()


def interleaved(timed, rounds=10, per_round=5, seconds=math.inf):
    """{name: Timed} -> {name: Times}, measured in turns; each round starts with another one.

    After one full round it stops as soon as what it has measured adds up to `seconds`.
    """
    names, collected, spent = list(timed), {name: [] for name in timed}, 0.0
    for i in range(rounds):
        turn = i % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            new = timed[name].samples(per_round)
            collected[name] += new
            spent += sum(new) / 1e6
        if spent >= seconds:
            break
    return {name: percentiles(times) for name, times in collected.items()}


def percentiles(times):
    return Times(*(float(p) for p in np.percentile(times, [20, 50, 80])), len(times))


def fastest(candidates, clock, finalists=3):
    """The name of the fastest of {name: call}: all are timed once, and the best of them again, in turns.

    Taking the minimum of many noisy times at once would crown a lucky one.
    """
    timed = {name: clock.ready(run) for name, run in candidates.items()}
    first = interleaved(timed, rounds=1)
    best = sorted(first, key=lambda name: first[name].p50)[:finalists]
    again = interleaved({name: timed[name] for name in best}, rounds=4)
    return min(again, key=lambda name: again[name].p50)
