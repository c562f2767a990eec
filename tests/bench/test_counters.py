"""The choice of shapes, and the run under ncu, for which a script of that name stands in."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

from bench import counters
from bench.results import write
from sparsedm.errors import InputError
from tests.bench.test_plot import row

OURS = "sparsedm 2:4"


def measured(**ratios):
    """Rows of square products, 2:4 so many times as fast as dense."""
    return [
        r
        for size, ratio in ratios.items()
        for r in (row("dense", 100, shape=f"square {size[1:]}"), row(OURS, 100 / ratio, shape=f"square {size[1:]}"))
    ]


def test_the_greatest_and_the_least_speed_ups_are_taken():
    rows = measured(n256=0.5, n512=1.1, n1024=1.6, n2048=1.4, n3072=0.9)
    rows += [row("sparsedm 2:4 mma", 1, shape="square 512"), row(OURS, 1, suite="conv", shape="c")]
    case = lambda size: ("square", f"square {size}", "plain", "bfloat16")  # noqa: E731
    assert counters.extremes(rows, 2) == [case(1024), case(2048), case(3072), case(256)]
    assert counters.extremes(rows[:2], 2) == [case(256)], "the only one, once"
    with pytest.raises(InputError, match="hold no 2:4 product that was timed against dense"):
        counters.extremes([row("dense", 1)], 2)


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A program of that name which prints its arguments and ends with the exit code that the file `code` holds."""
    script = tmp_path / "bin/ncu"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@"\nexit $(cat {tmp_path}/code)\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    (tmp_path / "code").write_text("0")
    return tmp_path


def test_ncu_watches_only_what_is_asked_for_and_leaves_the_clocks(ncu):
    write(ncu / "r.csv", measured(n256=2))
    assert counters.main([str(ncu / "r.csv"), "--out", str(ncu / "counters.txt")]) == 0
    told = (ncu / "counters.txt").read_text().splitlines()
    assert told[:4] == ["--profile-from-start", "off", "--clock-control", "none"]
    assert told[-1].endswith("run([('square', 'square 256', 'plain', 'bfloat16')])")


def test_a_failure_of_ncu_is_told_and_what_it_said_is_kept(ncu, capsys):
    write(ncu / "r.csv", measured(n256=2))
    (ncu / "code").write_text("9")
    assert counters.main([str(ncu / "r.csv"), "--out", str(ncu / "counters.txt")]) == 9
    assert "square 256" in capsys.readouterr().err
    assert (ncu / "counters.txt").exists()


def test_what_ncu_has_said_stays_if_it_is_ended(ncu):
    """The campaign ends the whole group of processes when the time is up."""
    write(ncu / "r.csv", measured(n256=2))
    (ncu / "bin/ncu").write_text("#!/bin/sh\necho ==PROF==\nexec sleep 600\n")
    report = ncu / "new/counters.txt"
    command = [sys.executable, "-m", "bench.counters", str(ncu / "r.csv"), "--out", str(report)]
    process = subprocess.Popen(command, start_new_session=True)
    for _ in range(600):
        if process.poll() is not None or (report.exists() and report.read_text()):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert report.read_text() == "==PROF==\n"


def test_without_ncu_or_results(tmp_path, monkeypatch, capsys):
    write(tmp_path / "r.csv", measured(n256=2))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.main([str(tmp_path / "r.csv"), "--out", str(tmp_path / "c.txt")]) == 2
    assert "not on the PATH" in capsys.readouterr().err
    assert counters.main([str(tmp_path / "none.csv")]) == 2
    assert "none.csv is missing or unreadable" in capsys.readouterr().err
    assert not (tmp_path / "c.txt").exists()


def test_each_case_is_called_twice_and_watched_once(monkeypatch):
    watched, names, on = [], [], [False]
    calls = {"start": lambda: on.__setitem__(0, True), "stop": lambda: on.__setitem__(0, False)}
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda.profiler, name, call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: names.append(name) or contextlib.nullcontext())
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: watched.append(on[0]) or linear(*a))
    counters.run([("square", "square 256", "epilogue", "float32")], device="cpu")
    assert names == ["square_256_epilogue_dense", "square_256_epilogue_sparsedm_2_4"]
    assert watched[:2] == [False, True], "dense: the first call tunes and compiles, the second is watched"
    assert not on[0]
