import copy
import math

import pytest
import torch
from torch import nn

from sparsedm.diffusion import VPSDE
from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.models.uvit import PRESETS, timestep_embedding
from sparsedm.sparsity import masks, sparsify
from tests.tolerance import assert_as_good_as_torch

SMALL = {"image_size": 8, "patch_size": 2, "dim": 24, "depth": 4, "heads": 3}


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
    ("name", "tokens", "more"),
    [
        ("uvit-tiny", 65, {}),
        ("uvit-cifar10-small", 257, {}),
        ("uvit-celeba64-small", 257, {}),
        ("uvit-imagenet64-mid", 258, {"label_emb.weight": (1000, 768)}),
        ("uvit-imagenet64-large", 258, {"label_emb.weight": (1000, 1024)}),
        ("uvit-imagenet256-large", 258, {"label_emb.weight": (1001, 1024)}),
        ("uvit-imagenet256-huge", 258, {"label_emb.weight": (1001, 1152)}),
        ("uvit-imagenet512-large", 258, {"label_emb.weight": (1001, 1024)}),
        ("uvit-imagenet512-huge", 258, {"label_emb.weight": (1001, 1152)}),
        ("uvit-coco-small", 334, {"context_embed.weight": (512, 768), "context_embed.bias": (512,)}),
        ("uvit-coco-small-deep", 334, {"context_embed.weight": (512, 768), "context_embed.bias": (512,)}),
    ],
)
def test_tokens_and_conditions_of_every_preset(name, tokens, more):
    state = build_model(name, device="meta").state_dict()
    assert state["pos_embed"].shape[1] == tokens
    conditions = {key: tuple(value.shape) for key, value in state.items() if key.startswith(("label", "context"))}
    assert conditions == more
    assert ("final_layer.weight" in state) == ("huge" not in name)


def test_every_preset_is_tested_above():
    assert len(PRESETS) == 11


@pytest.mark.parametrize("dim", [512, 768, 1024, 1152])
def test_the_time_embedding_has_the_bits_of_the_official_order(dim):
    """exp((-ln(1e4) i) / half) in fp32, as github.com/baofff/U-ViT and facebookresearch/DiT compute it."""
    t, half = torch.tensor([1.0, 437.0, 999.0]), dim // 2
    frequencies = torch.exp(torch.tensor(-math.log(1e4)) * torch.arange(half, dtype=torch.float32) / half)
    angles = t[:, None] * frequencies[None]
    assert torch.equal(timestep_embedding(t, dim), torch.cat([angles.cos(), angles.sin()], -1))


# ---- behaviour -------------------------------------------------------------------------------------------------------


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


def test_velocity_turns_what_the_layers_compute_into_noise():
    plain, model = (build_model("uvit-tiny", image_size=8, velocity=velocity).double() for velocity in (False, True))
    model.load_state_dict(plain.state_dict())
    x, t = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([10.0, 500.0, 990.0], dtype=torch.float64)
    log_alpha = -0.25 * 19.9 * (t / 999) ** 2 - 0.05 * t / 999
    alpha, sigma = log_alpha.exp().view(-1, 1, 1, 1), (1 - (2 * log_alpha).exp()).sqrt().view(-1, 1, 1, 1)
    expected = sigma * x + alpha * plain(x, t)
    assert_as_good_as_torch(model(x, t), expected, expected.float())


@pytest.mark.parametrize("schedule", ["vp-sde", "ddpm", "scaled-linear"])
def test_velocity_takes_whole_numbers_as_times(schedule):
    model = build_model("uvit-tiny", image_size=8, dim=16, depth=2, heads=2, velocity=True, schedule=schedule)
    x = torch.randn(3, 3, 8, 8)
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(model(x, torch.tensor([1, 500, 999], dtype=dtype)), model(x, torch.tensor([1.0, 500, 999])))
    assert model(x, torch.zeros(3)).isfinite().all()


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


def test_a_network_with_text_tokens_needs_them():
    model = build_model("uvit-tiny", **SMALL, context_tokens=3, context_dim=10)
    with pytest.raises(InputError, match=r"input context has shape None: this model takes \(2, 3, 10\)"):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2))
