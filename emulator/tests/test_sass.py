"""Offline compilation: a kernel built for GPUs that are not here, its SASS counted, its PTX run in the emulator."""

import functools

import pytest
import torch

from emulator.launch import run
from emulator.sass import Build, compile_offline

SUM = Build(
    "emulator.tests.kernels:scaled_sum_kernel",
    {"x_ptr": "*bf16", "y_ptr": "*fp32", "out_ptr": "*fp32", "factor": "i32", "N": "i32"},
    {"BLOCK": 256},
)
ARCHITECTURES = (80, 90, 100, 120)


@functools.cache
def compiled():
    return dict(zip(ARCHITECTURES, compile_offline([SUM.at(capability) for capability in ARCHITECTURES])))


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_a_kernel_is_compiled_counted_and_run(capability):
    built = compiled()[capability]
    assert f".target sm_{capability}" in built.ptx
    assert built.spills == built.shared == 0
    assert built.warnings == ()
    assert built.loops() == []
    assert built.count("LDG") == 2 * built.count("STG") > 0
    x, y = torch.randn(1000).bfloat16(), torch.randn(1000)
    out = torch.full((1000,), float("nan"))
    run(SUM, built.ptx, {"x_ptr": x, "y_ptr": y, "out_ptr": out, "factor": 3, "N": 1000}, (4,))
    torch.testing.assert_close(out, 3 * x.float() + y)


def test_what_the_compiler_says_reaches_the_caller():
    with pytest.raises(RuntimeError, match="BLOCK"):
        compile_offline([Build(SUM.kernel, SUM.signature, {})])
