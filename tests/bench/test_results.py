import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import results
from bench.results import COLUMNS, Results, read, read_experiment, write, write_experiment
from sparsedm.errors import InputError

ROW = {"suite": "gemm", "shape": "square 8", "mode": "plain", "dtype": "float32", "provider": "dense", "status": "ok"}


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "a.csv"
    row = ROW | {"M": 1052672, "p50_us": 12.3456789, "reason": 'a "quoted", comma', "value": None, "samples": 40.0}
    write(path, [row])
    (back,) = read(path)
    assert back["M"] == 1052672
    assert back["p50_us"] == 12.3457, "six digits are kept"
    assert back["reason"] == row["reason"]
    assert back["value"] is None
    assert back["samples"] == 40
    assert set(back) == set(COLUMNS)


def test_the_file_is_whole_after_every_addition(tmp_path):
    held = Results(tmp_path / "a.csv")
    for i in range(3):
        held.add([ROW | {"metric": f"metric {i}", "value": float(i)}])
        assert [r["value"] for r in read(tmp_path / "a.csv")] == [0.0, 1.0, 2.0][: i + 1]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.csv"], "no temporary file is left"


def test_resume_keeps_what_is_there_and_knows_it(tmp_path):
    Results(tmp_path / "a.csv").add([ROW | {"M": 8, "value": 0.5}])
    resumed = Results(tmp_path / "a.csv", resume=True)
    identity = {"suite": "gemm", "shape": "square 8", "mode": "plain", "dtype": "float32"}
    assert [row["provider"] for row in resumed.matching(identity)] == ["dense"]
    assert not resumed.matching(identity | {"mode": "epilogue"})
    resumed.add([ROW | {"mode": "epilogue"}])
    assert [(r["mode"], r["M"]) for r in read(tmp_path / "a.csv")] == [("plain", 8.0), ("epilogue", None)]


def test_what_was_begun_and_never_finished_is_a_failure(tmp_path):
    held, identity = Results(tmp_path / "a.csv"), {name: ROW[name] for name in ("suite", "shape", "mode", "dtype")}
    held.begin(identity)
    held.begin(identity | {"provider": "dense"})
    (row,) = Results(tmp_path / "a.csv", resume=True).rows
    assert row["provider"] == "dense", "the latest note, which says who was under way"
    assert (row["status"], row["reason"]) == ("failed", "the process ended in the middle of this: a crash, or a hang")
    held.add([ROW])
    assert [row["status"] for row in read(tmp_path / "a.csv")] == ["ok"], "finished: the note is gone"


def test_an_existing_file_is_not_overwritten(tmp_path):
    Results(tmp_path / "a.csv").add([ROW])
    with pytest.raises(InputError, match=r"exists: remove it, choose another --out, or continue it with --resume"):
        Results(tmp_path / "a.csv")


def test_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such columns: speed"):
        Results(tmp_path / "a.csv").add([ROW | {"speed": 1}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "is no results file: it has no column"),
        ("", "is no results file: it has no column"),
        (",".join(COLUMNS) + "\n" + ",".join("x" for _ in COLUMNS) + "\n", "a row is broken or cut short"),
        (",".join(COLUMNS) + "\ngemm,linear\n", "a row is broken or cut short"),
    ],
    ids=["other-csv", "empty", "text-for-a-number", "cut"],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"a\.csv is a pipe"):
        read(tmp_path / "a.csv")


def test_every_committed_file_is_read():
    for path in sorted((Path(results.__file__).parent / "results").glob("*/*.csv")):
        assert read(path) if path.name == "results.csv" else read_experiment(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p50_us": "nan"}, "its p50_us is nan, which is not a finite number"),
        ({"p80_us": "inf"}, "its p80_us is inf, which is not a finite number"),
        ({"gbps": "-inf"}, "its gbps is -inf"),
        ({"status": "failed", "value": "nan"}, "its value is nan"),
        ({"p50_us": ""}, "its times 1.0, None, 3.0 are not 0 < p20_us <= p50_us <= p80_us"),
        ({"p20_us": 0}, "its times 0.0, 2.0, 3.0 are not"),
        ({"p20_us": -1}, "its times -1.0, 2.0, 3.0 are not"),
        ({"p50_us": 4}, "its times 1.0, 4.0, 3.0 are not"),
        ({}, "an earlier row measures the same: gemm, square 8, plain, float32, dense, time"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_line(changes, message, tmp_path):
    row = ROW | {"metric": "time", "p20_us": 1, "p50_us": 2, "p80_us": 3}
    write(tmp_path / "a.csv", [row, row | changes])
    with pytest.raises(InputError, match=re.escape(f"a.csv, line 3: a row is broken or cut short: {message}")):
        read(tmp_path / "a.csv")


def test_a_wrong_output_may_differ_by_nan(tmp_path):
    wrong = {"metric": "time", "status": "wrong", "error": float("nan"), "allowed": float("inf")}
    write(tmp_path / "a.csv", [ROW | wrong, ROW | {"metric": "image difference", "value": float("nan")}])
    assert len(read(tmp_path / "a.csv")) == 2


def test_close_times_are_not_rounded_past_one_another(tmp_path):
    row = ROW | {"metric": "time", "p20_us": 1234567.4, "p50_us": 1234568.0, "p80_us": 1234568.0}
    Results(tmp_path / "a.csv").add([row])
    assert [read(tmp_path / "a.csv")[0][name] for name in ("p20_us", "p50_us")] == [1234567, 1234568]


RUN = {"experiment": "arms", "scale": "smoke", "run": "dense", "seed": 0}
WHOLE = [RUN | {"measure": measure, "value": 2.0} for measure in sorted(results.EVERY_RUN)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"seed": seed}, f"its seed {seed!r} is not a whole number") for seed in ("nan", "inf", "0.5", "", "-1")),
        ({"value": ""}, "it has no value"),
        ({"value": "nan"}, "its value is nan, which is not a finite number"),
        ({"measure": "Fréchet distance", "value": "inf"}, "its value is inf"),
        ({"x": "nan"}, "its x is nan"),
        ({"run": "chain", "value": 0.0}, "its validation loss is 0, and must be more than 0"),
        ({"measure": "sampling seconds, fp32", "value": 0.0}, "its sampling seconds, fp32 is 0, and must be more"),
        ({"value": 3.0}, "an earlier row measures the same: dense, 0, validation loss"),
    ],
)
def test_a_row_of_an_experiment_that_means_nothing_is_refused_with_its_line(changes, message, tmp_path):
    write_experiment(tmp_path / "a.csv", [*WHOLE, RUN | {"measure": "validation loss", "value": 1.0} | changes])
    with pytest.raises(InputError, match=re.escape(f"a.csv, line 6: a row is broken or cut short: {message}")):
        read_experiment(tmp_path / "a.csv")


def test_large_seeds_and_an_unknown_distance_come_back(tmp_path):
    unknown = RUN | {"measure": "distance to dense weights", "value": float("nan")}
    write_experiment(tmp_path / "a.csv", [row | {"seed": 2**63 - 1} for row in (*WHOLE, unknown)])
    rows = read_experiment(tmp_path / "a.csv")
    assert {row["seed"] for row in rows} == {2**63 - 1}
    assert rows[-1]["value"] != rows[-1]["value"]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv is missing"):
        read(tmp_path / "none.csv")


def test_a_later_row_of_the_same_time_replaces_the_earlier_one(tmp_path):
    held = Results(tmp_path / "a.csv")
    time, host = (ROW | {"metric": metric, "p20_us": 1.0, "p80_us": 9.0} for metric in ("time", "host"))
    held.add([time | {"p50_us": 1.0}, host | {"p50_us": 2.0}])
    held.add([time | {"p50_us": 3.0}, time | {"mode": "epilogue", "p50_us": 4.0}])
    found = {(r["mode"], r["metric"]): r["p50_us"] for r in read(tmp_path / "a.csv")}
    assert found == {("plain", "host"): 2, ("plain", "time"): 3, ("epilogue", "time"): 4}


# ---- what rows are stamped with


@pytest.fixture(autouse=True)
def _ask_again():
    results.commit.cache_clear()
    results._fixed.cache_clear()


def test_a_stamp_fills_columns_and_guesses_nothing():
    stamp = results.stamp("cpu")
    assert set(stamp) <= set(COLUMNS)
    assert stamp["device"].startswith("CPU: ")
    assert stamp["torch"] == torch.__version__
    empty = {name for name, value in stamp.items() if value == ""}
    assert empty >= {"capability", "driver", "cuda", "cusparselt", "sm_mhz", "memory_mhz", "power_w"}


def test_a_missing_nvidia_smi_leaves_empty_cells(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": "0"}))
    monkeypatch.setenv("PATH", "")
    assert results.sensors("cuda") == {"sm_mhz": "", "memory_mhz": "", "power_w": ""}


def test_nvidia_smi_is_asked_for_this_device(monkeypatch):
    asked = []

    def smi(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1980, 3201, 655.1\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": "ab-12"}))
    monkeypatch.setattr(subprocess, "run", smi)
    assert results.sensors("cuda:1") == {"sm_mhz": "1980", "memory_mhz": "3201", "power_w": "655.1"}
    (command,) = asked
    assert {"--id=GPU-ab-12", "--query-gpu=clocks.sm,clocks.mem,power.draw.instant"} <= set(command)
    answer = "1980, [N/A], [Unknown Error]\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, answer))
    assert results.sensors("cuda") == {"sm_mhz": "1980", "memory_mhz": "", "power_w": ""}


def test_an_old_nvidia_smi_tells_the_power_of_the_last_second(monkeypatch):
    def smi(command, **options):
        if "--query-gpu=clocks.sm,clocks.mem,power.draw" not in command:
            raise subprocess.CalledProcessError(2, command, 'Field "power.draw.instant" is not a valid field to query.')
        return subprocess.CompletedProcess(command, 0, "1980, 3201, 655.1\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": "0"}))
    monkeypatch.setattr(subprocess, "run", smi)
    assert results.sensors("cuda") == {"sm_mhz": "1980", "memory_mhz": "3201", "power_w": "655.1"}


def test_a_command_tells_what_chose_its_kernels(monkeypatch):
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    monkeypatch.delenv("SPARSEDM_BACKEND", raising=False)
    results._fixed.cache_clear()
    assert results.stamp("cpu")["command"].startswith("SPARSEDM_AUTOTUNE=off ")
    results._fixed.cache_clear()


def test_the_commit_may_be_told(monkeypatch):
    monkeypatch.setenv(results.COMMIT, "abc123")
    assert results.commit() == "abc123"


@pytest.mark.parametrize(
    ("changed", "tracked", "commit"),
    [("", True, "0123abc"), (" M file\n", True, "0123abc+dirty"), ("", False, "")],
    ids=["clean", "dirty", "inside-another-repository"],
)
def test_the_commit_is_that_of_this_code(monkeypatch, changed, tracked, commit):
    def git(command, **options):
        if "ls-files" in command and not tracked:
            raise subprocess.CalledProcessError(1, command)
        out = {"rev-parse": "0123abc\n", "ls-files": "results.py\n", "status": changed}[command[1]]
        return subprocess.CompletedProcess(command, 0, out)

    monkeypatch.delenv(results.COMMIT, raising=False)
    monkeypatch.setattr(subprocess, "run", git)
    assert results.commit() == commit


def test_the_command_line_holds_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/somebody/run.py", "--suite", "gemm x"])
    assert results.stamp("cpu")["command"] == "run.py --suite 'gemm x'"
