import functools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import (
    ceilings,
    measure,
    networks,
    providers,
    results,
    run,
)
from bench.baselines import OURS_AND_DENSE
from bench.results import Results, read
from bench.run import LAYER_SUITES, NETWORK_SUITES, Session, Watch, main, run_suites
from sparsedm.kernels.sparse24.dispatch import Choice

FAST = {"rounds": 1, "per_round": 1}


def session(path, shapes=None, resume=False, **options):
    return Session(
        Results(path, resume), torch.device("cpu"), torch.float32, quick=True, shapes=shapes, limits=FAST, **options
    )


@pytest.mark.parametrize("suite", LAYER_SUITES)
def test_layer_suites_measure_each_shape_in_each_mode(suite, tmp_path):
    shapes = "ddpm-tiny@1" if suite == "conv" else "uvit-tiny@1"
    run_suites(suite, session(tmp_path / "r.csv", shapes))
    rows = read(tmp_path / "r.csv")
    kind = LAYER_SUITES[suite][0]
    assert {r["mode"] for r in rows} == set(kind.of_models or kind.modes)
    assert {r["kernel"] for r in rows} == {kind.kernel}
    assert {r["status"] for r in rows} <= {"ok", "unsupported"}
    assert {r["provider"] for r in rows if r["status"] == "ok"} >= {"dense"}
    assert all(r["p20_us"] <= r["p50_us"] <= r["p80_us"] for r in rows if r["metric"] == "time" and r["status"] == "ok")


def test_sweeps_have_all_modes_and_back_ends_and_layers_their_own_epilogue(tmp_path):
    run_suites("gemm", session(tmp_path / "r.csv", "square@128,uvit-tiny@1"))
    found = {(r["model"], r["mode"], r["provider"]) for r in read(tmp_path / "r.csv")}
    assert {mode for model, mode, _ in found if model == "square"} == {"plain", "epilogue"}
    assert {mode for model, mode, _ in found if model != "square"} == {"epilogue"}
    forced = {model for model, _, provider in found if provider == "sparsedm 2:4 wgmma"}
    assert forced == {"square"}
    assert {model for model, _, provider in found if provider == "sparsedm 2:4"} == {"square", "uvit-tiny@1"}


def test_rows_are_in_the_file_before_the_next_shape_begins(tmp_path, monkeypatch):
    seen = []

    def only_notes(suite, problem, *rest, **limits):
        path = tmp_path / "r.csv"
        seen.append(len(read(path)) if path.exists() else 0)
        yield [{"suite": suite, "provider": "dense", "status": "ok", **problem.columns()}]

    monkeypatch.setattr(run, "measure", only_notes)
    run_suites("mask", session(tmp_path / "r.csv", "square"))
    assert seen == [1, 2, 3, 4], "the rows of those before, and the note that this one is under way"
    assert {r["status"] for r in read(tmp_path / "r.csv")} == {"ok"}


def test_a_crash_is_recorded_and_passed_over_by_resume(tmp_path, monkeypatch):
    real = run.measure

    def crashing(suite, problem, *rest, **limits):
        if problem.shape.N == 256:
            raise MemoryError("as if the process had been killed")
        yield from real(suite, problem, *rest, **limits)

    monkeypatch.setattr(run, "measure", crashing)
    with pytest.raises(MemoryError):
        run_suites("mask", session(tmp_path / "r.csv", "square", providers=("dense",)))
    run_suites("mask", session(tmp_path / "r.csv", "square", resume=True, providers=("dense",)))
    states = {r["shape"]: r["status"] for r in read(tmp_path / "r.csv")}
    assert states == {"square 128": "ok", "square 256": "failed", "square 512": "ok", "square 1024": "ok"}


def crashes(*arguments):
    raise SystemExit("as if the process had been killed")


def test_who_crashed_has_failed_and_resume_measures_the_others(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(providers.TopK, "bind", crashes)
        with pytest.raises(SystemExit):
            run_suites("mask", session(tmp_path / "r.csv", "square@256"))
    run_suites("mask", session(tmp_path / "r.csv", "square@256", resume=True))
    states = {r["provider"]: (r["status"], r["reason"]) for r in read(tmp_path / "r.csv")}
    assert states.pop("torch topk") == ("failed", "the process ended in the middle of this: a crash, or a hang")
    assert set(states.values()) == {("ok", "")}
    assert len(states) == 3


def lost(self, problem, prepared):
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize("limit", [["--seconds", "1000"], []], ids=["limited", "unlimited"])
def test_a_gpu_that_is_lost_fails_who_lost_it_and_the_process_starts_again(limit, tmp_path, monkeypatch):
    restarts = []
    arguments = ["--suite", "mask", "--quick", "--shapes", "square@256,square@512", "--out", str(tmp_path / "r.csv")]
    with monkeypatch.context() as broken:
        broken.setattr(providers.TopK, "bind", lost)
        for module in (measure, run):
            broken.setattr(module, "device_is_lost", lambda device: True)
        broken.setattr(run, "start_again", restarts.append)
        main([*arguments, *limit])
    (again,) = restarts
    left = again[len([*arguments, *limit]) :]
    assert again == [*arguments, *limit, *left]
    assert left == ["--resume", *(["--seconds", left[-1]] if limit else [])]
    assert not limit or 900 < int(left[-1]) <= 1000
    (row,) = read(tmp_path / "r.csv")
    assert (row["provider"], row["status"]) == ("torch topk", "failed")
    assert row["reason"] == "RuntimeError: an illegal memory access was encountered"
    assert main(again) == 0
    names = {r["provider"] for r in read(tmp_path / "r.csv") if r["shape"] == "square 256" and r["status"] == "ok"}
    assert names == {"dense", "sparsedm choose", "sparsedm choose + pack"}


def test_an_error_that_the_device_survives_is_no_reason_to_start_again(tmp_path, monkeypatch):
    def broken(*arguments, **limits):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(run, "measure", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["--suite", "mask", "--quick", "--shapes", "square@256", "--out", str(tmp_path / "r.csv")])


def test_somebody_who_hangs_is_late(tmp_path, monkeypatch):
    late = threading.Event()
    monkeypatch.setattr(providers.Choose, "bind", lambda *_: late.wait(10) and None)
    run_suites("mask", session(tmp_path / "r.csv", "square@256", timeout=0.2, on_timeout=late.set))
    assert late.is_set()


@pytest.mark.parametrize(
    ("suite", "provider", "patience"),
    [
        ("mask", providers.Dense(), 20),
        ("gemm", providers.Sparse24(), 20),
        ("gemm", providers.Sparse24("mma"), 80),
        ("first", providers.Configuration(Choice("wgmma", 0)), 20),
        ("conv", providers.Dense(), 80),
        ("masked-train", providers.Dense(), 80),
        ("end-to-end", providers.Dense(), 80),
    ],
)
def test_who_compiles_several_kernels_one_after_another_may_take_longer(
    suite, provider, patience, tmp_path, monkeypatch
):
    given = session(tmp_path / "r.csv", timeout=20, on_timeout=lambda: None)
    allowed = []
    monkeypatch.setattr(given.watch, "expect", allowed.append)
    shape = run.select("square@256", run.LinearShape, (1,), True)[0]
    given.do(suite, shape, "", [provider], lambda missing, starting: [] if starting(provider.name) else None)
    assert allowed == [80, patience], "for the rounds, and for the provider"


def test_a_suite_s_time_began_before_this_process_had_imported_torch(monkeypatch):
    assert run.deadline(50) > time.monotonic() + 40
    monkeypatch.setenv("BENCH_DEADLINE", str(at := time.monotonic() + 30))
    assert (run.deadline(50), run.deadline(-1) < at) == (at, True)


def test_who_is_ended_from_outside_has_not_failed(tmp_path, monkeypatch):
    arguments = ["--suite", "mask", "--quick", "--shapes", "square@256", "--out", str(tmp_path / "r.csv")]
    with monkeypatch.context() as slow:
        slow.setattr(providers.TopK, "bind", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(arguments) == 3
    assert not read(tmp_path / "r.csv")
    assert main([*arguments, "--resume"]) == 0
    assert {r["status"] for r in read(tmp_path / "r.csv")} == {"ok"}


def test_who_ends_the_process_twice_is_left_out_of_the_rest(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(providers.TopK, "bind", crashes)
        for _ in range(2):
            with pytest.raises(SystemExit):
                run_suites("mask", session(tmp_path / "r.csv", "square", resume=(tmp_path / "r.csv").exists()))
    run_suites("mask", session(tmp_path / "r.csv", "square", resume=True))
    rows = [r for r in read(tmp_path / "r.csv") if r["provider"] == "torch topk"]
    reasons = [results.ENDED] * 2 + ["it has ended its process 2 times in this suite"] * 2
    assert [(r["status"], r["reason"]) for r in rows] == [("failed", reason) for reason in reasons]
    assert len([r for r in read(tmp_path / "r.csv") if r["status"] == "ok" and r["metric"] == "time"]) == 3 * 4


class Slow(providers.TopK):
    """Stands for a provider that compiles; ended() is called meanwhile."""

    name, ended = "sparsedm choose compiled", staticmethod(lambda: None)

    def bind(self, problem, prepared):
        self.ended()
        return super().bind(problem, prepared)


def test_eager_rows_are_in_the_file_before_anything_compiles(tmp_path, monkeypatch):
    arguments = ["--suite", "mask", "--quick", "--shapes", "square@256", "--out", str(tmp_path / "r.csv")]
    names = ["dense", "torch topk", "sparsedm choose", "sparsedm choose + pack"]
    monkeypatch.setitem(run.PROVIDERS, "mask", [*run.PROVIDERS["mask"], Slow()])
    monkeypatch.setattr(run, "BESIDE", ("sparsedm choose",))
    with monkeypatch.context() as slow:
        slow.setattr(Slow, "ended", staticmethod(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert main(arguments) == 3
    eager = {r["provider"]: r["p50_us"] for r in read(tmp_path / "r.csv")}
    assert [r["provider"] for r in read(tmp_path / "r.csv") if r["metric"] == "time"] == names
    assert main([*arguments, "--resume"]) == 0
    rows = [r for r in read(tmp_path / "r.csv") if r["metric"] == "time"]
    assert {r["provider"] for r in rows} == {*names, Slow.name}
    again = {r["provider"] for r in rows if r["provider"] in eager and r["p50_us"] != eager[r["provider"]]}
    assert again <= {"dense", "sparsedm choose"}, "what it is compared with was measured beside it, and nothing else"
    assert again


def test_providers_that_there_is_no_time_for_are_left_for_the_next_time(tmp_path, monkeypatch):
    """The second of two networks to compile would begin too late; those that are not compiled are measured."""
    monkeypatch.setattr(networks.NetworkProvider, "supports", lambda self, problem: None)
    monkeypatch.setattr(networks, "max_autotune", lambda network: network)
    monkeypatch.setattr(run, "COMPILES", 1000)
    names = ("dense", "dense compiled", "sparsedm 2:4")
    first = session(tmp_path / "r.csv", "uvit-tiny@1", providers=names, deadline=time.monotonic() + 900)
    run_suites("train", first)
    run_suites("end-to-end", first)
    assert first.cut == 2
    assert {r["provider"] for r in read(tmp_path / "r.csv") if r["suite"] == "end-to-end"} == {"dense", "sparsedm 2:4"}
    run_suites("end-to-end", session(tmp_path / "r.csv", "uvit-tiny@1", resume=True, providers=names))
    assert {r["provider"] for r in read(tmp_path / "r.csv") if r["suite"] == "end-to-end"} == set(names)


def test_a_crash_while_sampling_costs_only_the_samples(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(run, "sampling_rows", crashes)
        with pytest.raises(SystemExit):
            run_suites("end-to-end", session(tmp_path / "r.csv", "uvit-tiny@1", providers=("dense",)))
    names = ("dense", "sparsedm masked")
    run_suites("end-to-end", session(tmp_path / "r.csv", "uvit-tiny@1", resume=True, providers=names))
    rows = {(r["mode"], r["provider"], r["status"]) for r in read(tmp_path / "r.csv") if r["metric"] in ("", "time")}
    sampling = "sampling, 4 steps"
    steps = {("step", name, "ok") for name in names}
    assert rows == steps | {(sampling, "", "failed"), (sampling, "sparsedm masked", "ok")}


def test_whole_sampling_is_watched_image_batch_by_batch(tmp_path, monkeypatch):
    """All of it together takes longer, for the networks of table 3, than one may hang."""
    alive = []
    monkeypatch.setattr(networks, "draw", lambda *_: alive.append("draws") or torch.zeros(1))
    given = session(tmp_path / "r.csv", "uvit-tiny@1", providers=("dense", "sparsedm masked"))
    monkeypatch.setattr(given.watch, "alive", lambda: alive.append("lives"))
    run_suites("end-to-end", given)
    assert alive == ["lives", "draws"] * (2 + 2 * 3 + 1)


def test_sampling_that_there_is_no_time_for_is_left_for_the_next_time(tmp_path, monkeypatch):
    shape, names = "uvit-tiny@1", ("dense",)
    with monkeypatch.context() as short:
        short.setattr(run, "SAMPLES", 1000)
        first = session(tmp_path / "r.csv", shape, providers=names, deadline=time.monotonic() + 900)
        run_suites("end-to-end", first)
    assert first.cut == 1
    assert {r["mode"] for r in read(tmp_path / "r.csv")} == {"step"}
    run_suites("end-to-end", session(tmp_path / "r.csv", shape, resume=True, providers=names))
    assert {r["mode"] for r in read(tmp_path / "r.csv")} == {"step", "sampling, 4 steps"}
    again = session(tmp_path / "r.csv", shape, resume=True, providers=names, deadline=-1.0)
    run_suites("end-to-end", again)
    assert again.cut == 0


def test_resume_measures_only_the_providers_that_are_missing(tmp_path):
    run_suites("mask", session(tmp_path / "r.csv", "uvit-tiny@1", providers=("dense",)))
    run_suites("mask", session(tmp_path / "r.csv", "uvit-tiny@1", resume=True, providers=("dense", "torch topk")))
    names = [r["provider"] for r in read(tmp_path / "r.csv")]
    assert names.count("dense") == names.count("torch topk") > 0


def test_resume_holds_for_a_second_what_there_was_no_time_to_hold(tmp_path, monkeypatch):
    """On a GPU: the best of our configurations, and everything else; one that hung while it was held, no more."""

    class One(providers.Configuration):
        def __init__(self, name):
            self.name = name

    monkeypatch.setattr(measure, "HELD", 2)
    given = session(tmp_path / "r.csv")
    every = [providers.Dense(), *(One(f"wgmma {n}") for n in range(4))]
    shape = run.select("square@256", run.LinearShape, (1,), True)[0]
    row = {"suite": "first", "shape": shape.name, "mode": "plain", "dtype": "float32", "status": "ok"}
    row["threads"] = str(torch.get_num_threads())
    given.results.add(
        [row | {"provider": p.name, "metric": "time", "p50_us": t} for p, t in zip(every, (9, 7, 4, 3, 5))]
    )
    given.results.add([row | {"provider": "wgmma 2", "metric": "held", "p50_us": 3}])
    asked = []

    def rows(missing, starting):
        asked.append([p.name for p in missing])
        times = [row | {"provider": p.name, "metric": "time", "p50_us": 1} for p in missing]
        return [[*times, *(row | {"provider": p.name, "metric": "held", "status": "failed"} for p in missing)]]

    for device in ("cpu", "cuda", "cuda"):
        given.device = torch.device(device)
        given.do("first", shape, "plain", every, rows)
    assert asked == [["dense", "wgmma 1"]], "a CPU knows no power"
    times = [r["p50_us"] for r in given.results.rows if r["metric"] == "time"]
    assert times == [9, 7, 4, 3, 5], "which were taken in turns"


def test_without_compilation_its_providers_are_left_out(tmp_path):
    run_suites("conv", session(tmp_path / "r.csv", "ddpm-tiny@1", compiled=False))
    assert {r["provider"] for r in read(tmp_path / "r.csv")} == {"dense", "sparsedm 2:4"}


def test_modes_can_be_chosen(tmp_path):
    run_suites("gemm", session(tmp_path / "r.csv", "square@128", providers=("dense",), modes=("epilogue",)))
    assert {r["mode"] for r in read(tmp_path / "r.csv")} == {"epilogue"}


def test_of_several_suites_one_may_have_nothing_to_measure(tmp_path):
    run_suites("ceiling,mask", session(tmp_path / "r.csv", "square@128", providers=("dense",)))
    assert {r["suite"] for r in read(tmp_path / "r.csv")} == {"mask"}


def test_a_deadline_leaves_out_and_resume_goes_on(tmp_path):
    first = session(tmp_path / "r.csv", "square", deadline=-1.0)
    run_suites("mask", first)
    assert first.cut == 4
    assert not first.results.rows
    run_suites("mask", session(tmp_path / "r.csv", "square", providers=("dense",)))
    count = len(read(tmp_path / "r.csv"))
    again = session(tmp_path / "r.csv", "square", resume=True, providers=("dense",), deadline=-1.0)
    run_suites("mask", again)
    assert (again.cut, len(again.results.rows)) == (0, count)


def test_ceilings_of_a_cpu(tmp_path):
    small = session(tmp_path / "r.csv")
    run_suites("ceiling", small)
    run_suites("ceiling", small)
    rows = read(tmp_path / "r.csv")
    assert [r["kernel"] for r in rows if r["kernel"] == "copy"] == ["copy"], "once, not once for each call"
    assert all(r["value"] > 0 for r in rows if r["status"] == "ok")
    assert {r["status"] for r in rows if r["kernel"] not in ("copy", "dense")} == {"unsupported"}


def test_ceilings_count_bytes_both_ways_and_two_operations():
    session = SimpleNamespace(device="cpu", dtype=torch.float32)
    _, copied = ceilings.copy(session, 1 << 20)
    assert copied(1000.0)["gbps"] == pytest.approx(2 * (1 << 20) / 1e-3 / 1e9), "read and written"
    _, rate = ceilings.dense(session, 64)
    assert rate(10.0)["value"] == pytest.approx(2 * 64**3 / 10e-6 / 1e12)


def test_a_probe_that_fails_or_ends_the_process_costs_no_other_ceiling(tmp_path, monkeypatch):
    def prepare(name, device, dtype):
        if name == "mma":
            raise RuntimeError("out of registers")
        raise SystemExit("as if the process had been killed")

    monkeypatch.setattr(ceilings, "unsupported", lambda name, *_: None if "w" not in name else "old")
    monkeypatch.setattr("bench.instruction_rates.prepare", prepare)
    with pytest.raises(SystemExit):
        run_suites("ceiling", session(tmp_path / "r.csv"))
    run_suites("ceiling", session(tmp_path / "r.csv", resume=True))
    states = {r["shape"].split()[0]: (r["status"], r["reason"]) for r in read(tmp_path / "r.csv")}
    assert states["copy"] == states["dense"] == ("ok", "")
    assert states["mma"] == ("failed", "RuntimeError: out of registers")
    assert states["mma.sp"] == ("failed", "the process ended in the middle of this: a crash, or a hang")
    assert states["wgmma"] == states["wgmma.sp"] == ("unsupported", "old")


HANGS = """
import time
from bench.run import Watch, start_again
print("hangs")
Watch(lambda: start_again(["--help"])).expect(0.1)
time.sleep(100)
"""


def test_a_watch_calls_when_nobody_is_alive():
    called = threading.Event()
    Watch(called.set).expect(0.05)
    assert called.wait(5)


def test_a_watch_that_hears_of_life_calls_later():
    called = threading.Event()
    watch = Watch(called.set)
    watch.alive()
    watch.expect(0.4)
    for _ in range(4):
        assert not called.wait(0.2)
        watch.alive()
    assert called.wait(5)


def test_a_watch_that_is_done_calls_nobody():
    called = threading.Event()
    watch = Watch(called.set)
    watch.expect(0.05)
    watch.expect(0.05)
    watch.done()
    assert not called.wait(0.2)


def test_a_process_that_hangs_is_replaced_by_another():
    done = subprocess.run([sys.executable, "-u", "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("hangs\nusage: python -m bench.run")
    assert 'File "<string>", line 6 in <module>' in done.stderr, "where it hung"


SMALL = {
    "ceiling": None,
    "mask": "square@256",
    "masked-train": "square@256",
    "gemm": "square@256,uvit-tiny@4",
    "conv": "ddpm-tiny@4",
    "end-to-end": "uvit-tiny@4",
    "train": "uvit-tiny@4",
}


@pytest.mark.gpu
@pytest.mark.parametrize("suite", SMALL)
def test_on_a_gpu_everything_of_torch_and_of_ours_is_right_and_timed_by_graphs(suite, tmp_path, monkeypatch):
    # what a compiler makes of the graphs is torch's affair, and takes minutes
    compiler = functools.partial(torch.compile, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(networks, "max_autotune", compiler)
    names = [p.name for kernel in OURS_AND_DENSE.values() for p in kernel if not p.name.endswith("compiled")]
    of_networks = [p.name for p in networks.STEP_PROVIDERS + networks.TRAINING_PROVIDERS if p.name != "cuSPARSELt"]
    names += of_networks if suite in NETWORK_SUITES else ["torch", "sparsedm"]  # the last two of the ceilings
    results = Results(tmp_path / "r.csv")
    options = {"quick": True, "shapes": SMALL[suite], "providers": tuple(names), "limits": FAST}
    run_suites(suite, Session(results, torch.device("cuda"), torch.bfloat16, **options))
    rows = read(tmp_path / "r.csv")
    assert not [(r["provider"], r["mode"], r["reason"]) for r in rows if r["status"] in ("failed", "wrong")]
    times = [r for r in rows if r["samples"] and r["metric"] not in ("host", "packing") and "sampling" not in r["mode"]]
    assert {r["method"] for r in times} == {"cuda graph"}
    if suite == "end-to-end":
        step = {p.name for p in networks.STEP_PROVIDERS if p.name != "cuSPARSELt"}
        assert {r["provider"] for r in rows if "sampling" in r["mode"]} == {r["provider"] for r in times} == step


def test_another_number_of_threads_is_another_measurement(tmp_path):
    for threads, names in ((1, ("dense",)), (2, ("dense", "sparsedm 2:4"))):
        torch.set_num_threads(threads)
        try:
            found = session(tmp_path / "r.csv", "square@128", providers=names, modes=("plain",), resume=threads > 1)
            run_suites("gemm", found)
        finally:
            torch.set_num_threads(1)
    held = sorted((r["provider"], r["threads"]) for r in read(tmp_path / "r.csv") if r["metric"] == "time")
    assert held == [("dense", "1"), ("dense", "2"), ("sparsedm 2:4", "2")]


def test_suite_cpu_goes_on_whatever_the_threads_of_the_session(tmp_path, monkeypatch):
    asked = []

    def quick(suite, problem, providers, clock, starting, **limits):
        row = {"suite": suite, "shape": problem.shape.name, "mode": problem.mode, "dtype": "float32", "status": "ok"}
        for provider in providers:
            assert starting(provider.name)
            asked.append(provider.name)
            times = {"metric": "time", "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0}
            yield [row | {"provider": provider.name} | times | results.stamp(torch.device("cpu"))]

    monkeypatch.setattr(run, "measure", quick)
    one, two = run.cpu.PLAN[0], next(part for part in run.cpu.PLAN if part.threads == 2)
    monkeypatch.setattr(run.cpu, "PLAN", [one, replace(two, quick=1)])
    counts = []
    for resume in (False, True):
        run_suites("cpu", session(tmp_path / "r.csv", resume=resume, providers=("dense",)))
        counts.append(len(asked))
    assert counts[0] == counts[1] > 1, "nothing is measured again"
    assert {row["threads"] for row in read(tmp_path / "r.csv")} == {"1", "2"}
