"""Samplers are proved on Gaussian data, where the exact noise predictor and the exact ODE flow are known.

x_0 ~ N(μ, Σ) gives x_t ~ N(α μ, C_t) with C_t = α² Σ + σ² I, the predictor ε̂ = σ C_t⁻¹ (x - α μ), and the flow of the
probability-flow ODE from t to s: x_s = α_s μ + C_s^(1/2) C_t^(-1/2) (x_t - α_t μ). All samplers are affine in x and in
the noises they draw, so their mean and covariance follow exactly from unit vectors, without statistics.
"""

import itertools
import math
import types

import pytest
import torch

from sparsedm import diffusion
from sparsedm.diffusion import VPSDE, DDPMSchedule, InputError
from tests.tolerance import assert_as_good_as_torch

SHAPE = (3, 1, 1)
MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
ROOT = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.2, 0.0], [-0.2, 0.1, 0.05]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T  # eigenvalues from 0.002 to 0.5: nearly a plane, as images are
SCHEDULES = pytest.mark.parametrize("schedule", [VPSDE(), DDPMSchedule()], ids=["vp", "ddpm"])
STOCHASTIC = ("euler-maruyama", "ddpm")


class Gaussian:
    """The exact noise predictor for N(mean, covariance), as a network: it knows the time in units of 0..999 only."""

    def __init__(self, schedule, mean=MEAN, covariance=COVARIANCE):
        self.schedule, self.mean = schedule, mean
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance)

    def __call__(self, x, t):
        assert t.shape == (len(x),)
        t = t[0] if isinstance(self.schedule, DDPMSchedule) else t[0] / 999
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


def moments(sampler, schedule, times):
    """Exact mean (3,) and covariance (3, 3) of a sampler's output on the Gaussian, by superposition.

    Batch entry 0 gets no noise at all, entry 1 + 3 k + i gets only the i-th unit vector as its k-th noise.
    """
    draws = len(times) if sampler in STOCHASTIC else 1
    units = torch.cat([torch.zeros(3 * draws)[None], torch.eye(3 * draws)]).double().view(-1, draws, *SHAPE)
    noises = iter(units.unbind(1))
    start = next(noises)
    out = diffusion.integrate(Gaussian(schedule), schedule, start, times, sampler, lambda: next(noises)).flatten(1)
    columns = out[1:] - out[0]
    return out[0], columns.T @ columns


def deviation(sampler, schedule, times):
    mean, covariance = moments(sampler, schedule, times)
    return max((mean - MEAN).abs().max().item(), (covariance - COVARIANCE).abs().max().item())


def orders(errors):
    """Measured order of convergence between successive doublings of the number of intervals."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


# ---- schedules


@SCHEDULES
def test_schedule_matches_its_definition(schedule):
    """Against the product (integral) of β written out; twice what torch.float32 arithmetic itself loses."""
    if isinstance(schedule, DDPMSchedule):
        t = torch.arange(1000, dtype=torch.float64)
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        alpha = torch.stack([torch.prod(1 - beta[: k + 1]) for k in range(1000)]).sqrt()
    else:
        t = torch.linspace(1e-4, 1, 1000, dtype=torch.float64)
        alpha = torch.exp(-0.5 * (0.1 * t + 19.9 * t * t / 2))
    sigma = (1 - alpha.square()).sqrt()
    for out, reference in [
        (schedule.alpha(t), alpha),
        (schedule.sigma(t), sigma),
        (schedule.half_log_snr(t), alpha.log() - sigma.log()),
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


def test_model_time_is_in_units_of_0_to_999():
    ends = torch.tensor([0.0, 1.0])
    assert VPSDE().model_time(ends).tolist() == [0, 999]
    assert DDPMSchedule().model_time(DDPMSchedule().training_time(torch.tensor([0.0, 1 - 2**-24]))).tolist() == [0, 999]
    assert VPSDE().training_time(ends).tolist() == [1, 0]


@SCHEDULES
@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
def test_time_grid(schedule, spacing):
    times = diffusion.time_grid(schedule, 20, spacing)
    assert times.shape == (20,)
    assert (times.diff() < 0).all()
    assert_as_good_as_torch(
        times[[0, -1]].float(), torch.tensor([schedule.last, schedule.first]).double(), times[[0, -1]]
    )
    even = {
        "time": lambda t: t,
        "logsnr": schedule.half_log_snr,
        "edm": lambda t: (schedule.sigma(t) / schedule.alpha(t)) ** (1 / 7),
    }[spacing](times)
    if not (spacing == "time" and isinstance(schedule, DDPMSchedule)):
        line = torch.linspace(even[0], even[-1], 20, dtype=torch.float64)
        assert_as_good_as_torch(even.float(), line, line.float())
    else:
        assert torch.equal(times, times.round())
        assert (times.diff() + 999 / 19).abs().max() <= 1


def test_all_thousand_ddpm_times():
    assert diffusion.time_grid(DDPMSchedule(), 1000, "time").tolist() == list(range(999, -1, -1))
    assert diffusion.time_grid(DDPMSchedule(), 1, "time").tolist() == [999]


# ---- samplers


@SCHEDULES
@pytest.mark.parametrize(
    ("sampler", "order", "steps"),
    [("ddim", 1, (65, 129, 257)), ("dpm++2m", 2, (65, 129, 257)), ("heun", 2, (33, 65, 129))],
)
def test_order_of_convergence(schedule, sampler, order, steps):
    """Error against the exact flow, then the exact data prediction that every sampler ends with.

    The measured order is within 0.15 of the true one: a first-order slip in a second-order method is far outside.
    """
    spacing = "logsnr" if sampler == "ddim" else diffusion.SAMPLERS[sampler][1]  # integer times are never quite even
    exact = Gaussian(schedule)
    x = torch.randn(16, *SHAPE, dtype=torch.float64)
    errors = []
    for n in steps:
        times = diffusion.time_grid(schedule, n, spacing)
        reference = exact.data(exact.flow(x, times[0], times[-1]), times[-1])
        errors.append((diffusion.integrate(exact, schedule, x, times, sampler) - reference).abs().max().item())
    assert all(abs(measured - order) < 0.15 for measured in orders(errors)), (errors, orders(errors))


@SCHEDULES
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_weak_order_of_the_stochastic_samplers(schedule, sampler):
    """Mean and covariance of the output (exact, by superposition) approach the data's at order 1."""
    errors = [deviation(sampler, schedule, diffusion.time_grid(schedule, n, "logsnr")) for n in (65, 129, 257)]
    assert all(abs(measured - 1) < 0.15 for measured in orders(errors)), (errors, orders(errors))


@SCHEDULES
@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_mean_and_covariance_by_statistics(schedule, sampler):
    """n samples through the front end, default spacing, against N(μ, Σ): 5 standard errors, plus the exact bias.

    Standard errors of a Gaussian's sample moments: √(Σ_ii / n) and √((Σ_ii Σ_jj + Σ_ij²) / n). The bias of the time
    step is known exactly (superposition) and must itself be small.
    """
    n, steps = 2000, 60
    times = diffusion.time_grid(schedule, steps, diffusion.SAMPLERS[sampler][1])
    bias = deviation(sampler, schedule, times)
    assert bias < (0.06 if sampler in STOCHASTIC or sampler == "ddim" else 0.005)
    model = Gaussian(schedule)
    x = diffusion.sample(model, schedule, n, SHAPE, sampler=sampler, steps=steps, dtype=torch.float64).flatten(1)
    variance = COVARIANCE.diagonal()
    assert ((x.mean(0) - MEAN).abs() < 5 * (variance / n).sqrt() + bias).all()
    standard_error = ((variance[:, None] * variance + COVARIANCE.square()) / n).sqrt()
    assert ((x.T.cov() - COVARIANCE).abs() < 5 * standard_error + bias).all()


def test_ddpm_step_is_the_papers():
    """One step k -> k - 1 against DDPM's eq. 6-7, written with its β, α = 1 - β and ᾱ."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha, alpha_bar = 1 - beta, torch.cumprod(1 - beta, 0)
    x, x0, noise = torch.randn(3, 5, dtype=torch.float64)
    for k in (1, 500, 999):
        mean = alpha_bar[k - 1].sqrt() * beta[k] / (1 - alpha_bar[k]) * x0
        mean += alpha[k].sqrt() * (1 - alpha_bar[k - 1]) / (1 - alpha_bar[k]) * x
        reference = mean + ((1 - alpha_bar[k - 1]) / (1 - alpha_bar[k]) * beta[k]).sqrt() * noise
        interval = (0, *torch.tensor([k, k - 1], dtype=torch.float64))
        out = diffusion.ddpm(lambda *_: (x0, None), DDPMSchedule(), [interval], x, lambda: noise)
        assert_as_good_as_torch(out.float(), reference, reference.float())


def test_euler_maruyama_step_is_the_reverse_sde():
    """One step t -> s against Score SDE's eq. 6 and 11, with ∫β written out: β(t) = 0.1 + 19.9 t."""
    x, eps, noise = torch.randn(3, 5, dtype=torch.float64)
    for t, s in [(1.0, 0.9), (0.5, 0.25), (0.02, 0.001)]:
        integral = 0.1 * (t - s) + 19.9 * (t**2 - s**2) / 2
        sigma = math.sqrt(1 - math.exp(-(0.1 * t + 19.9 * t**2 / 2)))
        reference = x + integral * x / 2 - integral * eps / sigma + math.sqrt(integral) * noise
        interval = (0, *torch.tensor([t, s], dtype=torch.float64))
        out = diffusion.euler_maruyama(lambda *_: (None, eps), VPSDE(), [interval], x, lambda: noise)
        assert_as_good_as_torch(out.float(), reference, reference.float())


@SCHEDULES
def test_a_single_image_comes_back_exactly(schedule):
    """Σ = 0: x̂_0 is the image at once, so any sampler must return it from any number of steps."""
    model = Gaussian(schedule, covariance=torch.zeros(3, 3, dtype=torch.float64))
    for sampler in diffusion.SAMPLERS:
        if sampler != "euler-maruyama":
            x = diffusion.sample(model, schedule, 2, SHAPE, sampler=sampler, steps=4, dtype=torch.float64)
            assert_as_good_as_torch(x.flatten(1).float(), MEAN.expand(2, 3), MEAN.float().expand(2, 3))


class Elementwise:
    """A stand-in network without sums over elements, so that its rounding cannot depend on the batch size."""

    config = types.SimpleNamespace(num_classes=10)

    def __call__(self, x, t, y=None):
        shift = 0 if y is None else y.view(-1, 1, 1, 1) / 16
        return (x * (t.view(-1, 1, 1, 1) / 999) - shift) * 0.5


@SCHEDULES
@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_samples_do_not_depend_on_the_batch(schedule, sampler):
    y = torch.arange(7) % 3

    def draw(count, **options):
        labels = y[options.get("start", 0) :][:count]
        options |= dict(sampler=sampler, steps=6, seed=5, y=labels, guidance=1.5)
        return diffusion.sample(Elementwise(), schedule, count, (3, 4, 5), **options)

    whole = draw(7)
    assert whole.shape == (7, 3, 4, 5)
    assert whole.dtype == torch.float32
    assert len(whole.flatten(1).unique(dim=0)) == 7
    assert torch.equal(draw(7, batch_size=3), whole)
    assert torch.equal(draw(7, batch_size=1), whole)
    assert torch.equal(draw(4, start=3), whole[3:])


def test_samples_depend_on_the_seed_and_not_on_the_global_generator():
    state = torch.get_rng_state()
    a, b, c = (diffusion.sample(Elementwise(), VPSDE(), 2, SHAPE, sampler="ddpm", steps=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_initial_noise_is_what_sample_starts_from():
    start = diffusion.initial_noise(3, SHAPE, seed=8, start=2)
    assert torch.equal(start, diffusion.initial_noise(9, SHAPE, seed=8)[2:5])
    x = diffusion.sample(lambda x, t: torch.zeros_like(x), VPSDE(), 3, SHAPE, steps=1, seed=8, start=2)
    assert torch.equal(x, start / VPSDE().alpha(torch.ones((), dtype=torch.float64)))


def test_streams_of_neighbouring_samples_and_seeds_are_independent():
    """Correlation of n pairs of unit normals has standard error 1/√n; 192 x 4 of them, so 5 standard errors."""
    n = 4000
    a, b = (diffusion.initial_noise(n, (192,), seed) for seed in (0, 1))
    for pairs in [a[1:] * a[:-1], a[2:] * a[:-2], a * b, a[:, 1:] * a[:, :-1]]:
        assert pairs.mean(0).abs().max() < 5 / math.sqrt(n)
    assert len(torch.cat([a, b]).unique(dim=0)) == 2 * n
    assert a.mean(0).abs().max() < 5 / math.sqrt(n)
    assert (a.var(0) - 1).abs().max() < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_a_different_network_at_every_step(sampler):
    """Step i uses network i, in Heun's second evaluation too; a list of one network is that network."""
    calls, base = [], Elementwise()

    def network(i):
        return lambda x, t: (calls.append((i, t[0].item())), base(x, t))[1]

    options = dict(sampler=sampler, steps=5, seed=1)
    mixed = diffusion.sample([network(i) for i in range(5)], VPSDE(), 2, SHAPE, **options)
    times = [999 * t for t in diffusion.time_grid(VPSDE(), 5, diffusion.SAMPLERS[sampler][1]).float()]
    heun = sampler == "heun"
    expected = [(i, k) for i in range(5) for k in ((i, i + 1) if heun and i < 4 else (i,))]
    assert [i for i, _ in calls] == [i for i, _ in expected]
    for (_, t), (_, k) in zip(calls, expected):
        assert_as_good_as_torch(torch.tensor(t), times[k].double(), times[k])
    assert torch.equal(mixed, diffusion.sample(base, VPSDE(), 2, SHAPE, **options))


def test_guidance_is_the_formula():
    net, x, t, y = Elementwise(), torch.randn(3, 3, 2, 2), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([0, 4, 9])
    null = torch.full_like(y, 10)
    out = diffusion.guided(net, y, 0.75)(x, t)
    assert torch.equal(out, net(x, t, y) + 0.75 * (net(x, t, y) - net(x, t, null)))
    assert torch.equal(diffusion.guided(net, y)(x, t), net(x, t, y))
    assert torch.equal(diffusion.guided(net, None, 0)(x, t), net(x, t))
    other = net(x, t, torch.zeros_like(y))
    out = diffusion.guided(net, y, 0.75, null_label=0)(x, t)
    assert torch.equal(out, net(x, t, y) + 0.75 * (net(x, t, y) - other))


def test_velocity_weighting_is_the_error_of_the_velocity():
    schedule, x0 = VPSDE(), torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def velocity(x, eps, t):
        """v = α ε - σ x0, with x0 = (x - σ ε) / α."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * eps - sigma * (x - sigma * eps) / alpha

    seen = []

    def network(x, t):
        seen.append((x, t.view(-1, 1, 1, 1) / 999))
        return 0.9 * x

    terms = diffusion.loss(network, x0, schedule, generator=torch.Generator().manual_seed(1), weighting="velocity")
    ((x, t),) = seen
    noise = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
    by_hand = (velocity(x, 0.9 * x, t) - velocity(x, noise, t)).square().mean()
    assert_as_good_as_torch(terms.total, by_hand, by_hand.float())
    assert_as_good_as_torch(terms.noise, (0.9 * x - noise).square().mean(), by_hand.float())
    with pytest.raises(InputError, match="unknown weighting 'snr'"):
        diffusion.loss(network, x0, schedule, weighting="snr")


def test_guidance_needs_a_null_label():
    net, y = Elementwise(), torch.tensor([1])
    net.config = types.SimpleNamespace(num_classes=1000, null_label=False)
    with pytest.raises(InputError, match="needs labels and a network with a null label"):
        diffusion.guided(net, y, 2.0)


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_clipping_keeps_the_data_prediction_in_range(sampler):
    def exploding(x, t):  # sees no noise at all, so that x̂_0 = x / α
        return torch.zeros_like(x)

    schedule = VPSDE()
    free = diffusion.sample(exploding, schedule, 4, (3, 4, 4), sampler=sampler, steps=10)
    clipped = diffusion.sample(exploding, schedule, 4, (3, 4, 4), sampler=sampler, steps=10, clip=1.0)
    assert free.abs().max() > 2
    assert clipped.abs().max() <= 1


def test_clipping_that_never_bites_changes_nothing_but_rounding():
    def towards_zero(x, t):
        return x / VPSDE().sigma(t / 999).view(-1, 1, 1, 1) * 0.5

    free, clipped = (
        diffusion.sample(towards_zero, VPSDE(), 4, (3, 4, 4), steps=10, clip=clip, dtype=torch.float64)
        for clip in (None, 1e9)
    )
    assert_as_good_as_torch(clipped, free, free.float())


def test_clip_bounds_the_data_prediction_and_keeps_the_noise_consistent():
    """DDIM over one interval with x̂_0 clipped, written out: α_s x̂_0 + σ_s (x - α_t x̂_0) / σ_t, then x̂_0 again."""
    schedule, times = VPSDE(), torch.tensor([0.5, 0.2], dtype=torch.float64)
    x, wrong = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha(times), schedule.sigma(times)
    first = ((x - sigma_t * wrong) / alpha_t).clamp(-1, 1)
    middle = alpha_s * first + sigma_s * (x - alpha_t * first) / sigma_t
    reference = ((middle - sigma_s * middle) / alpha_s).clamp(-1, 1)
    assert 0 < (reference.abs() == 1).sum() < reference.numel()
    out = diffusion.integrate(lambda x, t: wrong if t[0] > 300 else x, schedule, x, times, "ddim", clip=1.0)
    assert_as_good_as_torch(out.float(), reference, reference.float())


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 3, 1)
        self.drop = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.BatchNorm2d(3).eval()

    def forward(self, x, t, y=None):
        return self.frozen(self.drop(self.mix(x))) * (1 + t.view(-1, 1, 1, 1) / 999)


def test_sampling_has_no_dropout_no_gradient_and_leaves_the_mode_alone():
    net = Small().train()
    net.frozen.eval()
    a, b = (diffusion.sample(net, VPSDE(), 2, (3, 4, 4), steps=3) for _ in range(2))
    assert torch.equal(a, b)
    assert not a.requires_grad
    assert net.training
    assert net.drop.training
    assert not net.frozen.training


def test_progress_counts_every_step_of_every_batch(monkeypatch):
    bars = []

    class Bar(diffusion.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False})
            self.hidden = options["disable"]
            bars.append(self)

    monkeypatch.setattr(diffusion, "tqdm", Bar)
    diffusion.sample(Elementwise(), VPSDE(), 5, SHAPE, steps=4, batch_size=2, progress=True)
    diffusion.validation_loss(Elementwise(), torch.zeros(5, 3, 1, 1), VPSDE(), times=[0.1, 0.2], batch_size=2)
    assert [(bar.n, bar.total, bar.hidden) for bar in bars] == [(12, 12, None), (6, 6, True)]


# ---- loss


def hand_written_loss(weight, x0, schedule, seed, teacher_weight, w_noise, w_kd):
    """Terms and dtotal/dweight for the network weight * x * (1 + t/999), with the derivative written out."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(len(x0), generator=g).to(x0)
    noise = torch.randn(x0.shape, generator=g).to(x0)
    t = 1 - u if isinstance(schedule, VPSDE) else torch.floor(1000 * u)
    k = 999 * t if isinstance(schedule, VPSDE) else t
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
    assert all(labels is y for labels in seen)


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


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampler="euler"), "unknown sampler 'euler', expected one of euler-maruyama, ddpm"),
        (dict(steps=0), "steps is 0, it must be at least 1"),
        (dict(sampler="ddim", steps=1001), "steps is 1001, but the schedule has only 1000 discrete times"),
        (dict(spacing="cosine"), "unknown spacing 'cosine', expected one of time, logsnr, edm"),
        (dict(count=0), "count is 0 and batch_size None, both must be at least 1"),
        (dict(batch_size=0), "count is 2 and batch_size 0"),
        (dict(y=torch.zeros(3, dtype=torch.int64)), "3 labels were given for 2 samples"),
        (dict(model=[Elementwise()] * 4), "4 models were given for 50 steps, one per step is needed"),
        (dict(guidance=1.0), "guidance 1.0 needs labels"),
        (
            dict(guidance=1.0, y=torch.zeros(2, dtype=torch.int64), model=lambda x, t, y: x),
            "a network with a null label",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sample_refuses(options, message):
    options = dict(model=Elementwise(), schedule=DDPMSchedule(), count=2, shape=SHAPE) | options
    with pytest.raises(InputError, match=message):
        diffusion.sample(**options)


def test_transfer_needs_a_teacher():
    with pytest.raises(InputError, match=r"w_kd is 0\.1, which needs a teacher"):
        diffusion.loss(Elementwise(), torch.zeros(1, 3, 2, 2), VPSDE(), w_kd=0.1)
