"""Few rows: the split-K kernel and its reduction, executed in the emulator one after the other."""

import functools
import re

import pytest
import torch

from sparsedm.kernels.sparse24 import mma_splitk
from tests.kernels.sparse24.kernel_case import (
    Cases,
    KernelCase,
    KernelTests,
    Problem,
    check_places,
    hand_made,
    launch_on_the_gpu,
)


def case(share, slow=False, **sizes):
    """share: steps of K for one program."""
    return KernelCase(mma_splitk, mma_splitk.CONFIGS[0], sizes, 80, plan={"share": share}, slow=slow)


# 72 rows are more than the kernel is meant for.
CASES = Cases(
    {
        "one-row": case(2, M=1, N=136, K=328, bias=True, activation="silu"),
        "all": case(3, M=13, N=200, K=256, skip=200, groups=13, bias=True, activation="gelu", residual=True),
        "29-rows": case(4, M=29, N=64, K=264, dtype=torch.float16, residual=True, slow=True),
        "72-rows": case(1, M=72, N=130, K=64, out=torch.float32, bias=True, slow=True),
    }
)


FAULTS = {"selector": ("one-row", functools.partial(re.sub, r"(, %r\d+), 1;", r"\1, 0;"))}


class TestSplitK(KernelTests):
    def check_sass(self, case, compiled):
        (_, built), _ = compiled
        assert built.count("HMMA.SP.16832") > 0
        assert built.registers <= 96, "at least four programs of 128 threads must fit on a multiprocessor, better five"


@pytest.mark.parametrize("M", [1, 16, 17, 64, 100])
@pytest.mark.parametrize(("N", "steps"), [(512, 8), (4096, 64), (64, 3)])
def test_the_split_covers_k_and_fills_the_gpu(M, N, steps):
    config, share = mma_splitk.choose(M, N, steps, programs=4 * 132)
    programs = -(-N // 64) * -(-M // config.block_m) * -(-steps // share)
    assert 1 <= share <= steps
    assert config.block_m >= min(M, 64)
    assert programs >= 4 * 132 or share <= 4


@pytest.mark.gpu
def test_on_the_gpu_every_weight_comes_out_in_its_place():
    problem = hand_made("identity", N=136, K=64)
    launch_on_the_gpu(mma_splitk, problem)
    check_places(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("config", mma_splitk.CONFIGS, ids=str)
@pytest.mark.parametrize("M", [1, 16, 29, 64])
def test_on_the_gpu_sums_do_not_depend_on_the_order_of_programs(M, config):
    results = []
    for _ in range(2):
        problem = Problem(M=M, N=520, K=4104, bias=True, activation="gelu", residual=True)
        launch_on_the_gpu(mma_splitk, problem, config=config)
        results.append(problem.y.clone())
        problem.check()
    assert torch.equal(*results)
