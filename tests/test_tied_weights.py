"""Weights that layers share stay shared in every form of a model and in its file, and keep one mask."""

import copy

import pytest
import torch
from torch import nn

from sparsedm.compression import compress, decompress
from sparsedm.errors import InputError
from sparsedm.model_files import load_model, save_model
from sparsedm.sparsity import masked_layers, set_masking, sparsify


class Tied(nn.Module):
    """A head that holds the embedding's weight, and two layers that hold one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 32), nn.Linear(32, 24, bias=False)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.head.weight, self.second.weight = self.embed.weight, self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x)).tanh()))


def test_tied_weights_stay_tied_through_every_form_and_file(tmp_path):
    model, x = sparsify(Tied(), "2:4").eval(), torch.arange(24)[None]
    small = compress(model)
    again = decompress(small)
    assert again.head.weight is again.embed.weight
    assert again.second.weight is again.first.weight
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(again(x), expected)
        for number, network in enumerate((model, small, again)):
            file = save_model(tmp_path / f"{number}.safetensors", network)
            loaded = load_model(file, lambda config: Tied(), config={}).model
            assert torch.equal(loaded(x), expected)
    model.second.bias, model.again = model.first.bias, model.first  # a bias is shared, too, and a whole layer
    again = decompress(compress(model))
    assert again.second.bias is again.first.bias
    assert again.again is again.first
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-6)
    loose = sparsify(Tied(), "2:4")
    loose.second.weight = nn.Parameter(torch.randn(32, 32))
    file = save_model(tmp_path / "loose.safetensors", loose)
    with pytest.raises(InputError, match=r"1 tied in the model but different in the file \(second.weight\)"):
        load_model(file, lambda config: Tied(), config={})
    with torch.no_grad():
        small.embed.weight.mul_(2)
    with pytest.raises(InputError, match=r"head.weight was tied to embed.weight, but their values now differ"):
        decompress(small)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_tied_weight_with_a_frozen_mask_stays_tied(rounded):
    """Which weights were kept is no longer a question of today's magnitudes."""
    model, x = sparsify(Tied(), "2:4").eval(), torch.arange(24)[None]
    if rounded:
        for weight in (model.head.weight, model.first.weight):  # one value in bfloat16, where the mask is of the first
            weight.data = 1 + 1e-4 * torch.arange(4.0).repeat(8).expand_as(weight).contiguous()
        set_masking(model, frozen=True)
        model.bfloat16()
    else:
        for layer in (model.head, model.first, model.second):
            layer.mask = (torch.arange(4) < 2).repeat(8).expand_as(layer.weight)
    with torch.no_grad():
        small = compress(model)
        again = decompress(small)
        assert again.head.weight is again.embed.weight
        assert again.second.weight is again.first.weight
        assert torch.equal(again(x), model(x))
        assert torch.equal(again.head.masked_weight(), model.head.masked_weight())
        assert [name for name, layer in masked_layers(again) if layer.mask is not None] == ["head"]
        with pytest.warns(UserWarning, match="froze the masks"):
            copy.deepcopy(again).train()
        set_masking(again, decay=2e-4)
        assert not any(layer.mask is not None for _, layer in masked_layers(again)), "nobody asked for a frozen mask"
        small.embed.weight.mul_(2)
        with pytest.raises(InputError, match=r"head.weight was tied to embed.weight, but their values now differ"):
            decompress(small)


@pytest.mark.parametrize(
    "layers", [(nn.Embedding(32, 64), nn.Linear(64, 32)), (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))]
)
def test_beside_torchs_sparse_tensors_a_tied_weight_is_the_masked_one(layers):
    model = nn.Sequential(*layers)
    model[1].weight = model[0].weight
    model = sparsify(model.half(), "2:4", ["1"])
    held = decompress(compress(model), "cutlass")
    weight = held[1].weight
    assert torch.equal(weight if weight.dim() == 4 else weight.to_dense(), model[1].masked_weight())
    assert torch.equal(held[0].weight, model[0].weight)


class LongHead(Tied):
    """Two heads that hold the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(32, 24, bias=False)
        self.other.weight = self.head.weight

    def forward(self, x):
        return super().forward(x) + self.other(self.embed(x))


def test_a_tied_weight_that_compress_makes_dense_keeps_its_zeros_and_the_others_their_weights():
    model, x = sparsify(LongHead(), "2:4").eval(), torch.arange(24)[None]
    for layer in (model.head, model.other):
        layer.mask = torch.ones(24, 32, dtype=torch.bool)
        layer.mask[:, 0] = False  # no 2:4
    with torch.no_grad():
        again = decompress(compress(model))
        assert torch.equal(again.embed.weight, model.embed.weight)
        assert again.other.weight is again.head.weight is not again.embed.weight
        torch.testing.assert_close(again(x), model(x))
