import math
from functools import partial

import pytest
import torch

from sparsedm.diffusion import VPSDE
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import holds
from sparsedm.sparsity import masked_layers, masks, sparsify
from sparsedm.train import step
from sparsedm.train.chain import Start, run_chain
from sparsedm.train.data import batch_indices
from sparsedm.train.stages import METHODS, method_stages
from tests.tiny import OPTIONS, Tiny, same_state, tiny, tiny_images

NAMES = {"dense", "oneshot", "asp", "ste", "sr-ste", "kd", "sr-ste+kd", "chain", "inplace", "random-init"} | {
    "asp-random"
}


def run(name, folder, steps=10):
    """One method on the tiny network; the dense start is the same for all."""
    model = tiny(1)
    build, options = partial(Tiny, model.config), OPTIONS
    return run_chain(
        Start(model, tiny(2), build=build), method_stages(name, steps), tiny_images(), VPSDE(), options, folder,
        validation=tiny_images(16, seed=1), progress=False,
    )  # fmt: skip


def test_every_method_of_the_comparison_is_there():
    assert METHODS.keys() == NAMES
    assert all(method.summary for method in METHODS.values())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_runs_the_budget_on_the_same_batches_and_arrives_at_the_pattern(tmp_path, monkeypatch, name):
    seen = []

    def spied(n, size, step, seed):
        seen.append((step, seed))
        return batch_indices(n, size, step, seed)

    monkeypatch.setattr(step, "batch_indices", spied)
    results = run(name, tmp_path)
    assert seen == [(step, OPTIONS.seed) for step in range(0 if name == "oneshot" else 10)]
    last = results[-1]
    assert math.isfinite(last.result.validation_loss)
    for network in (last.model, last.ema):
        assert [str(layer.pattern) for _, layer in masked_layers(network)] == ["2:4"] * 2 * (name != "dense")
        for _, layer in masked_layers(network):
            assert holds(layer.effective_weight(), layer.pattern)


def test_what_makes_each_method():
    def settings(name):
        rows = {
            (s.decay, s.learns_from, s.w_kd, s.dropped, s.frozen_mask, s.inplace, s.init)
            for s in method_stages(name, 50)
        }
        assert len(rows) == 1
        return rows.pop()

    assert settings("dense") == settings("oneshot") == settings("ste") == (0, "none", 0, 1, False, False, "previous")
    assert settings("asp") == (0, "none", 0, 0, True, False, "previous")
    assert settings("sr-ste") == (2e-4, "none", 0, 1, False, False, "previous")
    assert settings("kd") == (0, "dense", 0.1, 1, False, False, "previous")
    assert settings("sr-ste+kd") == settings("chain") == (2e-4, "dense", 0.1, 1, False, False, "previous")
    assert settings("inplace") == (2e-4, "dense", 0.1, 1, False, True, "previous")
    assert settings("random-init") == (0, "none", 0, 1, False, False, "random")
    assert settings("asp-random") == (0, "none", 0, 0, True, False, "random")


@pytest.mark.parametrize("name", ["dense", "asp", "ste", "sr-ste", "kd", "sr-ste+kd", "oneshot"])
def test_begins_from_the_dense_network_and_its_average(tmp_path, name):
    [result] = run(name, tmp_path, 0)
    assert same_state(result.model.state_dict(), tiny(1).state_dict() | masks_in(result.model))
    assert same_state(result.ema.state_dict(), tiny(2).state_dict() | masks_in(result.ema))


def masks_in(model):
    return {f"{name}.mask": layer.mask for name, layer in masked_layers(model) if layer.mask is not None}


def test_one_shot_keeps_the_largest_weights_of_network_and_average(tmp_path):
    [result] = run("oneshot", tmp_path)
    assert result.result.step == 0
    for network, seed in ((result.model, 1), (result.ema, 2)):
        assert same_state(masks(network), masks(sparsify(tiny(seed), "2:4")))


def test_ladders():
    def ladder(name, **settings):
        return [stage.pattern for stage in method_stages(name, 100, **settings)]

    for name in ("chain", "inplace"):
        assert ladder(name) == ["31:32", "15:16", "7:8", "3:4", "2:4"]
        assert ladder(name, pattern="1:8") == ["31:32", "15:16", "7:8", "3:4", "2:4", "1:4", "1:8"]
        assert ladder(name, pattern="1:2") == ["31:32", "15:16", "7:8", "3:4", "1:2"]
        assert ladder(name, ladder=["3:4"]) == ["3:4", "2:4"]
    assert ladder("ste", pattern="1:4") == ["1:4"]
    assert [stage.steps for stage in method_stages("chain", 101)] == [20, 20, 21, 20, 20]


def test_refusals():
    with pytest.raises(InputError, match=r"unknown method 'magic': one of dense, oneshot, asp, ste, .*random-init"):
        method_stages("magic", 10)
    with pytest.raises(InputError, match="pattern 2:5"):
        method_stages("ste", 10, "2:5")
    with pytest.raises(InputError, match="method ste needs an N:M pattern, not 'dense'"):
        method_stages("ste", 10, "dense")
    with pytest.raises(InputError, match="4 steps are too few for 5 stages"):
        method_stages("chain", 4)


def test_random_init_forgets_the_network_and_keeps_the_average(tmp_path):
    [result] = run("random-init", tmp_path, 0)
    assert result.model.first.weight.shape == (64, 32)
    assert not torch.equal(result.model.first.weight, tiny(1).first.weight)
    assert same_state(result.ema.state_dict(), tiny(2).state_dict())
