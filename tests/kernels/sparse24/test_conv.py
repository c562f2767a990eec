"""The 2:4 convolution: reference against torch, dispatch and refusals."""

import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import library
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.conv import _pixels, sparse24_conv2d, sparse24_conv2d_ref
from sparsedm.kernels.sparse24.dispatch import CONV, Choice, Request
from tests.kernels.sparse24.kernel_case import Convolution
from tests.tolerance import assert_as_good_as_torch

BF16 = torch.bfloat16


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


def test_the_dispatcher_is_told_of_the_convolution_and_decides(monkeypatch):
    c, cache = Convolution(2, 64, 8, 6, 16, stride=2, bias=True, residual=True, dtype=torch.float32), {}
    call = lambda added: sparse24_conv2d(  # noqa: E731
        c.x, c.values, c.metadata, 3, c.bias, None, added, stride=2, padding=1, cache=cache, backend="wgmma"
    )
    expected, plain = call(c.residual), call(None)
    cache.clear()

    def serve(request, run, cache):
        assert request == Request(
            CONV, None, torch.float32, 2 * 4 * 3, 16, 9 * 64, device=c.x.device, out_dtype=torch.float32, bias=True,
            channels=64, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), image=(4, 3),
            residual=torch.float32, backend="wgmma", instructions=library.serving()[0],
        )  # fmt: skip
        assert torch.equal(run(Choice("dense"), {}, True), expected)
        assert torch.equal(run(Choice("dense"), {}, True, neutral=True), plain)
        return run(Choice("torch"), cache, False)

    monkeypatch.setattr(dispatch, "serve", serve)
    assert torch.equal(call(c.residual), expected)
    assert set(cache) == {"torch"}


def test_a_kernel_that_does_not_run_is_computed_in_torch(monkeypatch):
    c = Convolution(2, 64, 8, 6, 16, bias=True, activation="silu", residual=True)
    call = lambda: sparse24_conv2d(c.x, c.values, c.metadata, 3, c.bias, "silu", c.residual, padding=1)  # noqa: E731
    expected = call()
    monkeypatch.setattr(dispatch, "rule_of_thumb", lambda request: (Choice("mma"), ""))
    monkeypatch.setattr(dispatch, "launch", lambda *arguments, **_: False)
    assert torch.equal(call(), expected)


def test_y_has_the_dtype_of_x_whatever_is_added():
    c = Convolution(1, 16, 4, 4, 8, dtype=BF16)
    for grad in (False, True):
        y = sparse24_conv2d(c.x.requires_grad_(grad), c.values, c.metadata, 3, None, None, torch.ones(1, 8, 2, 2))
        assert y.dtype == BF16


REFUSED = {
    "channels": (dict(x=torch.ones(1, 16, 8, 8)), "16 channels and a 3 x 3 kernel make 144 columns"),
    "dtype": (dict(x=torch.ones(1, 32, 8, 8, dtype=BF16)), "x is bfloat16 and the weight float32"),
    "dimensions": (dict(x=torch.ones(32, 8, 8)), r"images are \(B, C, H, W\)"),
    "bias": (dict(bias=torch.ones(9)), r"bias \(9,\) float32 must have the shape \(8,\)"),
    "bias-dtype": (
        dict(bias=torch.ones(8).half()),
        r"bias \(8,\) float16 must have the shape \(8,\) and the dtype of x",
    ),
    "residual": (dict(residual=torch.ones(1, 8, 8, 8)), r"must have the shape of y, \(1, 8, 6, 6\)"),
    "device": (dict(bias=torch.ones(8, device="meta")), "one device, not on cpu and meta"),
    "activation": (dict(activation="relu"), "unknown activation 'relu'"),
    "backend": (dict(backend="wgma"), "unknown backend 'wgma'"),
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
