"""Tuning is remembered, merged safely, never trusted blindly; the timer and the GPU's name are fakes."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.kernels import launch, tuning
from sparsedm.kernels.tuning import Autotuner

pytestmark = pytest.mark.usefixtures("imaginary_gpu")
GPU = torch.device("cuda", 0)
CANDIDATES = [{"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 64}]


def kernel(x):
    return x + 1


def other_kernel(x):
    return x + 2


def work(candidate):
    """Every block size gives the same result, as it should."""
    work.candidate = candidate
    return torch.ones(4), torch.arange(4)


class Timer:
    """Pretends to measure: microseconds by BLOCK; counts its calls."""

    def __init__(self, microseconds):
        self.microseconds, self.calls = microseconds, 0

    def __call__(self, run):
        self.calls += 1
        run()
        return self.microseconds[work.candidate["BLOCK"]]


def tuner(timer, kernels=(kernel,), candidates=CANDIDATES):
    return Autotuner("double", candidates, kernels, timer)


def best(tuned, **key):
    return tuned.best(work, GPU, **(key or {"dtype": "bf16", "m": 64}))


def table(tmp_path, folder="tuned"):
    return tmp_path / folder / "nvidia-imaginary-1-sm-90.json"


def test_the_fastest_is_chosen_once_and_remembered_by_another_process(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    timer = Timer({16: 9.0, 32: 4.0, 64: 5.0})
    first = tuner(timer)
    assert best(first) == best(first) == {"BLOCK": 32}
    assert timer.calls == 3
    assert "tuning double for dtype=bf16 m=64" in caplog.text
    assert best(tuner(timer)) == {"BLOCK": 32}  # a new tuner has an empty memory, as a new process has
    assert timer.calls == 3
    (section,) = json.loads(table(tmp_path).read_text()).items()
    assert section[0] == first.section
    times = [[{"BLOCK": 16}, 9.0], [{"BLOCK": 32}, 4.0], [{"BLOCK": 64}, 5.0]]
    entry = {"config": {"BLOCK": 32}, "microseconds": 4.0, "times": times, "failed": []}
    assert section[1] == {"dtype=bf16 m=64": entry}


def test_the_times_of_all_candidates_are_known_here_and_to_another_process():
    timer = Timer({16: 9.0, 64: 5.0})
    for tuned in (tuner(timer), tuner(timer)):
        verdict = tuned.verdict(work, GPU, m=64)
        assert verdict.config == {"BLOCK": 64}
        assert verdict.times == (({"BLOCK": 16}, 9.0), ({"BLOCK": 64}, 5.0))
        assert verdict.failed == (({"BLOCK": 32}, "KeyError: 32"),)


def test_candidates_may_depend_on_the_key():
    tuned = tuner(Timer({16: 9.0, 32: 4.0, 64: 5.0}))
    assert tuned.best(work, GPU, candidates=CANDIDATES[::2], m=1) == {"BLOCK": 64}
    assert best(tuned, m=2) == {"BLOCK": 32}


def test_every_part_of_the_key_tunes_again():
    timer = Timer({16: 9.0, 32: 4.0, 64: 5.0})
    tuned = tuner(timer)
    keys = [{"dtype": "bf16", "m": 64}, {"dtype": "fp16", "m": 64}, {"dtype": "bf16", "m": 128}]
    for i, key in enumerate([*keys, {"bias": True, "m": 64}, {"scale": True, "m": 64}]):
        best(tuned, **key)
        assert timer.calls == 3 * (i + 1)


def test_another_kernel_source_or_triton_tunes_again(monkeypatch):
    timer = Timer({16: 9.0, 32: 4.0, 64: 5.0})
    best(tuner(timer))
    best(tuner(timer, kernels=(other_kernel,)))
    assert timer.calls == 6
    monkeypatch.setattr(tuning.triton, "__version__", "9.9")
    best(tuner(timer))
    assert timer.calls == 9


def test_a_config_that_is_no_longer_offered_is_not_used():
    best(tuner(Timer({16: 9.0, 32: 4.0, 64: 5.0})))
    assert best(tuner(Timer({16: 9.0, 64: 5.0}), candidates=[{"BLOCK": 16}, {"BLOCK": 64}])) == {"BLOCK": 64}


def test_the_shipped_table_serves_and_the_users_comes_first(tmp_path):
    timer = Timer({})
    section = tuner(timer).section
    tuning.merge_table(table(tmp_path, "shipped"), section, "m=8", {"config": {"BLOCK": 64}})
    assert best(tuner(timer), m=8) == {"BLOCK": 64}
    tuning.merge_table(table(tmp_path), section, "m=8", {"config": {"BLOCK": 16}})
    assert best(tuner(timer), m=8) == {"BLOCK": 16}


def test_off_takes_the_default_without_measuring(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    assert best(tuner(Timer({}))) == {"BLOCK": 16}
    assert "is not tuned for dtype=bf16 m=64" in caplog.text
    assert not table(tmp_path).exists()


def test_a_rule_may_give_another_default_which_no_measurement_follows(monkeypatch):
    tuned = tuner(Timer({16: 4.0, 32: 9.0, 64: 5.0}))
    assert tuned.best(work, torch.device("cpu"), default={"BLOCK": 64}, m=8) == {"BLOCK": 64}
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert tuned.best(work, GPU, default={"BLOCK": 64}, m=8) == {"BLOCK": 64}
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    assert tuned.best(work, GPU, default={"BLOCK": 64}, m=8) == {"BLOCK": 16}


def test_nothing_is_timed_or_remembered_while_a_cuda_graph_is_captured(monkeypatch):
    tuned = tuner(Timer({16: 9.0, 32: 4.0, 64: 5.0}))
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert best(tuned) == {"BLOCK": 16}
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    assert best(tuned) == {"BLOCK": 32}


def test_candidates_that_fail_are_passed_over_with_a_warning(tmp_path, caplog):
    assert best(tuner(Timer({64: 5.0}))) == {"BLOCK": 64}
    assert "double: candidate {'BLOCK': 32} is passed over: KeyError: 32" in caplog.text
    assert best(tuner(Timer({})), m=1) == {"BLOCK": 16}
    assert "nothing could be timed for m=1" in caplog.text
    (section,) = tuning.read_table(table(tmp_path)).values()
    assert "m=1" not in section


def test_a_default_that_won_because_others_failed_is_not_remembered_for_other_processes(tmp_path, caplog):
    """A Triton that cannot compile a kernel must not make its successors take the default for ever."""
    tuned = tuner(Timer({16: 4.0, 64: 5.0}))
    assert best(tuned) == {"BLOCK": 16}
    assert " for dtype=bf16 m=64, in this process only" in caplog.text
    assert not table(tmp_path).exists()
    assert best(tuner(Timer({16: 4.0, 32: 1.0, 64: 5.0}))) == {"BLOCK": 32}


def _ends_the_process(candidate):
    return os._exit(1) if candidate["BLOCK"] == 32 else work(candidate)


def _loses_the_device(candidate):
    def faulty(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if candidate["BLOCK"] == 32:
        torch.cuda.is_available, torch.cuda.synchronize = lambda: True, faulty
        faulty()
    return work(candidate)


@pytest.mark.parametrize("known", [False, True], ids=["new", "in the table"])
@pytest.mark.parametrize("fault", [_ends_the_process, _loses_the_device])
def test_a_candidate_that_ended_a_process_is_not_tried_again(tmp_path, caplog, fault, known):
    """As one that hangs does, when its process is ended from outside; perhaps one that ran until the last update."""
    times = {16: 9.0, 32: 4.0, 64: 5.0}
    if known:
        assert best(tuner(Timer(times)), m=1) == {"BLOCK": 32}
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=lambda: tuner(Timer(times)).best(fault, GPU, m=1))
    child.start()
    child.join()
    assert child.exitcode == 1
    assert best(tuner(Timer(times)), m=1 if known else 2) == {"BLOCK": 64}
    (note,) = (tmp_path / "tuned").glob("*.running")
    assert "candidate {'BLOCK': 32} is passed over: Refused: a process ended while it ran" in caplog.text
    assert f"delete {note}" in caplog.text
    timer = Timer({})
    assert best(tuner(timer), m=1 if known else 2) == {"BLOCK": 64}, "that day it is known"
    assert timer.calls == 0
    os.utime(note, (0, 0))  # long ago
    assert best(tuner(Timer(times)), m=1 if known else 2) == {"BLOCK": 32}, "that day's verdict is not kept"
    assert best(tuner(timer), m=1 if known else 2) == {"BLOCK": 32}


def test_a_candidate_that_was_refused_is_not_tried_for_a_day(tmp_path, caplog):
    times = {16: 9.0, 32: 4.0, 64: 5.0}
    tuner(Timer(times)).refuse({"BLOCK": 32}, "3 weights are not in their place")
    with pytest.raises(RuntimeError, match="3 weights are not in"), tuner(Timer(times)).trying({"BLOCK": 32}):
        pass
    assert best(tuner(Timer(times))) == {"BLOCK": 64}
    assert "candidate {'BLOCK': 32} is passed over: Refused: 3 weights are not in their place; to try" in caplog.text
    assert best(tuner(Timer(times | {16: 1.0})), m=1) == {"BLOCK": 16}
    assert best(tuner(Timer({})), m=1) == {"BLOCK": 16}, "the table holds it, though it is the default"
    (note,) = (tmp_path / "tuned").glob("*.wrong")
    os.utime(note, (0, 0))
    assert best(tuner(Timer(times))) == best(tuner(Timer(times)), m=1) == {"BLOCK": 32}


def test_a_refusal_that_is_taken_back_is_tried_again_the_same_day(tmp_path):
    times = Timer({16: 9.0, 32: 4.0, 64: 5.0})
    tuner(times).refuse({"BLOCK": 32}, "wrong")
    assert best(tuner(times)) == {"BLOCK": 64}
    ((entry,),) = (section.values() for section in tuning.read_table(table(tmp_path)).values())
    assert entry["failed"] == [[{"BLOCK": 32}, "Refused: wrong"]], "without the note, which is this computer's"
    tuner(times).allow({"BLOCK": 32})
    tuner(times).allow({"BLOCK": 32})
    assert best(tuner(times)) == {"BLOCK": 32}


def test_where_all_are_refused_none_runs(tmp_path, caplog):
    timer, ran = Timer({}), []
    for candidate in CANDIDATES:
        tuner(timer).refuse(candidate, "it hung")
    verdict = tuner(timer).verdict(ran.append, GPU, m=1)
    assert verdict == tuning.Verdict(
        CANDIDATES[0], (), tuple((c, "Refused: it hung") for c in CANDIDATES), tuning.ALL_REFUSED
    )
    assert not ran
    assert "no candidate is tried for m=1: it hung; to try it again today, delete" in caplog.text
    assert not table(tmp_path).exists()


def test_a_shipped_entry_is_used_where_nothing_is_refused(tmp_path):
    """What another computer refused has no note on this one."""
    times = Timer({16: 9.0, 32: 4.0, 64: 5.0})
    tuner(times).refuse({"BLOCK": 32}, "wrong")
    assert best(tuner(times)) == {"BLOCK": 64}
    (tmp_path / "shipped").mkdir()
    table(tmp_path).rename(table(tmp_path, "shipped"))
    (note,) = (tmp_path / "tuned").glob("*.wrong")
    note.unlink()
    assert best(tuner(Timer({}))) == {"BLOCK": 64}


def test_what_is_compared_with_is_not_refused(tmp_path):
    """A named back end has no dense product to compare with. Its first configuration may be the wrong one."""

    def first_is_wrong(candidate):
        return 0 * work(candidate)[0] + float(candidate["BLOCK"] != 16)

    timer = Timer({16: 1.0, 32: 4.0, 64: 5.0})
    tuner(timer).refuse({"BLOCK": 16}, "wrong")
    for _ in range(2):  # the second time from the table
        verdict = tuner(timer).verdict(first_is_wrong, GPU, m=1)
        assert verdict.config == {"BLOCK": 32}
        assert [candidate for candidate, _ in verdict.failed] == [{"BLOCK": 16}]


EXEC = """
import os, sys
from sparsedm.kernels.tuning import _noted
try:
    with _noted("section, candidate"):
        print("run", flush=True)
        os.execv(sys.executable, sys.orig_argv)  # as a benchmark's watchdog does when the kernel hangs
except RuntimeError as error:
    print(error)
"""


def test_a_candidate_that_hung_is_refused_by_the_same_process_after_exec(tmp_path):
    environment = os.environ | {"SPARSEDM_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", EXEC]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    run, refused = done.stdout.splitlines()
    assert run == "run"
    assert refused.startswith("a process ended while it ran")


def test_a_note_of_a_process_whose_number_another_one_has_got_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # a process that lives
    monkeypatch.setattr(tuning, "_started", lambda process: "long ago")
    note = tuning._noted("candidate")
    note.__enter__()
    monkeypatch.undo()
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="a process ended while it ran"), tuning._noted("candidate"):
        pass


def test_two_threads_may_try_the_same_candidate(tmp_path):
    with tuning._noted("candidate"), tuning._noted("candidate"):
        pass
    assert not list((tmp_path / "tuned").glob("*.running"))


def test_a_candidate_that_another_process_tries_just_now_is_tried_here_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # a process that lives
    with tuning._noted(f"{tuner(Timer({})).section}, {{'BLOCK': 32}}"):
        monkeypatch.undo()
        monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
        monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA Imaginary/1 sm_90")
        assert best(tuner(Timer({16: 9.0, 32: 4.0, 64: 5.0}))) == {"BLOCK": 32}


def test_a_note_that_is_being_written_is_no_dead_process(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # a process that lives
    note = tuning._noted("candidate")
    note.__enter__()
    monkeypatch.undo()
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    (file,) = (tmp_path / "tuned").glob("*.running")
    file.write_text("")
    with tuning._noted("candidate"):
        pass


@pytest.mark.parametrize(
    "wrong", [(1.03 * torch.ones(4), torch.arange(4)), (torch.ones(4), torch.arange(1, 5))], ids=str
)
def test_a_candidate_with_another_result_is_never_timed(tmp_path, caplog, wrong):
    timer = Timer({16: 5.0, 32: 4.0, 64: 9.0})

    def sometimes_wrong(candidate):
        right = work(candidate)
        return wrong if candidate["BLOCK"] == 32 else right

    verdict = tuner(timer).verdict(sometimes_wrong, GPU, m=1)
    assert verdict.config == {"BLOCK": 16}
    assert timer.calls == 2
    ((candidate, why),) = verdict.failed
    assert (candidate, why) == ({"BLOCK": 32}, "ArithmeticError: it gives another result than the default")
    assert f"candidate {candidate} is passed over: {why}" in caplog.text
    assert not table(tmp_path).exists(), "a default that won because of it is not remembered"


def test_a_candidate_is_compared_entry_by_entry():
    """A last row of zeros is 1% of the result, measured by its norm."""

    def ragged(candidate):
        result = work(candidate)[0].repeat(8192, 1)
        return result.index_fill(0, torch.tensor([8191]), float(candidate["BLOCK"] != 32))

    assert tuner(Timer({16: 9.0, 32: 4.0, 64: 5.0})).best(ragged, GPU, m=1) == {"BLOCK": 64}


@pytest.mark.parametrize("known", [False, True])
def test_an_entry_that_a_candidate_does_not_write_is_not_the_default_s(known):
    """The allocator gives every result the memory of the one before."""
    memory, written = torch.empty(4), 4

    def reused(candidate):
        work(candidate)
        memory[: written if candidate["BLOCK"] == 32 else 4] = 1
        return memory

    times = {16: 9.0, 32: 4.0, 64: 5.0}
    if known:
        assert tuner(Timer(times)).best(reused, GPU, m=1) == {"BLOCK": 32}
    written = 3
    assert tuner(Timer(times)).best(reused, GPU, m=1) == {"BLOCK": 64}


def test_what_is_compared_may_be_another_call_than_what_is_timed():
    def hidden(candidate):
        return 0 * work(candidate)[0]

    def check(candidate):
        return hidden(candidate), torch.full((4,), float(candidate["BLOCK"] == 32))

    timer = Timer({16: 9.0, 32: 4.0, 64: 5.0})
    assert tuner(timer).best(hidden, GPU, m=1) == {"BLOCK": 32}
    assert tuner(timer).best(hidden, GPU, m=2, check=check) == {"BLOCK": 64}


@pytest.mark.parametrize("known", [False, True])
def test_a_default_without_a_finite_result_is_taken_for_that_call_alone(tmp_path, known):
    """In fp16 the first steps of a training overflow, and then no two results can be compared."""
    timer, finite = Timer({16: 9.0, 32: 4.0, 64: 5.0}), False

    def overflowing(candidate):
        result, integers = work(candidate)
        return result if finite else result / 0, integers

    if known:
        best(tuner(timer), m=1)
    tuned, calls = tuner(timer), timer.calls
    verdict = tuned.verdict(overflowing, GPU, m=1)
    assert (verdict.config, verdict.basis, timer.calls) == ({"BLOCK": 16}, tuning.FOR_NOW, calls)
    assert table(tmp_path).exists() == known
    finite = True
    assert tuned.best(overflowing, GPU, m=1) == {"BLOCK": 32}


def test_one_cause_is_a_warning_once(caplog):
    def broken(candidate):
        return work(candidate) if candidate["BLOCK"] == 16 else 1 / 0

    tuned = tuner(Timer({16: 9.0}))
    for m in (1, 2):
        assert len(tuned.verdict(broken, GPU, m=m).failed) == 2
    assert caplog.text.count("is passed over: ZeroDivisionError") == 1


def test_candidates_are_timed_on_the_device_of_their_result(current_device):
    """The events of a timer are of the current device, and would say nothing of work on another."""
    timed_on = []
    tuned = tuner(lambda run: timed_on.append(*current_device) or 1.0)
    assert tuned.best(lambda candidate: torch.ones(4), GPU, m=1) == {"BLOCK": 16}
    assert [tuple(tensor.shape) for tensor in timed_on] == 3 * [(4,)]


def test_the_timer_gives_microseconds_of_one_run(monkeypatch):
    asked = {}

    def do_bench(run, **options):
        asked.update(options)
        run()
        return 0.25  # milliseconds, a single number because one quantile is asked for

    monkeypatch.setattr(tuning.triton.testing, "do_bench", do_bench)
    assert tuning.median_microseconds(lambda: None) == 250.0
    assert asked["quantiles"] == [0.5]


def test_a_rounding_is_no_other_result():
    timer = Timer({16: 9.0, 32: 4.0, 64: 5.0})

    def rounded(candidate):
        return work(candidate)[0] + 0.01 * (candidate["BLOCK"] == 32)

    assert tuner(timer).best(rounded, GPU, m=1) == {"BLOCK": 32}


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"a": 1}', '{"a": {"b": 1}}', "\udc80"]
    + ['{"a": {"b": {"times": 1}}}', '{"a": {"b": {"times": [1]}}}', '{"a": {"b": {"times": [[{}, "1"]]}}}']
    + ['{"a": {"b": {"failed": [[{}, 1]]}}}'],
    ids=repr,
)
def test_a_damaged_table_is_ignored_and_replaced(tmp_path, caplog, text):
    table(tmp_path).parent.mkdir()
    table(tmp_path).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert best(tuner(Timer({16: 9.0, 32: 4.0, 64: 5.0}))) == {"BLOCK": 32}
    assert "is ignored" in caplog.text
    assert best(tuner(Timer({}))) == {"BLOCK": 32}


def test_a_folder_that_cannot_be_written_only_warns(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "file" / "below"))
    assert best(tuner(Timer({16: 9.0, 32: 4.0, 64: 5.0}))) == {"BLOCK": 32}
    assert "cannot be written" in caplog.text
    assert "does not run" not in caplog.text


def _add_many(path, name):
    for i in range(10):
        tuning.merge_table(path, "double", f"{name} {i}", {"config": {}})


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_add_many, args=(table(tmp_path), name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(tuning.read_table(table(tmp_path))["double"]) == 30


@pytest.mark.parametrize("name", ["SPARSEDM_BACKEND", "SPARSEDM_AUTOTUNE"])
def test_an_unknown_setting_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "fast")
    with pytest.raises(InputError, match=f"{name}='fast' is unknown: it must be one of"):
        launch.forced_backend() if name == "SPARSEDM_BACKEND" else best(tuner(Timer({})))


def test_off_a_gpu_the_default_is_used_and_nothing_measured():
    assert tuner(Timer({})).best(work, torch.device("cpu"), m=64) == {"BLOCK": 16}


def test_buckets():
    sizes = (0, 1, 16, 17, 32, 33, 16384, 16448)
    assert [tuning.bucket(n) for n in sizes] == [16, 16, 16, 32, 32, 64, 16384, 32768]


def test_a_refusal_lasts_for_a_day_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    tuner = tuning.Autotuner("x", [{"a": 1}], [])
    tuner.refuse({"a": 1}, "wrong")
    (note,) = (tmp_path / "tuned").glob("*.wrong")
    for hours, refused in ((23, True), (25, False)):
        os.utime(note, 2 * (time.time() - 3600 * hours,))
        assert (tuner._refusal({"a": 1}) is not None) == refused
