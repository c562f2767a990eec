"""The training loop: one network, one set of options, one folder; exact resume, no synchronisation inside a GPU step.

All randomness of a step is a function of (seed, step): which images, flips, dropped labels, times, noise, dropout. So a
run that was stopped anywhere and started again ends, on a CPU, with the same bits as one that was not. To resume, make
the same call again. The loop knows nothing of patterns: whoever calls it sets them (`chain.py`).
"""

import contextlib
import copy
import hashlib
import math
import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from sparsedm import diffusion
from sparsedm.errors import InputError
from sparsedm.train import checkpoint, distributed
from sparsedm.train.data import batch, batch_indices
from sparsedm.train.metrics import MetricsLog

MAY_CHANGE = ("accumulate", "log_every", "save_every", "validate_every")  # options that leave the weights as they are


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the step was finished and saved. exit_code: 128 + the signal, as shells expect."""

    def __init__(self, signum, step, folder):
        super().__init__(f"stopped at step {step} and saved in {folder}; to resume, run the same command again")
        self.step, self.folder, self.exit_code = step, folder, 128 + signum


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The defaults are U-ViT's CIFAR-10 run (arXiv 2209.12152), with gradient clipping."""

    steps: int = 500_000
    batch_size: int = 128  # of one step, by all processes together
    accumulate: int = 1  # parts in which each process computes its share of a batch: less memory, more time
    lr: float = 2e-4
    betas: tuple = (0.99, 0.999)
    weight_decay: float = 0.03
    warmup: int | None = None  # steps of linear warm-up; None: a tenth of the run, at most 2500
    cosine: bool = False  # after the warm-up, let lr fall to zero along half a cosine
    ema: float = 0.9999  # the decay it ends with
    ema_warmup: int = 10  # after u updates the decay is at most (1 + u) / (ema_warmup + u); 1: no warm-up
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    flip: bool = True
    weighting: str = "noise"  # of the loss over noise levels, see `diffusion.loss`
    label_dropout: float = 0.1  # how often a class-conditional network sees the null label (for guidance)
    seed: int = 0
    amp: str | None = None  # None or "bf16"
    compile: bool = False
    log_every: int = 100
    save_every: int = 1000
    validate_every: int = 1000

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        rules = {
            "steps": self.steps >= 0,
            "batch_size": self.batch_size >= 1,
            "accumulate": self.accumulate >= 1,
            "lr": 0 < self.lr < math.inf,
            "betas": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "weight_decay": self.weight_decay >= 0,
            "warmup": self.warmup is None or self.warmup >= 0,
            "ema": 0 <= self.ema < 1,
            "ema_warmup": self.ema_warmup >= 1,
            "clip": self.clip >= 0,
            "seed": 0 <= self.seed < 2**63,
            "label_dropout": 0 <= self.label_dropout <= 1,
            "weighting": self.weighting in diffusion.WEIGHTINGS,
            "amp": self.amp in (None, "bf16"),
            "log_every": self.log_every >= 1,
            "save_every": self.save_every >= 1,
            "validate_every": self.validate_every >= 1,
        }
        for name in (name for name, holds in rules.items() if not holds):
            raise InputError(f"training option {name}={getattr(self, name)!r} is out of its range")

    def lr_at(self, step, updates):
        """The learning rate. step: made in this run; updates: made by this optimizer, more if it was taken over."""
        warmup = min(2500, self.steps // 10) if self.warmup is None else self.warmup
        if updates < warmup:
            return self.lr * (updates + 1) / warmup
        if not self.cosine:
            return self.lr
        begin = max(0, warmup - (updates - step))
        return self.lr * (1 + math.cos(math.pi * (step - begin) / max(self.steps - begin, 1))) / 2

    def ema_at(self, updates):
        return min(self.ema, (1 + updates) / (self.ema_warmup + updates))


@dataclass(frozen=True)
class TrainResult:
    """A finished run. The models are on the training device, in eval mode; losses are None where none was measured."""

    model: nn.Module
    ema: nn.Module
    step: int
    loss: float | None  # total, mean over the last logged window
    validation_loss: float | None  # of the EMA
    seconds: float  # of training alone, all sessions of this run together
    images_per_second: float | None  # over all of them
    checkpoint: Path


def train(
    model,
    images,
    schedule,
    options,
    folder,
    *,
    ema=None,
    teacher=None,
    w_kd=0.0,
    w_noise=1.0,
    dense=None,
    validation=None,
    first_step=0,
    continue_from=None,
    record=None,
    device="cpu",
    progress=True,
):
    """Train `model` in place for options.steps steps, or go on where `folder` stopped.

    images, validation: ImageSet. ema: the average to start from (default: the model); it is copied.
    teacher, w_kd, w_noise: see `diffusion.loss`. dense: the network whose distance to this one is logged.
    first_step: where the random streams start, so that the stages of a chain see different batches.
    continue_from: a checkpoint whose optimizer and update count are taken over (the same network under a new pattern).
    record: dict of JSON values that, beside the options, make this run what it is; stored in options.json.

    Returns TrainResult. Raises: Interrupted after SIGINT / SIGTERM (a second one acts as it would without us),
    TrainingDiverged, InputError (other options, not writable, labels that do not fit the network).
    """
    device, folder = torch.device(device), Path(folder)
    check_data(model, images, validation)
    model.to(device).train()
    ema = copy.deepcopy(model if ema is None else ema).to(device).eval().requires_grad_(False)
    if teacher is not None:
        teacher = teacher.to(device).eval().requires_grad_(False)
    images, validation = images.to(device), validation and validation.to(device)
    facts = {"options": asdict(options), "model": checkpoint.describe(model), "w_kd": w_kd, "w_noise": w_noise}
    facts |= {"first_step": first_step, "images": len(images), **(record or {})}
    state = {"step": 0, "updates": 0, "seconds": 0.0, "loss": None, "validation_loss": None}

    with contextlib.ExitStack() as stack:
        if distributed.first():
            stack.enter_context(checkpoint.run_lock(folder))
            checkpoint.claim(folder, facts, MAY_CHANGE)
        distributed.wait()
        one_step = _Step(model, ema, images, schedule, options, teacher, w_kd, w_noise, device)
        if continue_from is not None:
            state["updates"] = checkpoint.load_optimizer(continue_from, model, one_step.optimizer)["updates"]
        saved = checkpoint.latest(folder)
        if saved:
            checkpoint.load(saved, model, ema)
            state = checkpoint.load_optimizer(saved, model, one_step.optimizer)
        log = MetricsLog(folder, model, state["step"], device, dense and dense.to(device))
        stop = stack.enter_context(_signals())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        bar = stack.enter_context(
            tqdm(
                desc=folder.name,
                initial=state["step"],
                total=options.steps,
                disable=None if progress and distributed.first() else True,
            )
        )

        def keep():
            distributed.check_masks(model)
            if distributed.first():
                checkpoint.save(folder, state["step"], model=model, ema=ema, optimizer=one_step.optimizer, state=state)
            distributed.wait()
            return checkpoint.latest(folder)

        def validate():
            if validation is None:
                return None
            x, y = batch(validation, torch.arange(len(validation)))
            with one_step.autocast:
                return diffusion.validation_loss(ema, x, schedule, y=y if _classes(model) else None).item()

        for step in range(state["step"] + 1, options.steps + 1):
            lr = options.lr_at(step - 1, state["updates"])
            try:
                values = one_step(first_step + step - 1, lr, options.ema_at(state["updates"]))
            except InputError:  # a layer refuses NaN weights: say first what made them so
                log.check(step - 1)
                raise
            log.add(values, step)
            state["step"], state["updates"] = step, state["updates"] + 1
            bar.update()

            stopping, last = distributed.anywhere(stop), step == options.steps
            due_save = stopping or last or step % options.save_every == 0
            due_validation = validation is not None and (last or step % options.validate_every == 0)
            if due_save or due_validation or step % options.log_every == 0:
                entry = {"step": step, "lr": lr, **log.close(step, options.batch_size)}
                state["seconds"] += entry["seconds"]
                state["loss"], entry["seconds"] = entry["loss"], state["seconds"]
                if due_validation:
                    state["validation_loss"] = entry["validation_loss"] = validate()
                log.write(entry)
                bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                if due_save:
                    saved = keep()
                log.restart()
            if stopping:
                break
        if saved is None:  # a run of no steps: the networks as they came
            state["validation_loss"] = validate()
            saved = keep()
        if distributed.anywhere(stop):
            raise Interrupted(stop[0] if stop else signal.SIGTERM, state["step"], folder)
    return TrainResult(
        model.eval(),
        ema,
        step=state["step"],
        loss=state["loss"],
        validation_loss=state["validation_loss"],
        seconds=state["seconds"],
        images_per_second=options.batch_size * state["step"] / state["seconds"] if state["seconds"] else None,
        checkpoint=saved,
    )


class _Step:
    """One optimizer step. Nothing in it waits for a GPU: what it returns stays on the device."""

    def __init__(self, model, ema, images, schedule, options, teacher, w_kd, w_noise, device):
        self.model, self.ema, self.images, self.schedule, self.options = model, ema, images, schedule, options
        self.shares = distributed.shares(options.batch_size, options.accumulate)
        self.network = distributed.parallel(torch.compile(model) if options.compile else model)
        teacher = torch.compile(teacher) if options.compile and teacher is not None else teacher
        self.loss = {"teacher": teacher, "w_kd": w_kd, "w_noise": w_noise, "weighting": options.weighting}
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, options.lr, options.betas, weight_decay=options.weight_decay, fused=True
        )
        self.generator = torch.Generator(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.amp == "bf16")

    def __call__(self, position, lr, decay):
        """position: which batch and noise. Returns (4,): total, noise and transfer loss, gradient norm."""
        options, images = self.options, self.images
        self.generator.manual_seed(_seed(options.seed, position, "data, times, noise"))
        indices = batch_indices(len(images), options.batch_size, position, options.seed)
        if self.generator.device.type == "cuda":  # from pinned memory, so that the copy does not wait either
            indices = indices.pin_memory().to(self.generator.device, non_blocking=True)
        x, y = batch(images, indices, flip_generator=self.generator if options.flip else None)
        y = self._drop_labels(y)
        self.optimizer.zero_grad()
        losses = torch.zeros(3, device=x.device)
        draws = self.generator.get_state()
        for number, rows in self.shares:
            self.generator.set_state(draws)
            torch.manual_seed(_seed(options.seed, position, f"dropout {number}" if number else "dropout"))
            with self._averages_gradients(number == self.shares[-1][0]):
                with self.autocast:
                    terms = diffusion.loss(
                        self.network, x, self.schedule, y=y, generator=self.generator, rows=rows, **self.loss
                    )
                terms.total.backward()
            losses += torch.stack((terms.total.detach(), terms.noise, terms.transfer)) / len(self.shares)
        if len(self.shares) > 1:  # not the losses: every backward adds the decay of the pruned weights, undivided
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], len(self.shares))
        norm = nn.utils.clip_grad_norm_(self.parameters, options.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._update_ema(decay)
        return torch.cat((distributed.mean(losses), norm[None]))

    def _averages_gradients(self, last):
        """Processes average their gradients once per step: in the backward of the last part of the batch."""
        return contextlib.nullcontext() if last or distributed.world() == 1 else self.network.no_sync()

    def _drop_labels(self, y):
        classes = _classes(self.model)
        if not classes:
            return None
        if not getattr(self.model.config, "null_label", True):  # a network without guidance sees every label
            return y
        dropped = torch.rand(len(y), generator=self.generator, device=y.device) < self.options.label_dropout
        return y.masked_fill(dropped, classes)

    @torch.no_grad()
    def _update_ema(self, decay):
        # torch's own average, without AveragedModel, whose update copies a counter to the device and waits for it
        get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), self.parameters, None)
        for averaged, current in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(current, 1 - decay)
            else:  # counters and frozen masks
                averaged.copy_(current)


def check_data(model, images, validation):
    """Raise InputError where the network and the images do not fit each other."""
    if checkpoint.describe(model)["kind"] == "compressed":
        raise InputError("a compressed model is for inference: train the masked model it was made from")
    config, classes = getattr(model, "config", None), _classes(model)
    for found in filter(None, (images, validation)):
        shape = tuple(found.images.shape[1:])
        if config and shape != (config.channels, config.image_size, config.image_size):
            expected = (config.channels, config.image_size, config.image_size)
            raise InputError(f"the images are {shape} and the network takes {expected}")
        if classes and (found.labels is None or int(found.labels.max()) >= classes):
            have = "no labels" if found.labels is None else f"labels up to {int(found.labels.max())}"
            raise InputError(f"the network expects labels 0..{classes - 1} and the images have {have}")


def _classes(model):
    return getattr(getattr(model, "config", None), "num_classes", 0)


def _seed(seed, position, purpose):
    """63 bits that are a function of the arguments; unlike seed + position, two runs never share a stream."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@contextlib.contextmanager
def _signals():
    """A list that receives the first SIGINT or SIGTERM; then the old handlers are back, so that a second one acts."""
    received = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield received
        return
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for signum, handler in old.items():
            signal.signal(signum, handler)

    def receive(signum, frame):
        received.append(signum)
        restore()

    for signum in old:
        if old[signum] is not signal.SIG_IGN:
            signal.signal(signum, receive)
    try:
        yield received
    finally:
        restore()
