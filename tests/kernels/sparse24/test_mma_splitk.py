"""Few rows: the split-K kernel and its reduction, executed in the emulator one after the other."""

import functools

import pytest
import torch

from emulator.launch import run
from emulator.sass import Build, compile_offline
from sparsedm.kernels.sparse24 import mma_splitk as splitk
from tests.kernels.sparse24.problem import (
    Problem,
    check_places,
    divisible,
    hand_made,
    kinds,
    launch_on_the_gpu,
    prepacked,
)

# name -> (share: steps of K for one program, problem). 72 rows are more than the kernel is meant for.
CASES = {
    "one-row": (2, dict(M=1, N=136, K=328, bias=True, activation="silu")),
    "all": (3, dict(M=13, N=200, K=256, skip=200, groups=13, bias=True, activation="gelu", residual=True)),
}
SLOW = {
    "29-rows": (4, dict(M=29, N=64, K=264, dtype=torch.float16, residual=True)),
    "72-rows": (1, dict(M=72, N=130, K=64, out=torch.float32, bias=True)),
}
NAMES = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def prepare(name):
    share, sizes = (CASES | SLOW)[name]
    p = Problem(**sizes)
    values, metadata = prepacked(p, "splitk")
    config, _ = splitk.choose(*p.y.shape, metadata.shape[1], 4 * 132)
    parts = torch.full((-(-metadata.shape[1] // share), *p.y.shape), float("nan"))
    stages = splitk.stages(
        config, share, parts, p.x, values, metadata, p.y, p.bias, p.activation, p.residual, p.skip, p.scale
    )
    return p, config, parts, stages


def builds(name):
    _, _, _, (product, constants, reduction, finishing) = prepare(name)
    module = "sparsedm.kernels.sparse24.mma_splitk"
    return [
        Build(f"{module}:linear_splitk", kinds(product), constants, {"num_warps": 4}, divisible(product), 80),
        Build(f"{module}:reduce_splitk", kinds(reduction), finishing, {"num_warps": 4}, divisible(reduction), 80),
    ]


@functools.cache
def compiled(names):
    pairs = [builds(name) for name in names]
    flat = compile_offline([build for pair in pairs for build in pair])
    return {name: list(zip(pair, flat[2 * i : 2 * i + 2])) for i, (name, pair) in enumerate(zip(names, pairs))}


def kernels(name):
    return compiled(tuple(CASES) if name in CASES else (name,))[name]


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_are_right_in_the_emulator(name, early):
    problem, config, parts, (product, _, reduction, _) = prepare(name)
    (first, built), (second, reducing) = kernels(name)
    M, N = problem.y.shape
    tiles = -(-N // config.block_n) * -(-M // config.block_m)
    run(first, built.ptx, product, (tiles, len(parts)), early=early)
    run(second, reducing.ptx, reduction, (-(-M // splitk.REDUCE_ROWS), -(-N // splitk.REDUCE_COLUMNS)), early=early)
    assert torch.isfinite(parts).all(), "a partial sum was not written"
    problem.check()


@pytest.mark.parametrize("name", NAMES)
def test_sass(name):
    (_, built), (_, reducing) = kernels(name)
    assert built.count("HMMA.SP.16832") > 0
    assert built.spills == reducing.spills == 0
    assert built.registers <= 96, "at least four programs of 128 threads must fit on a multiprocessor, better five"


@pytest.mark.parametrize("M", [1, 16, 17, 64, 100])
@pytest.mark.parametrize(("N", "steps"), [(512, 8), (4096, 64), (64, 3)])
def test_the_split_covers_k_and_fills_the_gpu(M, N, steps):
    config, share = splitk.choose(M, N, steps, programs=4 * 132)
    programs = -(-N // 64) * -(-M // config.block_m) * -(-steps // share)
    assert 1 <= share <= steps
    assert config.block_m >= min(M, 64)
    assert programs >= 4 * 132 or share <= 4


@pytest.mark.gpu
def test_on_the_gpu_every_weight_comes_out_in_its_place():
    problem = hand_made("identity", N=136, K=64)
    launch_on_the_gpu(splitk, "splitk", problem)
    check_places(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*(pytest.param(name, id=f"random-{name}") for name in CASES), *SLOW])
def test_on_the_gpu_as_well_as_torch(name):
    _, sizes = (CASES | SLOW)[name]
    problem = Problem(**sizes)
    launch_on_the_gpu(splitk, "splitk", problem)
    problem.check()


@pytest.mark.gpu
@pytest.mark.parametrize("config", splitk.CONFIGS, ids=str)
@pytest.mark.parametrize("M", [1, 16, 29, 64])
def test_on_the_gpu_sums_do_not_depend_on_the_order_of_programs(M, config):
    results = []
    for _ in range(2):
        problem = Problem(M=M, N=520, K=4104, bias=True, activation="gelu", residual=True)
        launch_on_the_gpu(splitk, "splitk", problem, config=config)
        results.append(problem.y.clone())
        problem.check()
    assert torch.equal(*results)
