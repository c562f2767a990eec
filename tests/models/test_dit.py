import copy
import functools
import math

import pytest
import torch
from torch import nn

from sparsedm.compression import compress
from sparsedm.diffusion import VPSDE, DDPMSchedule, diffuse, draw_noise, loss, noise_streams, variational_bound
from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.samplers import guided, sample
from sparsedm.sparsity import masks, sparsify
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


# ---- the learned variance --------------------------------------------------------------------------------------------


def test_the_variance_is_the_second_half_of_the_channels():
    model = build().double()
    x, t, y = some_inputs(model.config)
    with torch.no_grad():
        expected = dit(dict(model.named_parameters()), model.config, x, t, y)
        assert_as_good_as_torch(model(x, t, y, variance=True).float(), expected, expected.float())
        assert torch.equal(model(x, t, y), model(x, t, y, variance=True)[:, :4])
    with pytest.raises(InputError, match="has learnt no variance"):
        build(learn_sigma=False)(x.float(), t.float(), y, variance=True)


def test_sampling_with_the_learned_variance_is_the_step_by_step_formula():
    """Three steps of DiT's sampler with guidance, whose variance is that of the labelled branch."""
    model = build().double().eval()
    schedule, y = DDPMSchedule(), torch.tensor([1, 4])
    sample_of = functools.partial(
        sample, model, schedule, 2, (4, 8, 8), sampler="ddpm-learned", steps=3, y=y, guidance=0.5, dtype=torch.float64
    )
    streams = noise_streams(2, 0, 0)
    x, times = draw_noise(streams, (4, 8, 8), "cpu", torch.float64), [999, 500, 0]
    weights = dict(model.named_parameters())
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    cumulative = torch.cumprod(1 - beta, 0)
    for i, t in enumerate(times):
        clock = torch.full((2,), float(t), dtype=torch.float64)
        with torch.no_grad():
            labelled, plain = (dit(weights, model.config, x, clock, label) for label in (y, torch.full_like(y, 5)))
        eps, v = 1.5 * labelled[:, :4] - 0.5 * plain[:, :4], labelled[:, 4:]
        x0 = (x - (1 - cumulative[t]).sqrt() * eps) / cumulative[t].sqrt()
        if t == 0:
            break
        before = cumulative[times[i + 1]]
        large = 1 - cumulative[t] / before  # the β of a schedule of these three times
        small = large * (1 - before) / (1 - cumulative[t])
        mean = large * before.sqrt() / (1 - cumulative[t]) * x0
        mean = mean + (1 - before) * (1 - large).sqrt() / (1 - cumulative[t]) * x
        deviation = (0.5 * ((v + 1) / 2 * large.log() + (1 - v) / 2 * small.log())).exp()
        x = mean + deviation * draw_noise(streams, (4, 8, 8), "cpu", torch.float64)
    assert_as_good_as_torch(sample_of().float(), x0, x0.float())


def test_the_variational_bound_is_the_divergence_of_two_gaussians():
    """Against torch.distributions, value and gradient, and at t = 0 the likelihood of a level."""
    schedule = DDPMSchedule()
    x0 = torch.rand(5, 4, 8, 8, dtype=torch.float64) * 1.8 - 0.9
    t = torch.tensor([1.0, 2, 417, 998, 999], dtype=torch.float64)
    noise, eps = torch.randn(2, *x0.shape, dtype=torch.float64)
    v = torch.rand_like(x0, requires_grad=True)
    x = diffuse(x0, t, noise, schedule)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    cumulative = torch.cumprod(1 - beta, 0)
    k = t.long()
    now, before, beta = (values.view(5, 1, 1, 1) for values in (cumulative[k], cumulative[k - 1], beta[k]))
    small = beta * (1 - before) / (1 - now)
    predicted = (x - (1 - now).sqrt() * eps) / now.sqrt()
    true, mine = (
        before.sqrt() * beta / (1 - now) * clean + (1 - before) * (1 - beta).sqrt() / (1 - now) * x
        for clean in (x0, predicted)
    )
    variance = (beta.log() * (1 + v) / 2 + small.log() * (1 - v) / 2).exp()
    q, p = torch.distributions.Normal(true, small.sqrt()), torch.distributions.Normal(mine, variance.sqrt())
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    out = variational_bound(schedule, x0, x, t, eps, v)
    assert torch.allclose(out, expected, rtol=1e-9)
    assert torch.allclose(*(torch.autograd.grad(value.sum(), v)[0] for value in (out, expected)), rtol=1e-7)

    first = torch.zeros(5, dtype=torch.float64)
    x = diffuse(x0, first, noise, schedule)
    close = noise + 0.01 * eps
    out = variational_bound(schedule, x0, x, first, close, v)
    predicted = (x - (1 - cumulative[0]).sqrt() * close) / cumulative[0].sqrt()
    small = torch.tensor(beta.new_tensor(0.02 - 1e-4).item() / 999 + 1e-4, dtype=torch.float64)  # β_1
    small = small * (1 - cumulative[0]) / (1 - cumulative[1])
    deviation = ((1 + v) / 4 * math.log(1e-4) + (1 - v) / 4 * small.log()).exp()
    normal = torch.distributions.Normal(predicted, deviation)
    expected = -(normal.cdf(x0 + 1 / 255) - normal.cdf(x0 - 1 / 255)).log().flatten(1).mean(1) / math.log(2)
    assert torch.allclose(out, expected, rtol=2e-3, atol=2e-3)  # the original approximates the distribution function

    with pytest.raises(InputError, match="a learned variance needs discrete times"):
        variational_bound(VPSDE(), x0, x, first, eps, v)


def test_training_learns_the_variance(tmp_path):
    """The loss is the squared error and the bound; the head of the variance moves, that of the noise as without it."""
    model = build()
    x0, y = torch.rand(6, 4, 8, 8) * 2 - 1, torch.arange(6) % 5
    draw = dict(y=y, generator=torch.Generator().manual_seed(3))
    terms = loss(model, x0, DDPMSchedule(), variance=True, **draw)
    terms.total.backward()
    assert terms.total > terms.noise
    head = model.final_layer.linear.weight.grad.view(2, 2, 8, 24)  # rows: pixels of a patch, then channels
    plain = copy.deepcopy(model)
    plain.zero_grad()
    draw["generator"].manual_seed(3)
    loss(plain, x0, DDPMSchedule(), **draw).total.backward()
    of_noise = plain.final_layer.linear.weight.grad.view(2, 2, 8, 24)
    assert torch.allclose(head[:, :, :4], of_noise[:, :, :4], rtol=1e-4, atol=1e-7)
    assert not of_noise[:, :, 4:].any()
    assert head[:, :, 4:].abs().amax() > 0
