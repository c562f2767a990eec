"""mma.sp without a GPU: the compiled PTX is executed in the emulator and the SASS inspected, for sm_80 and sm_90."""

import functools
import re

import pytest
import torch

from emulator.errors import EmulatorError
from emulator.launch import run
from emulator.sass import Build, compile_offline
from sparsedm.kernels.sparse24 import mma
from tests.kernels.sparse24.problem import (
    Problem,
    check_places,
    divisible,
    hand_made,
    kinds,
    launch_on_the_gpu,
    prepacked,
)

EPILOGUE = {"bias": True, "activation": "gelu", "residual": True}

# name -> (configuration, capability, problem). Ragged everywhere; K runs past the ring of four steps.
QUICK = {
    # two sources, of which the second ends inside a step, gates whose border lies inside a tile
    "everything": (mma.CONFIGS[3], 80, dict(M=100, N=136, K=256, skip=72, groups=4, strided=True, **EPILOGUE)),
    "fp16-to-fp32": (mma.CONFIGS[0], 90, dict(M=60, N=130, K=328, dtype=torch.float16, out=torch.float32, bias=True)),
}
SLOW = (
    {
        f"{i}-{activation}-sm{capability}": (config, capability, dict(M=264, N=200, K=200, activation=activation))
        for i, config in enumerate(mma.CONFIGS)
        for activation, capability in ((None, 80), ("silu", 90))
    }
    | {
        f"{i}-{activation}-widest": (
            config,
            capability,
            dict(M=264, N=200, K=128, skip=64, groups=2, **EPILOGUE | {"activation": activation}),
        )
        for i, config in enumerate(mma.CONFIGS)
        for activation, capability in (("gelu", 80), ("gelu_tanh", 90))
    }
    | {
        "one-row-one-step": (mma.CONFIGS[0], 80, dict(M=1, N=8, K=16, activation="gelu_tanh", residual=True)),
        "everything-sm90": (mma.CONFIGS[1], 90, dict(M=300, N=136, K=128, skip=72, groups=3, **EPILOGUE)),
        "straddling-skip": (mma.CONFIGS[3], 80, dict(M=20, N=64, K=72, skip=56)),
    }
)
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def arguments(config, problem):
    p = problem
    values, metadata = prepacked(p, "mma")
    scalars, constants = mma.operands(p.x, values, metadata, p.y, p.bias, p.residual, p.skip, p.scale)
    return scalars, constants | mma.tile_constants(config) | {"ACTIVATION": p.activation}


def build(config, capability, problem):
    scalars, constants = arguments(config, problem)
    warps = config.warps_n * config.warps_m
    kernel = "sparsedm.kernels.sparse24.mma:linear_mma"
    return Build(kernel, kinds(scalars), constants, {"num_warps": warps}, divisible(scalars), capability)


@functools.cache
def compiled(names):
    cases = [(QUICK | SLOW)[name] for name in names]
    builds = [build(config, capability, Problem(**sizes)) for config, capability, sizes in cases]
    return dict(zip(names, zip(builds, compile_offline(builds))))


def kernel(name):
    return compiled(tuple(QUICK) if name in QUICK else (name,))[name]


def emulate(config, problem, offline, ptx, early):
    scalars, _ = arguments(config, problem)
    M, N = problem.y.shape
    run(offline, ptx, scalars, (-(-N // config.block_n) * -(-M // config.block_m),), early=early)


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel_is_right_in_the_emulator(name, early):
    config, _, sizes = (QUICK | SLOW)[name]
    problem = Problem(**sizes)
    offline, built = kernel(name)
    emulate(config, problem, offline, built.ptx, early)
    problem.check()


@pytest.mark.parametrize("name", CASES)
def test_sass(name):
    config, _, _ = (QUICK | SLOW)[name]
    _, built = kernel(name)
    assert built.spills == 0
    loops = [built.histogram(*loop) for loop in built.loops()]
    (main,) = [loop for loop in loops if any(op.startswith("HMMA") for op in loop)]
    products = sum(n for op, n in main.items() if op.startswith("HMMA.SP.16832"))
    per_warp = 2 * (config.block_n // (16 * config.warps_n)) * (config.block_m // (8 * config.warps_m))
    assert products == per_warp == sum(n for op, n in main.items() if op.startswith("HMMA"))
    # what does not multiply is loads, addresses and one barrier: about a hundred instructions, whatever the tile
    assert sum(main.values()) <= 2 * products + 100
    assert not any(op.startswith(("LDL", "STL", "SHFL", "STS")) for op in main)
    assert sum(n for op, n in main.items() if op.startswith("LDSM")) == 2 * config.block_m // (8 * config.warps_m)


FAULTS = {
    "no-wait-for-copies": lambda ptx: re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 8", ptx),
    "selector": lambda ptx: re.sub(r"(, %r\d+), 1;", r"\1, 0;", ptx),
    "swapped-halves": lambda ptx: re.sub(r"ldmatrix\.sync\.aligned", "ldmatrix.sync.aligned.trans", ptx),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault):
    config, _, sizes = QUICK["fp16-to-fp32"]
    offline, built = kernel("fp16-to-fp32")
    broken = FAULTS[fault](built.ptx)
    assert broken != built.ptx, "the fault was not planted"
    problem = Problem(**sizes)
    noticed = False
    for early in (False, True):
        try:
            emulate(config, problem, offline, broken, early)
            problem.check()
        except (EmulatorError, AssertionError):
            noticed = True
            break
    assert noticed


@pytest.mark.gpu
@pytest.mark.parametrize("config", mma.CONFIGS, ids=str)
@pytest.mark.parametrize("matrix", ["identity", "one-hot"])
def test_on_the_gpu_every_weight_comes_out_in_its_place(config, matrix):
    problem = hand_made(matrix, N=520, K=328)
    launch_on_the_gpu(mma, "mma", problem, config=config)
    check_places(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*(pytest.param(name, id=f"random-{name}") for name in QUICK), *SLOW])
def test_on_the_gpu_as_well_as_torch(name):
    config, _, sizes = (QUICK | SLOW)[name]
    problem = Problem(**sizes)
    launch_on_the_gpu(mma, "mma", problem, config=config)
    problem.check()
