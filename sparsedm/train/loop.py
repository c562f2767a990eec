"""The training loop: one network, one set of options, one folder; exact resume. One step is in `step.py`.

On a CPU, a run that is stopped at any point and resumed gives bit for bit the result of an uninterrupted run. To
resume, make the same call again: `_Run` loads the newest checkpoint of the folder. The loop does not set patterns; its
caller does (`chain.py`).
"""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from sparsedm import diffusion
from sparsedm.errors import InputError, Stopped
from sparsedm.kernels.cpu import rules
from sparsedm.model_files import describe
from sparsedm.models.slimmable import SlimmableDDPM
from sparsedm.sparsity import hold_masks
from sparsedm.train import checkpoint, distributed, run_folder
from sparsedm.train.data import batch, check_context
from sparsedm.train.metrics import MetricsLog, Reference
from sparsedm.train.step import OPTIMIZERS, Step, classes_of, takes_text

logger = logging.getLogger(__name__)
# options that do not change the weights (accumulate: without dropout and slimmable networks)
MAY_CHANGE = ("accumulate", "log_every", "save_every", "validate_every")


class Interrupted(Stopped):
    """SIGINT or SIGTERM arrived, and the step was finished and saved. exit_code: 128 + the signal, as shells expect."""

    def __init__(self, signum, step, folder):
        super().__init__(f"stopped at step {step} and saved in {folder}; to resume, run the same command again")
        self.step, self.folder, self.exit_code = step, folder, 128 + signum


class OutOfTime(Interrupted):
    """The deadline passed; the finished steps are saved. exit_code: 3, also used by the benchmarks."""

    exit_code = 3

    def __init__(self, where):
        Exception.__init__(self, f"time was up {where}; to continue, run the same command again")


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The defaults are U-ViT's CIFAR-10 run (arXiv 2209.12152), with gradient clipping."""

    steps: int = 500_000
    batch_size: int = 128  # of one step, over all processes
    accumulate: int = 1  # each process computes its share of a batch in so many parts: less memory, more time
    lr: float = 2e-4
    optimizer: str = "adamw"  # of OPTIMIZERS: adam adds the decay to the gradient, masked-adamw selects the masks too
    betas: tuple = (0.99, 0.999)
    weight_decay: float = 0.03
    warmup: int | None = None  # steps of linear warm-up; None: a tenth of the run, at most warmup_most
    warmup_most: int = 2500
    cosine: bool = False  # after the warm-up, let lr fall to zero along half a cosine
    ema: float = 0.9999  # final decay of the EMA weights
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
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "warmup_most": (self.warmup_most >= 0, "at least 0"),
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
        """The learning rate. step: steps of this run. updates: see `RunState`."""
        warmup = min(self.warmup_most, self.steps // 10) if self.warmup is None else self.warmup
        if updates < warmup:
            return self.lr * (updates + 1) / warmup
        if not self.cosine:
            return self.lr
        begin = max(0, warmup - (updates - step))
        return self.lr * (1 + math.cos(math.pi * (step - begin) / max(self.steps - begin, 1))) / 2

    @property
    def fixed_length(self):
        """Why a finished run with these options cannot be made longer; None if it can."""
        if self.cosine:
            return "with cosine the learning rate has fallen to zero at the end"
        return "the warm-up is a share of the length: give it in steps (warmup)" if self.warmup is None else None

    def ema_at(self, updates):
        return min(self.ema, (1 + updates) / (self.ema_warmup + updates))


@dataclass(frozen=True)
class TrainResult:
    """A finished run. The models are on the training device, in eval mode. A loss is None if it was not measured."""

    model: nn.Module
    ema: nn.Module
    step: int
    loss: float | None  # total, mean over the last logged window
    validation_loss: float | None  # of the EMA
    seconds: float  # of training only, over all sessions of this run
    images_per_second: float | None  # over the same seconds
    checkpoint: Path


@dataclass
class RunState:
    """The progress of a run, stored in state.json.

    updates: optimizer updates in total. They include the updates of an earlier stage whose optimizer is continued.
    """

    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation_loss: float | None = None

    @classmethod
    def read(cls, saved, path):
        """The state of a checkpoint, from its state.json. Raises: InputError if a number is missing or impossible."""
        names = [field.name for field in fields(cls)]
        values = {name: saved[name] for name in names if name in saved}
        numbers = [value for name, value in values.items() if value is not None or not name.endswith("loss")]
        if (
            len(values) < len(names)
            or not all(type(number) in (int, float) for number in numbers)
            or not all(type(values[name]) is int for name in ("step", "updates"))
            or not (0 <= values["step"] <= values["updates"] and values["seconds"] >= 0)
            or path.name != f"step-{values['step']:08d}"
        ):
            raise InputError(
                f"{path / 'state.json'} is damaged: it must hold {', '.join(names)}, as {path.name} has them"
            )
        return cls(**values)


def train(
    student,
    images,
    loss,
    options,
    folder,
    *,
    reference=None,
    validation=None,
    first_step=0,
    record=None,
    deadline=math.inf,
    device="cpu",
    progress=True,
):
    """Train a Student in place for options.steps steps, or continue the run in `folder`.

    images, validation: ImageSet. loss: a Loss. reference: a metrics.Reference.
    first_step: where the random streams start, so that the stages of a chain see different batches.
    record: dict of JSON values to store in options.json, such as the data source; they must be the same on a resume.
    deadline: a value of time.monotonic(). The first step that ends after it is saved, and the last one of this call.

    Returns TrainResult. Raises: Interrupted after the first SIGINT or SIGTERM, once the step is saved (a second signal
    interrupts at once, as before the call); OutOfTime; TrainingDiverged; InputError (other options, a folder that
    cannot be written, labels that do not fit the network).
    """
    device, folder = torch.device(device), Path(os.path.expanduser(folder))
    check_data(student.model, images, validation)
    student, loss = student.to(device), loss.to(device)
    facts = {"options": asdict(options), "model": describe(student.model), "w_kd": loss.w_kd, "w_noise": loss.w_noise}
    facts |= {"first_step": first_step, "images": len(images), **(record or {})}
    with contextlib.ExitStack() as stack:
        distributed.first(lambda: _claim(stack, folder, facts, student.model, options))
        step = Step(student, images.to(device), loss, options, device)
        run = _Run(
            step,
            folder,
            student.continue_from,
            validation and validation.to(device),
            (reference or Reference()).to(device),
        )
        if loss.teacher is not None:
            with step.autocast:
                stack.enter_context(hold_masks(loss.teacher))
        stop = stack.enter_context(_signals())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(run.show(progress))
        _loop(run, first_step, stop, deadline)
        if run.saved is None:  # a run of 0 steps saves its initial networks
            run.validate()
            run.save()
        if distributed.anywhere(stop):
            raise Interrupted(stop[0] if stop else signal.SIGTERM, run.state.step, folder)
    state = run.state
    speed = options.batch_size * state.step / state.seconds if state.seconds else None
    losses = state.loss, state.validation_loss
    return TrainResult(student.model.eval(), student.ema, state.step, *losses, state.seconds, speed, run.saved)


def _claim(stack, folder, facts, model, options):
    """Lock a run folder until `stack` ends, and store or compare the facts of the run."""
    stack.enter_context(run_folder.lock(folder))
    config = getattr(model, "config", None)
    classes = [TrainOptions, type(config)] if is_dataclass(config) else [TrainOptions]
    may_grow = dict.fromkeys(("options.steps", "stage.steps"), options.fixed_length)
    number, started = run_folder.number(folder), run_folder.has_started(folder)
    facts = ({"run": number} if number else {}) | facts
    run_folder.claim(folder, facts, MAY_CHANGE, classes, may_grow, started)


def _loop(run, first_step, stop, deadline):
    """Make the remaining steps; return early once `stop` holds a signal. Raises: OutOfTime."""
    options, state = run.step.options, run.state
    if state.step < options.steps and distributed.anywhere(time.monotonic() >= deadline):
        raise OutOfTime(f"before step {state.step + 1} in {run.folder}")
    for number in range(state.step + 1, options.steps + 1):
        run.advance(number, first_step + number - 1)
        last = number == options.steps
        ending = distributed.anywhere(stop or (not last and time.monotonic() >= deadline))
        due_save = ending or last or number % options.save_every == 0
        due_validation = run.validation is not None and (last or number % options.validate_every == 0)
        if due_save or due_validation or number % options.log_every == 0:
            run.report(due_validation)
            if due_save:
                run.save()
            run.log.restart()
        if ending:
            if not distributed.anywhere(stop):
                raise OutOfTime(f"after step {number}, which is saved in {run.folder}")
            return


class _Run:
    """A run in its folder: step, state, log and newest checkpoint. Loads the newest checkpoint, if there is one."""

    def __init__(self, step, folder, continue_from, validation, reference):
        self.step, self.folder, self.validation, self.state = step, folder, validation, RunState()
        if continue_from is not None:
            saved = checkpoint.load_optimizer(continue_from, step.model, step.optimizer)
            self.state.updates = RunState.read(saved, continue_from).updates
        self.saved = run_folder.latest(folder)
        if self.saved:
            checkpoint.load(self.saved, step.model, step.ema)
            saved = checkpoint.load_optimizer(self.saved, step.model, step.optimizer)
            self.state = RunState.read(saved, self.saved)
            in_bf16 = step.options.amp == "bf16"
            if step.device.type == "cpu" and (differing := checkpoint.differing_kernels(saved, in_bf16)):
                words = "goes on with other CPU kernels, so it is not bit for bit the uninterrupted run"
                logger.warning("%s %s: %s", folder, words, differing)
        self.log = MetricsLog(folder, step.model, self.state.step, step.device, reference)

    def show(self, progress):
        """The progress bar, a context manager. Only the main process shows it, and only on a terminal."""
        self.progress = progress and distributed.is_main_process()
        total, disable = self.step.options.steps, None if self.progress else True
        self.bar = tqdm(desc=self.folder.name, initial=self.state.step, total=total, disable=disable)
        return self.bar

    def advance(self, number, position):
        """Make step `number` (1, 2, ...) of this run. `position` selects its batch and noise."""
        options, state = self.step.options, self.state
        self.lr = options.lr_at(number - 1, state.updates)
        try:
            values = self.step(position, self.lr, options.ema_at(state.updates))
        except InputError:  # a layer refuses NaN weights: say first what made them so
            self.log.check(number - 1)
            raise
        self.log.add(values, number)
        state.step, state.updates = number, state.updates + 1
        self.bar.update()

    def report(self, validate):
        """Write a log record of the steps since the last one."""
        state = self.state
        entry = {"step": state.step, "lr": self.lr, **self.log.close(state.step, self.step.options.batch_size)}
        state.seconds += entry["seconds"]
        state.loss, entry["seconds"] = entry["loss"], state.seconds
        if validate:
            entry["validation_loss"] = self.validate()
        self.log.write(entry)
        self.shown = {"loss": f"{entry['loss']:.4f}", "images/s": f"{entry['images_per_second']:,.0f}"}
        if "speed_to_dense" in entry:
            self.shown["of dense"] = f"{entry['speed_to_dense']:.2f}"
        self.bar.set_postfix(self.shown, refresh=False)

    def validate(self):
        """The loss of the EMA weights on the validation images, None if there are none."""
        if self.validation is not None:
            text = takes_text(self.step.model)
            x, y = batch(self.validation, torch.arange(len(self.validation), device="cpu"), text=text)
            y = y if text or classes_of(self.step.model) else None
            with self.step.autocast:
                found = diffusion.validation_loss(self.step.ema, x, self.step.schedule, y=y)
            if not torch.isfinite(found):
                self.log.diverged(self.state.step, f"validation loss {found.item()}")
            self.state.validation_loss = found.item()
        return self.state.validation_loss

    def save(self):
        step, state = self.step, self.state
        distributed.check_masks(step.model)
        networks = {"model": step.model, "ema": step.ema, "optimizer": step.optimizer}
        distributed.first(lambda: checkpoint.save(self.folder, state.step, **networks, state=asdict(state)))
        self.saved = run_folder.latest(self.folder)
        if self.bar.disable and self.progress and state.step:  # in the log of a job: a sign of life
            words = ", ".join(f"{what} {value}" for what, value in self.shown.items())
            logger.info("%s: step %s of %s, %s", self.folder.name, f"{state.step:,}", f"{step.options.steps:,}", words)


def amp_of(device, asked="auto"):
    """`TrainOptions.amp` for what is asked: bf16, off, or auto, which is bf16 on a GPU and fp32 elsewhere.

    A warning says where a CPU has no instructions for bf16: training is slower by it there.
    """
    if asked == "bf16" and device.type == "cpu" and rules.bf16_instructions() == []:
        logger.warning("bf16 is slower than fp32 on this CPU, which has no instructions for it")
    return "bf16" if asked == "bf16" or (asked == "auto" and device.type == "cuda") else None


def check_data(model, images, validation):
    """Raise InputError if the network cannot be trained on the images."""
    if describe(model)["kind"] == "compressed":
        raise InputError("a compressed model is for inference: train the masked model it was made from")
    if narrow := {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}:
        dtype = str(narrow.pop()).removeprefix("torch.")
        raise InputError(f"{dtype} weights lose the small steps of a training: train model.float(), with amp='bf16'")
    if isinstance(model, SlimmableDDPM) and model.width != 8:
        raise InputError(f"the slimmable network is set to {model.width}/8 of its width: set_width(8) before training")
    config, classes = getattr(model, "config", None), classes_of(model)
    for found in filter(None, (images, validation)):
        shape = found.shape
        if config and shape != (config.channels, config.image_size, config.image_size):
            expected = (config.channels, config.image_size, config.image_size)
            raise InputError(f"the images are {shape}, but the network takes {expected}")
        check_context(config, None if found.context is None else found.context.shape, found.source)
        if classes and (found.labels is None or int(found.labels.max()) >= classes):
            have = "no labels" if found.labels is None else f"labels up to {int(found.labels.max())}"
            raise InputError(f"the network expects labels 0..{classes - 1}, but the images have {have}")


@contextlib.contextmanager
def _signals():
    """A list that receives the first SIGINT or SIGTERM. A second signal reaches the old handlers."""
    received = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield received
        return
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    old = {s: handler for s, handler in old.items() if handler not in (signal.SIG_IGN, None)}  # ignored, or of C

    def restore():
        for signum, handler in old.items():
            signal.signal(signum, handler)

    def receive(signum, frame):
        received.append(signum)
        restore()

    for signum in old:
        signal.signal(signum, receive)
    try:
        yield received
    finally:
        restore()
