"""Measurements of a finished network: its samples, their distances to real images, its losses and its size.

Networks run in their training precision; features and distances are exact.
"""

import math
import time

import torch

from bench.experiments import activations
from bench.experiments.report import DISTANCE
from sparsedm import diffusion, evaluate, samplers
from sparsedm.features import to_uint8
from sparsedm.inspection import inspect
from sparsedm.train import data
from sparsedm.train.loop import OutOfTime
from sparsedm.train.metrics import weight_distance

LEVELS = 12  # noise levels of the validation curve
CURVE = 2048  # images of it, at most


def draw(network, scale, seed, autocast, deadline=math.inf):
    """uint8 (scale.samples, C, H, W) on the CPU, the same noise and labels for every network.

    autocast: a torch.autocast to run in. deadline: a value of time.monotonic(), looked at before each batch. Raises:
    OutOfTime.
    """
    config, count, images = network.config, scale.samples, []
    batch = samplers.batch_of(next(network.parameters()).device)
    labels = samplers.labels_in_turn(config, count)
    for start in range(0, count, batch):
        if time.monotonic() >= deadline:
            raise OutOfTime(f"after {start} of {count} samples of a trained run, which will be drawn again")
        size = min(batch, count - start)
        with autocast:
            drawn = samplers.sample(
                network,
                diffusion.schedule_of(network),
                size,
                (config.channels, config.image_size, config.image_size),
                steps=scale.sampling_steps,
                seed=seed,
                start=start,
                y=None if labels is None else labels[start : start + size],
                clip="every",
            )
        images.append(to_uint8(drawn).cpu())
    return torch.cat(images)


def measure(network, images, validation, judges, dense, autocast):
    """{measure: [(x, value)]} of a network and its `images`. x is None if there is no axis.

    validation: ImageSet. judges: [(Features, Summary of the real images)]; the first one decides. dense: the dense
    network that it started from.
    """
    schedule, device = diffusion.schedule_of(network), next(network.parameters()).device
    x, y = data.batch(validation.to(device), torch.arange(len(validation)))
    y = y if network.config.num_classes else None
    times = schedule.training_time((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS)
    few = slice(None, None, -(-len(x) // CURVE))
    with autocast:
        loss = diffusion.validation_loss(network, x, schedule, y=y)
        curve = diffusion.validation_loss(network, x[few], schedule, y=None if y is None else y[few], times=times)
    found = [evaluate.evaluate(images, reference, features) for features, reference in judges]
    distances, distance = found[0], weight_distance(network, dense)
    measured = {
        "validation loss": [(None, loss)],
        "validation images": [(None, len(x))],
        "loss at noise level": list(zip((times / schedule.last).tolist(), curve.tolist())),
        DISTANCE: [(None, distances["frechet_distance"])],
        "kernel distance": [(None, distances["kernel_distance"])],
        "precision": [(None, distances["precision"])],
        "recall": [(None, distances["recall"])],
        "samples": [(None, distances["count"])],
        "reference images": [(None, distances["reference_count"])],
        "parameters": [(None, inspect(network).totals()["parameters_after"])],
        "MACs": [(None, activations.macs(network))],
        "distance to dense weights": [(None, math.nan if distance is None else distance)],
    }
    return measured | {f"{DISTANCE}, {d['features']}": [(None, d["frechet_distance"])] for d in found[1:]}
