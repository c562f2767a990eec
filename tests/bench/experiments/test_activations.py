"""Inputs instead of weights: which are kept, the norm, the gradient, and that a deep copy takes the hooks along."""

import copy

import pytest
import torch
from torch import nn

from bench.experiments import activations
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels.pattern import Pattern
from sparsedm.models import build_model


def test_the_two_largest_of_four_are_kept_and_the_norm_stays():
    x = torch.tensor([[3.0, -4.0, 1.0, 2.0, 0.5, 0.5, 0.5, 0.5]])
    kept = activations.keep_largest(x, Pattern(2, 4), compensate=False)
    assert kept.tolist() == [[3, -4, 0, 0, 0.5, 0.5, 0, 0]], "of equal ones the first"
    scaled = activations.keep_largest(x, Pattern(2, 4))
    torch.testing.assert_close(scaled.norm(), x.norm())
    torch.testing.assert_close(scaled / scaled.norm(), kept / kept.norm())
    assert activations.keep_largest(torch.zeros(2, 4), Pattern(2, 4)).count_nonzero() == 0


def test_nan_among_the_inputs_is_told_as_such():
    with pytest.raises(InputError, match=r"^the inputs of a layer: 2 of them are NaN"):
        activations.keep_largest(torch.tensor([[1.0, float("nan")] * 2, [1.0] * 4]), Pattern(2, 4))


def test_only_kept_inputs_get_a_gradient():
    x = torch.tensor([[3.0, -4.0, 1.0, 2.0]], requires_grad=True)
    activations.keep_largest(x, Pattern(2, 4), compensate=False).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("layer", [nn.Linear(8, 4), nn.Conv2d(8, 4, 1)])
def test_groups_lie_along_the_inputs_of_a_layer(layer):
    x = torch.randn(2, 5, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 3, 3)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    expected = layer(activations.keep_largest(x, Pattern(2, 4), axis))
    holder = activations.sparsify_activations(nn.ModuleDict({"a": layer}), ["a"])
    torch.testing.assert_close(copy.deepcopy(holder)["a"](x), expected, rtol=0, atol=0)


def test_macs_count_the_inputs_that_are_read():
    network = build_model("uvit-tiny", image_size=8, dim=16, depth=2, heads=2)
    dense = inspect(network).totals()["macs_after"]
    assert activations.macs(network) == dense
    row = next(row for row in inspect(network).rows if row.name == "mid_block.mlp.fc1")
    assert activations.macs(activations.sparsify_activations(network, [row.name], "1:4")) == dense - row.macs * 3 // 4
    with pytest.raises(InputError, match="no layer has inputs in groups of 32"):
        activations.sparsify_activations(network, ["mid_block.mlp.fc1"], "2:32")
