import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.models.ddpm import PRESETS
from sparsedm.models.diffusers import config_from_diffusers, config_to_diffusers, from_diffusers, to_diffusers
from sparsedm.sparsity import set_masking, sparsify
from tests.tolerance import assert_as_good_as_torch

# config.json of google/ddpm-cifar10-32, written by diffusers 0.0.4 and read by every version since
CIFAR10_CONFIG = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
SMALL = {"image_size": 8, "width": 12, "multipliers": (1, 2, 3), "attention": (4,), "groups": 3, "blocks": 2}


def cifar10_shapes():
    """{key: shape} of UNet2DModel at the configuration above: 328 tensors."""
    shapes = {"conv_in": (128, 3, 3, 3), "conv_out": (3, 128, 3, 3), "conv_norm_out": (128,)}
    shapes |= {"time_embedding.linear_1": (512, 128), "time_embedding.linear_2": (512, 512)}

    def resnet(name, cin, cout):
        shapes.update({f"{name}.norm1": (cin,), f"{name}.conv1": (cout, cin, 3, 3), f"{name}.norm2": (cout,)})
        shapes.update({f"{name}.conv2": (cout, cout, 3, 3), f"{name}.time_emb_proj": (cout, 512)})
        if cin != cout:
            shapes[f"{name}.conv_shortcut"] = (cout, cin, 1, 1)

    def attention(name):
        shapes[f"{name}.group_norm"] = (256,)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{name}.{layer}"] = (256, 256)

    down = [[128, 128, 128], [128, 256, 256], [256, 256, 256], [256, 256, 256]]  # into each block, and out
    for i, widths in enumerate(down):
        for j in range(2):
            resnet(f"down_blocks.{i}.resnets.{j}", widths[j], widths[j + 1])
        if i < 3:
            shapes[f"down_blocks.{i}.downsamplers.0.conv"] = (widths[2], widths[2], 3, 3)
    for j in range(2):
        resnet(f"mid_block.resnets.{j}", 256, 256)
        attention(f"down_blocks.1.attentions.{j}")
    attention("mid_block.attentions.0")
    up = [([512, 512, 512], 256), ([512, 512, 512], 256), ([512, 512, 384], 256), ([384, 256, 256], 128)]
    for i, (cins, cout) in enumerate(up):
        for j, cin in enumerate(cins):
            resnet(f"up_blocks.{i}.resnets.{j}", cin, cout)
        if i < 3:
            shapes[f"up_blocks.{i}.upsamplers.0.conv"] = (cout, cout, 3, 3)
    for j in range(3):
        attention(f"up_blocks.2.attentions.{j}")
    return {f"{name}.weight": shape for name, shape in shapes.items()} | {
        f"{name}.bias": shape[:1] for name, shape in shapes.items()
    }


def make(**overrides):
    model = build_model("ddpm-tiny", **{**SMALL, **overrides})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def old_names(state):
    """The attention layers as they were called until early 2023."""
    renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, old in renames.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    return state


def test_cifar10_keys_and_shapes():
    state = to_diffusers(build_model("ddpm-cifar10", device="meta").state_dict())
    assert {key: tuple(value.shape) for key, value in state.items()} == cifar10_shapes()
    assert len(state) == 328


@pytest.mark.parametrize("names", [lambda state: state, old_names], ids=["today", "old"])
@pytest.mark.parametrize("labels", [0, 5])
def test_there_and_back(names, labels):
    model = make(num_classes=labels)
    state = from_diffusers(names(to_diffusers(model.state_dict())))
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_query_key_and_value_in_this_order():
    ours = make().state_dict()
    theirs = to_diffusers(ours)
    thirds = ours["mid.attns.0.qkv.weight"].split(36)
    for letter, third in zip("qkv", thirds):
        assert torch.equal(theirs[f"mid_block.attentions.0.to_{letter}.weight"], third)


def test_nothing_is_dropped_from_a_foreign_state_dict():
    state = to_diffusers(make().state_dict()) | {"conv_out.lora": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv_out\.lora"):
        make().load_state_dict(from_diffusers(state))


def test_an_attention_without_its_key_is_refused():
    state = to_diffusers(make().state_dict())
    del state["mid_block.attentions.0.to_k.bias"]
    with pytest.raises(InputError, match=r"has mid.attns.0.[qv].bias but not mid.attns.0.k.bias"):
        from_diffusers(state)


def test_a_frozen_mask_is_refused():
    model = sparsify(make(width=24), "2:4")
    set_masking(model, frozen=True)
    with pytest.raises(InputError, match=r"mask is a frozen mask, which diffusers cannot hold"):
        to_diffusers(model.state_dict())


def test_configuration_of_the_public_checkpoint():
    config = config_from_diffusers(CIFAR10_CONFIG)
    assert config.dropout == 0.0  # the file, made for sampling, has none
    assert replace(config, dropout=0.1) == PRESETS["ddpm-cifar10"]


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 5, "null_label": False}], ids=["unconditional", "labels"])
def test_configuration_there_and_back(overrides):
    config = make(**overrides).config
    assert config_from_diffusers(json.loads(json.dumps(config_to_diffusers(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos=True: DDPM would need False"),
        ({"block_out_channels": [128, 192, 256, 256]}, r"block_out_channels=\[128, 192, 256, 256\]: DDPM would need"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types=.*: DDPM would need .*AttnUpBlock2D"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "down_block_types=.*: DDPM would need"),
        ({"sample_size": None}, "sample_size=None: must be a non-zero int"),
        ({"out_channels": 6}, "out_channels=6: DDPM would need 3"),
        ({"new_option": 1}, "new_option=1: DDPM knows no such option"),
    ],
)
def test_configurations_of_other_networks_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        config_from_diffusers(CIFAR10_CONFIG | change)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("norm_eps", "norm_eps=1e-05: DDPM would need 1e-06"), ("freq_shift", "freq_shift=0: DDPM would need 1")],
)
def test_an_option_left_out_has_the_default_of_diffusers(left_out, message):
    with pytest.raises(InputError, match=message):
        config_from_diffusers({name: value for name, value in CIFAR10_CONFIG.items() if name != left_out})


@pytest.mark.parametrize("labels", [0, 5])
def test_same_noise_as_diffusers(labels):
    """Both directions of the weights, and the network itself, against the library."""
    diffusers = pytest.importorskip("diffusers")
    model = make(num_classes=labels, null_label=False)
    theirs = diffusers.UNet2DModel(**config_to_diffusers(model.config)).eval()
    theirs.load_state_dict(to_diffusers(model.state_dict()))
    again = make(num_classes=labels, null_label=False)
    again.load_state_dict(from_diffusers(theirs.state_dict()))

    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 721.0])
    y = torch.tensor([4, 0]) if labels else None
    ours = model(x, t, y)
    assert torch.equal(ours, again(x, t, y))
    low = theirs(x, t, y).sample
    # diffusers computes the time embedding in fp32 whatever the model's dtype, so the reference is ours in fp64, which
    # tests/models/test_ddpm.py proves
    high = model.double()(x.double(), t.double(), y)
    assert_as_good_as_torch(ours, high, low)
    assert_as_good_as_torch(low, high, ours)


def test_defaults_of_diffusers_are_still_what_we_say():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(**{name: value for name, value in CIFAR10_CONFIG.items() if name[0] != "_"})
    assert {key: tuple(value.shape) for key, value in theirs.state_dict().items()} == cifar10_shapes()
    assert config_from_diffusers(dict(theirs.config)) == config_from_diffusers(CIFAR10_CONFIG)
