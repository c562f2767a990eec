import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsedm.diffusion import VPSDE
from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.models.uvit import PRESETS, timestep_embedding
from sparsedm.sparsity import masks, sparsify
from tests.tolerance import assert_as_good_as_torch

SMALL = {"image_size": 8, "patch_size": 2, "dim": 24, "depth": 4, "heads": 3}
VARIANTS = {
    "unconditional": {},
    "labels": {"num_classes": 5},
    "labels-without-null": {"num_classes": 5, "null_label": False},
    "context": {"channels": 4, "context_tokens": 3, "context_dim": 10},
    "no-final-conv": {"channels": 4, "num_classes": 5, "final_conv": False},
}


# ---- an independent implementation: plain torch on a dictionary of weights, straight from the paper ------------------


def attention_ref(w, x, heads):
    dim = x.shape[-1]
    q, k, v = (x @ w["attn.qkv.weight"].T).split(dim, dim=-1)
    out = torch.empty_like(x)
    for h in range(heads):
        part = slice(h * dim // heads, (h + 1) * dim // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(dim // heads)
        out[..., part] = scores.softmax(-1) @ v[..., part]
    return out @ w["attn.proj.weight"].T + w["attn.proj.bias"]


def norm_ref(w, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block_ref(weights, name, x, heads, skip=None):
    w = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    if skip is not None:
        x = torch.cat([x, skip], -1) @ w["skip_linear.weight"].T + w["skip_linear.bias"]
    x = x + attention_ref(w, norm_ref(w, "norm1", x), heads)
    h = norm_ref(w, "norm2", x) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
    return x + h @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def uvit_ref(w, config, x, t, y=None, context=None):
    patch, dim, side = config.patch_size, config.dim, config.image_size // config.patch_size
    frequencies = torch.tensor([1e4 ** (-i / (dim // 2)) for i in range(dim // 2)], dtype=x.dtype)
    angles = t.to(x.dtype)[:, None] * frequencies
    tokens = [torch.cat([angles.cos(), angles.sin()], -1)[:, None]]
    if "label_emb.weight" in w:
        tokens = [w["label_emb.weight"][y][:, None]] + tokens
    if context is not None:
        tokens += [context @ w["context_embed.weight"].T + w["context_embed.bias"]]
    for i in range(side):  # patch by patch, row by row
        for j in range(side):
            pixels = x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].flatten(1)
            tokens.append((pixels @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"])[:, None])
    h = torch.cat(tokens, 1) + w["pos_embed"]

    half = config.depth // 2
    outputs = []
    for i in range(half):
        h = block_ref(w, f"in_blocks.{i}", h, config.heads)
        outputs.append(h)
    h = block_ref(w, "mid_block", h, config.heads)
    for i in range(half):
        h = block_ref(w, f"out_blocks.{i}", h, config.heads, skip=outputs[half - 1 - i])
    h = norm_ref(w, "norm", h) @ w["decoder_pred.weight"].T + w["decoder_pred.bias"]

    image = torch.empty_like(x)
    for i in range(side):
        for j in range(side):
            pixels = h[:, h.shape[1] - side * side + i * side + j].view(-1, patch, patch, config.channels)
            rows, columns = slice(i * patch, (i + 1) * patch), slice(j * patch, (j + 1) * patch)
            image[:, :, rows, columns] = pixels.permute(0, 3, 1, 2)
    return F.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1) if config.final_conv else image


def make(variant):
    """A small model with weights far from their start (zero biases would hide mistakes), in fp64, and its inputs."""
    model = build_model("uvit-tiny", dtype=torch.float64, **SMALL, **VARIANTS[variant])
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    config = model.config
    x = torch.randn(2, config.channels, 8, 8, dtype=torch.float64)
    t = torch.tensor([3.25, 721.0], dtype=torch.float64)
    y = torch.tensor([4, 0]) if config.num_classes else None
    context = torch.randn(2, 3, 10, dtype=torch.float64) if config.context_tokens else None
    return model, (x, t, y, context)


def low(values):
    return [v.float() if v is not None and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient(variant):
    model, inputs = make(variant)
    inputs[0].requires_grad_()
    weights = dict(model.named_parameters())
    low_weights = {name: p.detach().float().requires_grad_() for name, p in weights.items()}
    low_inputs = low([v.detach() if v is not None else v for v in inputs])
    low_inputs[0].requires_grad_()

    out = model(*inputs)
    ref = uvit_ref(weights, model.config, *inputs)
    ref_low = uvit_ref(low_weights, model.config, *low_inputs)
    assert_as_good_as_torch(out, ref, ref_low)

    dy = torch.randn_like(out)
    grads = torch.autograd.grad(out, [inputs[0], *weights.values()], dy)
    ref_grads = torch.autograd.grad(ref, [inputs[0], *weights.values()], dy)
    low_grads = torch.autograd.grad(ref_low, [low_inputs[0], *low_weights.values()], dy.float())
    for g, g_ref, g_low in zip(grads, ref_grads, low_grads):
        assert_as_good_as_torch(g, g_ref, g_low)


def test_single_precision_is_as_good_as_plain_torch():
    model, inputs = make("labels")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ref = uvit_ref(weights, model.config, *inputs)
    ref_low = uvit_ref({name: w.float() for name, w in weights.items()}, model.config, *low(inputs))
    assert_as_good_as_torch(model.float()(*low(inputs)), ref, ref_low)


def test_timestep_embedding_by_hand():
    embedding = timestep_embedding(torch.tensor([2, 999]), 4)  # frequencies 1 and 1e-2; integers allowed
    expected = [[math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]]
    expected += [[math.cos(999), math.cos(9.99), math.sin(999), math.sin(9.99)]]
    assert embedding.dtype == timestep_embedding(torch.tensor([2.0]).bfloat16(), 4).dtype == torch.float32
    assert timestep_embedding(torch.tensor([2.0]).double(), 4).dtype == torch.float64
    high = torch.tensor(expected, dtype=torch.float64)
    angles = torch.tensor([2.0, 999.0])[:, None] * torch.tensor([1.0, 0.01])
    assert_as_good_as_torch(embedding, high, torch.cat([angles.cos(), angles.sin()], -1))


# ---- the official checkpoints ----------------------------------------------------------------------------------------


def test_cifar10_state_dict_is_the_official_one():
    def block(name):
        return {
            f"{name}.norm1.weight": (512,),
            f"{name}.norm1.bias": (512,),
            f"{name}.attn.qkv.weight": (1536, 512),
            f"{name}.attn.proj.weight": (512, 512),
            f"{name}.attn.proj.bias": (512,),
            f"{name}.norm2.weight": (512,),
            f"{name}.norm2.bias": (512,),
            f"{name}.mlp.fc1.weight": (2048, 512),
            f"{name}.mlp.fc1.bias": (2048,),
            f"{name}.mlp.fc2.weight": (512, 2048),
            f"{name}.mlp.fc2.bias": (512,),
        }

    expected = {
        "pos_embed": (1, 257, 512),
        "patch_embed.proj.weight": (512, 3, 2, 2),
        "patch_embed.proj.bias": (512,),
        "norm.weight": (512,),
        "norm.bias": (512,),
        "decoder_pred.weight": (12, 512),
        "decoder_pred.bias": (12,),
        "final_layer.weight": (3, 3, 3, 3),
        "final_layer.bias": (3,),
    } | block("mid_block")
    for i in range(6):
        expected |= block(f"in_blocks.{i}") | block(f"out_blocks.{i}")
        expected |= {f"out_blocks.{i}.skip_linear.weight": (512, 1024), f"out_blocks.{i}.skip_linear.bias": (512,)}
    state = build_model("uvit-cifar10-small", device="meta").state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert len(state) == 164


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "more"),
    [
        ("uvit-tiny", 1_076_356, 65, {}),
        ("uvit-cifar10-small", 44_255_328, 257, {}),
        ("uvit-celeba64-small", 44_292_228, 257, {}),
        ("uvit-imagenet64-mid", 130_940_292, 258, {"label_emb.weight": (1000, 768)}),
        ("uvit-imagenet64-large", 286_827_652, 258, {"label_emb.weight": (1000, 1024)}),
        ("uvit-imagenet256-large", 286_763_172, 258, {"label_emb.weight": (1001, 1024)}),
        ("uvit-imagenet256-huge", 500_832_016, 258, {"label_emb.weight": (1001, 1152)}),
        ("uvit-coco-small", 44_692_644, 334, {"context_embed.weight": (512, 768), "context_embed.bias": (512,)}),
    ],
)
def test_every_preset_has_the_published_size(name, parameters, tokens, more):
    state = build_model(name, device="meta").state_dict()
    assert sum(value.numel() for value in state.values()) == parameters
    assert state["pos_embed"].shape[1] == tokens
    conditions = {key: tuple(value.shape) for key, value in state.items() if key.startswith(("label", "context"))}
    assert conditions == more
    assert ("final_layer.weight" in state) == (name != "uvit-imagenet256-huge")


def test_every_preset_is_tested_above():
    assert len(PRESETS) == 8


def test_macs_of_the_cifar10_model():
    model = build_model("uvit-cifar10-small", device="meta")
    with FlopCounterMode(display=False) as counter:
        model(*model.example_inputs())
    flops = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for operation, count in flops.items() if "bmm" in operation or "attention" in operation)
    macs, attention = (sum(flops.values()) - attention) // 2, attention // 2
    assert attention == 13 * 2 * 257 * 257 * 512
    assert round(macs / 1e9, 2) == 11.32
    assert round((macs + attention) / 1e9, 2) == 12.20


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_no_label_is_the_null_label():
    model, (x, t, _, _) = make("labels")
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 5])))
    assert not torch.equal(model(x, t), model(x, t, torch.tensor([4, 4])))


def test_sparse_layers_are_the_four_of_each_block():
    model = sparsify(build_model("uvit-tiny", **SMALL), "2:4")
    blocks = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(masks(model)) == {f"{block}.{layer}" for block in blocks for layer in layers}
    x, t, y = model.example_inputs(2)
    assert torch.isfinite(model(x, t, y)).all()


def test_initial_weights():
    model = build_model("uvit-tiny")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 4 * 5 + 2 + 1
    for weight in [model.pos_embed] + [m.weight for m in linears]:
        # the standard error of the standard deviation of n normal numbers is s / sqrt(2 n)
        assert abs(weight.std().item() - 0.02) < 5 * 0.02 / math.sqrt(2 * weight.numel())
    assert not any(m.bias.any() for m in linears if m.bias is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_example_inputs_fit_and_repeat(variant):
    model = build_model("uvit-tiny", **SMALL, **VARIANTS[variant])
    first, again = model.example_inputs(3), model.example_inputs(3)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, again))
    assert model(*first).shape == first[0].shape == (3, model.config.channels, 8, 8)


def test_compiles_to_one_graph():
    model, inputs = make("labels")
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(*inputs), model(*inputs))


def test_bfloat16_weights_and_autocast_run():
    model = build_model("uvit-tiny", **SMALL)
    x, t, y = model.example_inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(x, t, y)).all()
    low_model = copy.deepcopy(model).bfloat16()
    assert low_model(*low_model.example_inputs(2)).dtype == torch.bfloat16


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 30}, "image_size=30: must be a multiple of patch_size=4"),
        ({"heads": 5}, "dim=128: must be even and a multiple of heads=5"),
        ({"dim": 5, "heads": 5}, "dim=5: must be even"),
        ({"depth": 5}, "depth=5: must be even"),
        ({"depth": -2}, "depth=-2: must be at least 0"),
        ({"patch_size": 0}, "patch_size=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        build_model("uvit-tiny", device="meta", **overrides)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("unconditional", {"x": torch.zeros(2, 3, 16, 16)}, r"input x has shape \(2, 3, 16, 16\).*\(2, 3, 8, 8\)"),
        ("unconditional", {"t": torch.zeros(())}, r"input t has shape \(\): this model takes \(2,\)"),
        ("unconditional", {"y": torch.zeros(2)}, r"input y has shape \(2,\): this model takes None"),
        ("labels", {"y": torch.zeros(1)}, r"input y has shape \(1,\): this model takes \(2,\)"),
        ("labels-without-null", {}, r"input y has shape None: this model takes \(2,\)"),
        ("context", {}, r"input context has shape None: this model takes \(2, 3, 10\)"),
    ],
)
def test_wrong_inputs_are_refused(variant, change, message):
    model = build_model("uvit-tiny", **SMALL, **VARIANTS[variant])
    inputs = {"x": torch.zeros(2, model.config.channels, 8, 8), "t": torch.zeros(2)} | change
    with pytest.raises(InputError, match=message):
        model(**inputs)


def test_velocity_turns_what_the_layers_compute_into_noise():
    plain, model = (build_model("uvit-tiny", image_size=8, velocity=velocity).double() for velocity in (False, True))
    model.load_state_dict(plain.state_dict())
    x, t = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([10.0, 500.0, 990.0], dtype=torch.float64)
    log_alpha = -0.25 * 19.9 * (t / 999) ** 2 - 0.05 * t / 999
    alpha, sigma = log_alpha.exp().view(-1, 1, 1, 1), (1 - (2 * log_alpha).exp()).sqrt().view(-1, 1, 1, 1)
    expected = sigma * x + alpha * plain(x, t)
    assert_as_good_as_torch(model(x, t), expected, expected.float())


def test_velocity_does_not_round_the_noise_to_bf16_under_autocast():
    """At high noise the error of x_0 is that of the noise divided by α: 0.006 at t = 999."""
    model = build_model("uvit-tiny", image_size=8, velocity=True)
    with torch.no_grad():
        for parameter in model.final_layer.parameters():
            parameter.zero_()
    x, t = torch.randn(3, 3, 8, 8), torch.full((3,), 999.0)
    with torch.autocast("cpu", torch.bfloat16):
        noise = model(x, t)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, VPSDE().sigma(t / 999).view(-1, 1, 1, 1) * x)
    bf16 = copy.deepcopy(model).bfloat16()
    assert bf16(x.bfloat16(), t).dtype == torch.bfloat16
