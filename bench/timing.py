"""Time calls: clocks, interleaved rounds, percentiles, and the choice of the fastest of several calls.

A clock turns a call into a Timed; its `samples(n)` returns n times of one call in microseconds:
    CudaClock   replays of a CUDA graph between two events, the L2 cache flushed before each; where a call waits for the
                device or cannot be captured, the call itself between the events
    CpuClock    around as many calls as fill a millisecond: if torch has one thread, thread_time, the CPU time of this
                thread, which other processes disturb less; else perf_counter, the wall clock
Things that are compared are measured in turns (`interleaved`), so that a falling clock or another process on the
machine affects all equally. The 20th, 50th and 80th percentiles are reported, never a mean or a minimum.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from bench.results import sensors

SHORTEST = 1e-3  # seconds that one CPU sample lasts at least
LONG = 0.2  # seconds of a call on a CPU that one call warms up
WARM = 0.03  # seconds of work before a GPU is timed
FINALISTS = 3  # candidates of `fastest` that are timed again


class Times(NamedTuple):
    """Microseconds of one call."""

    p20: float
    p50: float
    p80: float
    count: int


class Timed(NamedTuple):
    """A call that is ready to be timed. samples(n): n times in microseconds. method: how they are measured. call: the
    function that is timed: the call, or the replay of its graph."""

    samples: Callable[[int], list]
    method: str
    call: Callable | None = None


class CpuClock:
    def __init__(self, now=None):
        alone = now is None and torch.get_num_threads() == 1
        self.now = now or (time.thread_time if alone else time.perf_counter)
        self.method = "thread_time" if alone else "perf_counter"

    def stream(self):
        return contextlib.nullcontext()

    def warm(self):
        """Nothing to do: a CPU was busy with this program."""

    def ready(self, run):
        calls = 1
        if self._seconds(run, 1) < LONG:  # else no second warm-up
            calls = max(1, math.ceil(SHORTEST / max(self._seconds(run, 1), 1e-9)))
        return Timed(lambda n: [self._seconds(run, calls) / calls * 1e6 for _ in range(n)], self.method)

    def host(self, run):
        """None: on a CPU the time of a call is its host cost."""

    def held(self, call, microseconds):
        """None: a CPU's clock and power are not known."""

    def _seconds(self, run, calls):
        start = self.now()
        for _ in range(calls):
            run()
        return self.now() - start


class CudaClock:
    """Everything runs on the clock's own stream: the default stream cannot be captured.

    A backward runs on the stream of its forward, so the forward of a timed backward must also be inside
    `with clock.stream():`. All graphs made in one such block share their memory; hundreds of separate pools would not
    fit.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flushed = torch.empty(max(4 * cache, 1 << 26), dtype=torch.int8, device=self.device)
        self._stream = torch.cuda.Stream(self.device)
        self._pool = None  # the memory of the graphs made in one block of `stream`

    @contextlib.contextmanager
    def stream(self):
        """A context in which torch runs on the clock's stream; the stream that was current waits for it."""
        before, outermost = torch.cuda.current_stream(self.device), self._pool is None
        if outermost:  # the current stream does not tell: torch has 32 streams for all clocks
            self._pool = torch.cuda.graph_pool_handle()  # one whose graphs are all gone may not be used again
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if outermost:
                self._pool = None
        before.wait_stream(self._stream)

    def ready(self, run):
        """-> Timed, after three calls: of a graph, or of the call itself if it cannot be captured."""
        with self.stream():
            for _ in range(3):  # compilation, autotuning, lazy initialisation
                run()
            torch.cuda.synchronize(self.device)
            graph = self._captured(run) if not waits(run) else None
        call, method = (run, "cuda events") if graph is None else (graph.replay, "cuda graph")
        return Timed(functools.partial(self._samples, call), method, call)

    def warm(self):
        """Raise the clocks of a GPU that was idle, for example during a compilation."""
        end = time.perf_counter() + WARM
        with self.stream():
            while time.perf_counter() < end:
                self.flushed.zero_()
                torch.cuda.synchronize(self.device)

    def host(self, run, samples=20):
        """The CPU time of launching a call, on an idle device: its queue holds about a thousand launches."""
        times = []
        with self.stream():
            for _ in range(samples):
                torch.cuda.synchronize(self.device)
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize(self.device)
        return percentiles(times)

    def held(self, call, microseconds, seconds=1.0):
        """Call without a pause for `seconds`; a call takes about `microseconds`. Returns (Times of one call from ten
        stretches, clocks and power read meanwhile by `results.sensors`). A GPU at its power limit shows it here. Values
        that come too late, perhaps of an idle GPU, are empty.
        """
        calls = max(1, round(seconds * 1e5 / microseconds))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        with ThreadPoolExecutor(1) as pool, self.stream():
            state = pool.submit(lambda: (time.sleep(0.4 * seconds), sensors(self.device))[1])
            events[0].record()
            for event in events[1:]:
                for _ in range(calls):
                    call()
                event.record()
            torch.cuda.synchronize(self.device)
            meanwhile = state.done()
        times = [1e3 * start.elapsed_time(end) / calls for start, end in itertools.pairwise(events)]
        return percentiles(times), state.result() if meanwhile else dict.fromkeys(state.result(), "")

    def _captured(self, run):
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool)
            try:
                run()
            finally:
                graph.capture_end()
        except RuntimeError:  # what must not be captured is timed as it is
            torch.cuda.synchronize(self.device)
            self._recover()
            return None
        return graph

    def _recover(self):
        """After a failed capture torch stays in capture mode: no memory is freed, random numbers fail."""
        number = torch.cuda.current_device() if self.device.index is None else self.device.index
        with contextlib.suppress(RuntimeError):  # unless it got as far as that itself
            torch._C._cuda_endAllocateToPool(number, self._pool)
            torch._C._cuda_releasePool(number, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        stuck = torch.cuda.default_generators[number]
        fresh = torch.Generator(stuck.device).manual_seed(stuck.initial_seed())
        stuck.graphsafe_set_state(fresh.graphsafe_get_state())

    def _samples(self, run, count):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        with self.stream():
            for start, end in pairs:
                self.flushed.zero_()  # also keeps the device busy while the host enqueues what follows
                start.record()
                run()
                end.record()
        torch.cuda.synchronize(self.device)
        return [1e3 * start.elapsed_time(end) for start, end in pairs]


def waits(run):
    """Whether a call waits for the GPU, for example by `.item()`. Capturing it would fail and damage torch's state."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def clock_for(device):
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


def interleaved(timed, rounds=10, per_round=5, seconds=math.inf):
    """{name: Timed} -> {name: Times}, measured in turns; each round starts with another one.

    Slow calls are measured fewer times in each round, not in fewer rounds. After one full round it stops when the
    measured times add up to `seconds`.
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
        if i == 0 and spent * rounds > seconds:
            per_round = max(1, int(per_round * (seconds - spent) / (spent * (rounds - 1))))
    return {name: percentiles(times) for name, times in collected.items()}


def percentiles(times):
    return Times(*(float(p) for p in np.percentile(times, [20, 50, 80])), len(times))


def fastest(candidates, clock):
    """The name of the fastest of {name: call}: all are timed once, and the best again, in turns.

    The minimum of many noisy times may belong to a lucky call.
    """
    with clock.stream():
        timed = {name: clock.ready(run) for name, run in candidates.items()}
        clock.warm()
        first = interleaved(timed, rounds=1)
        best = sorted(first, key=lambda name: first[name].p50)[:FINALISTS]
        again = interleaved({name: timed[name] for name in best}, rounds=4)
    return min(again, key=lambda name: again[name].p50)
