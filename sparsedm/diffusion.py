"""Noise schedules, the noise-prediction loss and samplers, for any network `model(x, t) -> predicted noise`.

    forward process   x_t = α(t) x_0 + σ(t) ε,   α² + σ² = 1,   ε ~ N(0, I)          (DDPM, arXiv 2006.11239, eq. 4)
    half log-SNR      λ(t) = log α(t) - log σ(t)                                     (DPM-Solver, arXiv 2206.00927)
    data prediction   x̂_0 = (x - σ ε̂) / α,   the network's guess of E[x_0 | x_t]     (DDPM, eq. 15)

x is (B, C, H, W) floating point, images in [-1, 1] or latents; the network receives t as (B,) in units of 0..999.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from sparsedm.errors import InputError

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Schedule:
    """What the two schedules share. Times are floating-point tensors of any shape; results have their shape and dtype.

    `last` is where sampling starts (almost pure noise), `first` the least noisy time a sampler shows to the network.
    A subclass gives log_alpha(t), its inverse time_at_log_alpha, training_time(u) which carries u ~ U[0, 1) to the
    distribution of t in training, and model_time(t) in the network's units.
    """

    def alpha(self, t):
        return self.log_alpha(t).exp()

    def sigma(self, t):
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def half_log_snr(self, t):
        return self.log_alpha(t) - self.sigma(t).log()

    def time_at_half_log_snr(self, half_log_snr):
        return self.time_at_log_alpha(-0.5 * F.softplus(-2 * half_log_snr))


@dataclass(frozen=True)
class VPSDE(Schedule):
    """The continuous schedule β(t) = 0.1 + 19.9 t, t in [0, 1] (Score SDE, arXiv 2011.13456, eq. 33); U-ViT's."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    first: float = 1e-3
    last: float = 1.0

    def log_alpha(self, t):
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def time_at_log_alpha(self, log_alpha):
        integral = -2 * log_alpha  # of β from 0 to t; the root is written without cancellation at small t
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())

    def training_time(self, u):
        return 1 - u

    def snap(self, t):
        return t

    def model_time(self, t):
        return 999 * t


@dataclass(frozen=True)
class DDPMSchedule(Schedule):
    """1000 discrete times k = 0..999 with β_k linear from 1e-4 to 0.02 (DDPM, section 4); α(k)² = Π_{j<=k} (1 - β_j).

    Between the integers log α is interpolated linearly, so that ODE samplers may stop anywhere (DPM-Solver, app. D.2).
    """

    beta_first: float = 1e-4
    beta_last: float = 0.02
    first: float = 0.0
    last: float = 999.0

    def log_alpha(self, t):
        table = _log_alpha_table(self, t.device, t.dtype)
        k = t.long().clamp(0, len(table) - 2)
        return table[k] + (t - k) * (table[k + 1] - table[k])

    def time_at_log_alpha(self, log_alpha):
        table = _log_alpha_table(self, log_alpha.device, log_alpha.dtype)
        k = (torch.searchsorted(-table, -log_alpha.contiguous()) - 1).clamp(0, len(table) - 2)
        return k + (log_alpha - table[k]) / (table[k + 1] - table[k])

    def training_time(self, u):
        return (u * (self.last + 1)).floor()

    def snap(self, t):
        return t.round()

    def model_time(self, t):
        return t


@functools.cache
def _log_alpha_table(schedule, device, dtype):
    beta = torch.linspace(schedule.beta_first, schedule.beta_last, int(schedule.last) + 1, dtype=torch.float64)
    return (0.5 * torch.log1p(-beta).cumsum(0)).to(device, dtype)


SCHEDULES = {"vp": VPSDE, "ddpm": DDPMSchedule}


# ---- training


class LossTerms(NamedTuple):
    """Scalars: what to differentiate, and its two parts (detached, unweighted; transfer is 0 without a teacher)."""

    total: torch.Tensor
    noise: torch.Tensor
    transfer: torch.Tensor


def diffuse(x0, t, noise, schedule):
    """x_t = α(t) x0 + σ(t) noise; x0 and noise (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return schedule.alpha(t) * x0 + schedule.sigma(t) * noise


WEIGHTINGS = ("noise", "velocity")


def loss(model, x0, schedule, *, y=None, generator=None, teacher=None, w_kd=0.0, w_noise=1.0, weighting="noise"):
    """w_noise mse(ε, model(x_t, t)) + w_kd mse(teacher(x_t, t), model(x_t, t)), one random t and ε per image.

    The first term is DDPM's eq. 14, the second SparseDM's transfer from a dense teacher (arXiv 2404.10445, eq. 11; its
    runs used w_kd = 0.1). The teacher sees the same x_t and t, gets no gradient, and should be in eval mode.
    x0 (B, C, H, W); y (B,) int64 or None. `generator` may live on another device than x0: a CPU generator gives the
    same t and ε on every device. weighting: "velocity" divides the squared errors by α(t)², which makes them those of
    the velocity (arXiv 2202.00512, section 4) and gives high noise its weight in a short training.
    Returns LossTerms. Raises InputError for another weighting, or when w_kd asks for a teacher that is not there.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"unknown weighting {weighting!r}, expected one of {', '.join(WEIGHTINGS)}")
    if w_kd and teacher is None:
        raise InputError(f"w_kd is {w_kd}, which needs a teacher, but none was given")
    where = generator.device if generator is not None else x0.device
    u = torch.rand(len(x0), generator=generator, device=where).to(x0)
    noise = torch.randn(x0.shape, generator=generator, device=where).to(x0)
    t = schedule.training_time(u)
    inputs = (diffuse(x0, t, noise, schedule), schedule.model_time(t), *_optional(y))

    predicted = model(*inputs).to(noise.dtype)
    noise_errors = _squared_errors(predicted, noise)
    transfer_errors = torch.zeros_like(noise_errors)
    if w_kd:
        with torch.no_grad():
            target = teacher(*inputs).to(noise.dtype)
        transfer_errors = _squared_errors(predicted, target)
    errors = w_noise * noise_errors + w_kd * transfer_errors
    if weighting == "velocity":
        errors = errors / schedule.alpha(t) ** 2
    return LossTerms(errors.mean(), noise_errors.detach().mean(), transfer_errors.detach().mean())


def _squared_errors(a, b):
    return (a - b).square().flatten(1).mean(1)  # (B,)


def validation_loss(model, x0, schedule, *, y=None, times=None, seed=0, batch_size=256, progress=False):
    """mse(ε, model(x_t, t)) over a fixed set, with the same t and ε per image for every model, order and batch size.

    x0 (n, C, H, W); y (n,) or None. times None: each image is seen at one time of the training distribution (spread
    evenly by the golden ratio), the result is a scalar. times (L,), in the schedule's units: the whole set is seen at
    each of them and the result is the curve (L,). float64, on the CPU. Dropout is off, nothing gets a gradient.
    """
    count = len(x0)
    if times is None:
        rows = schedule.training_time(GOLDEN_RATIO * torch.arange(1, count + 1, dtype=torch.float64) % 1)[None]
    else:
        rows = torch.as_tensor(times, dtype=torch.float64)[:, None].expand(-1, count)
    errors = torch.empty(rows.shape, dtype=torch.float64)
    starts = range(0, count, batch_size)
    with _inference(model), tqdm(total=len(rows) * len(starts), disable=_hidden(progress), desc="validate") as bar:
        for start in starts:
            here = slice(start, start + batch_size)
            noise = initial_noise(len(x0[here]), x0.shape[1:], seed, start).to(x0)
            for row, row_errors in zip(rows[:, here].to(x0), errors[:, here]):
                x = diffuse(x0[here], row, noise, schedule)
                predicted = model(x, schedule.model_time(row), *_optional(None if y is None else y[here]))
                row_errors.copy_(_squared_errors(predicted.double(), noise))
                bar.update()
    return errors.mean() if times is None else errors.mean(1)


# ---- samplers: predict(step, x, t) -> (x̂_0, ε̂); intervals yields (step, t, s), s being the less noisy time to go to;
# ---- noise() -> ε like x, fresh at every call. Each returns x at the last s. Times are 0-dim float64 tensors.


def euler_maruyama(predict, schedule, intervals, x, noise):
    """The reverse SDE dx = [-β x / 2 - β ∇log p] dt + √β dw (Score SDE, eq. 6 and 11), weak order 1.

    ∇log p = -ε̂/σ. The step's β Δt is the exact integral of β, which is 2 log(α_s/α_t): so it fits any schedule.
    """
    for step, t, s in intervals:
        _, eps = predict(step, x, t)
        beta = 2 * (schedule.log_alpha(s) - schedule.log_alpha(t))
        x = x + beta * (x / 2 - eps / schedule.sigma(t)) + beta.sqrt() * noise()
    return x


def ddpm(predict, schedule, intervals, x, noise):
    """Ancestral sampling from q(x_s | x_t, x̂_0) (DDPM, eq. 6-7, with the posterior variance), for any times t > s."""
    for step, t, s in intervals:
        x0, _ = predict(step, x, t)
        ratio = (schedule.log_alpha(t) - schedule.log_alpha(s)).exp()
        variance_t, variance_s, variance_between = schedule.sigma(t) ** 2, schedule.sigma(s) ** 2, 1 - ratio**2
        mean = (ratio * variance_s * x + schedule.alpha(s) * variance_between * x0) / variance_t
        x = mean + (variance_between * variance_s / variance_t).sqrt() * noise()
    return x


def ddim(predict, schedule, intervals, x, noise):
    """x_s = α_s x̂_0 + σ_s ε̂ (DDIM, arXiv 2010.02502, eq. 12 with σ = 0), order 1."""
    for step, t, s in intervals:
        x0, eps = predict(step, x, t)
        x = schedule.alpha(s) * x0 + schedule.sigma(s) * eps
    return x


def dpm_solver_pp_2m(predict, schedule, intervals, x, noise):
    """DPM-Solver++(2M), the multistep data-prediction solver (arXiv 2211.01095, algorithm 2), order 2."""
    x0_before = h_before = None
    for step, t, s in intervals:
        x0, _ = predict(step, x, t)
        h = schedule.half_log_snr(s) - schedule.half_log_snr(t)
        extrapolated = x0 if x0_before is None else x0 + (x0 - x0_before) * h / (2 * h_before)
        x = schedule.sigma(s) / schedule.sigma(t) * x - schedule.alpha(s) * torch.expm1(-h) * extrapolated
        x0_before, h_before = x0, h
    return x


def heun(predict, schedule, intervals, x, noise):
    """Heun's rule on d(x/α) = ε̂ d(σ/α), the probability-flow ODE (EDM, arXiv 2206.00364, algorithm 1), order 2.

    Two network evaluations per interval, both by the network of that interval's step.
    """
    for step, t, s in intervals:
        alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
        h = schedule.sigma(s) / alpha_s - schedule.sigma(t) / alpha_t
        _, eps = predict(step, x, t)
        _, eps_ahead = predict(step, alpha_s * (x / alpha_t + h * eps), s)
        x = alpha_s * (x / alpha_t + h * (eps + eps_ahead) / 2)
    return x


SAMPLERS = {  # name: (function, the spacing of times that suits it)
    "euler-maruyama": (euler_maruyama, "time"),
    "ddpm": (ddpm, "time"),
    "ddim": (ddim, "time"),
    "dpm++2m": (dpm_solver_pp_2m, "logsnr"),
    "heun": (heun, "edm"),
}
SPACINGS = ("time", "logsnr", "edm")


def time_grid(schedule, steps, spacing):
    """(steps,) float64 from schedule.last down to schedule.first: the times at which a sampler asks the network.

    "time": even in t, on integers where the schedule is discrete. "logsnr": even in λ (DPM-Solver). "edm": even in
    (σ/α)^(1/7) (EDM, eq. 5). Raises InputError below 1 step, above what a discrete schedule has, and for other names.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, it must be at least 1")
    ends = torch.tensor([schedule.last, schedule.first], dtype=torch.float64)
    if spacing == "time":
        times = schedule.snap(torch.linspace(*ends, steps, dtype=torch.float64))
        if len(times.unique()) < steps:
            raise InputError(f"steps is {steps}, but the schedule has only {int(schedule.last) + 1} discrete times")
        return times
    if spacing == "logsnr":
        times = schedule.time_at_half_log_snr(torch.linspace(*schedule.half_log_snr(ends), steps, dtype=torch.float64))
    elif spacing == "edm":
        root = torch.linspace(*(-schedule.half_log_snr(ends) / 7).exp(), steps, dtype=torch.float64)
        times = schedule.time_at_half_log_snr(-7 * root.log())
    else:
        raise InputError(f"unknown spacing {spacing!r}, expected one of {', '.join(SPACINGS)}")
    return times.clamp(schedule.first, schedule.last)


def integrate(model, schedule, x, times, sampler, noise=None, bar=None, clip=None):
    """Carry x (B, ...) at times[0] to a sample: `sampler` from times[0] to times[-1], then x̂_0 there.

    The last step is thus the same for all: DDPM's algorithm 2 adds no noise in it, EDM's Heun falls back to Euler and
    DPM-Solver++ to order 1. model: `model(x, t)`, or a list with one such per time. noise: callable, ε like x.
    clip: the largest |x̂_0| that is believed, None for any; ε̂ is made to agree with it.
    """
    models = list(model) if isinstance(model, list | tuple) else [model] * len(times)
    if len(models) != len(times):
        raise InputError(f"{len(models)} models were given for {len(times)} steps, one per step is needed")
    times = times.double().cpu()

    def predict(step, x, t):
        eps = models[step](x, x.new_full((len(x),), schedule.model_time(t).item())).to(x.dtype)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0 = (x - sigma * eps) / alpha
        if clip is None:
            return x0, eps
        x0 = x0.clamp(-clip, clip)
        return x0, (x - alpha * x0) / sigma

    def intervals():
        for step, (t, s) in enumerate(pairwise(times)):
            yield step, t, s
            if bar is not None:
                bar.update()

    x = SAMPLERS[sampler][0](predict, schedule, intervals(), x, noise)
    x, _ = predict(len(times) - 1, x, times[-1])
    if bar is not None:
        bar.update()
    return x


def sample(
    model,
    schedule,
    count,
    shape,
    *,
    sampler="dpm++2m",
    steps=50,
    spacing=None,
    seed=0,
    start=0,
    y=None,
    guidance=None,
    null_label=None,
    clip=None,
    batch_size=None,
    device=None,
    dtype=torch.float32,
    progress=False,
):
    """Draw `count` samples (count, *shape) of `dtype`, images in about [-1, 1], on the device (None: the model's).

    Sample i depends on (seed, start + i) alone, never on the batch it is drawn in: its noise is a stream of its own,
    drawn on the CPU so that a seed means the same picture on every device. (A network's own rounding may still depend
    on the batch size.) model: `model(x, t)` or `model(x, t, y)`, or a list of `steps` such, one per step, first the
    noisiest. steps: network evaluations, for heun 2 steps - 1. spacing: None for the sampler's own, see time_grid.
    y (count,) int64; guidance as in `guided`; null_label: None for the model's config.num_classes. clip: 1.0 for images
    keeps every x̂_0 in [-1, 1] on the way (DDPM's code; "static thresholding", arXiv 2205.11487, section 2.3): a small
    network's errors at high noise, where they are divided by α, would else carry the sample away.
    Raises InputError for an unknown sampler or spacing, and for counts and labels that do not fit together.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if count < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(f"count is {count} and batch_size {batch_size}, both must be at least 1")
    if y is not None and len(y) != count:
        raise InputError(f"{len(y)} labels were given for {count} samples")
    times = time_grid(schedule, steps, spacing or SAMPLERS[sampler][1])
    models = model if isinstance(model, list | tuple) else [model] * steps
    batch_size = batch_size or count
    if device is None:
        device = next((p.device for m in models if isinstance(m, torch.nn.Module) for p in m.parameters()), "cpu")

    samples = []
    starts = range(0, count, batch_size)
    with _inference(*models), tqdm(total=steps * len(starts), disable=_hidden(progress), desc=sampler) as bar:
        for first in starts:
            size = min(batch_size, count - first)
            streams = _streams(size, seed, start + first)
            labels = None if y is None else torch.as_tensor(y[first : first + size], device=device)
            batch_models = [guided(m, labels, guidance, null_label) for m in models]
            noise = functools.partial(_draw, streams, shape, device, dtype)
            samples.append(integrate(batch_models, schedule, noise(), times, sampler, noise, bar, clip))
    return torch.cat(samples)


def guided(model, y, guidance=None, null_label=None):
    """`model(x, t)` for labels y (B,): ε̂ = (1 + w) ε̂(x, t, y) - w ε̂(x, t, null), w = guidance.

    Classifier-free guidance (arXiv 2207.12598, eq. 6), both branches in one batch. Guidance None or 0 is the plain
    conditional network; y None the unconditional one. Raises InputError when guidance has no labels or no null label.
    """
    if not guidance:
        return lambda x, t: model(x, t, *_optional(y))
    config = getattr(model, "config", None)
    if null_label is None and getattr(config, "null_label", True):
        null_label = getattr(config, "num_classes", 0) or None
    if y is None or null_label is None:
        raise InputError(f"guidance {guidance} needs labels and a network with a null label")
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def predict(x, t):
        with_label, without = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        return with_label + guidance * (with_label - without)

    return predict


def initial_noise(count, shape, seed, start=0):
    """(count, *shape) float32 on the CPU: the noise from which `sample` starts samples start .. start + count - 1."""
    return _draw(_streams(count, seed, start), shape, "cpu", torch.float32)


def _streams(count, seed, start):
    # torch's CPU generator uses 32 bits of its seed. Multiples of the golden ratio keep the ranges of different seeds
    # apart, so two samples share a stream only by (seed, index), not by chance as with a hash.
    seeds = ((seed * 0x9E3779B9 + start + i) % 2**32 for i in range(count))
    return [torch.Generator().manual_seed(s) for s in seeds]


def _draw(streams, shape, device, dtype):
    return torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device, dtype)


@contextlib.contextmanager
def _inference(*models):
    """No gradients, and every module in eval mode, restored afterwards."""
    was = {module: module.training for m in models if isinstance(m, torch.nn.Module) for module in m.modules()}
    for module in was:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was.items():
            module.training = training


def _hidden(progress):
    return None if progress else True  # tqdm: None hides the bar unless stderr is a terminal


def _optional(y):
    return () if y is None else (y,)
