"""The campaign with suites of its own kind: small processes that write, fail, hang and run out of time."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from bench import campaign, plot
from bench.campaign import LOG_LIMIT, gpu_suites, run_campaign
from bench.results import read, write
from bench.suite import CUT, Suite
from sparsedm.errors import InputError
from tests.bench.test_plot import made_up


def script(code, *arguments):
    return (sys.executable, "-c", code, *arguments)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch, tmp_path):
    monkeypatch.setattr(campaign, "RESERVE", 0)
    monkeypatch.setattr("bench.suite.GRACE", 1)
    monkeypatch.setattr(plot, "DPI", 20)
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))


def states(index):
    return {entry["name"]: entry["status"] for entry in index["suites"]}


def test_a_failure_does_not_stop_the_others(tmp_path):
    suites = [
        Suite("good", script("print('hello')")),
        Suite("bad", script("import sys; print('the reason'); sys.exit(7)")),
        Suite("killed", script("import os; os.abort()")),
        Suite("short of time", script(f"import sys; sys.exit({CUT})")),
        Suite("last", script("print('still here')")),
    ]
    index = run_campaign(suites, tmp_path / "out", minutes=1)
    wanted = {"good": "ran", "bad": "failed", "killed": "failed", "short of time": "cut", "last": "ran"}
    assert states(index) == wanted
    assert index["suites"][1]["reason"] == "exit code 7: the reason"
    assert index == json.loads((tmp_path / "out/index.json").read_text())
    assert index["environment"]["device"].startswith("CPU")
    log = (tmp_path / "out/log.txt").read_text()
    assert log.index("==== good\nhello") < log.index("==== bad\nthe reason") < log.index("still here")


def test_a_hang_is_ended_with_its_children(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    began = time.monotonic()
    index = run_campaign([Suite("hangs", script(child), share=0.01)], tmp_path, minutes=1)
    assert time.monotonic() - began < 30
    assert states(index) == {"hangs": "cut"}
    assert index["suites"][0]["reason"].startswith("ended after 1 s without an answer")
    pid = int((tmp_path / "log.txt").read_text().splitlines()[1])
    for _ in range(50):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid), "the child of the suite lives on"


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_what_has_no_time_left_is_skipped_and_resumed(tmp_path):
    mark = tmp_path / "ran-once"
    once = f"import os; os.mkdir({str(mark)!r})"
    suites = [Suite("first", script(once)), Suite("second", script("print('second')"))]
    index = run_campaign(suites, tmp_path / "out", minutes=1, now=lambda: 1000.0 if mark.exists() else 0.0)
    assert states(index) == {"first": "ran", "second": "skipped"}
    resumed = run_campaign(suites, tmp_path / "out", minutes=1, resume=True)
    assert states(resumed) == {"first": "ran", "second": "ran"}, "the first would fail if it ran again"


def test_resume_runs_the_failed_and_the_cut_again(tmp_path):
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); n = p.exists(); p.touch(); sys.exit(0 if n else {})"
    suites = [Suite(f"leaves {c}", script(code.format(c), str(tmp_path / f"mark{c}"))) for c in (1, CUT)]
    assert states(run_campaign(suites, tmp_path / "out", 1)) == {"leaves 1": "failed", f"leaves {CUT}": "cut"}
    nothing_done = run_campaign(suites, tmp_path / "out", 0, resume=True)
    assert states(nothing_done) == {"leaves 1": "failed", f"leaves {CUT}": "cut"}, "what is known of them stays"
    again = run_campaign(suites, tmp_path / "out", 1, resume=True)
    assert set(states(again).values()) == {"ran"}


def test_only_some_suites_keep_the_entries_of_the_others(tmp_path):
    a, b = Suite("a", script("")), Suite("b", script(""))
    run_campaign([a, b], tmp_path, 1)
    index = run_campaign([b], tmp_path, 1, resume=True)
    assert states(index) == {"a": "ran", "b": "ran"}


def test_a_folder_is_not_used_twice_by_accident(tmp_path):
    run_campaign([Suite("a", script(""))], tmp_path, 1)
    with pytest.raises(InputError, match="holds a campaign: choose another --out, or go on with --resume"):
        run_campaign([Suite("a", script(""))], tmp_path, 1)


def test_the_folder_is_small_and_holds_results_plots_and_tuned_tables(tmp_path):
    rows = str(tmp_path / "rows.csv")
    write(rows, made_up())
    (tmp_path / "cache/tuned").mkdir(parents=True)
    (tmp_path / "cache/tuned/some-gpu.json").write_text('{"operation": {}}')
    suites = [
        Suite("measures", script("import shutil, sys; shutil.copy(*sys.argv[1:])", rows, "{csv}")),
        Suite("talks", script(f"print('x' * 200 + '\\n', end='') or [print(i) for i in range({LOG_LIMIT})]")),
    ]
    out = tmp_path / "out"
    assert set(states(run_campaign(suites, out, 2)).values()) == {"ran"}
    left = {"index.json", "results.csv", "targets.md", "log.txt", "tuned.json", "plots.zip"}
    assert {p.name for p in out.iterdir()} == left
    assert sum(p.stat().st_size for p in out.iterdir()) < 16 << 20
    assert json.loads((out / "tuned.json").read_text()) == {"some-gpu.json": {"operation": {}}}
    names = zipfile.ZipFile(out / "plots.zip").namelist()
    assert "roofline.png" in names
    assert json.loads((out / "index.json").read_text())["plots"] == f"{len(names)} pictures"
    assert len((out / "log.txt").read_text()) < 1.1 * LOG_LIMIT


def test_without_a_measurement_there_are_no_plots_and_a_reason(tmp_path):
    index = run_campaign([Suite("measures nothing", script(""))], tmp_path, minutes=1)
    assert index["plots"].startswith("none: cannot read ")
    assert {p.name for p in tmp_path.iterdir()} == {"index.json", "log.txt"}


def test_a_real_suite_measures_into_the_folder(tmp_path):
    small = ("--quick", "--device", "cpu", "--shapes", "uvit-tiny@1", "--providers", "dense,sparsedm choose")
    index = run_campaign([Suite("mask", campaign.bench("mask", *small))], tmp_path, minutes=5)
    assert states(index) == {"mask": "ran"}
    assert {row["provider"] for row in read(tmp_path / "results.csv")} == {"dense", "sparsedm choose"}
    assert index["plots"] == "2 pictures", "the masks, for light and dark pages"


def test_a_suite_learns_its_time_and_its_files(tmp_path):
    suite = Suite("asks", script("import sys; print(sys.argv[1:])", "{csv}", "{folder}/more", "{seconds}"), share=0.5)
    run_campaign([suite], tmp_path, minutes=2)
    told = [str(tmp_path / "results.csv"), str(tmp_path / "more"), "60"]
    assert (tmp_path / "log.txt").read_text().splitlines()[1] == str(told)


def test_a_group_runs_side_by_side_and_a_failure_in_it_is_one_suite_s(tmp_path):
    meets = "import pathlib, sys, time; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
    meets += "while not other.exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    suites = [
        Suite("a", script(meets, a, b), group="both"),
        Suite("b", script(meets, b, a), group="both"),
        Suite("fails", script("import sys; sys.exit('the reason')"), group="both"),
        Suite("after", script("print('after')")),
    ]
    index = run_campaign(suites, tmp_path / "out", minutes=0.5)
    assert states(index) == {"a": "ran", "b": "ran", "fails": "failed", "after": "ran"}
    assert [line for line in (tmp_path / "out/log.txt").read_text().splitlines() if line.startswith("====")] == [
        "==== a", "==== b", "==== fails", "==== after",
    ]  # fmt: skip


def test_a_suite_whose_program_is_missing_is_skipped(tmp_path):
    index = run_campaign([Suite("profiles", script(""), needs="no-such-program")], tmp_path, minutes=1)
    assert index["suites"][0] == {
        "name": "profiles", "status": "skipped", "reason": "no-such-program is not on the PATH",
    }  # fmt: skip


def test_ctrl_c_ends_what_is_running(tmp_path):
    mark = tmp_path / "pid"
    sleeps = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = "import sys; from bench.campaign import Suite, run_campaign\n"
    code += f"run_campaign([Suite('sleeps', (sys.executable, '-c', {sleeps!r}))], {str(tmp_path / 'out')!r}, 5)"
    process = subprocess.Popen(script(code), stderr=subprocess.PIPE, text=True)
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert not alive(int(mark.read_text()))


def test_the_gpu_suites_begin_with_checks_and_parse():
    from bench.run import SUITES, parser

    suites = gpu_suites()
    assert [s.name for s in suites][:4] == ["tests", "memcheck", "racecheck", "ceiling"]
    assert len({s.name for s in suites}) == len(suites)
    measured = set()
    for suite in suites:
        assert suite.group == ("checks" if suite.name in ("tests", "memcheck", "racecheck") else None)
        if "bench.run" in suite.command:
            options = parser().parse_args([part.format(csv="x.csv", seconds="9") for part in suite.command[3:]])
            assert options.resume
            measured |= set(options.suite.split(","))
    assert measured == set(SUITES), "every suite is in the campaign"


def test_the_studies_of_quality_parse_and_leave_their_reports(tmp_path):
    from bench.experiments import runner
    from sparsedm.cli import _parser

    experiments = argparse.ArgumentParser()
    runner.add_arguments(experiments)
    suites = campaign.quality_suites("images.zip")
    assert suites[0].name == "quality: arms", "what answers the question first"
    for suite in suites:
        module, *arguments = (part.format(folder="gpu", minutes="8.50") for part in suite.command[2:])
        options = {"sparsedm.cli": _parser(), "bench.experiments": experiments}[module].parse_args(arguments)
        assert (options.scale, options.data, options.minutes) == ("lite", "images.zip", 8.5)
        assert options.out.startswith("gpu-quality/")
    code = "import pathlib, sys; out = pathlib.Path(sys.argv[1]); (out / 'seed-0').mkdir(parents=True)\n"
    code += "names = ('report.md', 'results.csv', 'a.png', 'b.safetensors', 'seed-0/samples.png')\n"
    code += "[(out / name).write_text('x') for name in names]"
    study = Suite("quality: arms", script(code, "{folder}-quality/arms"), least=20)
    index = run_campaign([study, Suite("search", script(""), least=90)], tmp_path / "gpu", minutes=1)
    assert states(index) == {"quality: arms": "ran", "search": "skipped"}
    held = zipfile.ZipFile(tmp_path / "gpu/quality.zip").namelist()
    assert sorted(held) == ["arms-a.png", "arms-report.md", "arms-results.csv", "arms-seed-0-samples.png"]


def test_the_sanitizer_s_tests_are_there():
    """What -k and the file names select must not silently become nothing when a test is renamed."""
    (suite,) = (suite for suite in gpu_suites() if suite.name == "memcheck")
    command = suite.command[suite.command.index(sys.executable) :]
    listed = subprocess.run([*command, "--collect-only"], capture_output=True, text=True).stdout
    for kernel in ("mma", "mma_splitk", "mma_conv", "wgmma", "wgmma_conv"):
        assert f"<Module test_{kernel}.py>" in listed


def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert campaign.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch sees none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
