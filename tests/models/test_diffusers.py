import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.models import build_model, model_config
from sparsedm.models.convert import read_foreign
from sparsedm.models.ddpm import PRESETS
from sparsedm.models.diffusers import config_from_diffusers, config_to_diffusers, from_diffusers, to_diffusers
from sparsedm.models.dit import PRESETS as DIT_PRESETS
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
DDPM = {"kind": "ddpm", "image_size": 8, "width": 12, "multipliers": (1, 2, 3), "attention": (4,), "groups": 3}
DIT = {"kind": "dit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2, "num_classes": 5}
NETWORKS = {"ddpm": DDPM, "ddpm with labels": DDPM | {"num_classes": 5, "null_label": False}, "dit": DIT}
every_network = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)


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


def make(config, **overrides):
    model = build_model(config, **overrides)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model.eval()


def old_names(state):
    """The attention layers as they were called until early 2023."""
    renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, old in renames.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    return state


def test_cifar10_keys_and_shapes():
    model = build_model("ddpm-cifar10", device="meta")
    state = to_diffusers(model.state_dict(), model.config)
    assert {key: tuple(value.shape) for key, value in state.items()} == cifar10_shapes()
    assert len(state) == 328


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "names"),
    [(config, lambda state: state) for config in NETWORKS.values()] + [(DDPM, old_names)],
    ids=[*NETWORKS, "ddpm, old names"],
)
def test_weights_there_and_back(config, names):
    model = make(config)
    state = from_diffusers(names(to_diffusers(model.state_dict(), model.config)), model.config)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "ours", "theirs"),
    [
        (DDPM, "mid.attns.0.qkv.weight", "mid_block.attentions.0.to_{}.weight"),
        (DIT, "blocks.1.attn.qkv.bias", "transformer_blocks.1.attn1.to_{}.bias"),
    ],
    ids=["ddpm", "dit"],
)
def test_query_key_and_value_in_this_order(config, ours, theirs):
    model = make(config)
    state = to_diffusers(model.state_dict(), model.config)
    for letter, third in zip("qkv", model.state_dict()[ours].chunk(3)):
        assert torch.equal(state[theirs.format(letter)], third)


@pytest.mark.parametrize(
    ("config", "extra"),
    [(DDPM, "conv_out.lora"), (DIT, "transformer_blocks.0.norm3.weight")],
    ids=["ddpm", "dit"],
)
def test_nothing_is_dropped_from_a_foreign_state_dict(config, extra):
    model = make(config)
    state = to_diffusers(model.state_dict(), model.config) | {extra: torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key"):
        model.load_state_dict(from_diffusers(state, model.config))


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        (DDPM, "mid_block.attentions.0.to_k.bias", r"has mid.attns.0.[qv].bias but not mid.attns.0.k.bias"),
        (DIT, "transformer_blocks.1.attn1.to_k.bias", r"has blocks.1.attn.[qv].bias but not blocks.1.attn.k.bias"),
    ],
    ids=["ddpm", "dit"],
)
def test_an_attention_without_its_key_is_refused(config, key, message):
    model = make(config)
    state = to_diffusers(model.state_dict(), model.config)
    del state[key]
    with pytest.raises(InputError, match=message):
        from_diffusers(state, model.config)


@pytest.mark.parametrize("config", [DDPM | {"width": 24}, DIT], ids=["ddpm", "dit"])
def test_a_frozen_mask_is_refused(config):
    model = sparsify(make(config), "2:4")
    set_masking(model, frozen=True)
    with pytest.raises(InputError, match=r"mask is a frozen mask, which diffusers cannot hold"):
        to_diffusers(model.state_dict(), model.config)


def test_copies_of_an_embedder_that_differ_are_refused():
    model = make(DIT)
    theirs = to_diffusers(model.state_dict(), model.config)
    embedder = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(InputError, match=f"{embedder} differs from that of another block"):
        from_diffusers(theirs | {embedder: theirs[embedder] + 1}, model.config)


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [*NETWORKS.values(), *(preset for preset in DIT_PRESETS.values() if preset.num_classes)],
    ids=str,
)
def test_configuration_there_and_back(config):
    config = model_config(config)
    options = json.loads(json.dumps(config_to_diffusers(config)))
    assert config_from_diffusers(options) == config


def test_the_published_ddpm():
    config = config_from_diffusers(CIFAR10_CONFIG)
    assert config.dropout == 0.0  # the file, made for sampling, has none
    assert replace(config, dropout=0.1) == PRESETS["ddpm-cifar10"]


def test_the_published_dit_is_xlarge():
    """What is left out has its default; the predecessor's many empty options say nothing."""
    predecessor = {"cross_attention_dim": None, "only_cross_attention": False, "attention_type": "default"}
    options = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "out_channels": 8, "norm_eps": 1e-5}
    assert config_from_diffusers(options | predecessor) == DIT_PRESETS["dit-imagenet256-xlarge"]
    assert not config_from_diffusers({}).learn_sigma


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CIFAR10_CONFIG | change, message)
        for change, message in [
            ({"flip_sin_to_cos": True}, "flip_sin_to_cos=True: DDPM would need False"),
            ({"block_out_channels": [128, 192, 256, 256]}, r"block_out_channels=.*: DDPM would need"),
            ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types=.*: DDPM would need .*AttnUpBlock2D"),
            ({"down_block_types": ["SkipDownBlock2D"] * 4}, "down_block_types=.*: DDPM would need"),
            ({"sample_size": None}, "sample_size=None: must be a positive integer"),
            ({"block_out_channels": []}, r"block_out_channels=\[\]: must be a list of positive integers"),
            ({"block_out_channels": [128, "a"]}, r"block_out_channels=\[128, 'a'\]: must be a list of positive"),
            ({"block_out_channels": [0, 1]}, r"block_out_channels=\[0, 1\]: must be a list of positive integers"),
            ({"down_block_types": 7}, "down_block_types=7: must be a list"),
            ({"up_block_types": None}, "up_block_types=None: must be a list"),
            ({"num_class_embeds": "x"}, "num_classes='x': must be of type int"),
            ({"dropout": "x"}, "dropout='x': must be of type float"),
            ({"layers_per_block": 10**9}, "blocks=1000000000: must be from -128 to 128"),
            ({"out_channels": 6}, "out_channels=6: DDPM would need 3"),
            ({"new_option": 1}, "new_option=1: DDPM knows no such option"),
        ]
    ]
    + [
        ({"_class_name": "Transformer2DModel"}, "norm_type='layer_norm': DiT would need 'ada_norm_zero'"),
        ({"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single': DiT would need 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu': DiT would need 'gelu-approximate'"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768: DiT knows no such option"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None: must be a positive integer"),
        ({"patch_size": "2"}, "patch_size='2': must be a positive integer"),
        ({"out_channels": 5}, "out_channels=5: DiT has in_channels=4 or twice as many"),
        ({"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel, and only UNet2DModel and"),
    ],
)
def test_configurations_of_other_networks_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        config_from_diffusers(options)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("norm_eps", "norm_eps=1e-05: DDPM would need 1e-06"), ("freq_shift", "freq_shift=0: DDPM would need 1")],
)
def test_an_option_left_out_has_the_default_of_diffusers(left_out, message):
    with pytest.raises(InputError, match=message):
        config_from_diffusers({name: value for name, value in CIFAR10_CONFIG.items() if name != left_out})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_classes": 0}, "no null label, and DiTTransformer2DModel always has one"),
        ({"null_label": False}, "no null label"),
        ({"mlp_ratio": 2}, "mlp_ratio=2: DiTTransformer2DModel always has 4"),
    ],
)
def test_networks_that_diffusers_does_not_have_are_refused(option, message):
    model = build_model(DIT, device="meta", **option)
    with pytest.raises(InputError, match=message):
        config_to_diffusers(model.config)
    with pytest.raises(InputError, match=message):
        to_diffusers(model.state_dict(), model.config)


# ---- against the library ---------------------------------------------------------------------------------------------


@pytest.mark.interop
@every_network
def test_same_noise_as_diffusers(config):
    """Both directions of the weights, and the network itself, against the library."""
    diffusers = pytest.importorskip("diffusers")
    model = make(config)
    dit = model.config.kind == "dit"
    theirs = (diffusers.DiTTransformer2DModel if dit else diffusers.UNet2DModel)(**config_to_diffusers(model.config))
    theirs.eval().load_state_dict(to_diffusers(model.state_dict(), model.config))
    again = make(config)
    again.load_state_dict(from_diffusers(theirs.state_dict(), model.config))
    for block in theirs.transformer_blocks if dit else ():  # norm2's epsilon is an option there; this is not
        block.norm1.emb.time_proj.downscale_freq_shift = 0

    x, t = torch.randn(2, model.config.channels, 8, 8), torch.tensor([3.0, 721.0])
    y = torch.tensor([4, 0]) if model.config.num_classes else None
    with torch.no_grad():
        ours = model(x, t, y)
        assert torch.equal(ours, again(x, t, y))
        low = theirs(x, t, y).sample if not dit else theirs(x, t, class_labels=y).sample
        # diffusers computes the time embedding in fp32 whatever the model's dtype, so the reference is ours in fp64,
        # which tests/models proves
        high = model.double()(x.double(), t.double(), y)
    low = low[:, : model.config.channels]
    assert_as_good_as_torch(ours, high, low)
    assert_as_good_as_torch(low, high, ours)


@pytest.mark.interop
def test_a_fresh_dit_of_theirs_has_all_the_weights_that_ours_needs():
    diffusers = pytest.importorskip("diffusers")
    config = model_config(DIT)
    theirs = diffusers.DiTTransformer2DModel(**config_to_diffusers(config))
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    assert config_from_diffusers(dict(theirs.config)) == config
    build_model(config).load_state_dict(from_diffusers(theirs.state_dict(), config), strict=True)


@pytest.mark.interop
def test_defaults_of_diffusers_are_still_what_we_say():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(**{name: value for name, value in CIFAR10_CONFIG.items() if name[0] != "_"})
    assert {key: tuple(value.shape) for key, value in theirs.state_dict().items()} == cifar10_shapes()
    assert config_from_diffusers(dict(theirs.config)) == config_from_diffusers(CIFAR10_CONFIG)


def test_a_network_of_ddsms_code_is_not_written_as_another_one():
    with pytest.raises(InputError, match="ddsm=32: a network that computes as DDSM's code does"):
        config_to_diffusers(model_config("ddpm-tiny", ddsm=32))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"])
def test_a_pipeline_with_a_solver_that_stores_an_infinity_is_read(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = model_config("ddpm-tiny", image_size=16)
    pipeline = diffusers.DDPMPipeline(diffusers.UNet2DModel(**config_to_diffusers(config)), diffusers.DDPMScheduler())
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    assert "-Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    assert read_foreign(tmp_path)


def test_the_average_that_diffusers_own_script_leaves_is_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(**config_to_diffusers(model_config("ddpm-tiny", image_size=16)))
    settings = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    average = diffusers.training_utils.EMAModel(
        model.parameters(), **settings, model_cls=diffusers.UNet2DModel, model_config=model.config
    )
    average.step(model.parameters())
    model.save_pretrained(tmp_path / "unet")
    average.save_pretrained(tmp_path / "unet_ema")
    assert read_foreign(tmp_path)


def test_shards_in_fp16_are_read_under_the_name_that_diffusers_gives_them(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(**config_to_diffusers(model_config("ddpm-tiny", image_size=16)))
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="200KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    assert read_foreign(tmp_path)


def test_a_unet_that_leaves_out_its_groups_has_those_of_diffusers():
    left_out = {k: v for k, v in CIFAR10_CONFIG.items() if k not in ("norm_num_groups", "layers_per_block")}
    assert config_from_diffusers(left_out) == config_from_diffusers(CIFAR10_CONFIG)
