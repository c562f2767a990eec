"""Models of other libraries, on tiny random configurations: masked and compressed, against the library's own forward
with the masked weights placed by hand. Needs the `interop` extra; a family whose library is missing is skipped."""

import copy
import importlib
import json
import re

import pytest
import torch
from torch import nn

from sparsedm.compressed import Compressed
from sparsedm.compression import bake, compress, decompress
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels.pattern import Pattern, group_view, select_mask_ref, ungroup
from sparsedm.model_files import load_model, save_model
from sparsedm.permutation import permute_channels
from sparsedm.sparsity import FAMILIES, masked_layers, sparsify
from tests.tolerance import assert_as_good_as_torch

pytestmark = pytest.mark.interop

TIME = torch.tensor([3, 700])
UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}
DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}


def image(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).sin()


DIFFUSERS = {  # class: (its options, arguments of forward)
    "UNet2DModel": (
        UNET
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        {"sample": image(2, 3, 16, 16), "timestep": TIME},
    ),
    "UNet2DConditionModel": (
        UNET
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8},
        {"sample": image(2, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": image(2, 7, 32)},
    ),
    "DiTTransformer2DModel": (
        DIT | {"in_channels": 4, "out_channels": 8},
        {"hidden_states": image(2, 4, 8, 8), "timestep": TIME, "class_labels": torch.tensor([1, 2])},
    ),
    "SD3Transformer2DModel": (
        DIT
        | {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 32, "caption_projection_dim": 32}
        | {"pooled_projection_dim": 64, "pos_embed_max_size": 16},
        {"hidden_states": image(2, 4, 8, 8), "encoder_hidden_states": image(2, 7, 32)}
        | {"pooled_projections": image(2, 64), "timestep": TIME},
    ),
    "PixArtTransformer2DModel": (
        DIT
        | {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 32}
        | {"use_additional_conditions": False},
        {"hidden_states": image(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": image(2, 7, 32)}
        | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "FluxTransformer2DModel": (
        {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
        | {
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        {"hidden_states": image(2, 16, 16), "encoder_hidden_states": image(2, 7, 32), "timestep": TIME / 1000}
        | {"pooled_projections": image(2, 32), "txt_ids": torch.zeros(7, 3), "img_ids": image(16, 3)},
    ),
}


def built(name):
    options, inputs = DIFFUSERS[name]
    return getattr(pytest.importorskip("diffusers"), name)(**options).eval(), inputs


def vision_transformer(library):
    try:
        module = importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # torchvision beside a torch of another build raises RuntimeError
        pytest.skip(f"{library}: {error}")
    if library == "timm":
        model = module.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    else:
        model = module.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)
        nn.init.normal_(model.heads.head.weight)
    return model.eval()


@pytest.fixture(params=[*DIFFUSERS, "timm", "torchvision"])
def family(request):
    """(a model in eval mode, the arguments of its forward)."""
    if request.param in DIFFUSERS:
        return built(request.param)
    return vision_transformer(request.param), {"x": image(2, 3, 32, 32)}


def double(value):
    if isinstance(value, dict):
        return {name: double(inner) for name, inner in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def forward(model, inputs):
    y = model(**inputs)
    return y if isinstance(y, torch.Tensor) else y[0]


def masked_by_hand(model, names):
    """The library's own model, its weights multiplied with the masks of the reference."""
    model = copy.deepcopy(model)
    for name in names:
        weight = model.get_submodule(name).weight
        mask = ungroup(select_mask_ref(group_view(weight), Pattern(2, 4)), weight.shape)
        weight.data = weight.data * mask
    return model


def test_masked_and_compressed_are_the_librarys_own_forward_with_masked_weights(family):
    model, inputs = family
    original = copy.deepcopy(model)
    assert type(model).__name__ in FAMILIES
    sparsify(model, "2:4")
    names = [name for name, _ in masked_layers(model)]
    by_hand = masked_by_hand(original, names)
    expected = forward(by_hand.double(), double(inputs))
    usual = forward(by_hand.float(), inputs)
    assert not torch.equal(usual, forward(original, inputs)), "the masks must matter"
    assert_as_good_as_torch(forward(model, inputs), expected, usual)
    small = compress(model)
    assert [n for n, m in small.named_modules() if isinstance(m, Compressed)] == names
    assert_as_good_as_torch(forward(small, inputs), expected, usual)
    assert_as_good_as_torch(forward(decompress(small), inputs), expected, usual)


def test_the_default_layers_are_nearly_all_of_the_work(family):
    """And what stays dense says why."""
    model, inputs = family
    rows = inspect(sparsify(model, "2:4"), inputs).rows
    masked, dense = [r for r in rows if r.pattern == "2:4"], [r for r in rows if r.pattern == "dense"]
    blocks = [r for r in rows if "block" in r.name or "encoder_layer" in r.name]
    assert masked
    assert all(r.why and r.why != "no pattern was set" for r in dense)
    assert all(r.macs for r in masked)
    small = [r for r in blocks if r in dense and not any(word in r.name for word in ("norm", "emb", "self_attention"))]
    assert not small, "every product of a block is masked, but for modulations and embeddings"


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_compressed_model_is_saved_and_built_again_from_its_file(name, tmp_path):
    model, inputs = built(name)
    for form in (sparsify(model, "2:4"), compress(model)):
        save_model(tmp_path / "model.safetensors", form)
        loaded = load_model(tmp_path / "model.safetensors", lambda config: type(model).from_config(config))
        assert torch.equal(forward(loaded.model, inputs), forward(form, inputs))
    assert loaded.kind == "compressed"


def test_the_librarys_own_checkpoint_of_a_masked_model_is_a_usual_one(tmp_path):
    model, inputs = built("UNet2DModel")
    sparsify(model, "2:4").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"
    again = sparsify(type(model).from_pretrained(tmp_path), "2:4")
    assert torch.equal(forward(again.eval(), inputs), forward(model, inputs))


def losses_of_training(model, inputs, parameters, steps):
    """The loss in each step of an optimizer of torch."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(**inputs).sample - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_masked_model_trains_in_the_librarys_own_way():
    model, inputs = built("DiTTransformer2DModel")
    sparsify(model, "2:4").train()
    losses = losses_of_training(model, inputs, model.parameters(), steps=5)
    assert losses[-1] < losses[0]
    assert all(row.holds for row in inspect(model.eval(), inputs).rows)


def test_lora_factors_stay_dense_and_a_merged_layer_is_masked_anew():
    peft = pytest.importorskip("peft")
    model, inputs = built("DiTTransformer2DModel")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    wrapped = sparsify(peft.get_peft_model(model, config), "2:4", "all").eval()
    rows = {row.name: row for row in inspect(wrapped, inputs).rows}
    factors = [row for name, row in rows.items() if "lora_" in name]
    assert factors
    assert all(row.why == "a LoRA factor: merge it into its layer first" for row in factors)
    assert rows["base_model.model.transformer_blocks.0.attn1.to_q.base_layer"].pattern == "2:4"
    forward(wrapped, inputs)
    merged = sparsify(wrapped.merge_and_unload(), "2:4")
    layer = merged.transformer_blocks[0].attn1.to_q
    assert torch.equal(layer.effective_weight() != 0, select_mask_ref(layer.weight, Pattern(2, 4)))
    assert all(row.holds for row in inspect(merged, inputs).rows)


def test_lora_is_trained_on_a_masked_model_then_merged_and_compressed():
    peft = pytest.importorskip("peft")
    model, inputs = built("DiTTransformer2DModel")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"])
    with pytest.raises(ValueError, match=r"CompressedLinear.* is not supported"):
        peft.get_peft_model(compress(sparsify(copy.deepcopy(model), "2:4")), config)
    wrapped = peft.get_peft_model(sparsify(model, "2:4"), config).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    frozen = {n: p.detach().clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    losses = losses_of_training(wrapped, inputs, trained, steps=8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(wrapped.get_parameter(name), value) for name, value in frozen.items())
    to_q = "transformer_blocks.0.attn1.to_q"
    layer = wrapped.base_model.model.get_submodule(to_q)
    added = layer.get_delta_weight("default").detach()
    expected = layer.base_layer.weight.detach() + added
    assert added.any()
    merged = wrapped.merge_and_unload().eval()
    torch.testing.assert_close(merged.get_submodule(to_q).weight, expected)
    small = compress(merged)
    assert isinstance(small.get_submodule(to_q), Compressed)
    usual = forward(bake(merged), inputs)
    assert_as_good_as_torch(forward(small, inputs), forward(bake(merged).double(), double(inputs)), usual)


READ_PAST_MASKS = {  # each multiplies by, or starts from, the weight of a layer that it does not call
    "HRA": lambda peft: peft.HRAConfig(r=4, target_modules=["0"]),
    "SHiRA": lambda peft: peft.ShiraConfig(r=4, target_modules=["0"]),
    "MiSS": lambda peft: peft.MissConfig(r=4, target_modules=["0"], init_weights="bat"),
    "DoRA": lambda peft: peft.LoraConfig(r=4, target_modules=["0"], use_dora=True),
    "PiSSA": lambda peft: peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"),
    "OLoRA": lambda peft: peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="olora"),
}


@pytest.mark.parametrize("method", READ_PAST_MASKS)
def test_what_reads_weights_past_their_masks_is_refused(method):
    peft = pytest.importorskip("peft")
    config = READ_PAST_MASKS[method](peft)
    with pytest.raises(InputError, match="reads a layer's weight past its mask: use plain LoRA instead"):
        peft.get_peft_model(sparsify(nn.Sequential(nn.Linear(32, 32)), "2:4"), config)(torch.zeros(1, 32))
    dense = peft.get_peft_model(sparsify(nn.Sequential(nn.Linear(32, 32)), None), config)
    if method in (
        "OLoRA",
        "PiSSA",
        "MiSS",
    ):  # of the first two, what they have started from is the weight of the layer now
        return
    with pytest.raises(InputError, match="reads its weight without calling it"):
        sparsify(dense, "2:4", "0.base_layer$")


@pytest.mark.parametrize("name", DIFFUSERS)
def test_channels_are_permuted_without_changing_what_is_computed(name):
    """Gated feed-forwards have two rows to a channel; SD3's and Flux's joint attention is left alone."""
    model, inputs = built(name)
    before = copy.deepcopy(model)
    gains = permute_channels(model, rounds=5)
    assert all(gain.after >= gain.before for gain in gains.values())
    assert all(gain.after > gain.before for layer, gain in gains.items() if "net" in layer)
    kinds = {re.search(r"(\w+)(\.\d+)?\.(net\.2|to_out\.0)$", layer)[1] for layer in gains}
    assert (
        kinds
        == {
            "UNet2DModel": {"attentions"},
            "UNet2DConditionModel": {"attn1", "attn2", "ff"},
            "DiTTransformer2DModel": {"attn1", "ff"},
            "PixArtTransformer2DModel": {"attn1", "attn2", "ff"},
            "SD3Transformer2DModel": {"ff", "ff_context"},
            "FluxTransformer2DModel": {"ff", "ff_context"},
        }[name]
    )
    usual = forward(before, inputs)
    assert_as_good_as_torch(forward(model, inputs), forward(before.double(), double(inputs)), usual)
