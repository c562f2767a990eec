"""Shared by the networks: checks of options and input shapes, and example inputs."""

import math

import torch

from sparsedm.diffusion import SCHEDULES
from sparsedm.errors import InputError


def check_config(kind, config, positive, others):
    """Raise InputError unless a configuration names a noise schedule, its fields `positive` are at least 1, and its
    fields `others` at least 0."""
    if config.schedule not in SCHEDULES:
        raise InputError(f"{kind} schedule={config.schedule!r}: must be one of {', '.join(SCHEDULES)}")
    for name in positive + others:
        least = 1 if name in positive else 0
        if getattr(config, name) < least:
            raise InputError(f"{kind} {name}={getattr(config, name)}: must be at least {least}")


class Labelled:
    """A configuration with num_classes and null_label."""

    @property
    def label_rows(self):
        """The rows of the label table; 0 = no table."""
        return self.num_classes + self.null_label if self.num_classes else 0


def check_shapes(kind, config, x, t, y, **others):
    """Raise InputError if an input of a network does not have the shape of its configuration.

    kind: for the message. others: name -> (tensor or None, its shape; None if the network does not take the input).
    """
    batch = x.shape[0]
    expected = {
        "x": (x, (batch, config.channels, config.image_size, config.image_size)),
        "t": (t, (batch,)),
        "y": (y, (batch,) if config.num_classes else None),
    }
    for name, (value, shape) in (expected | others).items():
        given = None if value is None else tuple(value.shape)
        if given != shape:
            raise InputError(f"{kind} input {name} has shape {given}: this model takes {shape}")
    if not x.is_floating_point():
        raise InputError(
            f"{kind} input x is {str(x.dtype).removeprefix('torch.')}: images are floating point, from -1 to 1"
        )
    if y is not None and (y.is_floating_point() or y.is_complex()):
        raise InputError(f"{kind} input y is {str(y.dtype).removeprefix('torch.')}: labels are whole numbers, int64")


def labels_of(config, x, y):
    """y, or the null label for each image of x where a network that has one gets None."""
    if y is None and config.num_classes and config.null_label:
        return torch.full(x.shape[:1], config.num_classes, device=x.device)
    return y


def embed_labels(kind, config, table, y):
    """table(y). Raises InputError for a label that is not in the table, on a CPU; a GPU is not waited for."""
    if torch.compiler.is_compiling():
        return table(y)
    try:
        return table(y)
    except IndexError:
        low, high = (int(end) for end in y.aminmax())
        raise InputError(
            f"{kind} input y holds labels from {low} to {high}: this model takes 0 to {config.label_rows - 1}"
        ) from None


def example_inputs(config, like, batch):
    """Deterministic (x, t, y) of a network, on the device of `like` and in its dtype."""
    x = ramp(like, batch, config.channels, config.image_size, config.image_size)
    t = torch.linspace(0, 999, batch, device=like.device)
    return x, t, torch.zeros(batch, dtype=torch.int64, device=like.device) if config.num_classes else None


def ramp(like, *shape):
    """Numbers from -1 to 1 in equal steps."""
    return torch.linspace(-1, 1, math.prod(shape), device=like.device, dtype=like.dtype).view(shape)
