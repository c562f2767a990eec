"""Samplers are proved on Gaussian data, where the exact noise predictor and the exact ODE flow are known.

All samplers are affine in x and in the noises they draw, so their mean and covariance follow exactly from unit vectors,
without statistics.
"""

import itertools
import math
import types

import numpy as np
import pytest
import torch

from sparsedm import diffusion, samplers
from sparsedm.diffusion import VPSDE, DDPMSchedule
from sparsedm.errors import InputError
from tests.test_diffusion import COVARIANCE, MEAN, SHAPE, Elementwise, Gaussian, Small
from tests.tolerance import assert_as_good_as_torch

PLAIN = [name for name, sampler in samplers.SAMPLERS.items() if not sampler.learned]
STOCHASTIC = [name for name in PLAIN if samplers.SAMPLERS[name].stochastic]

SCHEDULES = pytest.mark.parametrize("schedule", [VPSDE(), DDPMSchedule()], ids=["vp", "ddpm"])


def moments(sampler, schedule, times):
    """Exact mean (3,) and covariance (3, 3) of a sampler's output on the Gaussian, by superposition.

    Batch entry 0 gets no noise at all, entry 1 + 3 k + i gets only the i-th unit vector as its k-th noise.
    """
    draws = len(times) if sampler in STOCHASTIC else 1
    units = torch.cat([torch.zeros(3 * draws)[None], torch.eye(3 * draws)]).double().view(-1, draws, *SHAPE)
    noises = iter(units.unbind(1))
    start = next(noises)
    out = samplers.integrate(Gaussian(schedule), schedule, start, times, sampler, lambda: next(noises)).flatten(1)
    columns = out[1:] - out[0]
    return out[0], columns.T @ columns


def times_of(schedule, *times):
    """The Times that a step is given."""
    table = samplers.time_table(schedule, torch.tensor(times, dtype=torch.float64))
    return [samplers.Time(*row) for row in table]


def deviation(sampler, schedule, times):
    mean, covariance = moments(sampler, schedule, times)
    return max((mean - MEAN).abs().max().item(), (covariance - COVARIANCE).abs().max().item())


def orders(errors):
    """Measured order of convergence between successive doublings of the number of intervals."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@SCHEDULES
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_time_grid(schedule, spacing):
    times = samplers.time_grid(schedule, 20, spacing)
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
    assert samplers.time_grid(DDPMSchedule(), 1000, "time").tolist() == list(range(999, -1, -1))
    assert samplers.time_grid(DDPMSchedule(), 1, "time").tolist() == [999]


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
    spacing = (
        "logsnr" if sampler == "ddim" else samplers.SAMPLERS[sampler].spacing
    )  # integer times are never quite even
    exact = Gaussian(schedule)
    x = torch.randn(16, *SHAPE, dtype=torch.float64)
    errors = []
    for n in steps:
        times = samplers.time_grid(schedule, n, spacing)
        reference = exact.data(exact.flow(x, times[0], times[-1]), times[-1])
        errors.append((samplers.integrate(exact, schedule, x, times, sampler) - reference).abs().max().item())
    assert all(abs(measured - order) < 0.15 for measured in orders(errors)), (errors, orders(errors))


@SCHEDULES
@pytest.mark.parametrize("sampler", ["euler-maruyama", "ddpm"])
def test_weak_order_of_the_stochastic_samplers(schedule, sampler):
    """Mean and covariance of the output (exact, by superposition) approach the data's at order 1."""
    errors = [deviation(sampler, schedule, samplers.time_grid(schedule, n, "logsnr")) for n in (65, 129, 257)]
    assert all(abs(measured - 1) < 0.15 for measured in orders(errors)), (errors, orders(errors))


@SCHEDULES
@pytest.mark.parametrize("sampler", PLAIN)
def test_mean_and_covariance_by_statistics(schedule, sampler):
    """n samples through the front end, default spacing, against N(μ, Σ): 5 standard errors, plus the exact bias.

    Standard errors of a Gaussian's sample moments: √(Σ_ii / n) and √((Σ_ii Σ_jj + Σ_ij²) / n). The bias of the time
    step is known exactly (superposition) and must itself be small.
    """
    n, steps = 2000, 60
    times = samplers.time_grid(schedule, steps, samplers.SAMPLERS[sampler].spacing)
    bias = deviation(sampler, schedule, times)
    assert bias < (0.06 if sampler in STOCHASTIC or sampler == "ddim" else 0.005)
    model = Gaussian(schedule)
    x = samplers.sample(model, schedule, n, SHAPE, sampler=sampler, steps=steps, dtype=torch.float64).flatten(1)
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
        out, _ = samplers.ddpm(lambda *_: (x0, None, None), x, noise, (), *times_of(DDPMSchedule(), k, k - 1))
        assert_as_good_as_torch(out.float(), reference, reference.float())


def test_euler_maruyama_step_is_the_reverse_sde():
    """One step t -> s against Score SDE's eq. 6 and 11, with ∫β written out: β(t) = 0.1 + 19.9 t."""
    x, eps, noise = torch.randn(3, 5, dtype=torch.float64)
    for t, s in [(1.0, 0.9), (0.5, 0.25), (0.02, 0.001)]:
        integral = 0.1 * (t - s) + 19.9 * (t**2 - s**2) / 2
        sigma = math.sqrt(1 - math.exp(-(0.1 * t + 19.9 * t**2 / 2)))
        reference = x + integral * x / 2 - integral * eps / sigma + math.sqrt(integral) * noise
        out, _ = samplers.euler_maruyama(lambda *_: (None, eps, None), x, noise, (), *times_of(VPSDE(), t, s))
        assert_as_good_as_torch(out.float(), reference, reference.float())


def test_2m_extrapolates_by_the_ratio_of_the_steps():
    """Against DPM-Solver++'s algorithm 2, after a step of three times the length in the half log-SNR."""
    x, x0, old = torch.randn(3, 5, dtype=torch.float64)
    t, s = times_of(VPSDE(), 0.5, 0.2)
    h = s.half_log_snr - t.half_log_snr
    reference = s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * (x0 + (x0 - old) / 6)
    out, _ = samplers.dpm_solver_pp_2m(lambda *_: (x0, None, None), x, None, (old, 3 * h), t, s)
    assert_as_good_as_torch(out.float(), reference, reference.float())


@SCHEDULES
def test_a_single_image_comes_back_exactly(schedule):
    """Σ = 0: x̂_0 is the image at once, so any sampler must return it from any number of steps."""
    model = Gaussian(schedule, covariance=torch.zeros(3, 3, dtype=torch.float64))
    for sampler in PLAIN:
        if not sampler.startswith("euler-maruyama"):
            x = samplers.sample(model, schedule, 2, SHAPE, sampler=sampler, steps=4, dtype=torch.float64)
            assert_as_good_as_torch(x.flatten(1).float(), MEAN.expand(2, 3), MEAN.float().expand(2, 3))


@SCHEDULES
@pytest.mark.parametrize("sampler", PLAIN)
def test_samples_do_not_depend_on_the_batch(schedule, sampler):
    y = torch.arange(7) % 3

    def draw(count, **options):
        labels = y[options.get("start", 0) :][:count]
        options |= dict(sampler=sampler, steps=6, seed=5, y=labels, guidance=1.5)
        return samplers.sample(Elementwise(), schedule, count, (3, 4, 5), **options)

    whole = draw(7)
    assert whole.shape == (7, 3, 4, 5)
    assert whole.dtype == torch.float32
    assert len(whole.flatten(1).unique(dim=0)) == 7
    assert torch.equal(draw(7, batch_size=3), whole)
    assert torch.equal(draw(7, batch_size=1), whole)
    assert torch.equal(draw(4, start=3), whole[3:])


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", PLAIN)
def test_a_seed_means_the_same_picture_on_a_gpu(sampler):
    def draw(device, dtype):
        torch.manual_seed(0)
        network = Small().to(device, dtype)
        with torch.no_grad():
            return samplers.sample(
                network, VPSDE(), 3, SHAPE, sampler=sampler, steps=5, dtype=dtype, clip="every"
            ).cpu()

    on_cpu = draw("cpu", torch.float64)
    assert_as_good_as_torch(draw("cuda", torch.float64), on_cpu, draw("cpu", torch.float32))


def test_samples_depend_on_the_seed_and_not_on_the_global_generator():
    state = torch.get_rng_state()
    a, b, c = (samplers.sample(Elementwise(), VPSDE(), 2, SHAPE, sampler="ddpm", steps=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_initial_noise_is_what_sample_starts_from():
    start = diffusion.initial_noise(3, SHAPE, seed=8, start=2)
    assert torch.equal(start, diffusion.initial_noise(9, SHAPE, seed=8)[2:5])
    x = samplers.sample(lambda x, t: torch.zeros_like(x), VPSDE(), 3, SHAPE, steps=1, seed=8, start=2)
    assert torch.equal(x, start / VPSDE().alpha(torch.ones((), dtype=torch.float64)))


@pytest.mark.parametrize("sampler", PLAIN)
def test_a_different_network_at_every_step(sampler):
    """Step i uses network i, in Heun's second evaluation too; a list of one network is that network."""
    calls, base = [], Elementwise()

    def network(i):
        return lambda x, t: (calls.append((i, t[0].item())), base(x, t))[1]

    options = dict(sampler=sampler, steps=5, seed=1)
    mixed = samplers.sample([network(i) for i in range(5)], VPSDE(), 2, SHAPE, **options)
    times = [999 * t for t in samplers.time_grid(VPSDE(), 5, samplers.SAMPLERS[sampler].spacing).float()]
    heun = sampler == "heun"
    expected = [(i, k) for i in range(5) for k in ((i, i + 1) if heun and i < 4 else (i,))]
    assert [i for i, _ in calls] == [i for i, _ in expected]
    for (_, t), (_, k) in zip(calls, expected):
        assert_as_good_as_torch(torch.tensor(t), times[k].double(), times[k])
    assert torch.equal(mixed, samplers.sample(base, VPSDE(), 2, SHAPE, **options))


def test_guidance_is_the_formula():
    net, x, t, y = Elementwise(), torch.randn(3, 3, 2, 2), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([0, 4, 9])
    null = torch.full_like(y, 10)
    out = samplers.guided(net, y, 0.75)(x, t)
    assert torch.equal(out, net(x, t, y) + 0.75 * (net(x, t, y) - net(x, t, null)))
    assert torch.equal(samplers.guided(net, y)(x, t), net(x, t, y))
    assert torch.equal(samplers.guided(net, None, 0)(x, t), net(x, t))
    other = net(x, t, torch.zeros_like(y))
    out = samplers.guided(net, y, 0.75, null_label=0)(x, t)
    assert torch.equal(out, net(x, t, y) + 0.75 * (net(x, t, y) - other))


def test_guidance_needs_a_null_label():
    net, y = Elementwise(), torch.tensor([1])
    net.config = types.SimpleNamespace(num_classes=1000, null_label=False)
    with pytest.raises(InputError, match="needs labels and a network with a null label"):
        samplers.guided(net, y, 2.0)


@pytest.mark.parametrize("sampler", PLAIN)
def test_clipping_keeps_the_data_prediction_in_range(sampler):
    def exploding(x, t):  # sees no noise at all, so that x̂_0 = x / α
        return torch.zeros_like(x)

    schedule = VPSDE()
    free = samplers.sample(exploding, schedule, 4, (3, 4, 4), sampler=sampler, steps=10)
    clipped = samplers.sample(exploding, schedule, 4, (3, 4, 4), sampler=sampler, steps=10, clip="every")
    assert free.abs().max() > 2
    assert clipped.abs().max() <= 1


def test_the_final_clip_is_of_the_sample_alone():
    schedule, seen = VPSDE(), []

    def exploding(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    free = samplers.sample(exploding, schedule, 4, (3, 4, 4), sampler="ddim", steps=5)
    final = samplers.sample(exploding, schedule, 4, (3, 4, 4), sampler="ddim", steps=5, clip="final")
    assert free.abs().max() > 2
    assert torch.equal(final, free.clamp(-1, 1))
    assert all(torch.equal(a, b) for a, b in zip(seen[:5], seen[5:]))
    with pytest.raises(InputError, match=r"unknown clip 1.0, expected one of every, final, never"):
        samplers.sample(exploding, schedule, 1, (3, 4, 4), clip=1.0)


def test_clip_bounds_the_data_prediction_and_keeps_the_noise_consistent():
    """DDIM over one interval with x̂_0 clipped, written out: α_s x̂_0 + σ_s (x - α_t x̂_0) / σ_t, then x̂_0 again."""
    schedule, times = VPSDE(), torch.tensor([0.5, 0.2], dtype=torch.float64)
    x, wrong = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha(times), schedule.sigma(times)
    first = ((x - sigma_t * wrong) / alpha_t).clamp(-1, 1)
    middle = alpha_s * first + sigma_s * (x - alpha_t * first) / sigma_t
    reference = ((middle - sigma_s * middle) / alpha_s).clamp(-1, 1)
    assert 0 < (reference.abs() == 1).sum() < reference.numel()
    out = samplers.integrate(lambda x, t: wrong if t[0] > 300 else x, schedule, x, times, "ddim", clip="every")
    assert_as_good_as_torch(out.float(), reference, reference.float())


def test_half_precision_is_only_that_of_the_network_and_of_x_between_steps():
    """Times, coefficients and every step are those of fp32: DDIM without noise, written out."""
    schedule, times, asked = VPSDE(), torch.tensor([0.777, 0.2], dtype=torch.float64), []

    def no_noise(x, t):
        asked.append((x.dtype, t))
        return torch.zeros_like(x)

    x = torch.randn(4, *SHAPE).bfloat16()
    out = samplers.integrate(no_noise, schedule, x, times, "ddim")
    alpha_t, alpha_s = schedule.alpha(times)
    between = (alpha_s * (x.float() / alpha_t)).bfloat16()
    assert torch.equal(out, (between.float() / alpha_s).bfloat16())
    assert [dtype for dtype, _ in asked] == 2 * [torch.bfloat16]
    assert all(torch.equal(t, torch.full((4,), 999 * time, dtype=torch.float32)) for (_, t), time in zip(asked, times))


def test_sampling_has_no_dropout_no_gradient_and_leaves_the_mode_alone():
    net = Small().train()
    net.frozen.eval()
    a, b = (samplers.sample(net, VPSDE(), 2, (3, 4, 4), steps=3) for _ in range(2))
    assert torch.equal(a, b)
    assert not a.requires_grad
    assert net.training
    assert net.drop.training
    assert not net.frozen.training


def test_progress_counts_every_step_of_every_batch(monkeypatch):
    bars = []

    class Bar(samplers.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False})
            self.hidden = options["disable"]
            bars.append(self)

    monkeypatch.setattr(samplers, "tqdm", Bar)
    monkeypatch.setattr(diffusion, "tqdm", Bar)
    samplers.sample(Elementwise(), VPSDE(), 5, SHAPE, steps=4, batch_size=2, progress=True)
    diffusion.validation_loss(Elementwise(), torch.zeros(5, 3, 1, 1), VPSDE(), times=[0.1, 0.2], batch_size=2)
    assert [(bar.n, bar.total, bar.hidden) for bar in bars] == [(12, 12, None), (6, 6, True)]


# ---- refusals


def test_the_number_of_steps_may_be_one_of_numpy():
    assert samplers.evaluations("ddim", np.int64(2)) == samplers.evaluations("ddim", 2)
    assert samplers.time_grid(VPSDE(), np.int64(2), "time").equal(samplers.time_grid(VPSDE(), 2, "time"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampler="euler"), "unknown sampler 'euler', expected one of euler-maruyama, euler-maruyama-uvit, ddpm"),
        (dict(steps=0), "steps is 0, it must be a whole number, at least 1"),
        (dict(steps=2.5), "steps is 2.5, it must be a whole number, at least 1"),
        (dict(sampler="ddim", steps=1001), "steps is 1001, but the schedule has only 1000 discrete times"),
        (dict(spacing="cosine"), "unknown spacing 'cosine', expected one of time, logsnr, edm"),
        (dict(count=0), "count is 0 and batch_size None: both must be at least 1"),
        (dict(batch_size=0), "count is 2 and batch_size 0"),
        (dict(y=torch.zeros(3, dtype=torch.int64)), "3 labels were given for 2 samples"),
        (dict(model=[Elementwise()] * 4), "4 models were given for 50 steps: one per step is needed"),
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
        samplers.sample(**options)


@pytest.mark.parametrize("sampler", PLAIN)
@pytest.mark.parametrize("steps", [1, 4])
def test_evaluations_are_those_that_happen(sampler, steps):
    calls = [0] * steps

    def network(step):
        def predict(x, t):
            calls[step] += 1
            return x

        return predict

    samplers.sample([network(step) for step in range(steps)], VPSDE(), 2, SHAPE, sampler=sampler, steps=steps)
    assert samplers.evaluations(sampler, steps) == calls
    with pytest.raises(InputError, match="steps is 0"):
        samplers.evaluations(sampler, 0)


def test_network_evaluations_as_a_budget():
    assert samplers.steps_for("heun", 50) == 25
    assert sum(samplers.evaluations("heun", 25)) == 49
    for sampler in samplers.SAMPLERS:
        for budget in (1, 2, 9, 50):
            steps = samplers.steps_for(sampler, budget)
            assert sum(samplers.evaluations(sampler, steps)) <= budget < sum(samplers.evaluations(sampler, steps + 1))
    with pytest.raises(InputError, match="0 network evaluations"):
        samplers.steps_for("ddim", 0)


def test_labels_that_no_class_has_are_refused():
    for label in (-1, 11):
        with pytest.raises(InputError, match="the network has the classes 0 to 9"):
            samplers.sample(Elementwise(), VPSDE(), 2, SHAPE, steps=2, y=torch.tensor([3, label]))
        with pytest.raises(InputError, match="the network has the classes 0 to 9"):
            diffusion.loss(Elementwise(), torch.zeros(2, *SHAPE), VPSDE(), y=torch.tensor([3, label]))
    with pytest.raises(InputError, match=r"labels of torch\.float32: they must be int64"):
        samplers.sample(Elementwise(), VPSDE(), 2, SHAPE, steps=2, y=torch.tensor([3.0, 1.0]))
    samplers.sample(Elementwise(), VPSDE(), 2, SHAPE, steps=2, y=torch.tensor([3, 10]))  # 10: no label


def test_more_samples_than_memory_holds_are_refused():
    with pytest.raises(InputError, match="not enough memory: count=1099511627776 takes"):
        samplers.sample(Elementwise(), VPSDE(), 2**40, SHAPE, steps=2)


def test_a_learned_variance_asks_for_a_network_that_has_one():
    with pytest.raises(InputError, match="sampler ddpm-learned needs a network that has learnt the variance"):
        samplers.sample(Elementwise(), DDPMSchedule(), 2, SHAPE, sampler="ddpm-learned", steps=2)
