"""The wgmma.sp convolution: its compiled PTX executed in the emulator, its SASS inspected."""

import functools
import re

import pytest
import torch

from emulator.memory import SHARED_BYTES
from sparsedm.kernels.sparse24 import wgmma_conv
from sparsedm.kernels.sparse24.wgmma_pipeline import stage_bytes
from tests.kernels.sparse24.kernel_case import (
    Cases,
    Convolution,
    KernelCase,
    KernelTests,
    launch_on_the_gpu,
    one_pixel_each,
)


def case(config=None, slow=False, **sizes):
    config = sizes["N"] <= 128 if config is None else config  # as the rule of thumb takes it
    return KernelCase(wgmma_conv, wgmma_conv.CONFIGS[config], sizes, kind=Convolution, plan={"blocks": 1}, slow=slow)


slow_case = functools.partial(case, slow=True)

# Ragged images, several images in a patch, more features than one tile.
CASES = Cases(
    {
        "3x3": case(B=1, C=64, H=11, W=20, N=136, bias=True, activation="silu", residual=True),
        "stride-2": case(B=3, C=128, H=12, W=8, N=72, stride=2, bias=True),
        # sides that TMA cannot halve, a kernel and a padding that are not the same along both
        "odd-1x3": case(B=2, C=64, H=9, W=7, N=16, stride=2, kernel=(1, 3), padding=(0, 2)),
    }
    | {
        f"{i}-{activation}": slow_case(i, B=2, C=64, H=9, W=12, N=136, bias=True, activation=activation, residual=True)
        for i in range(len(wgmma_conv.CONFIGS))
        for activation in (None, "gelu", "gelu_tanh", "silu")
    }
    | {
        "one-pixel": slow_case(B=130, C=64, H=1, W=1, N=64, bias=True),
        "small-images": slow_case(B=9, C=64, H=4, W=4, N=264, residual=True),
        "stride-2-asymmetric": slow_case(B=1, C=64, H=18, W=34, N=128, stride=2, padding=0, activation="gelu"),
        "fp16-5x5": slow_case(B=1, C=64, H=16, W=16, N=64, kernel=5, padding=2, dtype=torch.float16),
    }
)

FAULTS = {
    "selector": ("3x3", functools.partial(re.sub, r"(%r\d+), 1, 1, 1, 1, 0, 0;", r"\1, 0, 1, 1, 1, 0, 0;")),
}


class TestWgmmaConv(KernelTests):
    def check_sass(self, case, compiled):
        ((_, built),) = compiled
        assert compiled[0][1].warnings == (), "C75xx means that ptxas serialises every wgmma"
        assert built.count("HGMMA") == built.count("HGMMA.SP") > 0


@pytest.mark.parametrize("config", wgmma_conv.CONFIGS, ids=str)
def test_every_configuration_fits_and_keeps_its_ring_the_largest(config):
    ring, panels = config.stages * stage_bytes(config)[3], config.block_n * config.block_m * 2
    assert ring >= panels
    assert ring + 1024 + panels + 256 <= SHARED_BYTES


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (16, 16), (8, 8), (4, 4), (1, 1), (5, 100)])
@pytest.mark.parametrize("pixels", [128, 256])
def test_patches(pixels, rows, columns):
    images, height, width = wgmma_conv.choose_patch(pixels, rows, columns)
    assert images * height * width == pixels
    assert width <= 2 * columns
    assert height <= 2 * rows


@pytest.mark.gpu
@pytest.mark.parametrize("config", wgmma_conv.CONFIGS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_on_the_gpu_every_weight_comes_out_in_its_place(stride, config):
    c = one_pixel_each(B=64, C=64, H=4, W=6, N=136, stride=stride)
    launch_on_the_gpu(wgmma_conv, c, config=config)
    assert torch.equal(c.y, c.reference(torch.Tensor.float).to(torch.bfloat16))
