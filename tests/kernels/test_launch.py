"""Where an operation runs: what is forced, what a device can do, what is known while code is traced."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from sparsedm.errors import InputError
from sparsedm.kernels import launch


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("SPARSEDM_BACKEND", raising=False)


def test_backends(monkeypatch):
    assert launch.forced_backend() is None
    monkeypatch.setenv("SPARSEDM_BACKEND", "torch")
    assert launch.forced_backend() == "torch"
    assert not launch.uses_triton(torch.ones(1), None)
    with pytest.raises(InputError, match="one device, not on cpu and meta"):
        launch.uses_triton(torch.ones(1), torch.ones(1, device="meta"))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now fails
import torch, sparsedm, sparsedm.commands.train, sparsedm.commands.sample
assert "torch._dynamo" not in sys.modules, "it takes two seconds, which a refusal or --help must not wait for"
model = sparsedm.sparsify(sparsedm.build_model("uvit-tiny", image_size=8, dim=32, depth=2, heads=2), "2:4")
inputs = model.example_inputs(2)
model(*inputs).sum().backward()
small = sparsedm.compress(model.eval())
with torch.no_grad():
    assert (small(*inputs) - model(*inputs)).abs().max() < 1e-5
assert {row.backend for row in sparsedm.inspect(small).rows if row.pattern == "2:4"} == {"dense"}
"""


def test_the_package_works_where_triton_is_missing():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, timeout=120)


def test_a_triton_that_does_not_load_is_told_and_passed_over(tmp_path, monkeypatch, caplog):
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: GLIBC_2.99 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    found = runpy.run_path(launch.__file__)
    assert found["triton"] is None
    assert found["NO_TRITON"] == "Triton does not load: libtriton.so: GLIBC_2.99 not found"
    assert caplog.messages == [f"{found['NO_TRITON']}; torch computes"]


def test_an_amd_gpu_gets_no_kernels_in_nvidias_instructions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert launch.capability(torch.device("cuda")) == (9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.capability(torch.device("cuda")) is None


WITHOUT_COMPILER = """
import os
from emulator.driver import pretend, start
START
import contextlib
import torch, sparsedm
from sparsedm.kernels import launch, mask, masked_adamw
from sparsedm.kernels.sparse24 import dispatch
launch.capability = dispatch.capability = lambda device: (9, 0)
mask.type = lambda tensor: None  # so that a CPU's tensor goes the way of a GPU's

def train(held=False):
    torch.manual_seed(0)
    layer = sparsedm.Linear(128, 128, pattern="2:4", activation="gelu")
    optimizer = sparsedm.MaskedAdamW(layer.parameters(), 0.1, model=layer)
    for _ in range(2):
        with sparsedm.hold_masks(layer, optimizer=optimizer) if held else contextlib.nullcontext():
            layer(torch.randn(8, 128)).square().sum().backward()
        optimizer.step()
    return layer

held = train(held=True)
layer = train()
assert [name for name, *_ in launch.broken] == [masked_adamw.NAME[0], "select_mask"], launch.broken
assert torch.equal(held.weight, layer.weight)
weight = layer.weight.clone()
small, x = sparsedm.compress(torch.nn.Sequential(layer).bfloat16()), torch.randn(4096, 128).bfloat16()
for _ in range(2):
    y = small(x)
(row,) = sparsedm.inspect(small, (x,)).rows
assert row.backend == "dense" and "wgmma does not run here: CAUSE" in row.why, row
os.environ["SPARSEDM_BACKEND"] = "torch"
assert torch.equal(small(x), y)
assert torch.equal(train().weight, weight)
"""


CRASH = '#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\nkill -SEGV $$\n'
WITHOUT_DRIVER, WITH_DRIVER = "pretend((9, 0))", "start(execute=False)"
FAILURES = {  # variables of the compiler that fails: how the test starts, the exception, the end of the message
    ("CC",): (WITHOUT_DRIVER, "FileNotFoundError", "No such file or directory: '{file}'"),
    ("CC", "crash"): (WITHOUT_DRIVER, "CalledProcessError", "died with <Signals.SIGSEGV: 11>."),
    ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "crash"): (WITH_DRIVER, "PTXASError", "`ptxas` failed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES, ids=" ".join)
def test_masked_training_on_a_gpu_whose_compiler_fails_runs_in_torch(failure, tmp_path):
    """Triton builds its launcher with cc. A warning says why, and weights and images are those of plain torch."""
    begin, cause, words = FAILURES[failure]
    compiler = tmp_path / "compiler"
    if "crash" in failure:
        compiler.write_text(CRASH.format(real=Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"))
        compiler.chmod(0o755)
    env = {**os.environ, **dict.fromkeys(("TRITON_CACHE_DIR", "SPARSEDM_CACHE"), str(tmp_path))}
    if begin == WITHOUT_DRIVER:
        (tmp_path / "libcuda.so.1").write_bytes(b"")
        env["TRITON_LIBCUDA_PATH"] = str(tmp_path)
    env |= {name: str(compiler) for name in failure if name.isupper()}
    env.pop("TRITON_INTERPRET", None)
    code = WITHOUT_COMPILER.replace("START", begin).replace("CAUSE", cause)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if "does not run here" in line]
    assert [f"triton does not run here: {cause}" in line for line in lines] == [True, True, False], lines
    assert all(words.format(file=compiler) in line for line in lines), lines


CAUSES = [
    (RuntimeError("no such instruction"), "RuntimeError: no such instruction"),
    (RuntimeError(), "RuntimeError:"),
    (
        RuntimeError("ptxas failed\n`ptxas` stderr:\nptxas k.ptx, line 9; error : Unknown symbol\nRepro: ptxas -v"),
        "RuntimeError: ptxas failed ... ptxas k.ptx, line 9; error : Unknown symbol",
    ),
]


@pytest.mark.parametrize(("error", "line"), CAUSES, ids=str)
def test_the_line_of_an_exception_holds_its_cause(error, line):
    assert launch.reason_of(error) == line


def test_a_long_line_of_an_exception_has_its_beginning_and_its_end():
    crashed = subprocess.CalledProcessError(-11, ["cc", *(f"-I/usr/include/{i}" for i in range(100))])
    line = launch.reason_of(crashed)
    assert len(line) <= 400
    assert line.startswith("CalledProcessError: Command '['cc', ")
    assert line.endswith("died with <Signals.SIGSEGV: 11>.")


def test_the_line_of_a_compilers_exception_holds_the_cause_beneath_the_place():
    """Triton's begin with a place in a source; what is wrong is in the exception that caused it."""
    error = RuntimeError("at 12:8:\n    y = x\n        ^")
    error.__cause__ = AttributeError("module 'gluon' has no attribute 'barrier'")
    found = launch.reason_of(error)
    assert found == "RuntimeError: at 12:8: ... AttributeError: module 'gluon' has no attribute 'barrier'"
