"""The 2:4 convolution: reference against torch, dispatch and refusals, and the wgmma.sp kernel in the emulator."""

import functools

import pytest
import torch
import torch.nn.functional as F

from emulator.launch import run
from emulator.memory import SHARED_BYTES
from emulator.sass import Build, compile_offline
from sparsedm.errors import InputError
from sparsedm.kernels.cpu import library
from sparsedm.kernels.pattern import Pattern, group_view, select_mask_ref, ungroup
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24 import wgmma_conv as kernel
from sparsedm.kernels.sparse24 import wgmma_pipeline as pipeline
from sparsedm.kernels.sparse24.conv import _pair, _pixels, sparse24_conv2d, sparse24_conv2d_ref
from sparsedm.kernels.sparse24.dispatch import CONV, Choice, Request
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.sparse24.linear import ACTIVATIONS
from tests.kernels.sparse24.problem import kinds, prepacked
from tests.tolerance import assert_as_good_as_torch

BF16 = torch.bfloat16


class Convolution:
    """B images of C x H x W, a 2:4 weight, and what torch makes of them.

    kernel, padding: a number or a pair. config: number of the kernel's, or None.
    """

    def __init__(
        self, B, C, H, W, N, *, kernel=3, stride=1, padding=1, bias=False, activation=None, residual=False, dtype=BF16,
        config=None,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.kernel_size, self.activation = _pair(kernel), activation
        weight = torch.randn(N, C, *self.kernel_size)
        weight /= weight[0].numel() ** 0.5
        rows = group_view(weight)
        self.weight = ungroup(torch.where(select_mask_ref(rows, Pattern(2, 4)), rows, 0), weight.shape).to(dtype)
        self.values, self.metadata = pack(group_view(self.weight).reshape(N, -1))
        self.x = torch.randn(B, C, H, W).to(dtype)
        self.bias = torch.randn(N).to(dtype) if bias else None
        self.config = config
        self.geometry = {"stride": stride, "padding": _pair(padding)}
        size = self.reference(torch.Tensor.float, residual=False).shape
        self.residual = torch.randn(size).to(dtype) if residual else None
        self.y = torch.full(size, float("nan"), dtype=dtype).to(memory_format=torch.channels_last)

    def reference(self, convert, residual=True):
        bias = None if self.bias is None else convert(self.bias)
        y = F.conv2d(convert(self.x), convert(self.weight), bias, **self.geometry)
        y = ACTIVATIONS[self.activation](y)
        return y if not residual or self.residual is None else y + convert(self.residual)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [32, 20], ids=["whole-words", "padded"])
def test_equals_torch_on_the_decompressed_weight(kernel, stride, channels):
    c = Convolution(
        2, channels, 8, 6, 24, kernel=kernel, stride=stride, padding=kernel // 2, bias=True, activation="silu",
        residual=True, dtype=torch.float32,
    )  # fmt: skip
    arguments = (c.x, c.values, c.metadata, c.kernel_size, c.bias, c.activation, c.residual)
    expected = c.reference(lambda tensor: tensor)
    assert torch.equal(sparse24_conv2d_ref(*arguments, **c.geometry), expected)
    double = c.reference(torch.Tensor.double)
    assert_as_good_as_torch(sparse24_conv2d(*arguments, **c.geometry), double, expected)


@pytest.mark.parametrize(("padding", "same_as"), [("same", 1), ("valid", 0)])
def test_padding_in_torch_s_words(padding, same_as):
    c = Convolution(1, 32, 6, 6, 8, dtype=torch.float32)
    y = sparse24_conv2d(c.x, c.values, c.metadata, 3, padding=padding)
    assert torch.equal(y, sparse24_conv2d(c.x, c.values, c.metadata, 3, padding=same_as))
    with pytest.raises(InputError, match="'same' of a 2 x 4 kernel"):
        sparse24_conv2d(c.x, c.values, c.metadata, (2, 4), padding="same")


def test_pixels_are_copied_only_where_the_kernels_cannot_read_them():
    wide = torch.zeros(2 * 64 * 6 + 4, dtype=BF16)
    images = lambda start: wide[start : start + 768].view(2, 2, 3, 64).permute(0, 3, 1, 2)  # noqa: E731
    assert _pixels(images(0)).data_ptr() == wide.data_ptr()
    for image in (images(4), images(0).contiguous(), images(0)[:, :, ::2], images(0).transpose(2, 3)):
        pixels = _pixels(image)
        assert torch.equal(pixels, image.permute(0, 2, 3, 1))
        assert pixels.is_contiguous()
        assert pixels.data_ptr() % 16 == 0
    one = torch.zeros(1, 64, 1, 1).as_strided((1, 64, 1, 1), (1, 1, 7, 9))
    assert _pixels(one).stride() == (64, 64, 64, 1)


# name -> arguments of Convolution. Ragged images, several images in a patch, more features than one tile.
QUICK = {
    "3x3": dict(B=1, C=64, H=11, W=20, N=136, bias=True, activation="silu", residual=True),
    "stride-2": dict(B=3, C=128, H=12, W=8, N=72, stride=2, bias=True),
    # sides that TMA cannot halve, a kernel and a padding that are not the same along both
    "odd-1x3": dict(B=2, C=64, H=9, W=7, N=16, stride=2, kernel=(1, 3), padding=(0, 2)),
}
SLOW = {
    **{
        f"{i}-{activation}": dict(
            config=i, B=2, C=64, H=9, W=12, N=136, bias=True, activation=activation, residual=True
        )
        for i in range(len(kernel.CONFIGS))
        for activation in (None, "gelu", "gelu_tanh", "silu")
    },
    "one-pixel": dict(B=130, C=64, H=1, W=1, N=64, bias=True),
    "small-images": dict(B=9, C=64, H=4, W=4, N=264, residual=True),
    "stride-2-asymmetric": dict(B=1, C=64, H=18, W=34, N=128, stride=2, padding=0, activation="gelu"),
    "fp16-5x5": dict(B=1, C=64, H=16, W=16, N=64, kernel=5, padding=2, dtype=torch.float16),
}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def nhwc(tensor):
    return None if tensor is None else _pixels(tensor)


def configuration(c):
    return kernel.CONFIGS[c.y.shape[1] <= 128 if c.config is None else c.config]


def operands(c):
    values, metadata = prepacked(c, "wgmma")
    y = c.y.permute(0, 2, 3, 1)
    return kernel.operands(
        configuration(c), nhwc(c.x), values, metadata, y, c.kernel_size, *c.geometry.values(), c.bias, c.activation,
        nhwc(c.residual),
    )  # fmt: skip


def build(c):
    tensors, scalars, constants = operands(c)
    signature = {}
    for name, (tensor, box, swizzle) in tensors.items():
        dtype, bits = {BF16: ("bf16", 16), torch.float16: ("fp16", 16), torch.int32: ("i32", 32)}[tensor.dtype]
        layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank={len(box)})"
        signature[name] = f"tensordesc<{dtype}{list(box)},{layout}>"
    return Build(
        "sparsedm.kernels.sparse24.wgmma_conv:conv_specialized", signature | kinds(scalars), constants, {"num_warps": 4}
    )


@functools.cache
def compiled(names):
    builds = [build(Convolution(**(QUICK | SLOW)[name])) for name in names]
    return dict(zip(names, zip(builds, compile_offline(builds))))


def built(name):
    return compiled(tuple(QUICK) if name in QUICK else (name,))[name]


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel_is_right_in_the_emulator(name, early):
    c = Convolution(**(QUICK | SLOW)[name])
    offline, result = built(name)
    tensors, scalars, _ = operands(c)
    run(offline, result.ptx, {k: v[0] for k, v in tensors.items()} | scalars, (1,), early=early)
    assert_as_good_as_torch(c.y, c.reference(torch.Tensor.double), c.reference(lambda tensor: tensor))


@pytest.mark.parametrize("name", CASES)
def test_sass(name):
    _, result = built(name)
    assert result.warnings == ()
    assert result.spills == 0
    assert result.shared <= SHARED_BYTES
    assert result.count("HGMMA.SP") > 0
    assert result.count("HGMMA") == result.count("HGMMA.SP")


@pytest.mark.parametrize("config", kernel.CONFIGS, ids=str)
def test_every_configuration_fits_and_keeps_its_ring_the_largest(config):
    ring = config.stages * pipeline.stage_bytes(config.block_n, config.block_m, 64)[3]
    panels = config.block_n * config.block_m * 2
    assert ring >= panels
    assert ring + 1024 + panels + 256 <= SHARED_BYTES


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (16, 16), (8, 8), (4, 4), (1, 1), (5, 100)])
@pytest.mark.parametrize("pixels", [128, 256])
def test_patches(pixels, rows, columns):
    images, height, width = kernel.choose_patch(pixels, rows, columns)
    assert images * height * width == pixels
    assert width <= 2 * columns
    assert height <= 2 * rows


def test_the_dispatcher_is_told_of_the_convolution_and_decides(monkeypatch):
    c, cache = Convolution(2, 64, 8, 6, 16, stride=2, bias=True, dtype=torch.float32), {}
    call = lambda: sparse24_conv2d(  # noqa: E731
        c.x, c.values, c.metadata, 3, c.bias, stride=2, padding=1, cache=cache, backend="wgmma"
    )
    expected = call()
    cache.clear()

    def serve(request, run, cache):
        assert request == Request(
            CONV, None, torch.float32, 2 * 4 * 3, 16, 9 * 64, device=c.x.device, out_dtype=torch.float32, bias=True,
            channels=64, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), image=(4, 3),
            backend="wgmma", instructions=library.serving()[0],
        )  # fmt: skip
        assert torch.equal(run(Choice("dense"), {}, True), expected)
        return run(Choice("torch"), cache, False)

    monkeypatch.setattr(dispatch, "serve", serve)
    assert torch.equal(call(), expected)
    assert set(cache) == {"torch"}


def test_a_kernel_that_does_not_run_is_computed_in_torch(monkeypatch):
    c = Convolution(2, 64, 8, 6, 16, bias=True, activation="silu", residual=True)
    call = lambda: sparse24_conv2d(c.x, c.values, c.metadata, 3, c.bias, "silu", c.residual, padding=1)  # noqa: E731
    expected = call()
    monkeypatch.setattr(dispatch, "rule_of_thumb", lambda request: (Choice("mma"), ""))
    monkeypatch.setattr(dispatch, "launch", lambda *arguments, **_: False)
    assert torch.equal(call(), expected)


REFUSED = {
    "channels": (dict(x=torch.ones(1, 16, 8, 8)), "16 channels and a 3 x 3 kernel make 144 columns"),
    "dtype": (dict(x=torch.ones(1, 32, 8, 8, dtype=BF16)), "x is bfloat16 and the weight float32"),
    "dimensions": (dict(x=torch.ones(32, 8, 8)), r"images are \(B, C, H, W\)"),
    "bias": (dict(bias=torch.ones(9)), r"bias of shape \(9,\)"),
    "bias-dtype": (
        dict(bias=torch.ones(8).half()),
        r"type float16 must have the shape \(8,\) and the type of x, float32",
    ),
    "residual": (dict(residual=torch.ones(1, 8, 8, 8)), r"must have the shape of y, \(1, 8, 6, 6\)"),
    "activation": (dict(activation="relu"), "unknown activation 'relu'"),
    "too-small": (dict(x=torch.ones(1, 32, 2, 8)), "smaller than the kernel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    c = Convolution(1, 32, 8, 8, 8, dtype=torch.float32)
    wrong, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        sparse24_conv2d(
            **(dict(x=c.x, values=c.values, metadata=c.metadata, kernel_size=3, stride=1, padding=0) | wrong)
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_operator_is_registered_correctly(memory_format):
    c = Convolution(2, 32, 8, 8, 8, bias=True, activation="silu", residual=True, dtype=torch.float32)
    x = c.x.to(memory_format=memory_format)
    arguments = (x, c.values, c.metadata, [], [3, 3], c.bias, "silu", c.residual, [1, 1], [1, 1], [1, 1], [8, 8])
    torch.library.opcheck(torch.ops.sparsedm.sparse24_conv2d, (*arguments, "torch", 0, True))


def launched_on_the_gpu(module, backend, c, config):
    """y, computed by the kernel itself: the dispatcher might find dense quicker."""
    move = lambda tensor: None if tensor is None else tensor.cuda()  # noqa: E731
    y = c.y.cuda()
    module.launch(
        move(nhwc(c.x)), *map(move, prepacked(c, backend)), y.permute(0, 2, 3, 1), kernel_size=c.kernel_size,
        **c.geometry, bias=move(c.bias), activation=c.activation, residual=move(nhwc(c.residual)), config=config,
    )  # fmt: skip
    return y.cpu()


def one_pixel_each(**sizes):
    """Images with a single 1, in the channel 37 b of the image b: every result is one weight or zero, exactly."""
    c = Convolution(**sizes)
    images, channels, height, width = c.x.shape
    c.x = torch.zeros_like(c.x)
    for b in range(images):
        c.x[b, 37 * b % channels, b % height, (b + 1) % width] = 1
    return c


@pytest.mark.gpu
@pytest.mark.parametrize("config", range(len(kernel.CONFIGS)))
@pytest.mark.parametrize("stride", [1, 2])
def test_on_the_gpu_every_weight_comes_out_in_its_place(stride, config):
    c = one_pixel_each(B=64, C=64, H=4, W=6, N=136, stride=stride, config=config)
    y = launched_on_the_gpu(kernel, "wgmma", c, configuration(c))
    assert torch.equal(y, c.reference(torch.Tensor.float).to(BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*(pytest.param(name, id=f"random-{name}") for name in QUICK), *SLOW])
def test_on_the_gpu_as_well_as_torch(name):
    c = Convolution(**(QUICK | SLOW)[name])
    c.y = launched_on_the_gpu(kernel, "wgmma", c, configuration(c))
    assert_as_good_as_torch(c.y, c.reference(torch.Tensor.double), c.reference(lambda tensor: tensor))
