"""The measuring core on a clock that the test turns by hand."""

import pytest
import torch

from sparsedm.bench.timing import SHORTEST, CpuClock, Timed, clock_for, fastest, interleaved, percentiles


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


@pytest.mark.gpu
def test_cuda_clock_times_a_copy_by_graph_and_falls_back_to_events():
    x = torch.randn(1 << 26, device="cuda")
    clock = clock_for("cuda")
    copy = clock.ready(x.clone)
    synchronizing = clock.ready(lambda: x.sum().item())
    assert (copy.method, synchronizing.method) == ("cuda graph", "cuda events")
    short = interleaved({"copy": copy, "add": clock.ready(lambda: x[:1024] + 1)}, rounds=2)
    assert short["add"].p50 < short["copy"].p20
