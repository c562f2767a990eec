"""Samplers as the originals have them: U-ViT, DDSM, EDM, guided diffusion."""

import itertools
import math

import numpy as np
import pytest
import torch

from sparsedm import samplers
from sparsedm.diffusion import VPSDE, DDPMSchedule
from tests.test_diffusion import SHAPE, Gaussian
from tests.tolerance import assert_as_good_as_torch


def drawn_noise(count, like, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(like.shape, generator=generator, dtype=like.dtype) for _ in range(count)]


def test_uvits_own_euler_maruyama_rule():
    """github.com/baofff/U-ViT, sde.py: drift -β(t)x/2 - β(t) score, diffusion √β(t), from linspace(1e-3, 1) to 0."""
    schedule, steps = VPSDE(), 7
    net, x = Gaussian(schedule), torch.randn(4, *SHAPE, dtype=torch.float64)
    noise = drawn_noise(steps - 1, x)
    times = [0.0, *np.linspace(1e-3, 1, steps)]
    expected, fresh = x, iter(noise)
    for s, t in list(itertools.pairwise(times))[::-1]:
        beta, alpha2 = 0.1 + 19.9 * t, math.exp(-0.1 * t - 19.9 * t * t / 2)
        score = -net(expected, torch.full((4,), 999 * t, dtype=torch.float64)) / math.sqrt(1 - alpha2)
        mean = expected + (-0.5 * beta * expected - beta * score) * (s - t)
        expected = mean + math.sqrt(beta * (t - s)) * next(fresh) if s else mean
    grid, fresh = samplers.time_grid(schedule, steps, "time"), iter(noise)
    out = samplers.integrate(net, schedule, x, grid, "euler-maruyama-uvit", lambda: next(fresh))
    assert_as_good_as_torch(out.float(), expected, expected.float())


@pytest.mark.parametrize("schedule", [DDPMSchedule(), VPSDE()], ids=["ddpm", "vp-sde"])
def test_the_last_step_of_unets_sampler_removes_the_last_noise(schedule):
    """A network that knows the only image, 0: what stays is the noise of the last time, which has to go."""
    last = samplers.Time(*samplers.time_table(schedule, samplers.time_grid(schedule, 1000, "time"))[-1])
    x = torch.ones((), dtype=torch.float64) * last.sigma
    out, _ = samplers.euler_maruyama_uvit(lambda x, t: (x * 0, x / t.sigma, None), x, None, (), last)
    assert abs(out) < 0.1 * last.sigma


@pytest.mark.parametrize(("sampler", "off"), [("euler-maruyama-uvit", 0.028), ("euler-maruyama", 0.106)])
def test_how_far_off_the_spread_of_narrow_data_is(sampler, off):
    """The samplers are linear for Gaussian data: of a variance v0 the exact one after 50 steps, by propagation."""
    schedule, steps, narrow = VPSDE(), 50, 0.25**2
    rows = samplers.time_table(schedule, samplers.time_grid(schedule, steps, "time"))
    variance = torch.ones((), dtype=torch.float64)
    for i, row in enumerate(rows):
        t = samplers.Time(*row)
        total = t.alpha**2 * narrow + t.sigma**2

        def predict(x, _, t=t, total=total):
            eps = t.sigma * x / total
            return (x - t.sigma * eps) / t.alpha, eps, None

        one, none = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        if i == steps - 1:
            gain, _ = samplers.SAMPLERS[sampler].last(predict, one, none, (), t)
            variance = gain**2 * variance
        else:
            s = samplers.Time(*rows[i + 1])
            gain, _ = samplers.SAMPLERS[sampler].step(predict, one, none, (), t, s)
            spread, _ = samplers.SAMPLERS[sampler].step(predict, none, one, (), t, s)
            variance = gain**2 * variance + spread**2
    assert abs(variance.sqrt().item() / 0.25 - 1) == pytest.approx(off, abs=0.002)


@pytest.mark.parametrize("k", [1, 500, 999])
@pytest.mark.parametrize("sampler", ["ddpm", "ddpm-large", "ddpm-learned"])
def test_ancestral_variances_of_one_step(sampler, k):
    """From t = k to k - 1 against the tables of DDPM's code, in numpy: fixedsmall, fixedlarge, learned range."""
    beta = np.linspace(1e-4, 0.02, 1000)
    cumulative = np.cumprod(1 - beta)
    before = cumulative[k - 1]
    small, large = beta[k] * (1 - before) / (1 - cumulative[k]), beta[k]
    v = 0.3
    variance = {"ddpm": small, "ddpm-large": large, "ddpm-learned": large ** ((1 + v) / 2) * small ** ((1 - v) / 2)}
    x, eps, noise = torch.randn(3, 2, *SHAPE, dtype=torch.float64)
    x0 = (x - math.sqrt(1 - cumulative[k]) * eps) / math.sqrt(cumulative[k])
    mean = beta[k] * math.sqrt(before) / (1 - cumulative[k]) * x0
    mean = mean + (1 - before) * math.sqrt(1 - beta[k]) / (1 - cumulative[k]) * x
    expected = mean + math.sqrt(variance[sampler]) * noise
    t, s = (
        samplers.Time(*row) for row in samplers.time_table(DDPMSchedule(), torch.tensor([float(k), k - 1.0]).double())
    )
    out, _ = samplers.SAMPLERS[sampler].step(lambda *_: (x0, eps, v), x, noise, (), t, s)
    assert_as_good_as_torch(out.float(), expected, expected.float())
