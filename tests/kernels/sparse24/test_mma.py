"""mma.sp without a GPU: the compiled PTX is executed in the emulator and the SASS inspected, for sm_80 and sm_90."""

import functools
import re

import pytest
import torch

from sparsedm.kernels.sparse24 import mma
from tests.kernels.sparse24.kernel_case import (
    Cases,
    KernelCase,
    KernelTests,
    check_places,
    hand_made,
    launch_on_the_gpu,
    loop_with,
)

EPILOGUE = {"bias": True, "activation": "gelu", "residual": True}
Case = functools.partial(KernelCase, mma)
SlowCase = functools.partial(Case, slow=True)

# Ragged everywhere; K runs past the ring of four steps.
CASES = Cases(
    {
        # two sources, of which the second ends inside a step, gates whose border lies inside a tile
        "everything": Case(mma.CONFIGS[3], dict(M=100, N=136, K=256, skip=72, groups=4, strided=True, **EPILOGUE), 80),
        "fp16-to-fp32": Case(
            mma.CONFIGS[0], dict(M=60, N=130, K=328, dtype=torch.float16, out=torch.float32, bias=True)
        ),
    }
    | {
        f"{i}-{activation}-sm{at}": SlowCase(config, dict(M=264, N=200, K=200, activation=activation), at)
        for i, config in enumerate(mma.CONFIGS)
        for activation, at in ((None, 80), ("silu", 90))
    }
    | {
        f"{i}-{activation}-widest": SlowCase(
            config, dict(M=264, N=200, K=128, skip=64, groups=2, **EPILOGUE | {"activation": activation}), capability
        )
        for i, config in enumerate(mma.CONFIGS)
        for activation, capability in (("gelu", 80), ("gelu_tanh", 90))
    }
    | {
        "one-row-one-step": SlowCase(mma.CONFIGS[0], dict(M=1, N=8, K=16, activation="gelu_tanh", residual=True), 80),
        "everything-sm90": SlowCase(mma.CONFIGS[1], dict(M=300, N=136, K=128, skip=72, groups=3, **EPILOGUE)),
        "straddling-skip": SlowCase(mma.CONFIGS[3], dict(M=20, N=64, K=72, skip=56), 80),
    }
)

FAULTS = {
    name: ("fp16-to-fp32", functools.partial(re.sub, pattern, by))
    for name, pattern, by in (
        ("no-wait-for-copies", r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 8"),
        ("selector", r"(, %r\d+), 1;", r"\1, 0;"),
        ("swapped-halves", r"ldmatrix\.sync\.aligned", "ldmatrix.sync.aligned.trans"),
    )
}


class TestMma(KernelTests):
    def check_sass(self, case, compiled):
        main, config = loop_with(compiled[0][1], "HMMA"), case.config
        products = sum(n for op, n in main.items() if op.startswith("HMMA.SP.16832"))
        per_warp = 2 * (config.block_n // (16 * config.warps_n)) * (config.block_m // (8 * config.warps_m))
        assert products == per_warp == sum(n for op, n in main.items() if op.startswith("HMMA"))
        # what does not multiply is loads, addresses and one barrier: about a hundred instructions, whatever the tile
        assert sum(main.values()) <= 2 * products + 100
        assert not any(op.startswith(("LDL", "STL", "SHFL", "STS")) for op in main)
        assert sum(n for op, n in main.items() if op.startswith("LDSM")) == 2 * config.block_m // (8 * config.warps_m)


def test_a_row_of_nan_stays_nan_through_gelu():
    case, problem = CASES["everything"], CASES["everything"].problem()
    problem.x[7] = float("nan")
    case.emulate(CASES.compiled("everything"), problem)
    assert torch.equal(problem.y.isnan().any(1), torch.arange(100) == 7)
    assert problem.y[7].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", mma.CONFIGS, ids=str)
@pytest.mark.parametrize("matrix", ["identity", "one-hot"])
def test_on_the_gpu_every_weight_comes_out_in_its_place(config, matrix):
    problem = hand_made(matrix, N=520, K=328)
    launch_on_the_gpu(mma, problem, config=config)
    check_places(problem)
