"""The command lines of the programs in bench: what they take, and what they refuse before anything is measured."""

import os

import pytest
import torch

from bench import (
    campaign,
    ceilings,
    counters,
    first_contact,
    networks,
    plot,
    program,
    run,
    targets,
)
from bench.baselines import PROVIDERS
from bench.experiments import __main__ as experiments
from bench.results import Results, read
from bench.run import LAYER_SUITES, SUITES, main
from sparsedm.errors import InputError
from tests.bench.test_run import session


def test_the_command_line(tmp_path, capsys):
    out = tmp_path / "r.csv"
    arguments = ["--suite", "mask", "--quick", "--shapes", "uvit-tiny@1", "--providers", "dense", "--out", str(out)]
    assert main(arguments) == 0
    assert "rows (" in capsys.readouterr().out
    assert {r["provider"] for r in read(out)} == {"dense"}
    assert main([*arguments, "--resume", "--shapes", "square", "--seconds", "0"]) == 3, "3: left out for time"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], f"unknown suite 'speed': one of {', '.join(SUITES)}"),
        (["--suite", "gemm", "--providers", "cublas"], "unknown providers cublas: they are CUTLASS"),
        (["--suite", "gemm", "--modes", "fused"], "unknown modes fused: they are backward, choose, epilogue, forward"),
        (["--suite", "train", "--shapes", "sd3-medium@1"], "a whole network is model@batch"),
        (["--suite", "conv", "--shapes", "sd3-medium@1"], "hold no convolution layer"),
        (["--suite", "gemm", "--shapes", "sqare"], "unknown shapes 'sqare'"),
        (["--suite", "cpu", "--shapes", "square@256"], "suite cpu makes no use of --shapes: leave out"),
        (["--suite", "table3,ceiling", "--shapes", "nonsense"], "suite table3,ceiling makes no use of --shapes"),
        (["--suite", "table3", "--modes", "epilogue", "--batch", "3"], "suite table3 makes no use of --batch, --modes"),
        (["--suite", "train", "--modes", "epilogue"], "suite train makes no use of --modes"),
        (["--suite", "gemm", "--batch", "3", "--no-sampling"], "suite gemm makes no use of --no-sampling"),
        (["--suite", "mask", "--no-compile"], "suite mask makes no use of --no-compile"),
        (["--suite", "train", "--shapes", "uvit-tiny@0"], "'0' is not a whole number from 1"),
        (["--suite", "mask,speed", "--shapes", "square@128"], "unknown suite 'speed'"),
        (["--suite", "mask,conv", "--shapes", "square@128"], "hold no convolution layer"),
        (["--suite", "mask", "--modes", "epilogue"], "suite mask: --providers, --modes and --no-compile leave nothing"),
        (["--suite", "train,table3", "--no-compile", "--providers", "dense compiled"], "suite train,table3: --prov"),
        (["--suite", "ceiling", "--providers", "dense"], "suite ceiling: --providers, --modes and --no-compile leave"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--quick", "--out", str(tmp_path / "r.csv")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.csv").exists()


def test_an_option_that_one_of_the_suites_uses_is_taken(tmp_path):
    options = ["--shapes", "square@128", "--modes", "choose", "--no-compile", "--dry-run"]
    assert main(["--suite", "ceiling,mask,table3", *options, "--quick", "--out", str(tmp_path / "r.csv")]) == 0


def test_the_suites_that_compile_are_those_that_can_do_without():
    known = {suite: PROVIDERS[kind.kernel] for suite, (kind, *_) in LAYER_SUITES.items()}
    known |= {"end-to-end": networks.STEP_PROVIDERS, "table3": networks.STEP_PROVIDERS}
    known |= {"train": networks.TRAINING_PROVIDERS, "ceiling": [ceilings.TORCH, ceilings.OURS]}
    known |= {"cpu": [provider for part in run.cpu.PLAN for provider in part.providers]}
    known["first"] = run.first_providers(torch.device("cpu"), torch.float32)
    compiles = {suite for suite, found in known.items() if any(p.name.endswith("compiled") for p in found)}
    assert compiles == {suite for suite, options in run.USED.items() if "no_compile" in options}


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--resume"]])
@pytest.mark.parametrize(
    ("out", "message"),
    [(".", ": a plain file is needed"), ("/dev/null", ": a plain file is needed"), ("/proc/none.csv", "cannot write")],
)
def test_what_cannot_be_a_results_file_is_refused_at_once(out, message, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--suite", "mask", "--shapes", "square@128", "--quick", "--out", out, *more]) == 2
    assert message in capsys.readouterr().err


def test_whole_networks_can_be_named_beside_all_models(tmp_path):
    shapes = run.network_shapes(session(tmp_path / "r.csv", "models@2, uvit-tiny@4,uvit-tiny@4", batches=(8,)))
    every = [(name, 2) for name in run.MEASURED_MODELS]
    assert [(s.preset, s.batch) for s in shapes] == [*every, ("uvit-tiny", 4)]


def test_the_help_describes_every_suite():
    text = run.parser().format_help()
    assert all(f"\n    {suite} " in text for suite in SUITES)


def test_an_existing_file_is_refused(tmp_path):
    Results(tmp_path / "r.csv").add([])
    with pytest.raises(InputError, match="exists"):
        session(tmp_path / "r.csv")


def test_rows_of_another_device_are_not_continued(tmp_path, capsys):
    arguments = ["--suite", "mask", "--quick", "--shapes", "square@128", "--out", str(tmp_path / "r.csv"), "--resume"]
    assert main([*arguments, "--providers", "dense"]) == 0
    before = (tmp_path / "r.csv").read_text()
    name = read(tmp_path / "r.csv")[0]["device"]
    (tmp_path / "r.csv").write_text(other := before.replace(name, "Another GPU"))
    assert main(arguments) == 2
    assert "holds rows of Another GPU, and this is CPU: " in capsys.readouterr().err
    assert (tmp_path / "r.csv").read_text() == other


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--device", "x"), "'x' is not a device"),
        (("--device", "cuda:99"), "torch sees"),
        (("--seconds", "nan"), "'nan' is not a finite number"),
        (("--timeout", "0"), "'0' is not more than 0"),
        (("--batch", "0"), "'0' is not a whole number from 1"),
        (("--dtype", "fp8"), "invalid choice: 'fp8'"),
    ],
    ids=lambda value: value[0],
)
def test_a_strange_option_is_one_sentence(option, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--suite", "gemm", *option])
    assert end.value.code == 2
    assert said in (error := capsys.readouterr().err)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (campaign, ["publish", "--to", ""]),
        (campaign, ["second", "--only", ""]),
        (counters, [""]),
        (experiments, ["ratio", "--init", "", "--dry-run"]),
        (experiments, ["ratio", "--merge", ""]),
        (first_contact, ["--out", ""]),
        (plot, ["a.csv", ""]),
        (run, ["--suite", "gemm", "--providers", "", "--dry-run"]),
        (targets, ["a.csv", "--out", ""]),
    ],
)
def test_an_empty_value_is_refused(module, arguments, capsys):
    """Most likely a shell variable that is not set."""
    with pytest.raises(SystemExit) as end:
        module.main(arguments)
    assert end.value.code == 2
    assert "it is empty" in capsys.readouterr().err


def test_a_home_folder_is_found_in_an_option():
    assert run.parser().parse_args(["--suite", "gemm", "--out=~/r.csv"]).out == os.path.expanduser("~/r.csv")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 2, "not enough memory"),
        (OSError(28, "full", "x.csv"), 2, "x.csv: full"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=["memory", "disk", "interrupt"],
)
def test_what_is_no_defect_of_a_program_is_one_sentence(error, code, said, capsys):
    @program("bench")
    def failing(arguments):
        raise error

    assert failing([]) == code
    assert f"bench: {said}" in capsys.readouterr().err
