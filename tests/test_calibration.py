"""Masks calibrated by inputs (Wanda), against scores computed one after the other."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.layers import Linear
from sparsedm.model_files import load_model, save_model
from sparsedm.models import build_model
from sparsedm.sparsity import masks, set_masking, sparsify
from tests.tolerance import assert_as_good_as_torch

UVIT = {"kind": "uvit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2}


class Called(nn.Module):
    """Layers that meet their inputs in every way: twice, in two parts, by keyword, in groups, unbatched."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1, groups=2)
        self.twice, self.parts = nn.Linear(12, 12), Linear(20, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, shift=0.0):
        x = self.dropout(x)
        h = self.grouped(input=self.conv(x) + shift).mean((-2, -1))
        return self.parts(self.twice(self.twice(h)), skip=x.mean((-2, -1)))


def wanda_by_hand(weight, x, groups=1):
    """bool mask of 2:4 from inputs x (rows, channels), one score after the other."""
    keep, per = torch.zeros_like(weight, dtype=torch.bool), weight.shape[1]
    for out, *tap in torch.ones_like(weight[:, 0]).nonzero().tolist():
        first = out // (weight.shape[0] // groups) * per
        for start in range(0, per, 4):
            scores = [
                abs(weight[(out, start + i, *tap)].item()) * x[:, first + start + i].norm().item() for i in range(4)
            ]
            for i in sorted(range(4), key=lambda i: -scores[i])[:2]:
                keep[(out, start + i, *tap)] = True
    return keep


def test_calibrated_masks_are_wandas_and_stay():
    torch.manual_seed(0)
    model = Called().train()
    batches = [torch.randn(3, 8, 6, 6), {"x": torch.randn(2, 8, 6, 6), "shift": 0.5}, (torch.randn(8, 6, 6), 1.0)]
    batches[0][:, 2] *= 30  # an outlier, which Wanda keeps
    inputs = {name: [] for name in ("conv", "grouped", "twice", "parts")}
    with torch.no_grad():
        for batch, shift in zip((batches[0], batches[1]["x"], batches[2][0][None]), (0.0, 0.5, 1.0)):
            c = model.conv(batch) + shift
            h = model.grouped(c).mean((2, 3))
            inputs["conv"].append(batch.movedim(1, -1).reshape(-1, 8))
            inputs["grouped"].append(c.movedim(1, -1).reshape(-1, 8))
            inputs["twice"] += [h, model.twice(h)]
            inputs["parts"].append(torch.cat((model.twice(model.twice(h)), batch.mean((2, 3))), -1))
    assert sparsify(model, "2:4", calibrate=iter(batches)) is model
    assert all(module.training for module in model.modules())
    found = masks(model)
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        assert torch.equal(found[name], wanda_by_hand(layer.weight, torch.cat(x), getattr(layer, "groups", 1))), name
        assert found[name] is layer.mask, "frozen"
        assert not layer._forward_pre_hooks
    assert not torch.equal(found["conv"], masks(sparsify(copy.deepcopy(model), "2:4"))["conv"])
    assert all(row.holds for row in inspect(model.eval(), (batches[0],)).rows if row.pattern == "2:4")


def test_gradient_settings_leave_calibrated_masks():
    """Whoever calibrates and then trains keeps what was calibrated, until he asks for other masks."""
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(5, 8) * torch.tensor([9.0, 1] * 4)
    sparsify(model, "2:4").bfloat16().float()  # earlier masks, which a cast froze, are no reason to drop the new ones
    by_magnitude = masks(sparsify(copy.deepcopy(model), "2:4"))["0"]
    calibrated = masks(sparsify(model, "2:4", calibrate=[x]))["0"]
    assert not torch.equal(calibrated, by_magnitude)
    set_masking(model, decay=2e-4)
    assert model[0].rule.decay == 2e-4
    assert torch.equal(masks(model)["0"], calibrated)
    set_masking(model, frozen=False)
    assert torch.equal(masks(model)["0"], by_magnitude)


@torch.no_grad()
def test_a_calibrated_mask_keeps_more_of_the_output_and_survives_a_file(tmp_path):
    torch.manual_seed(0)
    dense = build_model(UVIT).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.05)
    inputs = (torch.randn(16, 3, 8, 8), torch.linspace(0, 999, 16))
    errors, models = [], [sparsify(copy.deepcopy(dense), "2:4", calibrate=c) for c in (None, [inputs])]
    for model in models:
        errors.append((model(*inputs) - dense(*inputs)).square().mean().item())
    assert errors[1] < errors[0]
    save_model(tmp_path / "m.safetensors", models[1])
    assert torch.equal(load_model(tmp_path / "m.safetensors", build_model).model(*inputs), models[1](*inputs))
    assert_as_good_as_torch(
        compress(models[1])(*inputs), models[1].double()(*(x.double() for x in inputs)), models[1].float()(*inputs)
    )


def test_inputs_that_were_always_zero_leave_the_choice_to_the_magnitudes():
    model = nn.Sequential(nn.Linear(8, 4))
    by_magnitude = masks(sparsify(copy.deepcopy(model), "2:4"))["0"]
    half = torch.zeros(2, 8)
    half[:, 4:] = torch.tensor([9.0, 1, 1, 1])
    found = masks(sparsify(copy.deepcopy(model), "2:4", calibrate=[half]))["0"]
    assert torch.equal(found[:, :4], by_magnitude[:, :4])
    assert torch.equal(masks(sparsify(model, "2:4", calibrate=[torch.zeros(2, 8)]))["0"], by_magnitude)


@pytest.mark.parametrize(
    ("batches", "rule"),
    [
        ([], "no batch of calibrate reaches conv"),
        ([torch.randn(0, 8, 6, 6)], r"empty batch: the input of conv is \(0, 8, 6, 6\)"),
        ([torch.full((1, 8, 6, 6), torch.nan)], "inputs of conv in calibrate hold NaN"),
        (torch.randn(2, 8, 6, 6), "calibrate is a Tensor: a list of batches"),
        (5, "calibrate is a int: a list of batches"),
        ("images", "calibrate is a str: a list of batches"),
        (torch.randn(2, 8, 6, 6).numpy(), "calibrate holds a ndarray: a batch is a tensor, a tuple of arguments"),
        ([None], "calibrate holds a NoneType: a batch is a tensor"),
        ([3.0], "calibrate holds a float: a batch is a tensor"),
        (["a.png"], "calibrate holds a str: a batch is a tensor"),
    ],
)
def test_calibration_that_says_nothing_is_refused_and_changes_nothing(batches, rule):
    model = Called()
    with pytest.raises(InputError, match=rule):
        sparsify(model, "2:4", calibrate=batches)
    assert type(model.conv) is nn.Conv2d
    assert not model.conv._forward_pre_hooks
    with pytest.raises(InputError, match="without a pattern there are none"):
        sparsify(model, None, calibrate=[torch.randn(1, 8, 6, 6)])


def test_a_batch_may_be_an_object_of_the_models_own_and_batches_a_plain_sequence():
    class Pair(nn.Linear):
        def forward(self, batch):
            return super().forward(batch.x)

    class Batches:
        def __getitem__(self, index):
            return [SimpleNamespace(x=part) for part in x.split(1)][index]

    x = torch.randn(3, 8)
    model = nn.Sequential(Pair(8, 8).requires_grad_(False), nn.Linear(8, 4))
    hidden = model[0](SimpleNamespace(x=x))
    sparsify(model, "2:4", "1", calibrate=Batches())
    assert torch.equal(model[1].mask, wanda_by_hand(model[1].weight, hidden, 1))


def test_calibration_of_weights_that_are_nan_names_the_layer_and_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="1: 1 of its weights are NaN"):
        sparsify(model, "2:4", calibrate=[torch.randn(3, 8)])
    assert type(model[0]) is nn.Linear
