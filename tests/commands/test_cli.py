"""The command line itself: help, refusals, pipes; what no other file of this folder tests."""

import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sparsedm import cli
from sparsedm.cli import COMMANDS, main, parse
from sparsedm.model_files import save_model
from sparsedm.models import MODELS, build_model
from sparsedm.train.stages import METHODS
from tests.commands.command import run


@pytest.mark.parametrize(("old", "new"), [("bench", "inspect --time"), ("experiment", "python -m bench.experiments")])
def test_a_command_that_left_the_package_says_where_it_went(old, new, capsys):
    assert run(old, "--model", "uvit-tiny") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert new in line


INSPECT_TOTALS = {
    None: ("11.32 G ->       6.07 G", "12.20 G ->       6.95 G"),
    "all": ("11.32 G ->       5.66 G", "12.20 G ->       6.54 G"),
}


@pytest.mark.parametrize("where", INSPECT_TOTALS)
def test_inspect_prints_the_published_totals(where, tmp_path, capsys):
    chart = tmp_path / "layers.png"
    arguments = ["inspect", "--model", "uvit-cifar10-small", "--pattern", "2:4", "--plot", chart]
    assert run(*arguments, *(["--where", where] if where else [])) == 0
    text = capsys.readouterr().out
    assert all(total in text for total in INSPECT_TOTALS[where])
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_inspect_names_the_chart_after_what_it_shows(trained, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "mine.safetensors", build_model("uvit-tiny"))
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "mine.safetensors", "--pattern", "2:4") == 0
    assert (tmp_path / "mine-2of4-layers.png").exists()
    (tmp_path / "named.safetensors").symlink_to(tmp_path / "mine.safetensors")  # as in the cache of a model hub
    assert run("inspect", "named.safetensors") == 0
    assert (tmp_path / "named-layers.png").exists()
    monkeypatch.chdir(trained)
    assert run("inspect", ".") == 0
    assert (trained / f"{trained.name}-layers.png").exists()


def test_inspect_reads_a_run_folder(trained, tmp_path, capsys):
    assert run("inspect", trained, "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json") == 0
    assert "2:4" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["totals"]["parameters"] > 0


def test_quickstart_dry_run_prints_the_plan(capsys):
    assert run("quickstart", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "3:4" in plan
    assert "1,065,711" in plan, "the network that is trained: with its classes"


def _not_an_image_archive(folder):
    (folder / "x.zip").write_bytes(b"PK\x03\x04 cut short")
    return folder / "x.zip"


BAD = {
    "unknown model": (["inspect", "--model", "uvit-giant"], "unknown model 'uvit-giant'"),
    "unknown pattern": (["inspect", "--model", "uvit-tiny", "--pattern", "half"], "unknown pattern 'half'"),
    "3:2": (["inspect", "--model", "uvit-tiny", "--pattern", "3:2"], "pattern 3:2"),
    "0:4": (["inspect", "--model", "uvit-tiny", "--pattern", "0:4"], "pattern 0:4"),
    "2:5": (["inspect", "--model", "uvit-tiny", "--pattern", "2:5"], "pattern 2:5"),
    "unknown option": (["inspect", "--model", "uvit-tiny", "--set", "size=3"], "unknown model option 'size'"),
    "--set without =": (["inspect", "--model", "uvit-tiny", "--set", "size"], "write name=value"),
    "nothing to inspect": (["inspect"], "name something to inspect"),
    "two hyphens": (["train", "--steps=--", "--data", "synthetic"], "--steps=-- gives no value"),
    "no data": (["quickstart", "--data", "{folder}/none", "--run", "{folder}/run"], "none"),
    "empty data": (["quickstart", "--data", "{folder}", "--run", "{folder}/run"], "{folder}"),
    "truncated zip": (["quickstart", "--data", "{zip}", "--run", "{folder}/run"], "x.zip"),
    "no checkpoint": (["sample", "{folder}"], "holds no checkpoint"),
    "foreign checkpoint": (["sample", "{zip}"], "x.zip"),
    "no cuda": (["quickstart", "--device", "cuda:99"], "cuda:99 was asked for"),
    "no such device": (["quickstart", "--device", "gpu"], "'gpu' is not a device"),
    "unknown method": (["train", "--data", "synthetic", "--method", "magic"], "unknown method 'magic'"),
    "negative seed": (["train", "--data", "synthetic", "--seed", "-1"], "'-1' is not a whole number"),
    "device not served": (["quickstart", "--device", "mps"], "'mps' is not supported"),
    "where without pattern": (["inspect", "--model", "uvit-tiny", "--where", "qkv"], "give one with --pattern"),
    "no batch": (["inspect", "--model", "uvit-tiny", "--batch", "0"], "'0' is not a whole number from 1"),
    "no chart": (
        ["inspect", "--model", "uvit-tiny", "--plot", "x.txt"],
        "x.txt must end in .png, .jpg, .jpeg or .webp",
    ),
    "numbers over the chart": (
        ["inspect", "--model", "uvit-tiny", "--plot", "{folder}/a.png", "--json", "{folder}/../data/a.png"],
        "a.png is the file of the chart",
    ),
    "numbers over the model": (
        ["inspect", "{zip}", "--json", "{zip}"],
        "x.zip is an input of this command, or of a later one: write to another file",
    ),
    "no size": (
        ["train", "--data", "synthetic:abc", "--dry-run"],
        "'synthetic:abc': write synthetic or",
    ),
    "another size": (["train", "--data", "synthetic:9", "--dry-run"], "'synthetic:9': drawn images are not resized"),
    "numbers in a folder": (["inspect", "--model", "uvit-tiny", "--json", "."], "cannot write .: it is a folder"),
    "more bytes than there are": (
        ["inspect", "--model", "uvit-tiny", "--set", "image_size=1000000000"],
        "model option image_size=1000000000: must be from -16777216 to 16777216",
    ),
    "too deep": (["inspect", "--model", "uvit-tiny", "--set", "depth=129"], "depth=129: must be from -128 to 128"),
    "a split below zero": (["train", "--data", "synthetic", "--split", "-1,2"], "split [-1.0, 2.0] must be"),
    "less than nothing": (["train", "--data", "synthetic", "--decay", "-inf"], "argument --decay: '-inf' is not a"),
    "begins with -": (["train", "--data", "synthetic", "--where", "-x"], "if it begins with -, write --where=VALUE"),
    "no flag": (["inspect", "--model", "uvit-tiny", "--set", "velocity=yes"], "must be of type bool, true or false"),
    "guidance without end": (["sample", "{folder}", "--guidance", "nan"], "argument --guidance: 'nan' is not a finite"),
    "guidance in words": (["sample", "{folder}", "--guidance", "much"], "argument --guidance: 'much' is not a finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(name, tmp_path, capsys):
    arguments, message = BAD[name]
    places = {"folder": tmp_path / "data", "zip": tmp_path / "x.zip"}
    places["folder"].mkdir()
    _not_an_image_archive(tmp_path)
    assert run(*(a.format(**places) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert len(error.strip().splitlines()) == 1, "one sentence"
    assert not (places["folder"] / "run").exists(), "a refused command must leave nothing behind"


def test_output_reaches_a_pipe_at_once_and_in_any_encoding(monkeypatch, tmp_path):
    class Pipe(io.BytesIO):
        lines = 0

        def write(self, piece):
            self.lines += 1
            return super().write(piece)

    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="ascii"))
    assert run("inspect", "--model", "uvit-tiny", "--plot", tmp_path / "wei\udcffß.png") == 0
    assert b"wei\\udcff\\xdf.png\n" in pipe.getvalue()
    assert pipe.lines > 1, "one write at the end of the command would come too late for who is waiting"


OPENED = """import sys
from sparsedm import cli
cli.open_streams()
with open(sys.argv[1], "w") as file:
    print("said")
    print("said", file=sys.stderr)
    file.write(str(file.fileno() > 2))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a shell of POSIX")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_lead_nowhere_and_into_no_file(closed, tmp_path):
    words = [sys.executable, "-c", OPENED, str(tmp_path / "a")]
    done = subprocess.run(f"{shlex.join(words)} {closed}", shell=True, capture_output=True)
    assert (tmp_path / "a").read_text() == "True"
    assert done.returncode == 0


def test_a_reader_that_leaves_ends_the_command_without_a_word(monkeypatch, tmp_path, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run("inspect", "--model", "uvit-tiny", "--plot", tmp_path / "a.png") == 141
    assert not (tmp_path / "a.png").exists()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "train", "sample", "evaluate", "inspect", "quickstart"])
def test_help_teaches(command, capsys):
    assert run(*filter(None, [command]), "--help") == 0
    text = capsys.readouterr().out
    assert "examples" in text or not command
    assert all(name in text for name in MODELS) or "--model" not in text, "a name cut at a hyphen cannot be copied"
    assert all(f"  {name}: " in text for name in METHODS) or "--method" not in text, "a line for each"
    assert ("--seed" in text) == (command not in ("", "inspect")), "an option is there where it does something"
    assert "exit codes:" in text


@pytest.mark.parametrize("library", ["glibc", "old glibc", "older glibc", "musl", None])
def test_freed_memory_is_kept_where_the_c_library_is_glibc(library, monkeypatch):
    told, most = {}, {"old glibc": 1 << 25, "older glibc": 1 << 19}.get(library, 1 << 40)

    def mallopt(option, size):
        if option == cli.M_MMAP_THRESHOLD and size > most:
            return 0  # and nothing changes
        told[option] = size
        return 1

    glibc = SimpleNamespace(gnu_get_libc_version=None, mallopt=mallopt)
    known = {"musl": SimpleNamespace(mallopt=mallopt)}

    def load(name):
        if library is None:
            raise OSError("no such library")
        return known.get(library, glibc)

    monkeypatch.setattr(cli.ctypes, "CDLL", load)
    cli.keep_freed_memory()
    assert told.get(cli.M_MMAP_THRESHOLD) == {"glibc": 1 << 30, "old glibc": 1 << 25}.get(library)
    assert (cli.M_TRIM_THRESHOLD in told) == (cli.M_MMAP_THRESHOLD in told), "alone it would freeze the other one"


def test_help_does_not_wait_for_torch():
    code = "import runpy, sys, time; sys.argv = ['sparsedm', '--help']"
    code += "\ntry: runpy.run_module('sparsedm', run_name='__main__')  # as python -m does"
    code += "\nexcept SystemExit as end: code = end.code"
    code += "\ncode = code or any(name in sys.modules for name in ('torch', 'matplotlib', 'numpy', 'PIL'))"
    code += "\nsys.exit(code or time.process_time() > 0.3)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(f"\n    {name}" in shown.stdout for name in COMMANDS)


def test_every_command_is_a_module_of_its_own():
    for module, summary in COMMANDS.values():
        command = importlib.import_module(module)
        assert callable(command.run)
        assert callable(command.add_arguments)
        assert command.EXAMPLES
        assert summary


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_commands(command):
    for example in importlib.import_module(COMMANDS[command][0]).EXAMPLES:
        assert parse([command, *example.split()]).run_command


def test_cuda_is_refused_where_there_is_none(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert run("quickstart", "--device", "cuda") == 2
    assert "torch sees 0 CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["quickstart"], ["evaluate", "{run}"], ["search"]])
def test_a_dry_run_refuses_data_of_a_kind_that_nothing_reads(command, trained, tmp_path, capsys):
    (tmp_path / "data.txt").touch()
    command = [word.format(run=trained) for word in command]
    assert run(*command, "--data", tmp_path / "data.txt", "--dry-run") == 2
    assert "data.txt: must be a folder, or end in .zip, .npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["evaluate", "{run}", "--features", "inceptoin"], "unknown features 'inceptoin'"),
        (["evaluate", "{run}", "--dense", "none"], "none does not exist"),
        (["evaluate", "{run}", "--count", 3], "3 generated"),
        (["search", "--features", "inceptoin"], "unknown features 'inceptoin'"),
        (["search", "--networks", "dense"], "--networks names networks of a run folder"),
        (["search", "--exclude", "2:5"], "no network to leave out is named '2:5': dense, 2:4, 1:4, 1:8"),
        (["search", "--family", "widths", "--exclude", "9/8"], "no network to leave out is named '9/8': dense 8/8"),
        (["search", "{run}", "--sampling-steps", 2, "--population", 100], "a population of 100 is more than"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value[-2:])),
)
def test_a_dry_run_refuses_what_would_be_refused_later(options, said, trained, capsys):
    assert run(*(str(word).format(run=trained) for word in options), "--data", "synthetic", "--dry-run") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [["quickstart"], ["evaluate", "{run}"], ["search"], ["search", "{run}"]])
def test_a_dry_run_refuses_drawn_images_of_another_size(command, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [word.format(run=trained) for word in command]
    assert run(*command, "--data", "synthetic:20", "--dry-run") == 2
    assert "data 'synthetic:20': drawn images are not resized, and " in capsys.readouterr().err


def test_a_link_to_itself_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    for command in (["inspect"], ["import"], ["sample"], ["evaluate", "--data", "synthetic"], ["quickstart", "--data"]):
        assert main([*command, "a.safetensors"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("ignored", [False, True])
def test_sigterm_leaves_no_half_written_file_and_is_no_error(ignored, tmp_path):
    """It arrives while something is read by code that takes any exception for a damaged file."""
    code = f"""
import os, signal, sys
from sparsedm import cli, files
from sparsedm.commands import inspect
def stopped(*arguments, **options):
    with files.atomic_file({str(tmp_path / "a.txt")!r}) as partial:
        partial.write_text("half")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise files.InputError("a damaged file") from error
if {ignored}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
inspect.build_model = stopped
inspect.inspect = lambda *arguments, **options: sys.exit(0)
sys.exit(cli.main(["inspect", "--model", "uvit-tiny"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == ((0, "") if ignored else (143, "sparsedm: terminated\n"))
    assert [path.name for path in tmp_path.iterdir()] == (["a.txt"] if ignored else [])
