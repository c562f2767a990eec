import math

import pytest
import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.models import build_model
from sparsedm.models.dit import PRESETS
from sparsedm.samplers import guided
from sparsedm.sparsity import compress, masks, sparsify
from tests.tolerance import assert_as_good_as_torch

SMALL = {"image_size": 8, "channels": 4, "patch_size": 2, "dim": 24, "depth": 2, "heads": 3, "num_classes": 5}
VARIANTS = {
    "labels": {},
    "labels-without-null": {"null_label": False},
    "unconditional": {"num_classes": 0},
    "noise-only": {"learn_sigma": False, "image_size": 12},
}


def build(**overrides):
    """A small network whose output is not zero, as that of a fresh one is."""
    model = build_model("dit-tiny", **(SMALL | {"learn_sigma": True} | overrides))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def some_inputs(config, batch=3, dtype=torch.float64):
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, dtype=dtype)
    y = torch.randint(0, config.num_classes, (batch,)) if config.num_classes else None
    return x, torch.rand(batch, dtype=dtype) * 999, y


# ---- an independent implementation: plain torch on a dictionary of weights, straight from the paper ------------------


def linear_ref(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm_ref(x, shift, scale):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]


def attention_ref(w, name, x, heads):
    dim = x.shape[-1]
    width, parts = dim // heads, []
    every = linear_ref(w, f"{name}.qkv", x).split(width, dim=-1)  # the heads of q, then of k, then of v
    for h in range(heads):
        q, k, v = every[h], every[heads + h], every[2 * heads + h]
        parts.append((q @ k.transpose(1, 2) / math.sqrt(width)).softmax(-1) @ v)
    return linear_ref(w, f"{name}.proj", torch.cat(parts, -1))


def position_ref(dim, side):
    """Official numbering: the first half of the vector is of the column, the second of the row; sines, then cosines."""

    def wave(position):
        angles = [position / 1e4 ** (i / (dim // 4)) for i in range(dim // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    return torch.tensor([[wave(column) + wave(row) for row in range(side) for column in range(side)]]).flatten(2)


def dit_ref(w, config, x, t, y=None):
    patch, dim, side = config.patch_size, config.dim, config.image_size // config.patch_size
    angles = t[:, None] * torch.tensor([1e4 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    c = linear_ref(w, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))
    c = linear_ref(w, "t_embedder.mlp.2", c * torch.sigmoid(c))
    if y is not None:
        c = c + w["y_embedder.embedding_table.weight"][y]
    c = c * torch.sigmoid(c)
    patches = [
        x[:, :, i : i + patch, j : j + patch].flatten(1)
        for i in range(0, config.image_size, patch)
        for j in range(0, config.image_size, patch)
    ]
    kernel = w["x_embedder.proj.weight"].flatten(1)
    h = torch.stack([p @ kernel.T + w["x_embedder.proj.bias"] for p in patches], 1)
    h = h + position_ref(dim, side).float().to(x.dtype)
    for b in range(config.depth):
        name = f"blocks.{b}"
        s1, k1, g1, s2, k2, g2 = linear_ref(w, f"{name}.adaLN_modulation.1", c).split(dim, -1)
        h = h + g1[:, None] * attention_ref(w, f"{name}.attn", norm_ref(h, s1, k1), config.heads)
        m = linear_ref(w, f"{name}.mlp.fc1", norm_ref(h, s2, k2))
        m = m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3))) / 2
        h = h + g2[:, None] * linear_ref(w, f"{name}.mlp.fc2", m)
    shift, scale = linear_ref(w, "final_layer.adaLN_modulation.1", c).split(dim, -1)
    h = linear_ref(w, "final_layer.linear", norm_ref(h, shift, scale))
    out = torch.empty(len(x), config.out_channels, config.image_size, config.image_size, dtype=x.dtype)
    for n in range(side * side):
        i, j = n // side * patch, n % side * patch
        out[:, :, i : i + patch, j : j + patch] = (
            h[:, n].view(-1, patch, patch, config.out_channels).permute(0, 3, 1, 2)
        )
    return out[:, : config.channels]


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient(variant):
    model = build(**VARIANTS[variant]).double()
    x, t, y = some_inputs(model.config)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected, up = dit_ref(weights, model.config, x, t, y), torch.randn_like(x)
    out = model(x, t, y)
    assert_as_good_as_torch(out, expected, out.detach().float())
    out.backward(up)
    expected.backward(up)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            assert_as_good_as_torch(parameter.grad, weights[name].grad, weights[name].grad.float())


def test_single_precision_is_as_good_as_plain_torch():
    model = build()
    x, t, y = some_inputs(model.config, dtype=torch.float32)
    w = dict(model.named_parameters())
    exact = dit_ref({k: v.double() for k, v in w.items()}, model.config, x.double(), t.double(), y)
    assert_as_good_as_torch(model(x, t, y), exact, dit_ref(w, model.config, x, t, y))


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("small", 33, 6.06), ("base", 130, 23.01), ("large", 458, 80.71), ("xlarge", 675, 118.64)],
)
def test_every_preset_has_the_published_size(name, parameters, gmacs):
    """Table 4 of the paper; its Gflops are multiply-accumulates."""
    totals = inspect(build_model(f"dit-imagenet256-{name}", device="meta")).totals()
    assert totals["parameters"] / 1e6 == pytest.approx(parameters, abs=0.6)
    assert totals["macs_with_attention"] == pytest.approx(gmacs * 1e9, rel=1e-3)


def test_xlarge_state_dict_is_the_official_one():
    """28 blocks of ten tensors, and the fourteen around them, under the names of DiT-XL-2-256x256.pt."""
    state = build_model("dit-imagenet256-xlarge", device="meta").state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    block = {"attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152), "mlp.fc2": (1152, 4608)}
    for b in range(28):
        for name, shape in (block | {"adaLN_modulation.1": (6912, 1152)}).items():
            expected |= {f"blocks.{b}.{name}.weight": shape, f"blocks.{b}.{name}.bias": shape[:1]}
    assert shapes == expected


def test_a_fresh_network_is_zero_and_its_blocks_the_identity():
    model = build_model("dit-tiny", **SMALL)
    x, t, y = some_inputs(model.config, dtype=torch.float32)
    assert not model(x, t, y).any()
    tokens = torch.randn(3, 16, 24)
    assert torch.equal(model.blocks[0](tokens, torch.randn(3, 24)), tokens)


def test_no_label_is_the_null_label():
    model = build()
    x, t, _ = some_inputs(model.config, dtype=torch.float32)
    null = torch.full((3,), 5)
    assert torch.equal(model(x, t), model(x, t, null))
    assert not torch.equal(model(x, t), model(x, t, torch.zeros_like(null)))


def test_guidance_is_the_official_one_of_all_channels():
    """With w = official cfg-scale - 1. The official default, the first three channels alone, is not offered."""
    model = build().double().eval()
    x, t, y = some_inputs(model.config)
    null = torch.full_like(y, model.config.num_classes)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        labelled, unlabelled = dit_ref(weights, model.config, x, t, y), dit_ref(weights, model.config, x, t, null)
        expected = unlabelled + 4.0 * (labelled - unlabelled)
        assert_as_good_as_torch(guided(model, y, 4.0 - 1)(x, t), expected, expected.float())


def test_masked_and_compressed():
    model = sparsify(build(dim=32, heads=2).eval(), "2:4")
    layers = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert set(masks(model)) == {f"blocks.{b}.{layer}" for b in range(2) for layer in layers}
    x, t, y = some_inputs(model.config, dtype=torch.float32)
    with torch.no_grad():
        usual = model(x, t, y)
        small = compress(model)(x, t, y)
        assert_as_good_as_torch(small, model.double()(x.double(), t.double(), y), usual)


def test_compiles_to_one_graph():
    model = build()
    inputs = some_inputs(model.config, dtype=torch.float32)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(*inputs), model(*inputs))


def test_bfloat16_weights_and_autocast_run():
    model = build()
    x, t, y = some_inputs(model.config, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t, y).isfinite().all()
    out = model.bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("name", PRESETS)
def test_example_inputs_fit_and_repeat(name):
    model = build_model(name, device="meta")
    assert model(*model.example_inputs(2)).shape == (2, *model.example_inputs()[0].shape[1:])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dim": 0}, "DiT dim=0: must be at least 1"),
        ({"image_size": 9}, "image_size=9: must be a multiple of patch_size=2"),
        ({"dim": 26}, "dim=26: must be a multiple of 4 and of heads=3"),
        ({"heads": 5}, "multiple of 4 and of heads=5"),
        ({"num_classes": -1}, "num_classes=-1: must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        build(**overrides)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("labels", lambda x, t, y: (x[:, :3], t, y), r"x has shape \(3, 3, 8, 8\): this model takes \(3, 4, 8, 8\)"),
        ("labels", lambda x, t, y: (x, t[:2], y), r"t has shape \(2,\)"),
        ("labels-without-null", lambda x, t, y: (x, t, None), "y has shape None"),
        ("unconditional", lambda x, t, y: (x, t, torch.zeros(3)), r"this model takes None"),
    ],
)
def test_wrong_inputs_are_refused(variant, change, message):
    model = build(**VARIANTS[variant]).double()
    with pytest.raises(InputError, match=message):
        model(*change(*some_inputs(model.config)))
