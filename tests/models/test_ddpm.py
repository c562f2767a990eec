import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.models.ddpm import PRESETS, timestep_embedding
from sparsedm.sparsity import masks, sparsify
from tests.tolerance import assert_as_good_as_torch

# two resolutions up and down, unequal widths, attention at one of them, odd numbers of groups and channels
SMALL = {"image_size": 8, "width": 12, "multipliers": (1, 2, 3), "attention": (4,), "groups": 3, "dropout": 0.0}
VARIANTS = {
    "unconditional": {},
    "labels": {"num_classes": 5},
    "labels-without-null": {"num_classes": 5, "null_label": False},
    "one-level": {"multipliers": (1,), "attention": (), "channels": 4, "blocks": 1},
}


# ---- an independent implementation: plain torch on a dictionary of weights, straight from the paper ------------------


def linear_ref(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def conv_ref(w, name, x, **geometry):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **geometry)


def silu_ref(x):
    return x * torch.sigmoid(x)


def norm_ref(w, name, x, groups):
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    grouped = grouped - grouped.mean(-1, keepdim=True)
    grouped = grouped / (grouped.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return grouped.view_as(x) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def resblock_ref(w, name, x, temb, groups):
    h = conv_ref(w, f"{name}.conv1", silu_ref(norm_ref(w, f"{name}.norm1", x, groups)), padding=1)
    h = h + linear_ref(w, f"{name}.time_proj", temb)[:, :, None, None]
    h = conv_ref(w, f"{name}.conv2", silu_ref(norm_ref(w, f"{name}.norm2", h, groups)), padding=1)
    return h + (conv_ref(w, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)


def attention_ref(w, name, x, groups):
    channels = x.shape[1]
    tokens = norm_ref(w, f"{name}.norm", x, groups).flatten(2).transpose(1, 2)
    q, k, v = linear_ref(w, f"{name}.qkv", tokens).split(channels, dim=-1)
    out = (q @ k.transpose(1, 2) / math.sqrt(channels)).softmax(-1) @ v
    return x + linear_ref(w, f"{name}.proj", out).transpose(1, 2).reshape(x.shape)


def ddpm_ref(w, config, x, t, y=None):
    half = config.width // 2
    frequencies = torch.tensor([1e4 ** (-i / (half - 1)) for i in range(half)], dtype=x.dtype)
    angles = t.to(x.dtype)[:, None] * frequencies
    temb = linear_ref(w, "time_embed.fc1", torch.cat([angles.sin(), angles.cos()], -1))
    temb = linear_ref(w, "time_embed.fc2", silu_ref(temb))
    temb = silu_ref(temb if y is None else temb + w["label_embed.weight"][y])

    def block(name, j, x):
        x = resblock_ref(w, f"{name}.blocks.{j}", x, temb, config.groups)
        return attention_ref(w, f"{name}.attns.{j}", x, config.groups) if f"{name}.attns.{j}.qkv.weight" in w else x

    levels = len(config.multipliers)
    h = conv_ref(w, "conv_in", x, padding=1)
    outputs = [h]
    for i in range(levels):
        for j in range(config.blocks):
            h = block(f"down.{i}", j, h)
            outputs.append(h)
        if i < levels - 1:  # a zero row below and a zero column to the right, none above or to the left
            padded = torch.cat([h, torch.zeros_like(h[:, :, :1])], 2)
            padded = torch.cat([padded, torch.zeros_like(padded[..., :1])], 3)
            h = conv_ref(w, f"down.{i}.downsample.conv", padded, stride=2)
            outputs.append(h)
    h = block("mid", 1, block("mid", 0, h))
    for i in range(levels):
        for j in range(config.blocks + 1):
            h = block(f"up.{i}", j, torch.cat([h, outputs.pop()], 1))
        if i < levels - 1:
            h = conv_ref(w, f"up.{i}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    return conv_ref(w, "conv_out", silu_ref(norm_ref(w, "norm_out", h, config.groups)), padding=1)


def make(variant):
    """A small model with weights far from their start (near-zero branches would hide mistakes), in fp64; its inputs."""
    model = build_model("ddpm-tiny", dtype=torch.float64, **{**SMALL, "blocks": 2, **VARIANTS[variant]})
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(2, model.config.channels, 8, 8, dtype=torch.float64)
    y = torch.tensor([4, 0]) if model.config.num_classes else None
    return model, (x, torch.tensor([3.25, 721.0], dtype=torch.float64), y)


def low(values):
    return [v.float() if v is not None and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient(variant):
    model, (x, t, y) = make(variant)
    x.requires_grad_()
    weights = dict(model.named_parameters())
    low_weights = {name: p.detach().float().requires_grad_() for name, p in weights.items()}
    low_x = x.detach().float().requires_grad_()

    out = model(x, t, y)
    ref = ddpm_ref(weights, model.config, x, t, y)
    ref_low = ddpm_ref(low_weights, model.config, low_x, t.float(), y)
    assert_as_good_as_torch(out, ref, ref_low)

    dy = torch.randn_like(out)
    grads = torch.autograd.grad(out, [x, *weights.values()], dy)
    ref_grads = torch.autograd.grad(ref, [x, *weights.values()], dy)
    low_grads = torch.autograd.grad(ref_low, [low_x, *low_weights.values()], dy.float())
    for g, g_ref, g_low in zip(grads, ref_grads, low_grads):
        assert_as_good_as_torch(g, g_ref, g_low)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_single_precision_is_as_good_as_plain_torch(memory_format):
    model, inputs = make("labels")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ref = ddpm_ref(weights, model.config, *inputs)
    ref_low = ddpm_ref({name: w.float() for name, w in weights.items()}, model.config, *low(inputs))
    x, t, y = low(inputs)
    model = model.float().to(memory_format=memory_format)
    assert_as_good_as_torch(model(x.to(memory_format=memory_format), t, y), ref, ref_low)


def test_timestep_embedding_by_hand():
    embedding = timestep_embedding(torch.tensor([2, 999]), 4)  # frequencies 1 and 1e-4; integers allowed
    expected = [[math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]]
    expected += [[math.sin(999), math.sin(0.0999), math.cos(999), math.cos(0.0999)]]
    assert embedding.dtype == timestep_embedding(torch.tensor([2.0]).bfloat16(), 4).dtype == torch.float32
    assert timestep_embedding(torch.tensor([2.0]).double(), 4).dtype == torch.float64
    high = torch.tensor(expected, dtype=torch.float64)
    angles = torch.tensor([2.0, 999.0])[:, None] * torch.tensor([1.0, 1e-4])
    assert_as_good_as_torch(embedding, high, torch.cat([angles.sin(), angles.cos()], -1))


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

    extra = 0

    def count(module, _inputs, output):
        nonlocal extra
        extra += output.numel() * (2 if isinstance(module, nn.GroupNorm) else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        model(*model.example_inputs())
    flops = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for operation, count in flops.items() if "bmm" in operation or "attention" in operation)
    assert (sum(flops.values()) - attention) // 2 == macs
    assert round((macs + extra) / 1e9, 2) == quoted


def test_every_preset_is_tested_above():
    assert len(PRESETS) == 3


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_no_label_is_the_null_label():
    model, (x, t, _) = make("labels")
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 5])))
    assert not torch.equal(model(x, t), model(x, t, torch.tensor([4, 4])))


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_example_inputs_fit_and_repeat(variant):
    model, _ = make(variant)
    first, again = model.example_inputs(3), model.example_inputs(3)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, again))
    assert model(*first).shape == first[0].shape == (3, model.config.channels, 8, 8)


def test_compiles_to_one_graph():
    model, inputs = make("labels")
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(*inputs), model(*inputs))


def test_bfloat16_weights_and_autocast_run():
    model = build_model("ddpm-tiny")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(*model.example_inputs(2))).all()
    low_model = copy.deepcopy(model).bfloat16()
    assert low_model(*low_model.example_inputs(2)).dtype == torch.bfloat16


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 30}, "image_size=30: cannot be halved 2 times"),
        ({"attention": (16, 5)}, r"attention=\(16, 5\): must be among the resolutions \(32, 16, 8\)"),
        ({"groups": 5}, "width=32: must be even, over 2 and a multiple of groups=5"),
        ({"width": 2, "groups": 1}, "width=2: must be even, over 2"),
        ({"multipliers": ()}, r"multipliers=\(\): must be one or more"),
        ({"multipliers": (1, 0)}, r"multipliers=\(1, 0\): must be"),
        ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and less than 1"),
        ({"dropout": math.nan}, "dropout=nan: must be at least 0 and less than 1"),
        ({"blocks": 0}, "blocks=0: must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1: must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        build_model("ddpm-tiny", device="meta", **overrides)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("unconditional", {"x": torch.zeros(2, 3, 16, 16)}, r"input x has shape \(2, 3, 16, 16\).*\(2, 3, 8, 8\)"),
        ("unconditional", {"t": torch.zeros(())}, r"input t has shape \(\): this model takes \(2,\)"),
        ("unconditional", {"y": torch.zeros(2)}, r"input y has shape \(2,\): this model takes None"),
        ("labels", {"y": torch.zeros(1)}, r"input y has shape \(1,\): this model takes \(2,\)"),
        ("labels-without-null", {}, r"input y has shape None: this model takes \(2,\)"),
    ],
)
def test_wrong_inputs_are_refused(variant, change, message):
    model, _ = make(variant)
    inputs = {"x": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2)} | change
    with pytest.raises(InputError, match=message):
        model(**inputs)
