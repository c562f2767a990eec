import torch
from torch import nn

from sparsedm.models import build_model
from sparsedm.samplers import guided
from sparsedm.sparsity import compress, masks, sparsify
from tests.models.references import dit
from tests.tolerance import assert_as_good_as_torch

SMALL = {"image_size": 8, "channels": 4, "patch_size": 2, "dim": 24, "depth": 2, "heads": 3, "num_classes": 5}


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


def test_guidance_is_the_official_one_of_all_channels():
    """With w = official cfg-scale - 1. The official default, the first three channels alone, is not offered."""
    model = build().double().eval()
    x, t, y = some_inputs(model.config)
    null = torch.full_like(y, model.config.num_classes)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        labelled, unlabelled = (dit(weights, model.config, x, t, label)[:, :4] for label in (y, null))
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
