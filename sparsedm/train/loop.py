"""The training loop: one network, one set of options, one folder; exact resume. What a step does stands in `step.py`.

A run that was stopped anywhere and started again ends, on a CPU, with the same bits as one that was not. To resume,
make the same call again. The loop knows nothing of patterns: whoever calls it sets them (`chain.py`).
"""

import contextlib
import copy
import logging
import math
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from sparsedm import diffusion
from sparsedm.errors import InputError
from sparsedm.model_files import describe
from sparsedm.sparsity import hold_masks
from sparsedm.train import checkpoint, distributed
from sparsedm.train.data import batch
from sparsedm.train.metrics import MetricsLog
from sparsedm.train.step import Step, classes_of

logger = logging.getLogger(__name__)
# options that leave the weights as they are (accumulate: where there is no dropout and no slimmable network)
MAY_CHANGE = ("accumulate", "log_every", "save_every", "validate_every")


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the step was finished and saved. exit_code: 128 + the signal, as shells expect."""

    def __init__(self, signum, step, folder):
        super().__init__(f"stopped at step {step} and saved in {folder}; to resume, run the same command again")
        self.step, self.folder, self.exit_code = step, folder, 128 + signum


class OutOfTime(Interrupted):
    """A deadline has passed, and what was done until then is saved. exit_code: 3, as of the benchmarks."""

    exit_code = 3

    def __init__(self, where):
        Exception.__init__(self, f"time was up {where}; to go on, run the same command again")


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
            "steps": (self.steps >= 0, "at least 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "more than 0, and finite"),
            "betas": (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup": (self.warmup is None or self.warmup >= 0, "at least 0"),
            "ema": (0 <= self.ema < 1, "at least 0 and less than 1"),
            "ema_warmup": (self.ema_warmup >= 1, "at least 1"),
            "clip": (self.clip >= 0, "at least 0"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            "label_dropout": (0 <= self.label_dropout <= 1, "from 0 to 1"),
            "weighting": (self.weighting in diffusion.WEIGHTINGS, f"one of {', '.join(diffusion.WEIGHTINGS)}"),
            "amp": (self.amp in (None, "bf16"), "None or bf16"),
            "log_every": (self.log_every >= 1, "at least 1"),
            "save_every": (self.save_every >= 1, "at least 1"),
            "validate_every": (self.validate_every >= 1, "at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InputError(f"training option {name}={getattr(self, name)!r}: must be {rule}")

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
    dense_speed=None,
    validation=None,
    first_step=0,
    continue_from=None,
    record=None,
    deadline=math.inf,
    device="cpu",
    progress=True,
):
    """Train `model` in place for options.steps steps, or go on where `folder` stopped.

    images, validation: ImageSet. ema: the average to start from (default: the model); it is copied, and forgotten
    within ten steps unless options.ema_warmup is 1.
    teacher, w_kd, w_noise: see `diffusion.loss`. dense: the network whose distance to this one is logged.
    dense_speed: its training's images per second, of which those of this one are logged as a share.
    first_step: where the random streams start, so that the stages of a chain see different batches.
    continue_from: a checkpoint whose optimizer and update count are taken over (the same network under a new pattern).
    record: dict of JSON values that, beside the options, make this run what it is; stored in options.json.
    deadline: of time.monotonic(). It is looked at where a record is due, so that a run that was cut and resumed has the
    records of one that was not; with a GPU, nothing waits in between.

    Returns TrainResult. Raises: Interrupted after SIGINT / SIGTERM (a second one acts as it would without us),
    OutOfTime, TrainingDiverged, InputError (other options, not writable, labels that do not fit the network).
    """
    device, folder = torch.device(device), Path(folder)
    check_data(model, images, validation)
    model.to(device).train()
    ema = copy.deepcopy(model if ema is None else ema).to(device).eval().requires_grad_(False)
    if teacher is not None:
        teacher = teacher.to(device).eval().requires_grad_(False)
    images, validation = images.to(device), validation and validation.to(device)
    facts = {"options": asdict(options), "model": describe(model), "w_kd": w_kd, "w_noise": w_noise}
    facts |= {"first_step": first_step, "images": len(images), **(record or {})}
    state = {"step": 0, "updates": 0, "seconds": 0.0, "loss": None, "validation_loss": None}

    with contextlib.ExitStack() as stack:
        if distributed.first():
            stack.enter_context(checkpoint.run_lock(folder))
            checkpoint.claim(folder, facts, MAY_CHANGE)
        distributed.wait()
        one_step = Step(model, ema, images, schedule, options, teacher, w_kd, w_noise, device)
        if teacher is not None:
            with one_step.autocast:
                stack.enter_context(hold_masks(teacher))
        if continue_from is not None:
            state["updates"] = checkpoint.load_optimizer(continue_from, model, one_step.optimizer)["updates"]
        saved = checkpoint.latest(folder)
        if saved:
            checkpoint.load(saved, model, ema)
            state = checkpoint.load_optimizer(saved, model, one_step.optimizer)
        log = MetricsLog(folder, model, state["step"], device, dense and dense.to(device), dense_speed)
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
                return diffusion.validation_loss(ema, x, schedule, y=y if classes_of(model) else None).item()

        def late():
            return distributed.anywhere(time.monotonic() >= deadline)

        if state["step"] < options.steps and late():
            raise OutOfTime(f"before step {state['step'] + 1} in {folder}")
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
                shown = {"loss": f"{entry['loss']:.4f}", "images/s": f"{entry['images_per_second']:,.0f}"}
                if "speed_to_dense" in entry:
                    shown["of dense"] = f"{entry['speed_to_dense']:.2f}"
                bar.set_postfix(shown, refresh=False)
                out_of_time = not last and late()
                if due_save or out_of_time:
                    saved = keep()
                    if bar.disable and progress and distributed.first():  # in the log of a job: a sign of life
                        words = ", ".join(f"{what} {value}" for what, value in shown.items())
                        logger.info("%s: step %s of %s, %s", folder.name, f"{step:,}", f"{options.steps:,}", words)
                if out_of_time and not stopping:
                    raise OutOfTime(f"after step {step}, which is saved in {folder}")
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


def amp_of(device):
    """Products in bf16 on a GPU, in fp32 elsewhere."""
    return "bf16" if device.type == "cuda" else None


def check_data(model, images, validation):
    """Raise InputError where the network and the images do not fit each other."""
    if describe(model)["kind"] == "compressed":
        raise InputError("a compressed model is for inference: train the masked model it was made from")
    config, classes = getattr(model, "config", None), classes_of(model)
    for found in filter(None, (images, validation)):
        shape = tuple(found.images.shape[1:])
        if config and shape != (config.channels, config.image_size, config.image_size):
            expected = (config.channels, config.image_size, config.image_size)
            raise InputError(f"the images are {shape} and the network takes {expected}")
        if classes and (found.labels is None or int(found.labels.max()) >= classes):
            have = "no labels" if found.labels is None else f"labels up to {int(found.labels.max())}"
            raise InputError(f"the network expects labels 0..{classes - 1} and the images have {have}")


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
