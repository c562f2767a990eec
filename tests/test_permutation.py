import copy
import itertools

import pytest
import torch
from torch import nn

from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern
from sparsedm.models import build_model
from sparsedm.models.uvit import MLP
from sparsedm.permutation import kept, permute_channels, search
from sparsedm.sparsity import set_masking, sparsify
from tests.tolerance import assert_as_good_as_torch

NETWORKS = {
    "uvit": {"kind": "uvit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2},
    "dit": {"kind": "dit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2, "num_classes": 3},
}
PATTERNS = ["1:2", "1:4", "2:4", "3:4"]


def network(name):
    model = build_model(NETWORKS[name]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_the_same_and_every_reader_keeps_more(name):
    model = network(name)
    before, inputs = copy.deepcopy(model), model.example_inputs(3)
    gains = permute_channels(model, rounds=20)
    blocks = 3 if name == "uvit" else 2
    assert len(gains) == 2 * blocks
    for layer, gain in gains.items():
        assert gain.before == kept(before.get_submodule(layer).weight, Pattern(2, 4))
        assert gain.after == kept(model.get_submodule(layer).weight, Pattern(2, 4)) > gain.before + 0.005
    with torch.no_grad():
        exact = before.double()(*(v.double() if v.is_floating_point() else v for v in inputs if v is not None))
        usual = before.float()(*inputs)
        assert_as_good_as_torch(model(*inputs), exact, usual)
    for layer, gain in gains.items():
        masked = sparsify(model, "2:4").get_submodule(layer)
        part = masked.effective_weight().detach().abs().sum() / masked.weight.detach().abs().sum()
        assert part.item() == pytest.approx(gain.after, rel=1e-5)


@pytest.mark.parametrize("where", [r"fc1$", r"attn\.qkv$"])
def test_a_frozen_mask_moves_with_the_rows_of_its_layer(where):
    model = sparsify(network("uvit"), "2:4", where)
    set_masking(model, frozen=True)
    inputs = model.example_inputs(2)
    with torch.no_grad():
        before = model(*inputs)
        permute_channels(model, rounds=5)
        torch.testing.assert_close(model(*inputs), before)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_groups_are_shared_out_in_the_best_of_all_ways(pattern):
    pattern = Pattern.parse(pattern)
    weight = torch.randn(5, 2 * pattern.group)
    columns = range(2 * pattern.group)
    halves = map(list, itertools.combinations(columns, pattern.group))  # the order within a group is of no effect
    best = max(kept(weight[:, half + [c for c in columns if c not in half]], pattern) for half in halves)
    order = search(weight, pattern, 1, 1, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(2 * pattern.group))
    assert kept(weight[:, order], pattern) == pytest.approx(best, rel=1e-6)


def test_a_planted_order_is_found():
    """Half of the groups hold large columns only: nearly all is kept once these are spread, two to a group."""
    weight = torch.full((6, 32), 0.01)
    weight[:, :16] = 1.0  # four groups of four large ones, four of none
    assert kept(weight, Pattern(2, 4)) == pytest.approx(0.5, abs=0.01)
    order = search(weight, Pattern(2, 4), 1, 60, torch.Generator().manual_seed(0))
    assert kept(weight[:, order], Pattern(2, 4)) > 0.99


def test_no_round_loses_and_an_odd_group_takes_its_turn():
    weight, results = torch.randn(16, 20), []
    for rounds in range(8):
        order = search(weight, Pattern(2, 4), 1, rounds, torch.Generator().manual_seed(1))
        results.append(kept(weight[:, order], Pattern(2, 4)))
    assert results == sorted(results)
    assert results[0] == kept(weight, Pattern(2, 4))
    assert results[-1] > results[0]
    assert (order.view(-1, 4).sort(1).values != torch.arange(20).view(-1, 4)).any(1).all(), "every group was drawn"


def test_heads_do_not_mix_and_each_is_permuted():
    order = search(torch.randn(16, 48), Pattern(2, 4), 3, 30, torch.Generator().manual_seed(0))
    before = torch.arange(48)
    assert torch.equal(order.view(3, 16).sort(1).values, before.view(3, 16))
    assert (order != before).view(3, 16).any(1).all()


def test_the_same_seed_gives_the_same_order():
    models = [network("uvit") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    assert permute_channels(models[0], rounds=5) == permute_channels(models[1], rounds=5)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def changed(change):
    model = network("uvit")
    change(model)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.mid_block.mlp, "norm", nn.LayerNorm(128)),
        lambda m: nn.utils.parametrizations.weight_norm(m.mid_block.mlp.fc1),
        lambda m: setattr(m.mid_block.mlp.fc1, "weight", m.in_blocks[0].mlp.fc1.weight),
        lambda m: setattr(m.out_blocks[0].mlp, "fc1", m.mid_block.mlp.fc1),
        lambda m: setattr(m, "alias", m.mid_block.mlp.fc2),
        lambda m: setattr(type(m.mid_block.mlp), "__module__", "elsewhere"),
    ],
    ids=["norm between", "weight_norm", "tied", "shared", "used elsewhere, too", "code of somebody else"],
)
def test_where_something_unknown_may_stand_between_nothing_is_permuted(change, monkeypatch):
    monkeypatch.setattr(MLP, "__module__", MLP.__module__)  # restored afterwards
    gains = permute_channels(changed(change), rounds=2)
    assert "mid_block.mlp.fc2" not in gains
    assert "mid_block.attn.proj" in gains


def test_a_block_that_is_shared_as_a_whole_is_permuted():
    model = changed(lambda m: setattr(m, "mid_block", m.in_blocks[0]))
    inputs = model.example_inputs(2)
    with torch.no_grad():
        before = model(*inputs)
        assert {"in_blocks.0.mlp.fc2", "in_blocks.0.attn.proj"} < set(permute_channels(model, rounds=2))
        torch.testing.assert_close(model(*inputs), before)


def frozen(model):
    set_masking(sparsify(model, "2:4"), frozen=True)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permute_channels(network("uvit"), "2:8"), "groups of up to 4, but the pattern is 2:8"),
        (lambda: permute_channels(network("uvit"), None), "the pattern is dense"),
        (lambda: permute_channels(network("uvit"), rounds=2.5), "rounds=2.5: must be a whole number of at least 1"),
        (lambda: permute_channels(network("uvit"), rounds=0), "rounds=0: must be a whole number of at least 1"),
        (lambda: permute_channels(network("uvit"), seed="x"), "seed='x': must be a whole number of at least 0"),
        (lambda: permute_channels(None), "a NoneType is no model"),
        (lambda: permute_channels(network("uvit").to("meta")), "on the meta device"),
        (lambda: permute_channels(compress(sparsify(network("uvit"), "2:4"))), "the model is compressed"),
        (lambda: permute_channels(sparsify(network("uvit"), "2:4")), "permute channels before sparsify"),
        (
            lambda: permute_channels(frozen(network("uvit"))),
            "attn.proj is masked, and would get another mask",
        ),
        (lambda: permute_channels(nn.Sequential(nn.Linear(8, 8))), "Sequential has no pair of layers"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_another_seed_gives_another_order():
    models = [network("uvit") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    assert permute_channels(models[0], rounds=2) != permute_channels(models[1], rounds=2, seed=1)
