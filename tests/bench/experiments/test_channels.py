"""Which channels go: equal to a slimmable network where importance falls, to the network itself where nothing goes."""

import math

import pytest
import torch

from bench.experiments import channels
from sparsedm.models import build_model
from sparsedm.train import data

SHAPE = {"image_size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "groups": 1}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = build_model("slimmable-tiny", **SHAPE, num_classes=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def falling(network):
    """Importance that falls from the first channel of every tensor to its last one."""
    found = {}
    for name, axes in channels.spaces(network).items():
        value = torch.zeros(network.get_parameter(name).shape)
        for axis, spans in enumerate(axes):
            along = torch.cat([torch.arange(size, 0, -1.0) for _, size in spans])
            value += along.view([-1 if other == axis else 1 for other in range(value.dim())])
        found[name] = value
    return found


def test_every_parameter_has_its_spaces(network):
    runs = channels.spaces(network)
    assert runs.keys() == dict(network.named_parameters()).keys()
    for name, axes in runs.items():
        shape = network.get_parameter(name).shape
        assert [sum(size for _, size in spans) for spans in axes] == list(shape[: len(axes)])


def test_where_importance_falls_it_is_the_slimmable_network(network):
    """Which takes first channels; it does not scale queries, so that is undone."""
    narrow = channels.prune(network.export(8), 8, falling(network)).eval()
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            if ".qkv." in name:
                parameter[: len(parameter) // 3] /= math.sqrt(0.5)
    inputs = network.example_inputs(2)
    torch.testing.assert_close(narrow(*inputs), network.export(4)(*inputs), rtol=1e-5, atol=1e-6)


def test_nothing_is_pruned_at_full_width(network):
    whole, inputs = network.export(8), network.example_inputs(2)
    same = channels.prune(whole, 16, {n: torch.rand(p.shape) for n, p in whole.named_parameters()}).eval()
    assert torch.equal(same(*inputs), whole(*inputs))


def test_channels_that_count_for_nothing_go_first():
    """Half of the hidden channels of a block are cut off from what follows: pruning them changes nothing there."""
    torch.manual_seed(1)
    model = build_model("ddpm-tiny", **SHAPE | {"groups": 4, "attention": ()}).eval()
    dead = torch.tensor([0, 3, 5, 6, 9, 10, 13, 15])  # two in each group of four
    conv2 = model.down[0].blocks[0].conv2
    with torch.no_grad():
        torch.nn.init.normal_(conv2.weight)
        conv2.weight[:, dead] = 0
    importance = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    for name in ("conv1.weight", "conv1.bias", "time_proj.weight", "time_proj.bias", "norm2.weight", "norm2.bias"):
        importance[f"down.0.blocks.0.{name}"][dead] = 0
    alive = [c for c in range(16) if c not in dead]
    with torch.no_grad():
        model.down[0].blocks[0].conv1.bias.copy_(torch.arange(16.0))
    narrow = channels.prune(model, 8, importance)
    assert narrow.down[0].blocks[0].conv1.bias.tolist() == alive
    scores = channels._scores(channels.spaces(model), importance)["down.0.blocks.0.inner"]
    assert channels._kept("x", 16, 0.5, scores, 4).tolist() == alive


def test_importance_is_the_weight_times_its_gradient():
    torch.manual_seed(2)
    model = build_model("ddpm-tiny", **SHAPE | {"groups": 4})
    images = data.load("synthetic", "train", size=8, limit=32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = channels.taylor(model, images, 4)
    assert found.keys() == before.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all((value >= 0).all() for value in found.values())
    assert found["mid.blocks.0.conv1.weight"].sum() > 0
    zero = torch.nn.init.zeros_(model.mid.blocks[0].conv1.weight)
    assert channels.taylor(model, images, 4)["mid.blocks.0.conv1.weight"].sum() == 0 == zero.sum()
