"""The campaign with suites of its own kind: small processes that write, fail, hang and run out of time."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace

import pytest

from bench import campaign, plot
from bench.campaign import LOG_LIMIT, first_suites, run_campaign, search_for_the_fault, second_suites
from bench.results import read, write
from bench.suite import CUT, Suite
from sparsedm.errors import InputError
from sparsedm.files import cache_folder
from tests.bench.stand_in import own_cache
from tests.bench.test_plot import made_up


def script(code, *arguments):
    return (sys.executable, "-c", code, *arguments)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(campaign, "RESERVE", 0)
    monkeypatch.setattr("bench.suite.GRACE", 1)
    monkeypatch.setattr(plot, "DPI", 20)
    monkeypatch.setenv("SPARSEDM_CACHE", str(own_cache(tmp_path_factory.mktemp("home"))))


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
    index = run_campaign(suites, tmp_path / "out", seconds=60)
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
    index = run_campaign([Suite("hangs", script(child), seconds=0.6)], tmp_path, seconds=60)
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
    index = run_campaign(suites, tmp_path / "out", seconds=60, now=lambda: 1000.0 if mark.exists() else 0.0)
    assert states(index) == {"first": "ran", "second": "skipped"}
    resumed = run_campaign(suites, tmp_path / "out", seconds=60)
    assert states(resumed) == {"first": "ran", "second": "ran"}, "the first would fail if it ran again"


def test_resume_runs_the_failed_and_the_cut_again(tmp_path):
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); n = p.exists(); p.touch(); sys.exit(0 if n else {})"
    suites = [Suite(f"leaves {c}", script(code.format(c), str(tmp_path / f"mark{c}"))) for c in (1, CUT)]
    assert states(run_campaign(suites, tmp_path / "out", 60)) == {"leaves 1": "failed", f"leaves {CUT}": "cut"}
    nothing_done = run_campaign(suites, tmp_path / "out", 0)
    assert states(nothing_done) == {"leaves 1": "failed", f"leaves {CUT}": "cut"}, "what is known of them stays"
    again = run_campaign(suites, tmp_path / "out", 60)
    assert set(states(again).values()) == {"ran"}


def test_only_some_suites_keep_the_entries_of_the_others(tmp_path):
    a, b = Suite("a", script("")), Suite("b", script(""))
    run_campaign([a, b], tmp_path, 60)
    index = run_campaign([b], tmp_path, 60)
    assert states(index) == {"a": "ran", "b": "ran"}


def test_a_folder_of_another_device_is_refused(tmp_path):
    run_campaign([Suite("a", script(""))], tmp_path, 60)
    index = json.loads((tmp_path / "index.json").read_text())
    index["environment"]["device"] = "Another GPU"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="holds a campaign on Another GPU: choose another --out"):
        run_campaign([Suite("a", script(""))], tmp_path, 60)


def test_a_folder_of_another_commit_is_refused(tmp_path, monkeypatch, capsys):
    """Its first contact was with other kernels."""
    suite = Suite("a", script(""))
    for commit in ("", "abc", "abc", ""):  # nothing is known of a copy without its repository
        monkeypatch.setattr(campaign, "stamp", lambda device, now=commit: {"device": device, "commit": now})
        run_campaign([suite], tmp_path, 60)
        assert ("set SPARSEDM_COMMIT" in capsys.readouterr().err) == (not commit)
    monkeypatch.setattr(campaign, "stamp", lambda device: {"device": device, "commit": "def"})
    with pytest.raises(InputError, match="holds a campaign of commit abc: choose another --out"):
        run_campaign([suite], tmp_path, 60)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".results.ab12cd34.partial.csv", ".ab12cd34.partial"):
        (tmp_path / name).write_text("half")
    now = "import pathlib, sys; pathlib.Path(sys.argv[1], '.targets.ab12cd34.partial.md').write_text('half')"
    run_campaign([Suite("killed", script(now, str(tmp_path)))], tmp_path, 60)
    assert not list(tmp_path.glob(".*"))


def test_every_suite_leaves_results_targets_and_plots_before_the_next_one_ends_in_a_small_folder(tmp_path):
    rows = str(tmp_path / "rows.csv")
    write(rows, made_up())
    (cache_folder() / "tuned").mkdir()
    (cache_folder() / "tuned/some-gpu.json").write_text('{"operation": {}}')
    waits = "import pathlib, sys, time; folder = pathlib.Path(sys.argv[1])\n"
    waits += "while not all((folder / name).exists() for name in sys.argv[2:]): time.sleep(0.05)"
    names = ("index.json", "results.csv", "targets.md", "plots.zip")
    suites = [
        Suite("measures", script("import shutil, sys; shutil.copy(*sys.argv[1:])", rows, "{csv}")),
        Suite("waits for them", script(waits, "{folder}", *names)),
        Suite("talks", script(f"print('x' * 200 + '\\n', end='') or [print(i) for i in range({LOG_LIMIT})]")),
    ]
    out = tmp_path / "out"
    assert set(states(run_campaign(suites, out, 120)).values()) == {"ran"}
    left = {"index.json", "results.csv", "targets.md", "log.txt", "tuned.json", "plots.zip"}
    assert {p.name for p in out.iterdir()} == left
    assert sum(p.stat().st_size for p in out.iterdir()) < 16 << 20
    assert json.loads((out / "tuned.json").read_text()) == {"some-gpu.json": {"operation": {}}}
    names = zipfile.ZipFile(out / "plots.zip").namelist()
    assert {"roofline.png", "first-contact.png"} <= set(names)
    assert len((out / "log.txt").read_text()) < 1.1 * LOG_LIMIT


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path, monkeypatch, capfd):
    def broken(*arguments):
        raise ZeroDivisionError("drawn wrong")

    monkeypatch.setattr(campaign.plot, "draw_archive", broken)
    (tmp_path / "results.csv").write_text("")
    drawing = campaign._Drawing(tmp_path)
    drawing.begin()
    drawing.finish(again=False)
    assert "drawn wrong" in capfd.readouterr().err


@pytest.mark.parametrize("seconds", [60, 0])
def test_what_was_not_drawn_when_time_is_over_is_not_begun(seconds, tmp_path, monkeypatch):
    drawn, in_progress = [], threading.Event()

    def draw(*arguments):
        drawn.append(arguments)
        in_progress.wait(10)

    class Writes(campaign._Drawing):
        def finish(self, again):
            self.results.write_text("newer")
            in_progress.set()
            super().finish(again)

    monkeypatch.setattr(campaign.plot, "draw_archive", draw)
    monkeypatch.setattr(campaign, "_Drawing", Writes)
    monkeypatch.setattr(campaign, "_leave", lambda folder: None)
    (tmp_path / "results.csv").write_text("old")
    run_campaign([Suite("measures", script(""))], tmp_path, seconds)
    assert len(drawn) == (2 if seconds else 1)


def test_without_a_measurement_there_are_no_plots(tmp_path):
    run_campaign([Suite("measures nothing", script(""))], tmp_path, seconds=60)
    assert {p.name for p in tmp_path.iterdir()} == {"index.json", "log.txt"}


def test_a_real_suite_measures_into_the_folder(tmp_path):
    small = ("--quick", "--device", "cpu", "--shapes", "uvit-tiny@1", "--providers", "dense,sparsedm choose")
    index = run_campaign([Suite("mask", campaign.bench("mask", *small))], tmp_path, seconds=300)
    assert states(index) == {"mask": "ran"}
    assert {row["provider"] for row in read(tmp_path / "results.csv")} == {"dense", "sparsedm choose"}
    assert zipfile.ZipFile(tmp_path / "plots.zip").namelist() == ["masks.png", "masks-dark.png"]


def test_a_suite_learns_its_time_and_its_files(tmp_path):
    asks = "import os, sys, time; print(sys.argv[1:]); print(float(os.environ['BENCH_DEADLINE']) - time.monotonic())"
    suite = Suite("asks", script(asks, "{csv}", "{folder}/more", "{seconds}"), seconds=60)
    run_campaign([suite], tmp_path, seconds=120)
    told = [str(tmp_path / "results.csv"), str(tmp_path / "more"), "60"]
    _, arguments, left, *_ = (tmp_path / "log.txt").read_text().splitlines()
    assert arguments == str(told)
    assert 30 < float(left) < 60, "what the process has used is gone"


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
    index = run_campaign(suites, tmp_path / "out", seconds=30)
    assert states(index) == {"a": "ran", "b": "ran", "fails": "failed", "after": "ran"}
    assert [line for line in (tmp_path / "out/log.txt").read_text().splitlines() if line.startswith("====")] == [
        "==== a", "==== b", "==== fails", "==== after",
    ]  # fmt: skip


def test_a_suite_whose_program_is_missing_is_skipped(tmp_path):
    index = run_campaign([Suite("profiles", script(""), needs="no-such-program")], tmp_path, seconds=60)
    assert index["suites"][0] == {
        "name": "profiles", "status": "skipped", "reason": "no-such-program is not on the PATH",
    }  # fmt: skip


ENDED = """
import sys
from bench import campaign, suite
suite.GRACE = 0.2
campaign.torch.cuda.is_available = lambda: True
campaign.stamp = lambda device: {"device": device}
campaign.suites_of = lambda *_: [suite.Suite("sleeps", (sys.executable, "-c", *sys.argv[1:3]))]
sys.exit(campaign.main(["first", "--out", sys.argv[3]]))
"""


def test_a_campaign_that_is_ended_ends_what_is_running(tmp_path):
    """Also what takes no notice of SIGTERM, as a suite that waits for a GPU."""
    mark = tmp_path / "pid"
    sleeps = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    sleeps += "file = open(sys.argv[1], 'w'); file.write(str(os.getpid())); file.close(); time.sleep(600)"
    command = script(ENDED, sleeps, str(mark), str(tmp_path / "out"))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    try:
        assert os.getsid(int(mark.read_text())) == os.getsid(0), "and so does the end of the session"
        process.terminate()
        assert "stopped" in process.communicate(timeout=30)[1]
        assert not alive(int(mark.read_text()))
    finally:
        process.kill()
        if alive(int(mark.read_text())):
            os.kill(int(mark.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("part", [first_suites, second_suites, search_for_the_fault])
def test_the_suites_of_a_part_parse_and_fit_into_its_time(part):
    from bench import counters, first_contact
    from bench.run import check_options, parser

    suites = part()
    assert len({s.name for s in suites}) == len(suites)
    parsers = {
        "bench.run": parser(),
        "bench.counters": counters.parser(),
        "bench.first_contact": first_contact.parser(),
    }
    places = {"csv": "x.csv", "seconds": "9", "folder": "x"}
    for suite in suites:
        for module in parsers.keys() & set(suite.command):
            arguments = suite.command[suite.command.index(module) + 1 :]
            options = parsers[module].parse_args([part.format(**places) for part in arguments])
            if module == "bench.run":
                check_options(options)
    if part is second_suites:
        assert campaign.SECONDS["first"] + campaign.SECONDS["second"] <= 570, "one command of 600 s, with its imports"
        asked = itertools.takewhile(lambda suite: suite.name != "counters", suites)
        assert sum(suite.seconds for suite in asked) <= campaign.SECONDS["second"]
        assert [suite.name for suite in suites][-2:] == ["memcheck", "racecheck"]
    if part is first_suites:
        assert [suite.name for suite in suites][:2] == ["environment", "first contact"]


def test_the_two_parts_share_no_suite_s_name():
    """A suite that ran in the search for a fault would not run afterwards."""
    assert not {s.name for s in search_for_the_fault()} & {s.name for s in (*first_suites(), *second_suites())}


def test_every_suite_of_the_benchmark_is_in_the_campaign():
    from bench.run import SUITES

    commands = [suite.command for suite in (*first_suites(), *second_suites())]
    asked = {name for c in commands if "--suite" in c for name in c[c.index("--suite") + 1].split(",")}
    assert asked | {"first", "cpu"} == set(SUITES), "first_contact measures first, and cpu needs no GPU"


def test_the_second_part_is_decided_by_the_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = [suite.name for suite in campaign.suites_of("second", tmp_path)]
    assert names[:2] == ["first contact again", "gemm: models"]
    assert "first contact compiles again" in capsys.readouterr().err
    for verdicts, of, expected in (
        ({"wgmma 0": "right", "wgmma 1": "hangs"}, 3, "gemm: models"),
        ({"wgmma 0": "wrong", "wgmma 1": "hangs"}, 2, "instructions"),
        ({"wgmma 0": "wrong", "wgmma 1": "hangs"}, 3, "first contact again"),
        ({"wgmma 0": "compiles for more than 60 s", "wgmma 1": "hangs"}, 2, "instructions"),
        ({"wgmma 0": "compiles for more than 60 s"}, 1, "first contact again"),
    ):
        (tmp_path / "first.json").write_text(json.dumps({"configurations": verdicts, "of": of}))
        assert campaign.suites_of("second", tmp_path)[0].name == expected
    (tmp_path / "first.json").write_text(json.dumps({"configurations": {"wgmma 0": "right"}, "of": 1}))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "of another machine"))
    again = campaign.suites_of("second", tmp_path)[0]
    assert again.name == "first contact again"
    contact = replace(again, command=script(""))
    for _ in range(2):
        run_campaign([contact], tmp_path / "out", 60)
    log = (tmp_path / "out/log.txt").read_text()
    assert log.count("==== first contact again") == 2, "it ran before, but on another machine"


def test_the_studies_of_quality_parse_and_leave_their_reports(tmp_path):
    from bench.experiments import runner
    from sparsedm.cli import parse

    experiments = argparse.ArgumentParser()
    runner.add_arguments(experiments)
    suites = campaign.quality_suites("images.zip")
    assert suites[0].name == "quality: arms", "what answers the question first"
    for suite in suites:
        module, *arguments = (part.format(folder="gpu", minutes="8.50") for part in suite.command[2:])
        options = {"sparsedm": parse, "bench.experiments": experiments.parse_args}[module](arguments)
        assert (options.scale, options.data, options.minutes) == ("lite", "images.zip", 8.5)
        assert options.out.startswith("gpu-quality/")
    code = "import pathlib, sys; out = pathlib.Path(sys.argv[1]); (out / 'seed-0').mkdir(parents=True)\n"
    code += "names = ('report.md', 'results.csv', 'a.png', 'b.safetensors', 'seed-0/samples.png', '.a.0.partial.png')\n"
    code += "[(out / name).write_text('x') for name in names]"
    study = Suite("quality: arms", script(code, "{folder}-quality/arms"), least=20)
    index = run_campaign([study, Suite("search", script(""), least=90)], tmp_path / "gpu", seconds=60)
    assert states(index) == {"quality: arms": "ran", "search": "skipped"}
    held = zipfile.ZipFile(tmp_path / "gpu/quality.zip").namelist()
    assert sorted(held) == ["arms--a.png", "arms--report.md", "arms--results.csv", "arms--seed-0--samples.png"]


def test_the_sanitizer_s_tests_are_there():
    """What -k and the file names select must not silently become nothing when a test is renamed."""
    (suite,) = (suite for suite in second_suites() if suite.name == "memcheck")
    command = suite.command[suite.command.index(sys.executable) :]
    listed = subprocess.run([*command, "--collect-only"], capture_output=True, text=True).stdout
    for kernel in ("mma", "mma_splitk", "mma_conv", "wgmma", "wgmma_conv"):
        assert f"<Module test_{kernel}.py>" in listed


def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert campaign.main(["first", "--out", str(tmp_path / "out")]) == 2
    assert "torch sees none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
