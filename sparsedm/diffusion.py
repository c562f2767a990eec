"""Noise schedules and the noise-prediction loss, for any network `model(x, t) -> predicted noise`.

    forward process   x_t = α(t) x_0 + σ(t) ε,   α² + σ² = 1,   ε ~ N(0, I)          (DDPM, arXiv 2006.11239, eq. 4)
    half log-SNR      λ(t) = log α(t) - log σ(t)                                     (DPM-Solver, arXiv 2206.00927)
    data prediction   x̂_0 = (x - σ ε̂) / α,   the network's guess of E[x_0 | x_t]     (DDPM, eq. 15)

x is (B, C, H, W) floating point, images in [-1, 1] or latents; the network receives t as (B,) in units of about 0..999.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from sparsedm.errors import InputError
from sparsedm.layers import is_sharded
from sparsedm.sparsity import hold_masks

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Schedule:
    """What all schedules share. Times are floating-point tensors of any shape; results have their shape and dtype.

    A subclass defines:
    last, first          the times where sampling starts (almost pure noise) and of the network's last call
    log_alpha(t)         log α; time_at_log_alpha is its inverse
    beta(t)              -2 d log α / dt
    training_time(u)     a time to train at, from a uniform u in [0, 1)
    model_time(t)        t in the network's units; time_of is its inverse
    snap(t)              t, rounded to a whole number if the schedule is discrete
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

    def beta(self, t):
        return self.beta_min + (self.beta_max - self.beta_min) * t

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

    def time_of(self, model_time):
        return model_time / 999


@dataclass(frozen=True)
class DDPMSchedule(Schedule):
    """1000 discrete times k = 0..999 with β_k linear from 1e-4 to 0.02 (DDPM, section 4); α(k)² = Π_{j<=k} (1 - β_j).

    scaled: √β_k is linear instead (latent diffusion, arXiv 2112.10752). first_index: the network's input t at k = 0.
    Between integers log α is interpolated linearly, so that ODE samplers may use any time (DPM-Solver, app. D.2). Other
    times count as the nearest end.
    """

    beta_first: float = 1e-4
    beta_last: float = 0.02
    scaled: bool = False
    first_index: int = 0
    first: float = 0.0
    last: float = 999.0

    def log_alpha(self, t):
        table, t = _log_alpha_table(self, t.device, t.dtype), t.clamp(self.first, self.last)
        k = t.long().clamp(max=len(table) - 2)
        return table[k] + (t - k) * (table[k + 1] - table[k])

    def beta(self, t):
        table = _log_alpha_table(self, t.device, t.dtype)
        k = t.ceil().long().clamp(1, len(table) - 1)  # of the interval that ends here
        return 2 * (table[k - 1] - table[k])

    def time_at_log_alpha(self, log_alpha):
        table = _log_alpha_table(self, log_alpha.device, log_alpha.dtype)
        k = (torch.searchsorted(-table, -log_alpha.contiguous()) - 1).clamp(0, len(table) - 2)
        return k + (log_alpha - table[k]) / (table[k + 1] - table[k])

    def training_time(self, u):
        return (u * (self.last + 1)).floor()

    def snap(self, t):
        return t.round()

    def model_time(self, t):
        return t + self.first_index

    def time_of(self, model_time):
        return model_time - self.first_index


def _log_alpha_table(schedule, device, dtype):
    # a mode may give a tensor without data, and what is cached serves the whole process
    moded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return (_new_table if moded else _cached_table)(schedule, device, dtype)


def _new_table(schedule, device, dtype):
    power = 2 if schedule.scaled else 1
    ends = schedule.beta_first ** (1 / power), schedule.beta_last ** (1 / power)
    beta = torch.linspace(*ends, int(schedule.last) + 1, dtype=torch.float64, device="cpu") ** power
    return (0.5 * torch.log1p(-beta).cumsum(0)).to(device, dtype)


_cached_table = functools.cache(_new_table)


SCHEDULES = {
    "vp-sde": VPSDE(),
    "ddpm": DDPMSchedule(),
    "scaled-linear": DDPMSchedule(0.00085, 0.012, scaled=True, first_index=1),  # U-ViT's, on Stable Diffusion's latents
}


def schedule_of(model):
    """The noise schedule that the network's configuration names."""
    return SCHEDULES[model.config.schedule]


# ---- training


class LossTerms(NamedTuple):
    """Scalars: the loss to differentiate, and its two parts (detached, unweighted; transfer is 0 without a teacher)."""

    total: torch.Tensor
    noise: torch.Tensor
    transfer: torch.Tensor


def diffuse(x0, t, noise, schedule):
    """x_t = α(t) x0 + σ(t) noise; x0 and noise (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return schedule.alpha(t) * x0 + schedule.sigma(t) * noise


WEIGHTINGS = ("noise", "velocity")


def check_labels(config, y):
    """Raise InputError if the labels y are not integers that a network of this configuration knows."""
    classes = getattr(config, "num_classes", 0)
    if y is None or not classes:
        return
    y = torch.as_tensor(y, device="cpu")
    if y.dtype not in (torch.int64, torch.int32):
        raise InputError(f"labels of {y.dtype}: they must be int64")
    if not y.numel():
        return
    most = classes - (not getattr(config, "null_label", True))
    low, high = (int(end) for end in y.aminmax())
    if low < 0 or high > most:
        raise InputError(f"labels from {low} to {high}: the network has the classes 0 to {classes - 1}")


def loss(
    model,
    x0,
    schedule,
    *,
    y=None,
    generator=None,
    teacher=None,
    w_kd=0.0,
    w_noise=1.0,
    weighting="noise",
    variance=False,
    rows=slice(None),
):
    """w_noise mse(ε, model(x_t, t)) + w_kd mse(teacher(x_t, t), model(x_t, t)), one random t and ε per image.

    The first term is DDPM's eq. 14. The second is SparseDM's transfer from a dense teacher (arXiv 2404.10445, eq. 11;
    its runs used w_kd = 0.1). The teacher sees the same x_t and t, gets no gradient, and should be in eval mode.

    x0 (B, C, H, W); y (B,) int64, (B, tokens, width) for a text-conditional network, or None. generator: may be on
    another device than x0; a CPU generator gives the same t and ε on every device.
    weighting: "velocity" divides the squared error by α(t)². The result is the error of the predicted velocity
    (arXiv 2202.00512, section 4). It gives the noisiest images more weight, which helps short runs.
    variance: the model also predicts a variance (`model(..., variance=True)`); `variational_bound` is added to total.
    rows: the part of the batch to compute. Times and noise are still drawn for the whole batch, so the mean over all
    parts equals the loss of the whole batch.
    Returns LossTerms. Raises InputError for an unknown weighting, if w_kd is not 0 and there is no teacher, and on a
    CPU for labels that the network does not know.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"unknown weighting {weighting!r}, expected one of {', '.join(WEIGHTINGS)}")
    if x0.device.type == "cpu":  # elsewhere the look at the labels would make everybody wait
        check_labels(getattr(model, "config", None), y)
    if w_kd and teacher is None:
        raise InputError(f"w_kd is {w_kd}, which needs a teacher, but none was given")
    where = generator.device if generator is not None else x0.device
    wide = torch.promote_types(x0.dtype, torch.float32)  # bfloat16 has 256 times, and one of them does not exist
    drawn = {"generator": generator, "device": where, "dtype": torch.float32}
    u, noise = (draw.to(x0.device, wide) for draw in (torch.rand(len(x0), **drawn), torch.randn(x0.shape, **drawn)))
    x0, u, noise, y = x0[rows], u[rows], noise[rows], None if y is None else y[rows]
    t = schedule.training_time(u)
    noisy = diffuse(x0, t, noise, schedule)
    inputs = (noisy.to(x0.dtype), schedule.model_time(t), *_optional(y))

    predicted = model(*inputs, **({"variance": True} if variance else {})).to(noise.dtype)
    bound = 0.0
    if variance:
        predicted, v = predicted.chunk(2, dim=1)
        bound = variational_bound(schedule, x0, noisy, t, predicted.detach(), v).mean()
    noise_errors = _squared_errors(predicted, noise)
    transfer_errors = torch.zeros_like(noise_errors)
    if w_kd:
        with torch.no_grad():
            target = teacher(*inputs).to(noise.dtype)
        transfer_errors = _squared_errors(predicted, target)
    errors = w_noise * noise_errors + w_kd * transfer_errors
    if weighting == "velocity":
        errors = errors / schedule.alpha(t) ** 2
    return LossTerms(errors.mean() + bound, noise_errors.detach().mean(), transfer_errors.detach().mean())


def check_discrete(schedule):
    """Raise InputError if a network cannot learn the variance on this schedule."""
    if not isinstance(schedule, DDPMSchedule):
        raise InputError("a learned variance needs discrete times: the ddpm or the scaled-linear schedule")


def variational_bound(schedule, x0, x, t, eps, v):
    """KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)), or -log p(x_0 | x_t) at t = 0: (B,), bits per number.

    The mean of p follows from the predicted noise eps; its variance is β^((1 + v) / 2) β̃^((1 - v) / 2) (arXiv
    2102.09672, section 3.1). DiT adds this bound to the squared error of eps; `loss` detaches eps here.
    x0, x, eps, v (B, C, H, W); t (B,), whole numbers. Raises: InputError for a schedule without discrete times.
    """
    check_discrete(schedule)

    def terms(t):
        """log β, log β̃ at t; the factor of x_0 in the mean of q(x_t-1 | x_t, x_0)."""
        log_alpha = schedule.log_alpha(t)
        before = torch.where(t > 0, schedule.log_alpha((t - 1).clamp(min=0)), torch.zeros_like(log_alpha))
        beta = -torch.expm1(2 * (log_alpha - before))
        variance, variance_before = -torch.expm1(2 * log_alpha), -torch.expm1(2 * before)
        return beta.log(), (beta * variance_before / variance).log(), before.exp() * beta / variance

    shape = (-1, *[1] * (x0.ndim - 1))
    large, _, factor = (value.view(shape) for value in terms(t))
    small = terms(t.clamp(min=1))[1].view(shape)  # β̃ is 0 at t = 0
    t = t.view(shape)
    predicted = (x - schedule.sigma(t) * eps) / schedule.alpha(t)
    log_variance = (large * (1 + v) + small * (1 - v)) / 2
    kl = (log_variance - small - 1 + (small - log_variance).exp()) / 2
    kl = kl + (factor * (x0 - predicted)).square() * (-log_variance).exp() / 2
    nats = torch.where(t > 0, kl, -_log_likelihood(x0, predicted, log_variance / 2))
    return nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x, mean, log_std):
    """log p of 256 levels in [-1, 1] under a Gaussian. Its distribution function is approximated as in the original."""

    def below(edge):
        z = (edge - mean) * (-log_std).exp()
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    lower, upper = below(x - 1 / 255), below(x + 1 / 255)
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


def _optional(y):
    return () if y is None else (y,)


def _squared_errors(a, b):
    return (a - b).square().flatten(1).mean(1)  # (B,)


def validation_loss(model, x0, schedule, *, y=None, times=None, seed=0, batch_size=256, progress=False):
    """mse(ε, model(x_t, t)) over a fixed set. The t and ε of an image do not depend on the model or the batch size.

    x0 (n, C, H, W); y (n,) or None. times None: one time per image, from the training distribution (spread evenly by
    the golden ratio); returns a scalar. times (L,), in the schedule's units: all images at each time; returns (L,).
    The result is float64 on the CPU. Dropout is off; there are no gradients.
    """
    count, wide = len(x0), torch.promote_types(x0.dtype, torch.float32)
    if times is None:
        numbers = torch.arange(1, count + 1, dtype=torch.float64, device="cpu")
        rows = schedule.training_time(GOLDEN_RATIO * numbers % 1)[None]
    else:
        rows = torch.as_tensor(times, dtype=torch.float64, device="cpu")[:, None].expand(-1, count)
    errors = torch.empty(rows.shape, dtype=torch.float64, device="cpu")
    starts = range(0, count, batch_size)
    hidden = None if progress else True  # None: unless stderr is a terminal
    with evaluating(model), tqdm(total=len(rows) * len(starts), disable=hidden, desc="validate") as bar:
        for start in starts:
            here = slice(start, start + batch_size)
            noise = initial_noise(len(x0[here]), x0.shape[1:], seed, start).to(x0.device, wide)
            for row, row_errors in zip(rows[:, here].to(x0.device, wide), errors[:, here]):
                x = diffuse(x0[here], row, noise, schedule).to(x0.dtype)
                predicted = model(x, schedule.model_time(row), *_optional(None if y is None else y[here]))
                row_errors.copy_(_squared_errors(predicted.double(), noise))
                bar.update()
    return errors.mean() if times is None else errors.mean(1)


# ---- a stream of noise for every sample, and evaluation mode: for the samplers too


def initial_noise(count, shape, seed, start=0):
    """(count, *shape) float32 on the CPU: the initial noise of samples start .. start + count - 1 of `sample`."""
    return draw_noise(noise_streams(count, seed, start), shape, "cpu", torch.float32)


def noise_streams(count, seed, start):
    """One random stream (a CPU generator) for each of the samples start .. start + count - 1."""
    # torch's CPU generator uses 32 bits of its seed. Multiples of the golden ratio keep the ranges of different seeds
    # apart, so two samples share a stream only by (seed, index), not by chance as with a hash.
    seeds = ((seed * 0x9E3779B9 + start + i) % 2**32 for i in range(count))
    return [torch.Generator().manual_seed(s) for s in seeds]


def draw_noise(streams, shape, device, dtype):
    """(len(streams), *shape): the next normal numbers of each stream."""
    drawn = [torch.randn(shape, generator=g, device="cpu", dtype=torch.float32) for g in streams]
    return torch.stack(drawn).to(device, dtype)


@contextlib.contextmanager
def evaluating(*models):
    """A context without gradients, with masks selected once, and in eval mode. Afterwards the modes are restored."""
    was = {module: module.training for m in models if isinstance(m, torch.nn.Module) for module in m.modules()}
    for module in was:
        module.training = False
    whole = [m for m in models if isinstance(m, torch.nn.Module) and not any(map(is_sharded, m.parameters()))]
    try:
        with torch.no_grad(), hold_masks(*whole):
            yield
    finally:
        for module, training in was.items():
            module.training = training
