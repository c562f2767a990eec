import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsedm.models import build_model
from sparsedm.models.ddpm import PRESETS
from sparsedm.sparsity import masks, sparsify
from tests.models import references

# ---- published sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "quoted"),
    [("ddpm-tiny", 1_113_955, 247_758_848, 0.25), ("ddpm-cifar10", 35_746_307, 6_053_953_536, 6.07)]
    + [("ddpm-celeba64", 78_700_803, 23_882_629_120, 23.92)],
)
def test_parameters_and_macs(name, parameters, macs, quoted):
    """The quoted 6.07 G counts besides the products of the layers each bias as one and each normalised value as two."""
    model = build_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        extra = references.biases_and_normalised_values(model)
    flops = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for operation, count in flops.items() if "bmm" in operation or "attention" in operation)
    assert (sum(flops.values()) - attention) // 2 == macs
    assert round((macs + extra) / 1e9, 2) == quoted


def test_every_preset_is_tested_above():
    assert len(PRESETS) == 3


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_dropout_only_while_training():
    model = build_model("ddpm-tiny", dropout=0.5)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    inputs = model.example_inputs()
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


def test_sparse_layers_are_all_but_the_first():
    model = build_model("ddpm-tiny")
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(masks(sparsify(model, "2:4"))) == layers - {"conv_in"}
    assert torch.isfinite(model(*model.example_inputs(2))).all()


def test_initial_weights():
    """Uniform in +-gain sqrt(6 / (fan in + fan out)), and the last layer of every residual branch 1e5 times smaller."""
    model = build_model("ddpm-tiny")
    for name, m in model.named_modules():
        if not isinstance(m, nn.Linear | nn.Conv2d):
            continue
        assert not m.bias.any(), name
        kernel = m.weight[0, 0].numel()
        out, cin = m.weight.shape[:2]
        out = out // 3 if name.endswith("qkv") else out  # three square layers in one
        bound = math.sqrt(6 / (kernel * (cin + out)))
        small = name.endswith(("conv2", "proj", "conv_out")) and not name.endswith("time_proj")
        bound *= 1e-5 if small else 1
        largest = m.weight.abs().max().item()
        # the largest of n uniform numbers is below (1 - 30 / n) of the bound with probability exp(-30)
        assert bound * (1 - 30 / m.weight.numel()) < largest <= bound * (1 + 1e-6), name
