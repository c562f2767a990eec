"""The measuring core on a clock that the test turns by hand."""

import contextlib
import threading
import time
import types

import pytest
import torch

from bench import timing
from bench.timing import SHORTEST, CpuClock, CudaClock, Timed, clock_for, fastest, interleaved, percentiles


class HandClock:
    """`now()` in seconds; a call made by `lasting` moves it on. Also a clock for `fastest`, one call per sample."""

    def __init__(self, tick=0):
        self.microseconds, self.tick = 0, tick  # tick: what every sample takes at least
        self.calls = []

    def now(self):
        return self.microseconds / 1e6

    def lasting(self, name, *microseconds):
        """A call that takes these times in turn, and then the last one for ever."""
        durations = list(microseconds)

        def run():
            self.calls.append(name)
            self.microseconds += durations.pop(0) if len(durations) > 1 else durations[0]

        return run

    def ready(self, run):
        def samples(count):
            times = []
            for _ in range(count):
                start = self.microseconds
                self.microseconds += self.tick
                run()
                times.append(self.microseconds - start)
            return times

        return Timed(samples, "by hand")

    def host(self, run):
        return None

    def held(self, call, microseconds):
        return None

    def stream(self):
        return contextlib.nullcontext()

    def warm(self):
        pass


def test_percentiles_are_the_20th_50th_and_80th():
    assert percentiles(range(101)) == (20.0, 50.0, 80.0, 101)


def test_one_slow_sample_does_not_move_the_median():
    assert percentiles([10.0] * 9 + [1e6]).p50 == 10.0


def test_a_cpu_sample_fills_a_millisecond_and_is_per_call():
    clock = HandClock()
    timed = CpuClock(clock.now).ready(clock.lasting("a", 50.0, 50.0, 100.0))  # warm-up, calibration, then
    before = len(clock.calls)
    assert timed.samples(1) == [pytest.approx(100.0)]
    assert (len(clock.calls) - before) * 50e-6 == pytest.approx(SHORTEST)
    assert timed.method == "perf_counter"


def test_a_long_call_is_one_sample():
    clock = HandClock()
    timed = CpuClock(clock.now).ready(clock.lasting("a", 7e4))
    before = len(clock.calls)
    assert timed.samples(3) == pytest.approx([7e4] * 3)
    assert len(clock.calls) - before == 3


def test_the_warm_up_is_not_measured():
    clock = HandClock()
    timed = CpuClock(clock.now).ready(clock.lasting("compiles first", 9e6, 2000.0))
    assert timed.samples(1) == [pytest.approx(2000.0)]


def test_rounds_take_turns_and_each_starts_with_another():
    clock = HandClock()
    timed = {name: clock.ready(clock.lasting(name, 10.0)) for name in "abc"}
    times = interleaved(timed, rounds=3, per_round=2)
    assert "".join(clock.calls) == "aabbcc" + "bbccaa" + "ccaabb"
    assert times["b"] == (10, 10, 10, 6)


def test_a_device_that_slows_down_hits_all_alike():
    clock = HandClock()
    slowing = [100.0] * 4 + [200.0] * 4  # from the second half of the run on, everything takes twice as long
    times = interleaved({n: clock.ready(clock.lasting(n, *slowing)) for n in "ab"}, rounds=8, per_round=1)
    assert times["a"] == times["b"]


def test_time_is_bounded_but_everybody_is_measured_once():
    clock = HandClock()
    timed = {name: clock.ready(clock.lasting(name, 1e6)) for name in "ab"}
    times = interleaved(timed, rounds=100, per_round=1, seconds=0.5)
    assert {name: t.count for name, t in times.items()} == {"a": 1, "b": 1}


def test_what_is_slow_gets_fewer_samples_but_no_fewer_rounds():
    clock = HandClock()
    timed = {name: clock.ready(clock.lasting(name, 1e5)) for name in "ab"}
    times = interleaved(timed, rounds=8, per_round=5, seconds=4.0)
    assert "".join(clock.calls[:14]) == "aaaaabbbbb" + "bbaa", "five each, then two each"
    assert {name: t.count for name, t in times.items()} == {"a": 5 + 7 * 2, "b": 5 + 7 * 2}


def test_nothing_to_measure():
    assert interleaved({}) == {}


def test_fastest_measures_the_best_again_and_is_not_fooled_by_one_lucky_sample():
    clock = HandClock()
    lucky = [1.0] * 5 + [50.0]  # quick in the first round only
    candidates = {
        "steady": clock.lasting("steady", 10.0),
        "lucky": clock.lasting("lucky", *lucky),
        "slow": clock.lasting("slow", 90.0),
        "slower": clock.lasting("slower", 99.0),
    }
    assert fastest(candidates, clock) == "steady"
    assert clock.calls.count("slower") == 5, "a candidate out of the final is not measured again"


def test_a_cpu_gets_the_cpu_clock():
    assert isinstance(clock_for("cpu"), CpuClock)


class Gpu:
    """Plays torch.cuda for a CudaClock: a kernel takes 7 microseconds, the replay of a graph 5."""

    def __init__(self, monkeypatch):
        gpu, pools = self, iter(range(100))
        self.capturing, self.broken, self.strict = None, False, False
        self.ended, self.generators, self.microseconds = [], [], 0

        class Stream:
            def __init__(self, device):
                pass

            def wait_stream(self, other):
                pass

        self.default = self.stream = Stream("cuda")

        class CUDAGraph:
            def capture_begin(self, pool):
                assert gpu.stream is not gpu.default
                gpu.capturing = pool

            def capture_end(self):
                pool, gpu.capturing, broken, gpu.broken = gpu.capturing, None, gpu.broken, False
                if broken:
                    raise RuntimeError("operation failed due to a previous error during capture")
                gpu.ended.append(pool)

            def replay(self):
                gpu.microseconds += 5

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.microseconds

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        @contextlib.contextmanager
        def stream(chosen):
            before, gpu.stream = gpu.stream, chosen
            yield
            gpu.stream = before

        generator = types.SimpleNamespace(
            device="cuda", initial_seed=lambda: 3, graphsafe_set_state=self.generators.append
        )
        new = types.SimpleNamespace(manual_seed=lambda seed: types.SimpleNamespace(graphsafe_get_state=lambda: seed))
        fakes = {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "Event": Event,
            "stream": stream,
            "current_stream": lambda device: gpu.stream,
            "current_device": lambda: 0,
            "synchronize": lambda device: None,
            "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=1 << 10),
            "graph_pool_handle": lambda: next(pools),
            "default_generators": [generator],
            "set_sync_debug_mode": lambda mode: setattr(gpu, "strict", mode == "error"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)  # fails where torch has no such name
        monkeypatch.setattr(torch, "Generator", lambda device: new)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda n, pool: self.ended.append(pool), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda n, pool: None, raising=False)
        self.clock = CudaClock("cpu")

    def launch(self):
        assert self.stream is not self.default
        self.microseconds += 7 if self.capturing is None else 0

    def wait(self):
        """The host waits: refused by the debug mode, and fatal to a capture."""
        if self.strict:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.broken = self.capturing is not None


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_a_call_is_captured_and_its_replay_timed(gpu):
    timed = gpu.clock.ready(gpu.launch)
    assert (timed.method, timed.samples(3)) == ("cuda graph", pytest.approx([5.0] * 3))
    assert gpu.stream is gpu.default


def test_graphs_that_are_made_together_share_their_memory_and_others_never(gpu):
    with gpu.clock.stream():
        together = [gpu.clock.ready(gpu.launch) for _ in range(3)]
    assert len(set(gpu.ended)) == 1
    del together  # with its graphs the memory goes, and torch refuses to make graphs in it
    gpu.clock.ready(gpu.launch)
    assert len(set(gpu.ended)) == 2
    assert fastest({"a": gpu.launch, "b": gpu.launch}, gpu.clock) in "ab"
    assert len(set(gpu.ended)) == 3


def test_a_clock_inside_another_s_block_may_get_the_same_stream(gpu):
    """torch hands out 32 streams in turn, and the search for an algorithm makes a clock of its own."""
    inner = CudaClock("cpu")
    inner._stream = gpu.clock._stream
    with gpu.clock.stream():
        outer = gpu.clock.ready(gpu.launch)
        for _ in range(2):  # two searches, whose graphs are gone when they end
            assert inner.ready(gpu.launch).method == "cuda graph"
        again = gpu.clock.ready(gpu.launch)
    assert (outer.method, again.method) == ("cuda graph", "cuda graph")
    assert gpu.ended[0] == gpu.ended[3]
    assert len(set(gpu.ended)) == 3


def test_a_call_that_waits_is_timed_as_it_is_and_no_capture_is_tried(gpu):
    timed = gpu.clock.ready(lambda: [gpu.launch(), gpu.wait()])
    assert (timed.method, timed.samples(2)) == ("cuda events", pytest.approx([7.0] * 2))
    assert not gpu.ended
    assert not gpu.strict, "the debug mode is put back"


def test_a_capture_that_fails_is_cleaned_up_after(gpu):
    def run():
        gpu.launch()
        gpu.broken = gpu.capturing is not None  # what the debug mode does not know

    timed = gpu.clock.ready(run)
    assert (timed.method, timed.samples(1)) == ("cuda events", pytest.approx([7.0]))
    assert len(gpu.ended) == 1, "torch's allocator is out of the capture"
    assert gpu.generators == [3], "and so are its random numbers"
    assert gpu.stream is gpu.default
    with gpu.clock.stream():
        assert gpu.clock.ready(run).method == "cuda events"
        assert gpu.clock.ready(gpu.launch).method == "cuda graph"
    assert len(set(gpu.ended)) == 3, "into memory without the remains of what failed"


def test_an_idle_gpu_is_warmed_up(gpu, monkeypatch):
    busy, clock = [], iter([0.0, 0.01, 0.02, 0.04])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    gpu.clock.flushed = types.SimpleNamespace(zero_=lambda: busy.append(gpu.stream))
    gpu.clock.warm()
    assert len(busy) == 2
    assert gpu.default not in busy


def test_the_host_is_timed_one_call_at_a_time(gpu):
    calls = []
    times = gpu.clock.host(lambda: calls.append(gpu.launch()), samples=4)
    assert (times.count, len(calls)) == (4, 4)


def test_a_held_second_is_as_many_calls_as_fill_it_with_the_sensors_read_meanwhile(gpu, monkeypatch):
    answered = threading.Event()
    timed = gpu.clock.ready(gpu.launch)
    monkeypatch.setattr(timing, "sensors", lambda device: answered.set() or {"power_w": "700"})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: answered.wait(10) and time.sleep(0.2))
    before = gpu.microseconds
    times, state = gpu.clock.held(timed.call, 50.0, seconds=0.01)
    assert (times.p50, times.count, state) == (pytest.approx(5.0), 10, {"power_w": "700"})
    assert gpu.microseconds - before == 10 * 20 * 5, "ten stretches of a thousandth of a second"


def test_sensors_that_answer_when_the_second_is_over_tell_nothing(gpu, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: over.set())
    monkeypatch.setattr(timing, "sensors", lambda device: (over.wait(10), time.sleep(0.5), {"power_w": "70"})[2])
    assert gpu.clock.held(gpu.launch, 50.0, seconds=0.01)[1] == {"power_w": ""}


@pytest.mark.gpu
def test_cuda_clock_times_a_copy_by_graph_and_falls_back_to_events():
    x = torch.randn(1 << 26, device="cuda")
    clock = clock_for("cuda")
    copy = clock.ready(x.clone)
    synchronizing = clock.ready(lambda: x.sum().item())
    assert (copy.method, synchronizing.method) == ("cuda graph", "cuda events")
    short = interleaved({"copy": copy, "add": clock.ready(lambda: x[:1024] + 1)}, rounds=2)
    assert short["add"].p50 < short["copy"].p20


@pytest.mark.gpu
def test_after_a_capture_that_failed_torch_works_as_before():
    clock, x = clock_for("cuda"), torch.ones(1 << 20, device="cuda")

    def run():
        torch.cuda.synchronize()  # forbidden in a capture, and unknown to the debug mode
        return x + 1

    stream = torch.cuda.current_stream()
    assert clock.ready(run).method == "cuda events"
    assert torch.cuda.current_stream() == stream
    assert torch.randn(1000, device="cuda").std() > 0.5
    assert clock.ready(lambda: x + 1).method == "cuda graph"
    big = torch.empty(1 << 28, device="cuda")
    reserved = torch.cuda.memory_reserved()
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - (1 << 28)


@pytest.mark.gpu
def test_a_backward_is_captured_with_the_forward_made_on_the_clock_s_stream():
    clock, w = clock_for("cuda"), torch.randn(256, 256, device="cuda", requires_grad=True)
    with clock.stream():
        y = torch.randn(256, 256, device="cuda") @ w
    assert clock.ready(lambda: torch.autograd.grad(y, w, y.detach(), retain_graph=True)).method == "cuda graph"
