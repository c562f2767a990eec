"""The mma.sp convolution: its compiled PTX executed in the emulator, its SASS inspected, for sm_80 and sm_89."""

import functools
import re

import pytest
import torch

from sparsedm.kernels.sparse24 import mma_conv
from tests.kernels.sparse24.kernel_case import (
    Cases,
    Convolution,
    KernelCase,
    KernelTests,
    launch_on_the_gpu,
    loop_with,
    one_pixel_each,
)

FULL = dict(bias=True, activation="silu", residual=True)


def case(config, capability=80, slow=False, **sizes):
    return KernelCase(mma_conv, mma_conv.CONFIGS[config], sizes, capability, Convolution, slow=slow)


slow_case = functools.partial(case, slow=True)

# Ragged images, several images in a tile.
CASES = Cases(
    {
        "3x3": case(1, B=2, C=64, H=7, W=9, N=72, **FULL),
        "stride-2": case(2, 89, B=3, C=128, H=7, W=10, N=20, stride=2, bias=True),
        # steps of several kernel positions, the last of which ends early; a kernel that is not square
        "narrow-2x3": case(2, B=2, C=24, H=7, W=5, N=24, kernel=(2, 3), padding=(0, 2), **FULL),
    }
    | {
        f"{i}-{activation}": slow_case(i, B=5, C=64, H=6, W=8, N=136, **FULL | {"activation": activation})
        for i in range(len(mma_conv.CONFIGS))
        for activation in (None, "gelu", "gelu_tanh")
    }
    | {
        "asymmetric": slow_case(0, 86, B=1, C=64, H=18, W=34, N=128, stride=2, padding=0),
        "fp16-5x5": slow_case(0, 90, B=1, C=64, H=16, W=16, N=64, kernel=5, padding=2, dtype=torch.float16),
        "stride-3": slow_case(2, B=2, C=64, H=10, W=11, N=64, stride=3, padding=1),
        "eight-channels": slow_case(2, 90, B=1, C=8, H=9, W=9, N=16, dtype=torch.float16),
        "one-pixel": slow_case(2, B=70, C=64, H=1, W=1, N=64),
    }
    | {
        f"{i}-narrow": slow_case(i, B=5, C=96, H=6, W=8, N=136, stride=1 + i % 2, **FULL)
        for i in range(len(mma_conv.CONFIGS))
    }
)

FAULTS = {
    name: ("3x3", functools.partial(re.sub, pattern, by))
    for name, pattern, by in (
        ("no-wait-for-copies", r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 8"),
        ("one-pixel-too-many", r"setp\.lt\.s32", "setp.le.s32"),
        ("selector", r"(, %r\d+), 1;", r"\1, 0;"),
    )
}


class TestMmaConv(KernelTests):
    def check_sass(self, case, compiled):
        main, config = loop_with(compiled[0][1], "HMMA"), case.config
        products = sum(n for op, n in main.items() if op.startswith("HMMA.SP.16832"))
        per_warp = 2 * (config.block_n // (16 * config.warps_n)) * (config.block_m // (8 * config.warps_m))
        assert products == per_warp == sum(n for op, n in main.items() if op.startswith("HMMA"))
        # what the linear kernel's loop has, and the kernel position with the tests for the borders of the image
        assert sum(main.values()) <= 2 * products + 200
        assert not any(op.startswith(("LDL", "STL", "SHFL", "STS")) for op in main)
        copies = [op for op in main if op.startswith("LDGSTS")]
        assert copies
        assert all(op.endswith(".128") for op in copies), "16 bytes at a time"


def test_an_infinite_pixel_reaches_no_further_than_the_kernel():
    """Columns of zeros fill the last step up: what lies there in the image must not be multiplied by them."""
    c = CASES["narrow-2x3"].problem()
    c.x[0, :, 3, 2] = float("inf")
    CASES["narrow-2x3"].emulate(CASES.compiled("narrow-2x3"), c)
    expected = c.reference(torch.Tensor.double).isfinite()
    assert not expected.all()
    assert torch.equal(c.y.isfinite(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("config", mma_conv.CONFIGS, ids=str)
@pytest.mark.parametrize("channels", [64, 24])
def test_on_the_gpu_every_weight_comes_out_in_its_place(channels, config):
    c = one_pixel_each(B=64, C=channels, H=4, W=6, N=136, stride=2)
    launch_on_the_gpu(mma_conv, c, config=config)
    assert torch.equal(c.y, c.reference(torch.Tensor.float).to(torch.bfloat16))
