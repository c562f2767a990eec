"""Samplers and the validation loss are proved on Gaussian data, whose noise predictor and ODE flow are known exactly.

x_0 ~ N(μ, Σ) gives x_t ~ N(α μ, C_t) with C_t = α² Σ + σ² I, the predictor ε̂ = σ C_t⁻¹ (x - α μ), and the flow of the
probability-flow ODE from t to s: x_s = α_s μ + C_s^(1/2) C_t^(-1/2) (x_t - α_t μ).
"""

import math
import types

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from sparsedm import diffusion
from sparsedm.diffusion import VPSDE, DDPMSchedule
from sparsedm.errors import InputError
from sparsedm.models import MODELS
from tests.tolerance import assert_as_good_as_torch

SHAPE = (3, 1, 1)
MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
ROOT = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.2, 0.0], [-0.2, 0.1, 0.05]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T  # eigenvalues from 0.002 to 0.5: nearly a plane, as images are
SCHEDULES = pytest.mark.parametrize("schedule", diffusion.SCHEDULES.values(), ids=diffusion.SCHEDULES)


class Gaussian:
    """The exact noise predictor for N(mean, covariance), as a network: it knows the time in its own units only."""

    def __init__(self, schedule, mean=MEAN, covariance=COVARIANCE):
        self.schedule, self.mean = schedule, mean
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance)

    def __call__(self, x, t):
        assert t.shape == (len(x),)
        t = t[0] - self.schedule.first_index if isinstance(self.schedule, DDPMSchedule) else t[0] / 999
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        centred = (x.flatten(1) - alpha * self.mean) @ self.basis
        return (sigma * centred / self._variance(t) @ self.basis.T).view(x.shape)

    def _variance(self, t):
        return self.schedule.alpha(t) ** 2 * self.eigenvalues + self.schedule.sigma(t) ** 2

    def flow(self, x, t, s):
        centred = (x.flatten(1) - self.schedule.alpha(t) * self.mean) @ self.basis
        scaled = centred * (self._variance(s) / self._variance(t)).sqrt()
        return (self.schedule.alpha(s) * self.mean + scaled @ self.basis.T).view(x.shape)

    def data(self, x, t):
        eps = self(x, self.schedule.model_time(t).expand(len(x)))
        return (x - self.schedule.sigma(t) * eps) / self.schedule.alpha(t)


class Elementwise:
    """A stand-in network without sums over elements, so that its rounding cannot depend on the batch size."""

    config = types.SimpleNamespace(num_classes=10)

    def __call__(self, x, t, y=None):
        shift = 0 if y is None else y.view(-1, 1, 1, 1) / 16
        return (x * (t.view(-1, 1, 1, 1) / 999) - shift) * 0.5


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 3, 1)
        self.drop = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.BatchNorm2d(3).eval()

    def forward(self, x, t, y=None):
        return self.frozen(self.drop(self.mix(x))) * (1 + t.view(-1, 1, 1, 1) / 999)


# ---- schedules


@SCHEDULES
def test_schedule_matches_its_definition(schedule):
    """Against the product (integral) of β written out; twice what torch.float32 arithmetic itself loses."""
    if isinstance(schedule, DDPMSchedule):
        t = torch.arange(1000, dtype=torch.float64)
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        if schedule.scaled:  # Stable Diffusion's
            beta = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2
        alpha = torch.stack([torch.prod(1 - beta[: k + 1]) for k in range(1000)]).sqrt()
        rate = -torch.log1p(-beta).index_select(0, t.long().clamp(min=1))  # no interval ends at the first time
    else:
        t = torch.linspace(1e-4, 1, 1000, dtype=torch.float64)
        alpha, rate = torch.exp(-0.5 * (0.1 * t + 19.9 * t * t / 2)), 0.1 + 19.9 * t
    sigma = (1 - alpha.square()).sqrt()
    for out, reference in [
        (schedule.alpha(t), alpha),
        (schedule.sigma(t), sigma),
        (schedule.half_log_snr(t), alpha.log() - sigma.log()),
        (schedule.beta(t), rate),
    ]:
        assert_as_good_as_torch(out.float(), reference, reference.float())


@SCHEDULES
def test_time_is_recovered_from_the_half_log_snr(schedule):
    t = torch.linspace(schedule.first, schedule.last, 777, dtype=torch.float64)
    recovered = schedule.time_at_half_log_snr(schedule.half_log_snr(t))
    assert_as_good_as_torch(recovered.float(), t, t.float())


def test_ddpm_log_alpha_is_continuous_and_linear_between_the_integers():
    schedule = DDPMSchedule()
    left, middle, right = schedule.log_alpha(torch.tensor([41.0, 41.25, 42.0], dtype=torch.float64))
    assert middle == left + 0.25 * (right - left)
    assert right < left


def test_each_kind_of_model_has_the_schedule_it_was_published_with():
    discrete = {name for name, config in MODELS.items() if "coco" in name or "huge" in name}
    for name, config in MODELS.items():
        expected = VPSDE() if config.kind == "uvit" else DDPMSchedule()
        if name in discrete:  # github.com/baofff/U-ViT, train_ldm_discrete.py and train_t2i_discrete.py
            expected = DDPMSchedule(0.00085, 0.012, scaled=True, first_index=1)
        assert diffusion.schedule_of(types.SimpleNamespace(config=config)) == expected
    assert len(discrete) == 4


def test_the_scaled_linear_schedule_is_stable_diffusions():
    """Against the product written out in numpy, and its published ends: ᾱ of the first and last step."""
    schedule = diffusion.SCHEDULES["scaled-linear"]
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    cumulative = np.cumprod(1 - beta)
    times = torch.arange(1000, dtype=torch.float64)
    assert np.allclose(schedule.alpha(times).square().numpy(), cumulative, rtol=1e-12, atol=0)
    assert abs(schedule.alpha(times[-1:]).square().item() - 0.0046602) < 1e-6
    assert schedule.model_time(times)[[0, -1]].tolist() == [1, 1000]
    assert torch.equal(schedule.time_of(schedule.model_time(times)), times)


def test_model_time_is_in_units_of_0_to_999():
    ends = torch.tensor([0.0, 1.0])
    assert VPSDE().model_time(ends).tolist() == [0, 999]
    assert DDPMSchedule().model_time(DDPMSchedule().training_time(torch.tensor([0.0, 1 - 2**-24]))).tolist() == [0, 999]
    assert VPSDE().training_time(ends).tolist() == [1, 0]


# ---- loss


def hand_written_loss(weight, x0, schedule, seed, teacher_weight, w_noise, w_kd):
    """Terms and dtotal/dweight for the network weight * x * (1 + t/999), with the derivative written out."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(len(x0), generator=g).to(x0)
    noise = torch.randn(x0.shape, generator=g).to(x0)
    t = 1 - u if isinstance(schedule, VPSDE) else torch.floor(1000 * u)
    k = 999 * t if isinstance(schedule, VPSDE) else t + schedule.first_index
    alpha, sigma = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
    base = (alpha * x0 + sigma * noise) * (1 + k[:, None, None, None] / 999)
    noise_error, transfer_error = weight * base - noise, (weight - teacher_weight) * base
    total = w_noise * (noise_error**2).mean() + w_kd * (transfer_error**2).mean()
    gradient = (2 * w_noise * noise_error * base + 2 * w_kd * transfer_error * base).mean()
    return total, (noise_error**2).mean(), (transfer_error**2).mean(), gradient


@SCHEDULES
@pytest.mark.parametrize(("w_noise", "w_kd"), [(1.0, 0.0), (1.0, 0.1), (0.0, 1.0)])
def test_loss_values_and_gradients(schedule, w_noise, w_kd):
    results = []
    for dtype in (torch.float32, torch.float64):
        x0 = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
        weight, teacher_weight = (torch.tensor(w, dtype=dtype, requires_grad=True) for w in (0.7, 0.9))

        def network(w):
            return lambda x, t: w * x * (1 + t.view(-1, 1, 1, 1) / 999)

        terms = diffusion.loss(
            network(weight),
            x0,
            schedule,
            generator=torch.Generator().manual_seed(9),
            teacher=network(teacher_weight),
            w_kd=w_kd,
            w_noise=w_noise,
        )
        terms.total.backward()
        assert teacher_weight.grad is None
        assert not terms.noise.requires_grad
        assert not terms.transfer.requires_grad
        by_hand = hand_written_loss(weight.detach(), x0, schedule, 9, teacher_weight.detach(), w_noise, w_kd)
        results.append((torch.stack([*terms, weight.grad]).detach(), torch.stack(by_hand)))
    (ours, low), (ours_high, high) = results
    if not w_kd:
        assert ours[2] == 0
        low[2] = high[2] = 0
    for out, reference, torch_low in zip(ours, high, low):
        assert_as_good_as_torch(out, reference, torch_low)
    for out, reference in zip(ours_high, high):
        assert_as_good_as_torch(out.float(), reference, reference.float())


def test_loss_passes_labels_to_student_and_teacher():
    y = torch.tensor([1, 2])
    seen = []

    def network(x, t, labels):
        seen.append(labels)
        return x

    diffusion.loss(network, torch.zeros(2, 3, 2, 2), VPSDE(), y=y, teacher=network, w_kd=1.0)
    assert len(seen) == 2
    assert all(torch.equal(labels, y) for labels in seen)


def test_loss_covers_all_times():
    """u ~ U[0, 1) reaches the network as k = 0..999, every one about equally often: 5 standard errors of a count."""
    counts = torch.zeros(1000)

    def network(x, t):
        counts.index_add_(0, t.long(), torch.ones(len(t)))
        assert torch.equal(t, t.round())
        return x

    n = 200_000
    diffusion.loss(network, torch.zeros(n, 1, 1, 1), DDPMSchedule(), generator=torch.Generator().manual_seed(0))
    assert ((counts - n / 1000).abs() < 5 * math.sqrt(n / 1000)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_16_bits_see_all_times_and_lose_nothing_but_their_own_bits(dtype):
    seen = []

    def network(x, t):
        seen.append((x.dtype, t))
        return torch.zeros_like(x)

    x0 = torch.zeros(50_000, 1, 1, 1, dtype=dtype)
    terms = diffusion.loss(network, x0, DDPMSchedule(), generator=torch.Generator().manual_seed(0))
    wide = diffusion.loss(network, x0.float(), DDPMSchedule(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(terms.total, wide.total)
    assert seen[0][0] == dtype
    assert torch.equal(seen[0][1], seen[1][1])
    assert len(seen[0][1].unique()) == 1000
    losses = [diffusion.validation_loss(network, x[:512], DDPMSchedule()) for x in (x0, x0.float())]
    assert losses[0] == losses[1]
    assert torch.equal(seen[-1][1], seen[-3][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_no_noise_and_no_time(dtype):
    x, schedule = torch.randn(4, 3, 4, 4), diffusion.SCHEDULES["vp-sde"]

    def drawn():
        seen = []
        diffusion.loss(lambda x, t: seen.append((x, t)) or x, x, schedule, generator=torch.Generator().manual_seed(0))
        return [*seen[0], diffusion.initial_noise(2, (3, 4, 4), seed=0)]

    before = drawn()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, drawn(), before))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("w_kd", [0.0, 0.3])
def test_velocity_weighting_is_the_error_of_the_velocity(w_kd):
    schedule, x0 = VPSDE(), torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def velocity(x, eps, t):
        """v = α ε - σ x0, with x0 = (x - σ ε) / α."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * eps - sigma * (x - sigma * eps) / alpha

    seen = []

    def network(x, t):
        seen.append((x, t.view(-1, 1, 1, 1) / 999))
        return 0.9 * x

    draw = {"generator": torch.Generator().manual_seed(1), "teacher": lambda x, t: 0.5 * x, "w_kd": w_kd}
    terms = diffusion.loss(network, x0, schedule, weighting="velocity", **draw)
    ((x, t),) = seen
    noise = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
    by_hand = (velocity(x, 0.9 * x, t) - velocity(x, noise, t)).square().mean()
    by_hand += w_kd * (velocity(x, 0.9 * x, t) - velocity(x, 0.5 * x, t)).square().mean()
    assert_as_good_as_torch(terms.total, by_hand, by_hand.float())
    assert_as_good_as_torch(terms.noise, (0.9 * x - noise).square().mean(), by_hand.float())
    with pytest.raises(InputError, match="unknown weighting 'snr'"):
        diffusion.loss(network, x0, schedule, weighting="snr")


def test_transfer_needs_a_teacher():
    with pytest.raises(InputError, match=r"w_kd is 0\.1, which needs a teacher"):
        diffusion.loss(Elementwise(), torch.zeros(1, 3, 2, 2), VPSDE(), w_kd=0.1)


# ---- noise


def test_streams_of_neighbouring_samples_and_seeds_are_independent():
    """Correlation of n pairs of unit normals has standard error 1/√n; 192 x 4 of them, so 5 standard errors."""
    n = 4000
    a, b = (diffusion.initial_noise(n, (192,), seed) for seed in (0, 1))
    for pairs in [a[1:] * a[:-1], a[2:] * a[:-2], a * b, a[:, 1:] * a[:, :-1]]:
        assert pairs.mean(0).abs().max() < 5 / math.sqrt(n)
    assert len(torch.cat([a, b]).unique(dim=0)) == 2 * n
    assert a.mean(0).abs().max() < 5 / math.sqrt(n)
    assert (a.var(0) - 1).abs().max() < 5 * math.sqrt(2 / n)


# ---- validation


@SCHEDULES
def test_validation_is_the_same_for_every_batch_size_and_has_a_known_answer(schedule):
    """For the exact predictor the expected squared error per element is mean_i (1 - σ² / (α² Σ_i + σ²))."""
    n = 20_000
    exact = Gaussian(schedule)
    x0 = (MEAN + torch.randn(n, 3, dtype=torch.float64) @ ROOT.T).view(n, *SHAPE)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * (schedule.last - schedule.first) + schedule.first
    curve = diffusion.validation_loss(exact, x0, schedule, times=times, batch_size=n)
    expected = torch.stack([(1 - schedule.sigma(t) ** 2 / exact._variance(t)).mean() for t in times])
    # each of the three squared errors has variance at most 2: a bound on the standard error of the mean of 3 n
    assert ((curve - expected).abs() < 5 * math.sqrt(2 / (3 * n))).all()

    x0, y = x0[:50].float(), torch.arange(50) % 3
    results = [diffusion.validation_loss(Elementwise(), x0, schedule, y=y, batch_size=b) for b in (50, 7, 1)]
    assert results[0].shape == ()
    assert results[0].dtype == torch.float64
    assert results[0] == results[1] == results[2]
    assert results[0] != diffusion.validation_loss(Elementwise(), x0, schedule, y=y, seed=1)
    assert results[0] != diffusion.validation_loss(Elementwise(), x0, schedule, y=1 + y)


def test_validation_times_are_spread_evenly():
    seen = []
    diffusion.validation_loss(lambda x, t: seen.append(t) or x, torch.zeros(100, *SHAPE), VPSDE(), batch_size=30)
    times = torch.cat(seen).sort().values
    assert len(times) == 100
    even = torch.arange(0.5, 100) / 100 * 999
    assert (times - even).abs().max() < 2 * 999 / 100


def test_validation_has_no_dropout_and_no_gradient():
    net = Small().train()
    x0 = torch.randn(4, 3, 4, 4)
    a, b = (diffusion.validation_loss(net, x0, VPSDE()) for _ in range(2))
    assert a == b
    assert not a.requires_grad
    assert net.drop.training


def test_a_table_made_without_data_serves_nobody_else():
    """torch.export and memory estimators call networks under a FakeTensorMode."""
    schedule = DDPMSchedule(beta_first=2e-4)  # nobody has asked for its table yet
    with FakeTensorMode():
        assert isinstance(schedule.log_alpha(torch.zeros(2)), FakeTensor)
    for t in (torch.zeros(2), torch.zeros(2, dtype=torch.float64)):
        assert type(schedule.log_alpha(t)) is torch.Tensor
        assert torch.isfinite(schedule.log_alpha(t)).all()


def test_beta_is_the_slope_of_log_alpha():
    for schedule in diffusion.SCHEDULES.values():
        t = torch.linspace(schedule.first, schedule.last, 12, dtype=torch.float64)[1:-1] + 0.3 * (schedule.last > 1)
        step = 1e-5 * schedule.last
        slope = (schedule.log_alpha(t - step) - schedule.log_alpha(t + step)) / step
        assert torch.allclose(schedule.beta(t), slope, rtol=1e-5)
