"""What becomes of whole models is tested in test_sparsity.py, the products themselves in test_sparse24_*.py."""

import copy

import pytest
import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.layers import Conv2d, Linear
from sparsedm.sparsity import compress, sparsify
from tests.tolerance import assert_as_good_as_torch


def test_a_compressed_layer_shows_what_a_dense_one_would():
    small = compress(sparsify(nn.Sequential(nn.Linear(16, 8), nn.Conv2d(16, 8, 3, stride=2, padding=1)), "2:4"))
    assert (small[0].in_features, small[0].out_features, small[0].weight.shape) == (16, 8, (8, 16))
    assert (small[1].in_channels, small[1].out_channels, small[1].kernel_size) == (16, 8, (3, 3))
    assert (small[1].stride, small[1].padding, small[1].weight.shape) == ((2, 2), (1, 1), (8, 16, 3, 3))


def test_a_compressed_bf16_weight_takes_9_16ths():
    layer = compress(sparsify(nn.Linear(256, 64, bias=False, dtype=torch.bfloat16), "2:4"))
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert held * 16 == 9 * 256 * 64 * 2


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_compressed_layer_computes_under_autocast_as_the_masked_one_does(activation):
    linear = Linear(64, 24, pattern="2:4", activation=activation), torch.randn(2, 5, 64)
    conv = Conv2d(32, 8, 3, padding=1, pattern="2:4", activation=activation), torch.randn(2, 32, 6, 6)
    for layer, x in (linear, conv):
        small = compress(layer)
        with torch.no_grad():
            residual = torch.randn_like(layer(x))
            exact = copy.deepcopy(layer).double()(x.double(), residual.double())
            with torch.autocast("cpu", torch.bfloat16):
                usual = layer(x, residual)
                y = small(x, residual)
                assert small(x).dtype == layer(x).dtype == torch.bfloat16
                cast = small._cast[1]
                assert small(x) is not None
                assert small._cast[1] is cast, "the values are cast once"
            assert y.dtype == usual.dtype == torch.float32, "a residual in fp32 is not rounded to bf16"
            assert_as_good_as_torch(y, exact, usual)
            assert_as_good_as_torch(small(x, residual), exact, layer(x, residual))


@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(16, 8, 3)], ids=["linear", "conv"])
def test_metadata_that_no_weight_has_is_refused_when_it_is_loaded(layer):
    model = compress(sparsify(nn.Sequential(layer), "2:4"))
    state = model.state_dict()
    state["0.metadata"][0, 0] = 0x4440  # its first pair is (0, 0)
    with pytest.raises(InputError, match=r"^0: .*row 0"):
        model.load_state_dict(state)
