"""First contact on the stand-in driver, and what its parent process makes of children that hang or are wrong."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import baselines, first_contact
from bench.campaign import search_for_the_fault
from bench.first_contact import verdict_of
from bench.providers import Bound
from tests.bench import stand_in


def test_a_configuration_is_compiled_and_then_found_right(tmp_path):
    command = (sys.executable, "-m", "bench.first_contact", "--small", "--one", "wgmma,8")
    environment = stand_in.environment(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=stand_in.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [first_contact.COMPILED, first_contact.RIGHT]


def script(code):
    return (sys.executable, "-c", f"import subprocess, sys, time\nsay = lambda *s: print(*s, flush=True)\n{code}")


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("say('compiled'); say('right')", "right"),
        ("say('compiled'); say('right'); time.sleep(600)", "right"),
        ("say('compiled'); sys.exit(3)", "exit code 3: compiled"),
        ("say('compiled'); raise AssertionError('1 of 9 weights')", "exit code 1: AssertionError: 1 of 9 weights"),
        ("say('compiled'); subprocess.run(['sleep', '600'])", "hangs: more than 0.5 s"),
        ("say('warning'); time.sleep(600)", "compiles for more than 2 s"),
        ("pass", "exit code 0: no output"),
    ],
    ids=["right", "right-and-busy", "ends-badly", "wrong", "hangs", "compiles-for-ever", "silent"],
)
def test_the_verdict_on_a_process(code, verdict, monkeypatch):
    monkeypatch.setattr(first_contact, "COMPILES", 4)
    began, processes = time.monotonic(), []
    assert verdict_of(script(code), 0.5, processes) == verdict
    assert time.monotonic() - began < 20
    processes[0].kill()
    processes[0].communicate()


def test_what_is_right_goes_on_until_its_time_and_what_it_says_is_shown(tmp_path, capfd):
    commands = {
        "slow": script("say('right'); time.sleep(600)"),
        "quick": script("say('right'); time.sleep(0.5); raise ValueError('an epilogue does not compile')"),
    }
    began = time.monotonic()
    found = first_contact.verdicts_of(commands, 20, tmp_path / "first.json", began + 5)
    assert found == {"quick": "right", "slow": "right"}
    assert "an epilogue does not compile" in capfd.readouterr().out
    assert time.monotonic() - began < 20


def test_what_is_checked_is_compiled_first_and_the_rest_when_it_is_right(monkeypatch, capsys):
    done = []
    monkeypatch.setattr(first_contact, "problems", lambda *_: ("identity", "product"))
    monkeypatch.setattr(first_contact, "result", lambda choice, problem: done.append(problem))
    monkeypatch.setattr(first_contact, "compile_all", lambda *_: done.append(capsys.readouterr().out.split()))
    monkeypatch.setattr(first_contact, "check", lambda _, *on: done.append([*capsys.readouterr().out.split(), *on]))
    monkeypatch.setattr(first_contact, "trying", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    first_contact.contact(first_contact.Choice("wgmma", 0), torch.device("cuda"))
    assert done == ["identity", "product", ["compiled", "identity", "product"], ["right"]]


COUNTS = """
import sys
from bench import first_contact
from bench.problems import LinearProblem
from bench.shapes import LinearShape
from triton import knobs
made, device = [], first_contact.torch.device("cpu")
knobs.compilation.listener = lambda *, src, cache_hit, **_: made.append(src.name)
backend, number, rows = sys.argv[1:]
choice = first_contact.Choice(backend, int(number))
checked = first_contact.problems(device)
def compiled(problems):
    before = len(made)
    with first_contact.compiling_only():
        for problem in problems:
            first_contact.result(choice, problem)
    return made[before:]
print(sorted(set(compiled(checked))))
print(compiled(checked))  # as the check asks for them
first_contact.compile_all(choice, device)
layers = LinearShape("fc1", "", int(rows), 2304, 1152, "gelu_tanh"), LinearShape("fc2", "", 136, 1152, 4608, None, True)
print(compiled([LinearProblem(shape, "epilogue", first_contact.torch.bfloat16, device) for shape in layers]))
"""


@pytest.mark.parametrize("case", [("splitk", "0", "64"), pytest.param(("mma", "3", "4096"), marks=pytest.mark.slow)])
def test_neither_the_check_nor_a_layer_compiles_what_was_not_compiled_before(case, tmp_path):
    """Else a product that compiles for 20 s would be said to hang."""
    code = f"from tests import emulated_gpu\nemulated_gpu.start(execute=False)\n{COUNTS}"
    environment = stand_in.environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, *case], env=environment, capture_output=True, text=True)
    kernels = ["linear_splitk", "reduce_splitk"] if case[0] == "splitk" else ["linear_mma"]
    assert done.stdout.splitlines() == [str(kernels), "[]", "[]"], done.stderr[-3000:]


def test_a_fault_is_searched_for_where_a_process_has_died_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    with first_contact.trying(first_contact.LINEAR, first_contact.Choice("wgmma", 0)):
        (note,) = (tmp_path / "tuned").glob("*.running")
        text = note.read_text()
    died = subprocess.Popen(["true"])
    died.wait()
    note.with_name(note.name.replace(f".{os.getpid()}.", f".{died.pid}.")).write_text(text)
    monkeypatch.setattr(first_contact, "compile_all", lambda *_: None)
    monkeypatch.setattr(first_contact, "problems", lambda *_: ())
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    checked = []
    monkeypatch.setattr(first_contact, "check", lambda *_: checked.append(1))
    one = ["--one", "wgmma,0", "--small"]
    with pytest.raises(RuntimeError, match="a process ended while it ran"):
        first_contact.main(one)
    (sanitizer,) = (suite for suite in search_for_the_fault() if suite.name == "memcheck: one")
    at = sanitizer.command.index("--one")
    assert first_contact.main(sanitizer.command[at:]) == 0
    assert checked == [1]


def test_what_is_wrong_is_refused_by_the_tuner(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    monkeypatch.setattr(first_contact, "compile_all", lambda *_: None)
    monkeypatch.setattr(first_contact, "problems", lambda *_: ())

    def wrong(*_):
        raise AssertionError("1 of 9 weights are not in their place")

    monkeypatch.setattr(first_contact, "check", wrong)
    choice = first_contact.Choice("wgmma", 2)
    with pytest.raises(AssertionError, match="1 of 9"):
        first_contact.contact(choice, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="first contact: 1 of 9"), first_contact.trying(first_contact.LINEAR, choice):
        pass
    with first_contact.trying(first_contact.LINEAR, choice._replace(config=1)):
        pass


@pytest.fixture
def mended(tmp_path, monkeypatch):
    """A choice that was found wrong, and is right now."""
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    monkeypatch.setattr(first_contact, "compile_all", lambda *_: None)
    monkeypatch.setattr(first_contact, "problems", lambda *_: ())
    monkeypatch.setattr(first_contact, "check", lambda *_: None)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    choice = first_contact.Choice("wgmma", 2)
    first_contact.refuse(first_contact.LINEAR, choice, "first contact: 1 of 9 weights are not in their place")
    return choice


def test_what_was_wrong_and_is_mended_is_right_on_the_same_day(mended, tmp_path, capsys):
    """The mend may be in a file that the name of the note does not tell."""
    first_contact.contact(mended, torch.device("cuda"))
    assert capsys.readouterr().out.split()[-1] == first_contact.RIGHT
    assert not list((tmp_path / "tuned").iterdir())


@pytest.mark.parametrize(("small", "again"), [(True, True), (True, False), (False, True)])
def test_the_search_for_the_fault_acquits_nothing(small, again, mended, tmp_path):
    with contextlib.nullcontext() if again else pytest.raises(RuntimeError, match="1 of 9"):
        first_contact.contact(mended, torch.device("cuda"), small, again)
    assert len(list((tmp_path / "tuned").iterdir())) == 1


def test_only_what_is_right_and_meant_for_large_products_is_timed(tmp_path, monkeypatch):
    """And what is asked for is known to the suite "first"."""
    seen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for module in (first_contact, baselines):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    monkeypatch.setattr(
        first_contact, "verdict_of", lambda command, *_: "hangs" if command[-1] == "wgmma,1" else "right"
    )
    monkeypatch.setattr(first_contact.run, "main", lambda arguments: seen.append(arguments) or 3)
    assert first_contact.main(["--out", str(tmp_path), "--seconds", "50"]) == 3
    verdicts = json.loads((tmp_path / "first.json").read_text())["configurations"]
    assert {name for name, verdict in verdicts.items() if verdict != "right"} == {"wgmma 1"}
    assert {name.split()[0] for name in verdicts} == {"wgmma", "splitk", "mma"}
    ((*_, seconds, _, names),) = seen
    assert 0 < int(seconds) <= 50
    known = [p.name for p in baselines.first_providers("cuda", torch.bfloat16)]
    assert names.split(",") == [name for name in known if name != "wgmma 1"]


ENDED_EARLY = """
import sys
from bench import first_contact
first_contact.torch.cuda.is_available = lambda: True
first_contact.capability = lambda device: (9, 0)
sleeps = "import os, sys, time; open(sys.argv[1] + '/pids', 'a').write(f'{os.getpid()} '); time.sleep(600)"
real, out = first_contact.verdict_of, sys.argv[1]

def verdict_of(command, *rest):
    return "right" if command[-1] == "wgmma,0" else real((sys.executable, "-c", sleeps, out), *rest)

first_contact.verdict_of = verdict_of
first_contact.main(["--out", out])
"""


def test_when_it_is_ended_its_children_end_and_what_is_known_is_kept(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ENDED_EARLY, str(tmp_path)], cwd=stand_in.ROOT)
    pids = []
    while len(pids) < 4 or not (tmp_path / "first.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
        pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
    process.terminate()
    process.wait(30)
    first = json.loads((tmp_path / "first.json").read_text())
    assert first == {"configurations": {"wgmma 0": "right"}, "of": 16}, "fewer than all: not the end"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_when_nothing_is_right_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(first_contact, "capability", lambda device: (9, 0))
    monkeypatch.setattr(first_contact, "verdict_of", lambda command, *_: "hangs")
    monkeypatch.setattr(first_contact.run, "main", lambda arguments: pytest.fail("timed"))
    assert first_contact.main(["--out", str(tmp_path)]) == 1


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert first_contact.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("small", [False, True])
def test_what_is_checked_is_ragged_and_has_many_tiles_for_each_block(small, monkeypatch):
    seen = []

    class Right:
        def __init__(self, choice):
            pass

        def prepare(self, problem):
            seen.append((problem.shape.M, problem.shape.N, problem.shape.K))

        def bind(self, problem, prepared):
            return Bound(lambda: problem.answer(problem.masked, problem.dtype)[0], "")

    monkeypatch.setattr(first_contact, "Configuration", Right)
    first_contact.check(None, *first_contact.problems(torch.device("cpu"), small))
    large = [(512, 520, 512), (136, 520, 320), (5000, 2056, 520)]
    assert seen == ([(128, 264, 128), (136, 264, 128)] if small else large)


def test_a_third_of_the_time_is_left_for_timing(tmp_path, monkeypatch):
    until = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(first_contact, "choices", lambda *_: [])
    monkeypatch.setattr(first_contact, "verdicts_of", lambda *given: until.append(given[-1] - time.monotonic()) or {})
    first_contact.main(["--out", str(tmp_path), "--seconds", "90"])
    assert until[0] == pytest.approx(60, abs=5)
