"""What U-ViT, DiT and DDPM share: nine tests, each for every network and its variants."""

import copy
import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsedm.errors import InputError
from sparsedm.models import MODELS, build_model, ddpm, model_config, uvit
from tests.models import references
from tests.tolerance import assert_as_good_as_torch

NULL_FREE = {"num_classes": 5, "null_label": False}
BASES = {  # small, with unequal and odd sizes
    "uvit": {"kind": "uvit", "image_size": 8, "dim": 24, "depth": 4, "heads": 3},
    "dit": {"kind": "dit", "image_size": 8, "dim": 24, "depth": 2, "heads": 3, "num_classes": 5},
    "ddpm": {"kind": "ddpm", "image_size": 8, "width": 12, "multipliers": (1, 2, 3), "attention": (4,), "groups": 3}
    | {"dropout": 0.0},
}
CASES = {
    "uvit": {},
    "uvit labels": {"num_classes": 5},
    "uvit labels without null": NULL_FREE,
    "uvit context": {"channels": 4, "context_tokens": 3, "context_dim": 10},
    "uvit no final conv": {"channels": 4, "num_classes": 5, "final_conv": False},
    "uvit as SparseDM's": {"qkv_bias": True, "mlp_time_embed": True},
    "dit labels": {},
    "dit labels without null": NULL_FREE,
    "dit": {"num_classes": 0},
    "dit noise only": {"learn_sigma": False, "image_size": 12, "channels": 3},
    "ddpm": {},
    "ddpm labels": {"num_classes": 5},
    "ddpm labels without null": NULL_FREE,
    "ddpm one level": {"multipliers": (1,), "attention": (), "channels": 4, "blocks": 1},
}
SHALLOW = {"uvit": {"depth": 2}, "dit": {"depth": 1}, "ddpm": {"multipliers": (1, 2), "blocks": 1}}
LABELLED = [name for name in CASES if name.endswith(" labels")]
every_case = pytest.mark.parametrize("case", CASES)
every_network = pytest.mark.parametrize("case", LABELLED)


def build(case, **overrides):
    """A small network with weights far from their start: zero biases and branches would hide mistakes."""
    model = build_model(BASES[case.split()[0]], **CASES[case] | overrides)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.25)
    return model


def make(case, **overrides):
    """The network in fp64, and inputs."""
    model = build(case, **overrides).double()
    config = model.config
    x = torch.randn(2, config.channels, config.image_size, config.image_size, dtype=torch.float64)
    inputs = [x, torch.tensor([3.25, 721.0], dtype=torch.float64)]
    inputs.append(torch.tensor([4, 0]) if config.num_classes else None)
    if getattr(config, "context_tokens", 0):
        inputs.append(torch.randn(2, config.context_tokens, config.context_dim, dtype=torch.float64))
    return model, inputs


def low(values):
    return [v.detach().float() if v is not None and v.is_floating_point() else v for v in values]


def reference(model, weights, inputs):
    return getattr(references, model.config.kind)(weights, model.config, *inputs)[:, : model.config.channels]


@every_case
def test_output_and_every_gradient(case):
    model, inputs = make(case)
    weights = dict(model.named_parameters())
    low_weights = {name: p.detach().float().requires_grad_() for name, p in weights.items()}
    low_inputs = low(inputs)
    for x in (inputs[0], low_inputs[0]):
        x.requires_grad_()
    out, ref = model(*inputs), reference(model, weights, inputs)
    ref_low = reference(model, low_weights, low_inputs)
    assert_as_good_as_torch(out, ref, ref_low)

    def gradients(out, x, weights):
        wanted = [x, *(p for p in weights.values() if p.requires_grad)]
        return torch.autograd.grad(out, wanted, dy.to(out.dtype), allow_unused=True)

    dy = torch.randn_like(out)
    sides = (out, inputs[0], weights), (ref, inputs[0], weights), (ref_low, low_inputs[0], low_weights)
    for g, g_ref, g_low in zip(*(gradients(*side) for side in sides), strict=True):
        assert_as_good_as_torch(g, g_ref, g_low)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_network
def test_single_precision_is_as_good_as_plain_torch(case, memory_format):
    model, inputs = make(case)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ref = reference(model, weights, inputs)
    ref_low = reference(model, {name: w.float() for name, w in weights.items()}, low(inputs))
    x, *rest = low(inputs)
    model = model.float().to(memory_format=memory_format)
    assert_as_good_as_torch(model(x.to(memory_format=memory_format), *rest), ref, ref_low)


@pytest.mark.parametrize("network", [uvit, ddpm], ids=["uvit and dit", "ddpm"])
def test_timestep_embedding_by_hand(network):
    """U-ViT: cosines, then sines, of 1 and 1e-2; DDPM: sines, then cosines, of 1 and 1e-4. Integers are allowed."""
    step = 0.01 if network is uvit else 1e-4
    embedding = network.timestep_embedding(torch.tensor([2, 999]), 4)
    expected, torch_low = [], []
    for t in (2, 999):
        waves = [math.cos(t), math.cos(step * t)], [math.sin(t), math.sin(step * t)]
        first, second = waves if network is uvit else waves[::-1]
        expected.append([*first, *second])
    angles = torch.tensor([2.0, 999.0])[:, None] * torch.tensor([1.0, step])
    torch_low = [angles.cos(), angles.sin()] if network is uvit else [angles.sin(), angles.cos()]
    assert embedding.dtype == network.timestep_embedding(torch.tensor([2.0]).bfloat16(), 4).dtype == torch.float32
    assert network.timestep_embedding(torch.tensor([2.0]).double(), 4).dtype == torch.float64
    assert_as_good_as_torch(embedding, torch.tensor(expected, dtype=torch.float64), torch.cat(torch_low, -1))


# parameters and MACs. U-ViT's of CIFAR-10 by hand, without attention: 13 blocks of 12 d² weights, 6 skips of 2 d², both
# ends and the last convolution. DiT's: table 4 of its paper, where "Gflops" are all MACs. DDPM's: see test_ddpm.py
SIZES = {
    "uvit-tiny": (1_076_356, None),
    "uvit-cifar10-small": (44_255_328, 257 * 512**2 * (13 * 12 + 6 * 2) + 2 * 256 * 12 * 512 + 81 * 1024),
    "uvit-celeba64-small": (44_292_228, None),
    "uvit-imagenet64-mid": (130_940_292, None),
    "uvit-imagenet64-large": (286_827_652, None),
    "uvit-imagenet256-large": (286_763_172, None),
    "uvit-imagenet256-huge": (500_832_016, None),
    "uvit-coco-small": (44_692_644, None),
    "dit-imagenet256-small": (33e6, 6.06e9),
    "dit-imagenet256-base": (130e6, 23.01e9),
    "dit-imagenet256-large": (458e6, 80.71e9),
    "dit-imagenet256-xlarge": (675e6, 118.64e9),
    "dit-imagenet256-xlarge-patch8": (677e6, 7.39e9),
    "dit-imagenet512-xlarge": (675e6, 524.6e9),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    parameters, macs = SIZES[name]
    model = build_model(name, device="meta").eval()
    about = 0.02 if name.startswith("dit") else 0
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=about)
    with FlopCounterMode(display=False) as counter:
        model(*model.example_inputs())
    flops = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for operation, count in flops.items() if "bmm" in operation or "attention" in operation)
    if name == "uvit-cifar10-small":
        assert attention // 2 == 13 * 2 * 257 * 257 * 512
    if macs is not None:
        counted = sum(flops.values()) - (0 if name.startswith("dit") else attention)
        assert counted // 2 == pytest.approx(macs, rel=about / 20)


@every_network
def test_no_label_is_the_null_label(case):
    model, (x, t, _) = make(case)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 5])))
    assert not torch.equal(model(x, t), model(x, t, torch.tensor([4, 4])))


@pytest.mark.parametrize("name", [*MODELS, *CASES])
def test_the_contract(name):
    """Configuration through JSON, example inputs that fit and repeat, and what every network has."""
    model = build(name) if name in CASES else build_model(name, device="meta").eval()
    config = model.config
    assert model_config(json.loads(json.dumps(asdict(config)))) == model_config(config) == config
    assert name not in MODELS or model_config(name) == config
    first, again = model.example_inputs(3), model.example_inputs(3)
    assert first[0].is_meta or all(a is b or torch.equal(a, b) for a, b in zip(first, again))
    assert model(*first).shape == first[0].shape == (3, config.channels, config.image_size, config.image_size)
    assert config.kind == name.replace("-", " ").split()[0]
    assert config.num_classes >= 0
    assert isinstance(model.sparse_layers, str)


@every_network
def test_compiles_to_one_graph(case):
    model, inputs = make(case, **SHALLOW[case.split()[0]])
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(*inputs), model(*inputs))


@every_network
def test_bfloat16_weights_and_autocast_run(case):
    model = build(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(*model.example_inputs(2))).all()
    low_model = copy.deepcopy(model).bfloat16()
    assert low_model(*low_model.example_inputs(2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("case", "overrides", "message"),
    [
        ("uvit", {"image_size": 30, "patch_size": 4}, "image_size=30: must be a multiple of patch_size=4"),
        ("uvit", {"heads": 5}, "dim=24: must be even and a multiple of heads=5"),
        ("uvit", {"dim": 5, "heads": 5}, "dim=5: must be even"),
        ("uvit", {"depth": 5}, "depth=5: must be even"),
        ("uvit", {"depth": -2}, "depth=-2: must be at least 0"),
        ("uvit", {"patch_size": 0}, "patch_size=0: must be at least 1"),
        ("uvit", {"schedule": "cosine"}, "U-ViT schedule='cosine': must be one of vp-sde, ddpm, scaled-linear"),
        ("dit", {"dim": 0}, "DiT dim=0: must be at least 1"),
        ("dit", {"image_size": 9}, "image_size=9: must be a multiple of patch_size=2"),
        ("dit", {"dim": 26}, "dim=26: must be a multiple of 4 and of heads=3"),
        ("dit", {"heads": 5}, "multiple of 4 and of heads=5"),
        ("dit", {"num_classes": -1}, "num_classes=-1: must be at least 0"),
        ("dit", {"schedule": ""}, "DiT schedule=''"),
        ("ddpm", {"image_size": 30}, "image_size=30: cannot be halved 2 times"),
        ("ddpm", {"attention": (4, 5)}, r"attention=\(4, 5\): must be among the resolutions \(8, 4, 2\)"),
        ("ddpm", {"groups": 5}, "width=12: must be even, over 2 and a multiple of groups=5"),
        ("ddpm", {"width": 2, "groups": 1}, "width=2: must be even, over 2"),
        ("ddpm", {"multipliers": ()}, r"multipliers=\(\): must be one or more"),
        ("ddpm", {"multipliers": (1, 0, 1)}, r"multipliers=\(1, 0, 1\): must be"),
        ("ddpm", {"dropout": 1.0}, "dropout=1.0: must be at least 0 and less than 1"),
        ("ddpm", {"dropout": math.nan}, "dropout=nan: must be from -16777216 to 16777216"),
        ("ddpm", {"blocks": 0}, "blocks=0: must be at least 1"),
        ("ddpm", {"num_classes": -1}, "num_classes=-1: must be at least 0"),
        ("ddpm", {"schedule": "vp"}, "DDPM schedule='vp'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(case, overrides, message):
    with pytest.raises(InputError, match=message):
        build_model(BASES[case], device="meta", **overrides)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (2, 3, 16, 16)}, r"input x has shape \(2, 3, 16, 16\): this model takes \(2, \d, 8, 8\)"),
        ({"t": ()}, r"input t has shape \(\): this model takes \(2,\)"),
        ({"y": (1,)}, r"input y has shape \(1,\): this model takes \(2,\)"),
        ({"y": None}, r"input y has shape None: this model takes \(2,\)"),
    ],
    ids=["x", "t", "y", "no y"],
)
@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("without null")])
def test_wrong_inputs_are_refused(case, changed, message):
    model = build(case)
    shapes = {"x": (2, model.config.channels, 8, 8), "t": (2,), "y": (2,)} | changed
    inputs = {name: None if shape is None else torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(InputError, match=message):
        model(**inputs)


@every_network
def test_labels_that_no_class_has_are_refused(case):
    model = build(case)
    x, t = torch.zeros(2, model.config.channels, 8, 8), torch.zeros(2)
    for wrong in (-1, 6):
        with pytest.raises(
            InputError, match=f"labels from {min(wrong, 1)} to {max(wrong, 1)}: this model takes 0 to 5"
        ):
            model(x, t, torch.tensor([1, wrong]))
    with pytest.raises(InputError, match="y is float32: labels are whole numbers"):
        model(x, t, torch.zeros(2))
    with pytest.raises(InputError, match="x is uint8: images are floating point, from -1 to 1"):
        model(x.byte(), t, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("case", ["uvit", "dit", "ddpm"])
def test_labels_for_a_network_without_classes_are_refused(case):
    model = build(case)
    with pytest.raises(InputError, match=r"input y has shape \(2,\): this model takes None"):
        model(torch.zeros(2, model.config.channels, 8, 8), torch.zeros(2), torch.zeros(2))


def test_heads_are_the_published_ones():
    """No shape of a weight shows them: with others an official checkpoint loads and computes something else."""
    heads = {("uvit", 512): 8, ("uvit", 768): 12, ("uvit", 1024): 16, ("uvit", 1152): 16}
    heads |= {("dit", 384): 6, ("dit", 768): 12, ("dit", 1024): 16, ("dit", 1152): 16}
    for name, config in MODELS.items():
        if config.kind in ("uvit", "dit") and not name.endswith("tiny"):
            assert config.heads == heads[config.kind, config.dim], name
