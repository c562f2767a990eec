"""Five samplers, which carry noise to images with a network `model(x, t) -> predicted noise`, and guidance by a label.

Schedules and symbols are those of `diffusion.py`. What a sampler is given: predict(step, x, t) -> (x̂_0, ε̂); intervals
yields (step, t, s), s being the less noisy time to go to; noise() -> ε like x, fresh at every call. It returns x at the
last s. Times are 0-dim float64 tensors.
"""

import functools
from itertools import pairwise

import torch
from tqdm import tqdm

from sparsedm.cuda_graph import graphed
from sparsedm.diffusion import draw_noise, evaluating, noise_streams
from sparsedm.errors import InputError


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


def evaluations(sampler, steps):
    """How often a sampler of that name calls the network of each of its steps: [2, ..., 2, 1] for heun, else [1, ...].

    Raises InputError below 1 step.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, it must be at least 1")
    return [2 if SAMPLERS[sampler][0] is heun else 1] * (steps - 1) + [1]


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
    network_dtype=None,
    progress=False,
    cuda_graph=False,
):
    """Draw `count` samples (count, *shape) of `dtype`, images in about [-1, 1], on the device (None: the model's).

    Sample i depends on (seed, start + i) alone, never on the batch it is drawn in: its noise is a stream of its own,
    drawn on the CPU so that a seed means the same picture on every device. (A network's own rounding may still depend
    on the batch size.) model: `model(x, t)` or `model(x, t, y)`, or a list of `steps` such, one per step, first the
    noisiest. steps: network evaluations, for heun 2 steps - 1. spacing: None for the sampler's own, see time_grid.
    y (count,) int64; guidance as in `guided`; null_label: None for the model's config.num_classes. clip: 1.0 for images
    keeps every x̂_0 in [-1, 1] on the way (DDPM's code; "static thresholding", arXiv 2205.11487, section 2.3): a small
    network's errors at high noise, where they are divided by α, would else carry the sample away. network_dtype: of the
    x that the network is given, where it is not `dtype`, in which the sampler itself computes. cuda_graph: replay the
    network's evaluations as a CUDA graph (cuda_graph.py); the few operations of a step around them run ahead of it.
    Raises InputError for an unknown sampler or spacing, for counts and labels that do not fit together, and for a graph
    off a GPU.
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

    networks = graphed(models, device) if cuda_graph else models
    samples = []
    starts = range(0, count, batch_size)
    hidden = None if progress else True  # None: unless stderr is a terminal
    with evaluating(*models), tqdm(total=steps * len(starts), disable=hidden, desc=sampler) as bar:
        for first in starts:
            size = min(batch_size, count - first)
            streams = noise_streams(size, seed, start + first)
            labels = None if y is None else torch.as_tensor(y[first : first + size], device=device)
            batch_models = [_given(guided(m, labels, guidance, null_label), network_dtype) for m in networks]
            noise = functools.partial(draw_noise, streams, shape, device, dtype)
            samples.append(integrate(batch_models, schedule, noise(), times, sampler, noise, bar, clip))
    return torch.cat(samples)


def _given(predict, dtype):
    return predict if dtype is None else lambda x, t: predict(x.to(dtype), t)


def guided(model, y, guidance=None, null_label=None):
    """`model(x, t)` for labels y (B,): ε̂ = (1 + w) ε̂(x, t, y) - w ε̂(x, t, null), w = guidance.

    Classifier-free guidance (arXiv 2207.12598, eq. 6), both branches in one batch. Guidance None or 0 is the plain
    conditional network; y None the unconditional one. Raises InputError when guidance has no labels or no null label.
    """
    if not guidance:
        return lambda x, t: model(x, t) if y is None else model(x, t, y)
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
