"""The mma.sp convolution: its compiled PTX executed in the emulator, its SASS inspected, for sm_80 and sm_89."""

import functools
import re

import pytest
import torch

from emulator.errors import EmulatorError
from emulator.launch import run
from emulator.sass import Build, compile_offline
from sparsedm.kernels.sparse24 import mma_conv as kernel
from tests.kernels.sparse24.problem import divisible, kinds, prepacked
from tests.kernels.sparse24.test_conv import Convolution, launched_on_the_gpu, nhwc, one_pixel_each
from tests.tolerance import assert_as_good_as_torch

FULL = dict(bias=True, activation="silu", residual=True)

# name -> (configuration, capability, arguments of Convolution). Ragged images, several images in a tile.
QUICK = {
    "3x3": (kernel.CONFIGS[1], 80, dict(B=2, C=64, H=7, W=9, N=72, **FULL)),
    "stride-2": (kernel.CONFIGS[2], 89, dict(B=3, C=128, H=7, W=10, N=20, stride=2, bias=True)),
    # steps of several kernel positions, the last of which ends early; a kernel that is not square
    "narrow-2x3": (kernel.CONFIGS[2], 80, dict(B=2, C=24, H=7, W=5, N=24, kernel=(2, 3), padding=(0, 2), **FULL)),
}
SLOW = {
    **{
        f"{i}-{activation}": (config, 80, dict(B=5, C=64, H=6, W=8, N=136, **FULL | {"activation": activation}))
        for i, config in enumerate(kernel.CONFIGS)
        for activation in (None, "gelu", "gelu_tanh")
    },
    "asymmetric": (kernel.CONFIGS[0], 86, dict(B=1, C=64, H=18, W=34, N=128, stride=2, padding=0)),
    "fp16-5x5": (kernel.CONFIGS[0], 90, dict(B=1, C=64, H=16, W=16, N=64, kernel=5, padding=2, dtype=torch.float16)),
    "stride-3": (kernel.CONFIGS[2], 80, dict(B=2, C=64, H=10, W=11, N=64, stride=3, padding=1)),
    **{
        f"{i}-narrow": (config, 80, dict(B=5, C=96, H=6, W=8, N=136, stride=1 + i % 2, **FULL))
        for i, config in enumerate(kernel.CONFIGS)
    },
    "eight-channels": (kernel.CONFIGS[2], 90, dict(B=1, C=8, H=9, W=9, N=16, dtype=torch.float16)),
    "one-pixel": (kernel.CONFIGS[2], 80, dict(B=70, C=64, H=1, W=1, N=64)),
}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def operands(config, c):
    values, metadata = prepacked(c, "mma")
    return kernel.operands(
        config, nhwc(c.x), values, metadata, c.y.permute(0, 2, 3, 1), c.kernel_size, *c.geometry.values(), c.bias,
        c.activation, nhwc(c.residual),
    )  # fmt: skip


def build(config, capability, c):
    scalars, constants = operands(config, c)
    options = {"num_warps": config.warps_n * config.warps_m}
    name = "sparsedm.kernels.sparse24.mma_conv:conv_mma"
    return Build(name, kinds(scalars), constants, options, divisible(scalars), capability)


@functools.cache
def compiled(names):
    cases = [(QUICK | SLOW)[name] for name in names]
    builds = [build(config, capability, Convolution(**sizes)) for config, capability, sizes in cases]
    return dict(zip(names, zip(builds, compile_offline(builds))))


def built(name):
    return compiled(tuple(QUICK) if name in QUICK else (name,))[name]


def emulate(name, c, ptx, early):
    config, _, _ = (QUICK | SLOW)[name]
    offline, _ = built(name)
    scalars, _ = operands(config, c)
    grid = -(-scalars["N"] // config.block_n) * -(-scalars["M"] // config.block_m)
    run(offline, ptx, scalars, (grid,), early=early)


def emulate_and_check(name, ptx, early):
    _, _, sizes = (QUICK | SLOW)[name]
    c = Convolution(**sizes)
    emulate(name, c, ptx, early)
    assert_as_good_as_torch(c.y, c.reference(torch.Tensor.double), c.reference(lambda tensor: tensor))


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel_is_right_in_the_emulator(name, early):
    emulate_and_check(name, built(name)[1].ptx, early)


def test_an_infinite_pixel_reaches_no_further_than_the_kernel():
    """Columns of zeros fill the last step up: what lies there in the image must not be multiplied by them."""
    _, _, sizes = QUICK["narrow-2x3"]
    c = Convolution(**sizes)
    c.x[0, :, 3, 2] = float("inf")
    emulate("narrow-2x3", c, built("narrow-2x3")[1].ptx, early=True)
    expected = c.reference(torch.Tensor.double).isfinite()
    assert not expected.all()
    assert torch.equal(c.y.isfinite(), expected)


@pytest.mark.parametrize("name", CASES)
def test_sass(name):
    config, _, _ = (QUICK | SLOW)[name]
    _, result = built(name)
    assert result.spills == 0
    loops = [result.histogram(*loop) for loop in result.loops()]
    (main,) = [loop for loop in loops if any(op.startswith("HMMA") for op in loop)]
    products = sum(n for op, n in main.items() if op.startswith("HMMA.SP.16832"))
    per_warp = 2 * (config.block_n // (16 * config.warps_n)) * (config.block_m // (8 * config.warps_m))
    assert products == per_warp == sum(n for op, n in main.items() if op.startswith("HMMA"))
    # what the linear kernel's loop has, and the kernel position with the tests for the borders of the image
    assert sum(main.values()) <= 2 * products + 200
    assert not any(op.startswith(("LDL", "STL", "SHFL", "STS")) for op in main)
    copies = [op for op in main if op.startswith("LDGSTS")]
    assert copies
    assert all(op.endswith(".128") for op in copies), "16 bytes at a time"


@pytest.mark.parametrize("pattern", [r"cp\.async\.wait_group\s+\d+", r"setp\.lt\.s32", r"(, %r\d+), 1;"])
def test_planted_faults_are_noticed(pattern):
    by = {"c": "cp.async.wait_group 8", "s": "setp.le.s32", "(": r"\1, 0;"}[pattern[0]]
    broken = re.sub(pattern, by, built("3x3")[1].ptx)
    assert broken != built("3x3")[1].ptx, "the fault was not planted"
    with pytest.raises((EmulatorError, AssertionError)):
        emulate_and_check("3x3", broken, early=False)


@pytest.mark.gpu
@pytest.mark.parametrize("config", kernel.CONFIGS, ids=str)
@pytest.mark.parametrize("channels", [64, 24])
def test_on_the_gpu_every_weight_comes_out_in_its_place(channels, config):
    c = one_pixel_each(B=64, C=channels, H=4, W=6, N=136, stride=2)
    y = launched_on_the_gpu(kernel, "mma", c, config)
    assert torch.equal(y, c.reference(torch.Tensor.float).to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*(pytest.param(name, id=f"random-{name}") for name in QUICK), *SLOW])
def test_on_the_gpu_as_well_as_torch(name):
    config, _, sizes = (QUICK | SLOW)[name]
    c = Convolution(**sizes)
    c.y = launched_on_the_gpu(kernel, "mma", c, config)
    assert_as_good_as_torch(c.y, c.reference(torch.Tensor.double), c.reference(lambda tensor: tensor))
