"""One training step: batch, loss of its parts, gradients, optimizer update, EMA weights. It never waits for a GPU.

All randomness of a step (images, flips, dropped labels, times, noise, dropout) is a function of (seed, position).
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sparsedm import diffusion
from sparsedm.copying import copied
from sparsedm.optim import MaskedAdamW
from sparsedm.sparsity import hold_masks
from sparsedm.train import distributed
from sparsedm.train.data import batch, batch_indices

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "masked-adamw": MaskedAdamW}


@dataclass(frozen=True)
class Student:
    """A network that is trained in place, and its EMA weights.

    ema: initial averaged weights (default: a copy of the model). With the default ema_warmup they have almost no
    influence after ten steps; ema_warmup=1 keeps it. continue_from: a checkpoint of the same network, perhaps under
    another pattern; its optimizer state and number of updates are continued.
    """

    model: nn.Module
    ema: nn.Module | None = None
    continue_from: Path | None = None

    def to(self, device):
        ema = copied(self.model if self.ema is None else self.ema)
        return replace(self, model=self.model.to(device).train(), ema=frozen(ema, device))


@dataclass(frozen=True)
class Loss:
    """The arguments of `diffusion.loss` that a student learns from."""

    schedule: diffusion.Schedule
    teacher: nn.Module | None = None
    w_kd: float = 0.0
    w_noise: float = 1.0

    def to(self, device):
        return self if self.teacher is None else replace(self, teacher=frozen(self.teacher, device))


def frozen(network, device):
    return network.to(device).eval().requires_grad_(False)


class Step:
    """Makes the steps of a run: `step(position, lr, decay)`. options: a `loop.TrainOptions`."""

    def __init__(self, student, images, loss, options, device):
        self.model, self.ema, self.images, self.options = student.model, student.ema, images, options
        self.schedule, teacher, self.device = loss.schedule, loss.teacher, device
        # a slimmable network may be shown every image once for each width, see SlimmableConfig
        config = getattr(self.model, "config", None)
        self.copies = getattr(config, "passes", 1) if getattr(config, "same_images", False) else 1
        self.shares = distributed.shares(options.batch_size, options.accumulate)
        if self.copies > 1:  # a part holds every copy of its images, so that all widths see them
            rows = torch.arange(self.copies * options.batch_size, device=device).view(self.copies, -1)
            self.shares = [(number, rows[:, part].flatten()) for number, part in self.shares]
        self.network = distributed.parallel(torch.compile(self.model) if options.compile else self.model)
        teacher = torch.compile(teacher) if options.compile and teacher is not None else teacher
        self.loss = {"teacher": teacher, "w_kd": loss.w_kd, "w_noise": loss.w_noise, "weighting": options.weighting}
        self.loss["variance"] = getattr(getattr(self.model, "config", None), "learn_sigma", False)
        self.parameters = list(self.model.parameters())
        kind, rates = OPTIMIZERS[options.optimizer], {"betas": options.betas, "weight_decay": options.weight_decay}
        more = {"model": self.model} if kind is MaskedAdamW else {"fused": True}
        self.optimizer = kind(self.parameters, options.lr, **rates, **more)
        self.generator = torch.Generator(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.amp == "bf16")

    def __call__(self, position, lr, decay):
        """position: selects batch and noise. Returns (4,): total, noise and transfer loss, gradient norm."""
        options, images = self.options, self.images
        self.generator.manual_seed(_seed(options.seed, position, "data, times, noise"))
        indices = batch_indices(len(images), options.batch_size, position, options.seed)
        if self.generator.device.type == "cuda":  # from pinned memory, so that the copy does not wait either
            indices = indices.pin_memory().to(self.generator.device, non_blocking=True)
        flips = self.generator if options.flip else None
        text = takes_text(self.model)
        x, y = batch(images, indices, flip_generator=flips, generator=self.generator, text=text)
        y = self._drop_context(y) if text else self._drop_labels(y)
        if self.copies > 1:
            x, y = x.repeat(self.copies, 1, 1, 1), None if y is None else y.repeat(self.copies)
        self.optimizer.zero_grad()
        losses = torch.zeros(3, device=x.device)
        draws = self.generator.get_state()
        with contextlib.ExitStack() as held:
            with self.autocast:
                selects = isinstance(self.optimizer, MaskedAdamW)
                held.enter_context(hold_masks(self.model, optimizer=self.optimizer if selects else None))
            for number, rows in self.shares:
                self.generator.set_state(draws)
                torch.manual_seed(_seed(options.seed, position, f"dropout {number}" if number else "dropout"))
                with self._averages_gradients(number == self.shares[-1][0]):
                    with self.autocast:
                        terms = diffusion.loss(
                            self.network, x, self.schedule, y=y, generator=self.generator, rows=rows, **self.loss
                        )
                    (self.copies * terms.total).backward()
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
        classes = classes_of(self.model)
        if not classes:
            return None
        if not getattr(self.model.config, "null_label", True):  # a network without guidance sees every label
            return y
        dropped = torch.rand(len(y), generator=self.generator, device=y.device) < self.options.label_dropout
        return y.masked_fill(dropped, classes)

    def _drop_context(self, y):
        null = self.images.null_context
        if null is None:
            return y
        dropped = torch.rand(len(y), generator=self.generator, device=y.device) < self.options.label_dropout
        return torch.where(dropped[:, None, None], null.float(), y)

    @torch.no_grad()
    def _update_ema(self, decay):
        # torch's average without AveragedModel: its update copies a counter to the device and waits for it
        get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), self.parameters, None)
        for averaged, current in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(current, 1 - decay)
            else:  # counters and frozen masks
                averaged.copy_(current)


def classes_of(model):
    """The number of classes of a network, 0 if it is unconditional."""
    return getattr(getattr(model, "config", None), "num_classes", 0)


def takes_text(model):
    """Whether a network is told a context (`ImageSet.context`) rather than a class."""
    return bool(getattr(getattr(model, "config", None), "context_tokens", 0))


def _seed(seed, position, purpose):
    """63 bits, a function of the arguments. Unlike with seed + position, two runs never share a stream."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
