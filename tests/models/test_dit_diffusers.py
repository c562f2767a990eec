import pytest
import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.models.dit import PRESETS, DiTConfig
from sparsedm.models.dit_diffusers import config_from_diffusers, config_to_diffusers, from_diffusers, to_diffusers
from sparsedm.sparsity import set_masking, sparsify
from tests.tolerance import assert_as_good_as_torch

SMALL = DiTConfig(image_size=8, dim=32, depth=2, heads=2, num_classes=5)


def build():
    model = build_model(SMALL).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_weights_survive_both_ways():
    state = build().state_dict()
    back = from_diffusers(to_diffusers(state), SMALL)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.interop
def test_the_same_output_once_two_constants_are_the_same():
    """norm2's epsilon is an option there (its default is not the official one); the time frequencies are not."""
    diffusers = pytest.importorskip("diffusers")
    model = build()
    theirs = diffusers.DiTTransformer2DModel(**config_to_diffusers(SMALL)).eval()
    theirs.load_state_dict(to_diffusers(model.state_dict()), strict=True)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 371.5, 999.0]), torch.tensor([0, 3, 5])
    with torch.no_grad():
        expected = theirs.double()(x.double(), t.double(), y).sample[:, :4]
        usual = theirs.float()(x, t, y).sample[:, :4]
        assert_as_good_as_torch(model(x, t, y), expected, usual)


@pytest.mark.interop
def test_a_fresh_network_of_theirs_has_all_the_weights_that_ours_needs():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(**config_to_diffusers(SMALL))
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    config = config_from_diffusers(dict(theirs.config))
    assert config == SMALL
    build_model(config).load_state_dict(from_diffusers(theirs.state_dict(), config), strict=True)


@pytest.mark.parametrize("config", [c for c in PRESETS.values() if c.num_classes] + [SMALL], ids=lambda c: f"{c.dim}")
def test_configuration_survives_both_ways(config):
    assert config_from_diffusers(config_to_diffusers(config)) == config


def test_the_published_configuration_is_xlarge():
    """What is left out has its default; the predecessor's many empty options say nothing."""
    predecessor = {"cross_attention_dim": None, "only_cross_attention": False, "attention_type": "default"}
    options = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "out_channels": 8, "norm_eps": 1e-5}
    assert config_from_diffusers(options | predecessor) == PRESETS["dit-imagenet256-xlarge"]
    assert not config_from_diffusers({}).learn_sigma


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"_class_name": "Transformer2DModel"}, "norm_type='layer_norm': DiT would need 'ada_norm_zero'"),
        ({"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single': DiT would need 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu': DiT would need 'gelu-approximate'"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768: DiT knows no such option"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None: must be a positive integer"),
        ({"patch_size": "2"}, "patch_size='2': must be a positive integer"),
        ({"out_channels": 5}, "out_channels=5: DiT has in_channels=4 or twice as many"),
    ],
)
def test_configurations_of_other_networks_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        config_from_diffusers(option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_classes": 0}, "no null label, and DiTTransformer2DModel always has one"),
        ({"null_label": False}, "no null label"),
        ({"mlp_ratio": 2}, "mlp_ratio=2: DiTTransformer2DModel always has 4"),
    ],
)
def test_networks_that_diffusers_does_not_have_are_refused(option, message):
    config = build_model(SMALL, device="meta", **option).config
    with pytest.raises(InputError, match=message):
        config_to_diffusers(config)


def test_weights_that_have_no_place_are_refused():
    unlabelled = build_model(SMALL, num_classes=0).state_dict()
    with pytest.raises(InputError, match="no labels, and DiTTransformer2DModel always has some"):
        to_diffusers(unlabelled)
    frozen = sparsify(build(), "2:4")
    set_masking(frozen, frozen=True)
    with pytest.raises(InputError, match=r"blocks.0.attn.qkv.mask is a frozen mask"):
        to_diffusers(frozen.state_dict())
    theirs = to_diffusers(build().state_dict())
    embedder = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(InputError, match=f"{embedder} differs from that of another block"):
        from_diffusers(theirs | {embedder: theirs[embedder] + 1}, SMALL)
    del theirs["transformer_blocks.1.attn1.to_k.bias"]
    with pytest.raises(InputError, match=r"gives blocks.1.attn.q.bias but not blocks.1.attn.k.bias"):
        from_diffusers(theirs, SMALL)


def test_other_keys_stay_to_be_listed():
    theirs = to_diffusers(build().state_dict()) | {"transformer_blocks.0.norm3.weight": torch.ones(3)}
    assert "transformer_blocks.0.norm3.weight" in from_diffusers(theirs, SMALL)
