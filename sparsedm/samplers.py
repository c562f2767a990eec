"""Samplers: they turn noise into images with a network `model(x, t) -> predicted noise`. Also guidance by a label.

Schedules and symbols are defined in `diffusion.py`. A sampler is a function for one step from time t to the less noisy
time s: step(predict, x, noise, before, t, s). It returns x at time s and a tuple that the next step receives as
`before`; the first step receives (). t and s are Times; noise is ε, shaped like x. `Sampler.last` is the last step,
which has no s. predict(x, t) returns (x̂_0, ε̂, v); v is the network's variance output, None if the sampler does not
use it. A step is a function of these tensors alone and never waits for their values: it can become a CUDA graph.

To add a sampler, write its step and a row of `SAMPLERS`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
from tqdm import tqdm

from sparsedm.cuda_graph import Graphs
from sparsedm.diffusion import SCHEDULES, check_labels, draw_noise, evaluating, noise_streams
from sparsedm.errors import InputError, check_memory


class Time(NamedTuple):
    """A time and the values of the schedule at it, as 0-dim float64 tensors on the device of x."""

    model_time: torch.Tensor  # in the network's units
    alpha: torch.Tensor
    sigma: torch.Tensor
    log_alpha: torch.Tensor
    half_log_snr: torch.Tensor
    time: torch.Tensor
    beta: torch.Tensor


def time_table(schedule, times):
    """times (n,) -> (n, 7). Each row holds the fields of a Time."""
    quantities = schedule.model_time, schedule.alpha, schedule.sigma, schedule.log_alpha, schedule.half_log_snr
    return torch.stack([*(quantity(times) for quantity in quantities), times, schedule.beta(times)], 1)


def euler_maruyama(predict, x, noise, before, t, s):
    """The reverse SDE dx = [-β x / 2 - β ∇log p] dt + √β dw (Score SDE, eq. 6 and 11), weak order 1.

    ∇log p = -ε̂/σ. A step uses the exact integral of β, 2 log(α_s/α_t), in place of β Δt: it fits any schedule.
    """
    _, eps, _ = predict(x, t)
    beta = 2 * (s.log_alpha - t.log_alpha)
    return x + beta * (x / 2 - eps / t.sigma) + beta.sqrt() * noise, ()


def euler_maruyama_uvit(predict, x, noise, before, t, s=None):
    """Euler-Maruyama with β(t) Δt, and a last step to time 0 without noise.

    This is the sampler of U-ViT's code; U-ViT's published FIDs were computed with it. Test with data of standard
    deviation 0.25 and 50 steps: the samples' standard deviation is off by 2.8% here and by 10.6% with `euler_maruyama`.
    For very narrow data `euler_maruyama` is better.
    """
    _, eps, _ = predict(x, t)
    if s is None:  # from a discrete schedule's first time, 0, there is a step of its β, too
        beta = torch.where(t.time > 0, t.beta * t.time, -2 * t.log_alpha)
    else:
        beta = t.beta * (t.time - s.time)
    mean = x + beta * (x / 2 - eps / t.sigma)
    return (mean if s is None else mean + beta.sqrt() * noise), ()


def ddpm(predict, x, noise, before, t, s, variance="small"):
    """Ancestral sampling from q(x_s | x_t, x̂_0) (DDPM, eq. 6-7), for any times t > s.

    variance: "small": β̃, the variance of the posterior. "large": the variance of q(x_t | x_s), which is β_t if
    s = t - 1 ("fixedlarge" in DDPM's CIFAR-10 run and DDSM). "learned": β^((1 + v) / 2) β̃^((1 - v) / 2)
    (arXiv 2102.09672, eq. 15).
    """
    x0, _, v = predict(x, t)
    ratio = (t.log_alpha - s.log_alpha).exp()
    variance_t, variance_s, variance_between = t.sigma**2, s.sigma**2, 1 - ratio**2
    mean = (ratio * variance_s * x + s.alpha * variance_between * x0) / variance_t
    small = variance_between * variance_s / variance_t
    if variance == "learned":
        return mean + (variance_between.log() * (1 + v) / 4 + small.log() * (1 - v) / 4).exp() * noise, ()
    return mean + (small if variance == "small" else variance_between).sqrt() * noise, ()


def ddim(predict, x, noise, before, t, s):
    """x_s = α_s x̂_0 + σ_s ε̂ (DDIM, arXiv 2010.02502, eq. 12 with σ = 0), order 1."""
    x0, eps, _ = predict(x, t)
    return s.alpha * x0 + s.sigma * eps, ()


def dpm_solver_pp_2m(predict, x, noise, before, t, s):
    """DPM-Solver++(2M), the multistep data-prediction solver (arXiv 2211.01095, algorithm 2), order 2."""
    x0, _, _ = predict(x, t)
    h = s.half_log_snr - t.half_log_snr
    extrapolated = x0
    if before:
        x0_before, h_before = before
        extrapolated = x0 + (x0 - x0_before) * h / (2 * h_before)
    return s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * extrapolated, (x0, h)


def heun(predict, x, noise, before, t, s):
    """Heun's rule on d(x/α) = ε̂ d(σ/α), the probability-flow ODE (EDM, arXiv 2206.00364, algorithm 1), order 2.

    Each step evaluates its network twice.
    """
    h = s.sigma / s.alpha - t.sigma / t.alpha
    _, eps, _ = predict(x, t)
    _, eps_ahead, _ = predict(s.alpha * (x / t.alpha + h * eps), s)
    return s.alpha * (x / t.alpha + h * (eps + eps_ahead) / 2), ()


def data_prediction(predict, x, noise, before, t):
    """x̂_0: the default last step. DDPM's algorithm 2 adds no noise there, Heun is Euler, DPM-Solver++ has order 1."""
    x0, _, _ = predict(x, t)
    return x0, ()


class Sampler(NamedTuple):
    """A row of SAMPLERS."""

    step: Callable
    spacing: str  # its default spacing of times, see `time_grid`
    stochastic: bool = False  # its steps need noise
    learned: bool = False  # asks the network for the variance
    evaluations: int = 1  # network evaluations in each step; the last step has one
    last: Callable = data_prediction


def _ddpm(variance):
    step = functools.partial(ddpm, variance=variance)
    return Sampler(step, "time", stochastic=True, learned=variance == "learned")


SAMPLERS = {
    "euler-maruyama": Sampler(euler_maruyama, "time", stochastic=True),
    "euler-maruyama-uvit": Sampler(euler_maruyama_uvit, "time", stochastic=True, last=euler_maruyama_uvit),
    "ddpm": _ddpm("small"),
    "ddpm-large": _ddpm("large"),
    "ddpm-learned": _ddpm("learned"),
    "ddim": Sampler(ddim, "time"),
    "dpm++2m": Sampler(dpm_solver_pp_2m, "logsnr"),
    "heun": Sampler(heun, "edm", evaluations=2),
}
SPACINGS = ("time", "logsnr", "edm")


def evaluations(sampler, steps):
    """Number of network calls in each step: [2, ..., 2, 1] for heun, all ones for every other sampler.

    sampler: a name in SAMPLERS. Raises InputError below 1 step.
    """
    _check_steps(steps)
    return [SAMPLERS[sampler].evaluations] * (steps - 1) + [1]


def _check_steps(steps):
    if not isinstance(steps, Integral) or steps < 1:
        raise InputError(f"steps is {steps!r}, it must be a whole number, at least 1")


def steps_for(sampler, evaluations):
    """The largest number of steps that needs at most `evaluations` network calls. Example: 25 steps for heun with 50.

    Raises InputError below 1 evaluation.
    """
    if evaluations < 1:
        raise InputError(f"{evaluations} network evaluations: at least 1 is needed")
    return (evaluations - 1) // SAMPLERS[sampler].evaluations + 1


def time_grid(schedule, steps, spacing):
    """The times of a sampler's steps: (steps,) float64 from schedule.last down to schedule.first.

    "time": even in t; whole numbers if the schedule is discrete. "logsnr": even in λ (DPM-Solver). "edm": even in
    (σ/α)^(1/7) (EDM, eq. 5). Raises InputError below 1 step, for more steps than a discrete schedule has times, and for
    an unknown spacing.
    """
    _check_steps(steps)
    on_cpu = {"dtype": torch.float64, "device": "cpu"}  # whatever torch's default device is
    ends = torch.tensor([schedule.last, schedule.first], **on_cpu)
    if spacing == "time":
        times = schedule.snap(torch.linspace(*ends, steps, **on_cpu))
        if len(times.unique()) < steps:
            raise InputError(f"steps is {steps}, but the schedule has only {int(schedule.last) + 1} discrete times")
        return times
    if spacing == "logsnr":
        times = schedule.time_at_half_log_snr(torch.linspace(*schedule.half_log_snr(ends), steps, **on_cpu))
    elif spacing == "edm":
        root = torch.linspace(*(-schedule.half_log_snr(ends) / 7).exp(), steps, **on_cpu)
        times = schedule.time_at_half_log_snr(-7 * root.log())
    else:
        raise InputError(f"unknown spacing {spacing!r}, expected one of {', '.join(SPACINGS)}")
    return times.clamp(schedule.first, schedule.last)


CLIPS = ("every", "final", "never")


def step_times(schedule, sampler, steps):
    """`time_grid` with the sampler's own spacing."""
    return time_grid(schedule, steps, SAMPLERS[sampler].spacing)


def labels_in_turn(config, count):
    """int64 (count,): all classes in turn; None for a network without classes."""
    return torch.arange(count, device="cpu") % config.num_classes if config.num_classes else None


def batch_of(device):
    """How many images to draw at a time. 500 halve a CPU's speed."""
    return 64 if torch.device(device).type == "cpu" else 256


def integrate(model, schedule, x, times, sampler, noise=None, bar=None, clip="never", *, y=None, graphs=None):
    """Turn noise x (B, ...) at times[0] into samples: steps from times[0] to times[-1], then the sampler's last step.

    model: `model(x, t)`, `model(x, t, y)` if there are labels y (B,), or a list of models, one per time.
    noise: () -> new ε, shaped like x. clip: see `sample`. graphs: a cuda_graph.Graphs that replays every step, or None.
    A step computes in fp32 at least; between steps x has its own dtype.
    Raises: InputError if the number of models is not the number of times.
    """
    models = list(model) if isinstance(model, list | tuple) else [model] * len(times)
    if len(models) != len(times):
        raise InputError(f"{len(models)} models were given for {len(times)} steps: one per step is needed")
    call = graphs or (lambda function, *arguments: function(*arguments))
    table = time_table(schedule, times.double().cpu()).to(x.device)
    before = ()
    for i, model in enumerate(models):
        last = i == len(times) - 1
        step = SAMPLERS[sampler].last if last else SAMPLERS[sampler].step
        drawn = noise() if SAMPLERS[sampler].stochastic and not last else None
        x, *before = call(_step, step, model, clip == "every", y, x, drawn, table[i : i + 2], *before)
        if bar is not None:
            bar.update()
    return x if clip == "never" else x.clamp(-1, 1)


def _step(step, model, clip, y, x, noise, times, *before):
    """One step. Returns (x, *before). In a CUDA graph step, model and clip are constants; tensors are inputs."""
    dtype, labels = x.dtype, () if y is None else (y,)
    wide = torch.promote_types(dtype, torch.float32)

    def predict(x, t):
        out = model(x.to(dtype), t.model_time.to(wide).repeat(len(x)), *labels).to(wide)
        eps, v = out.chunk(2, dim=1) if out.shape[1] == 2 * x.shape[1] else (out, None)
        x0 = (x - t.sigma * eps) / t.alpha
        if not clip:
            return x0, eps, v
        x0 = x0.clamp(-1, 1)  # the noise must agree with it
        return x0, (x - t.alpha * x0) / t.sigma, v

    noise = None if noise is None else noise.to(wide)
    x, before = step(predict, x.to(wide), noise, before, *(Time(*row) for row in times))
    return x.to(dtype), *before


@dataclass(frozen=True)
class Execution:
    """How samples are computed. Only null_label changes the samples by more than rounding.

    null_label: the label for "no class"; None: the model's config.num_classes. A text-conditional network takes the
    context (tokens, width) of the empty text. batch_size: samples at a time; None: all. device: None: the model's.
    dtype: the dtype of the samples. network_dtype: the dtype of the network's input x; None: dtype. progress: show a
    bar on a terminal. cuda_graph: replay whole steps, network and update, as CUDA graphs (cuda_graph.py): the same
    samples, in less host time.
    """

    null_label: int | torch.Tensor | None = None
    batch_size: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    network_dtype: torch.dtype | None = None
    progress: bool = False
    cuda_graph: bool = False


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
    clip="never",
    **execution,
):
    """Draw `count` samples (count, *shape), images in about [-1, 1].

    Sample i depends only on (seed, start + i), not on its batch. Its noise is a random stream of its own, drawn on the
    CPU, so that a seed gives the same picture on every device. (The network's rounding may depend on the batch size.)

    model: `model(x, t)`, `model(x, t, y)`, or a list of `steps` models, one per step, the noisiest step first.
    steps: sampling steps. Each costs one network evaluation; heun costs 2 * steps - 1 in all.
    spacing: see `time_grid`; None: the sampler's. y (count,) int64: labels; a text-conditional network takes contexts
    (count, tokens, width). guidance: see `guided`.
    clip (images only). "every": clip the predicted clean image to [-1, 1] in each step, as DDPM does ("static
    thresholding", arXiv 2205.11487, section 2.3); without it the errors of a small network grow at high noise, where
    they are divided by α. "final": clip the finished sample only (DDSM). "never": do not clip (U-ViT).
    execution: fields of `Execution`, by name.
    Raises InputError for an unknown sampler, spacing or clip; for labels that do not fit `count` or the model; if the
    sampler needs a learned variance and the network has none; and for a CUDA graph on another device.
    """
    run = Execution(**execution)
    for what, name, known in (("sampler", sampler, SAMPLERS), ("clip", clip, CLIPS)):
        if name not in known:
            raise InputError(f"unknown {what} {name!r}, expected one of {', '.join(known)}")
    if count < 1 or (run.batch_size is not None and run.batch_size < 1):
        raise InputError(f"count is {count} and batch_size {run.batch_size}: both must be at least 1")
    if y is not None and len(y) != count:
        raise InputError(f"{len(y)} labels were given for {count} samples")
    if guidance is not None and not math.isfinite(guidance):
        raise InputError(f"guidance is {guidance}, it must be finite")
    check_memory(8 * count * math.prod(shape), f"count={count}")  # all batches, and their join
    times = time_grid(schedule, steps, spacing or SAMPLERS[sampler].spacing)
    models = model if isinstance(model, list | tuple) else [model] * steps
    for network in {id(m): m for m in models}.values():
        config = getattr(network, "config", None)
        check(config, sampler)
        check_labels(config, y)
    batch_size, device = run.batch_size or count, run.device
    if device is None:
        device = next((p.device for m in models if isinstance(m, torch.nn.Module) for p in m.parameters()), "cpu")
    if isinstance(run.null_label, torch.Tensor):
        run = replace(run, null_label=run.null_label.to(device))

    prepared = {id(m): _prepared(m, guidance, run, SAMPLERS[sampler].learned) for m in models}
    networks = [prepared[id(m)] for m in models]  # equal for equal networks, so that a graph records once
    graphs = Graphs(device) if run.cuda_graph else None
    samples = []
    starts = range(0, count, batch_size)
    hidden = None if run.progress else True  # None: unless stderr is a terminal
    with evaluating(*models), tqdm(total=steps * len(starts), disable=hidden, desc=sampler) as bar:
        for first in starts:
            size = min(batch_size, count - first)
            streams = noise_streams(size, seed, start + first)
            labels = None if y is None else torch.as_tensor(y[first : first + size], device=device)
            noise = functools.partial(draw_noise, streams, shape, device, run.dtype)
            x = integrate(networks, schedule, noise(), times, sampler, noise, bar, clip, y=labels, graphs=graphs)
            samples.append(x)
    return torch.cat(samples)


def check(config, sampler, steps=None):
    """Raise InputError if networks of `config` cannot be sampled so. steps None: whatever their number."""
    if SAMPLERS[sampler].learned and not getattr(config, "learn_sigma", False):
        raise InputError(f"sampler {sampler} needs a network that has learnt the variance (a DiT with learn_sigma)")
    if steps is not None:
        step_times(SCHEDULES[config.schedule], sampler, steps)


def _prepared(model, guidance, run, variance):
    """`model` as `integrate` calls it."""
    asked = functools.partial(model, variance=True) if variance else model
    config, dtype = getattr(model, "config", None), run.network_dtype
    return lambda x, t, y=None: guided(asked, y, guidance, run.null_label, config)(
        x if dtype is None else x.to(dtype), t
    )


def guided(model, y, guidance=None, null_label=None, config=None):
    """A `model(x, t)` for labels or texts y (B, ...): ε̂ = (1 + w) ε̂(x, t, y) - w ε̂(x, t, null), w = guidance.

    Classifier-free guidance (arXiv 2207.12598, eq. 6), both calls in one batch. guidance None or 0: the conditional
    network. y None: the unconditional network. config: None: the model's. If the network has more output channels
    than x, these hold the variance. Guidance leaves them as the call with the label gives them.
    Raises InputError if guidance has no labels or no null label.
    """
    if not guidance:
        return lambda x, t: model(x, t) if y is None else model(x, t, y)
    config = getattr(model, "config", None) if config is None else config
    if null_label is None and getattr(config, "null_label", True):
        null_label = getattr(config, "num_classes", 0) or None
    if y is None or null_label is None:
        raise InputError(
            f"guidance {guidance} needs labels and a network with a null label, or texts and an empty text"
        )
    null = null_label.to(y).expand_as(y) if isinstance(null_label, torch.Tensor) else torch.full_like(y, null_label)
    labels = torch.cat([y, null])

    def predict(x, t):
        with_label, without = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        noise = with_label + guidance * (with_label - without)
        return torch.cat([noise[:, : x.shape[1]], with_label[:, x.shape[1] :]], 1)

    return predict
