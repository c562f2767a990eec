"""metrics.jsonl: the log of a run, one JSON record per line. Also detects losses that are infinite or NaN.

A record holds step, lr, loss (total), noise_loss, transfer_loss and gradient_norm (means over the steps since the last
record), density (of the masked layers), flip_rate (the share of mask entries that changed since the last record),
flip_rates (the same per layer), distance (to the dense weights, see `weight_distance`), seconds (of training, over all
sessions), images_per_second, speed_to_dense (images_per_second divided by the dense network's, if known) and
validation_loss (if measured).
"""

import contextlib
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.files import append_json_line, parse_json, write_text
from sparsedm.sparsity import masked_layers, masks
from sparsedm.train import distributed, run_folder


class TrainingDiverged(InputError):
    """The loss or a gradient became infinite or NaN. It was not saved: the last checkpoint is good."""


def read_metrics(folder):
    """The records of a run folder's metrics.jsonl, oldest first, without damaged ones; [] if there are none."""
    file, records = Path(folder) / "metrics.jsonl", []
    if not file.is_file():
        return records
    with contextlib.suppress(OSError), file.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(InputError, UnicodeDecodeError):
                record = parse_json(line.decode(), file, step=int)
                if line.endswith(b"\n") and _is_whole(record):
                    records.append(record)
    return records


def _is_whole(record):
    """Whether the values of a record are of the types that the log writes."""
    rates = record.get("flip_rates", {})
    others = {name: value for name, value in record.items() if name not in ("flip_rates", "diverged")}
    if others.get("distance", 0) is None:  # the dense network has other shapes
        del others["distance"]
    return isinstance(rates, dict) and all(type(n) in (int, float) for n in (*others.values(), *rates.values()))


def usual_speed(folder):
    """Images per second in training: the median over the records, because the first includes one-time work.

    None if there are no records.
    """
    speeds = [record["images_per_second"] for record in read_metrics(folder) if "images_per_second" in record]
    return statistics.median(speeds) if speeds else None


class Reference(NamedTuple):
    """The dense network to compare a run with: its weights and its training speed in images per second."""

    model: nn.Module | None = None
    speed: float | None = None

    def to(self, device):
        return self if self.model is None else self._replace(model=self.model.to(device))


class MetricsLog:
    """Writes metrics.jsonl. The sums since the last record stay on the device until the next record."""

    def __init__(self, folder, model, step, device, reference):
        self.folder, self.file, self.model, self.device = folder, folder / "metrics.jsonl", model, device
        self.reference = reference
        self.looks_each_step = device.type == "cpu"  # reading a value from a GPU would wait for it
        if (
            distributed.is_main_process() and self.file.exists()
        ):  # drop the steps after the checkpoint: they are repeated
            kept = [json.dumps(r) + "\n" for r in read_metrics(folder) if r["step"] <= step and "diverged" not in r]
            write_text(self.file, "".join(kept))
        self.masks = masks(model)
        self.restart()

    def restart(self):
        self.sums, self.count, self.start = torch.zeros(4, device=self.device), 0, time.perf_counter()

    def add(self, values, step):
        self.sums += values
        self.count += 1
        if self.looks_each_step:
            self.check(step)

    def check(self, step):
        """Raise TrainingDiverged if a value since the last record was not finite: then the sum is not finite."""
        loss, _, _, norm = self.sums.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        since = "at step" if self.looks_each_step else f"in the {self.count} steps up to"
        self.diverged(step, f"loss {loss}, gradient norm {norm}", since)

    def diverged(self, step, what, since="at step"):
        """Record that `what` is not finite, and raise TrainingDiverged."""
        self.write({"step": step, "diverged": what})
        saved = run_folder.latest(self.folder)
        kept = f"in another folder (the last good checkpoint is {saved})" if saved else "here: nothing is saved yet"
        raise TrainingDiverged(f"training diverged {since} {step} ({what}): try a lower learning rate {kept}")

    def close(self, step, batch_size):
        """The record of the steps since the last one: means, speed, and changes of the masks."""
        self.check(step)
        names = ("loss", "noise_loss", "transfer_loss", "gradient_norm")
        seconds = time.perf_counter() - self.start
        before, self.masks = self.masks, masks(self.model)
        sizes = {name: mask.numel() for name, mask in self.masks.items()}
        kept = sum(mask.sum() for mask in self.masks.values())
        flipped = {name: (mask != before[name]).sum() for name, mask in self.masks.items()}
        entries, flips = sum(sizes.values()), [count.item() for count in flipped.values()]
        record = {
            **dict(zip(names, (self.sums / self.count).tolist())),
            "seconds": seconds,
            "images_per_second": self.count * batch_size / seconds,
            "density": float(kept / entries) if entries else 1.0,  # of the masked layers
            "flip_rate": sum(flips) / entries if entries else 0.0,  # of their mask entries
            "flip_rates": {name: count / sizes[name] for name, count in zip(sizes, flips)},
        }
        if self.reference.speed:
            record["speed_to_dense"] = record["images_per_second"] / self.reference.speed
        if self.reference.model is not None:
            record["distance"] = weight_distance(self.model, self.reference.model)
        return record

    def write(self, record):
        if not distributed.is_main_process():
            return
        append_json_line(self.file, record)


def weight_distance(network, dense):
    """||w_effective - w_dense|| / ||w_dense|| over the masked layers; over all weights if no layer is masked.

    None if the dense network has other shapes.
    """
    theirs = dict(dense.named_parameters())
    masked = {f"{name}.weight": layer.effective_weight() for name, layer in masked_layers(network)}
    mine = masked or dict(network.named_parameters())
    if any(name not in theirs or theirs[name].shape != weight.shape for name, weight in mine.items()):
        return None
    with torch.no_grad():
        moved = sum((weight.detach() - theirs[name]).square().sum() for name, weight in mine.items())
        return (moved / sum(theirs[name].square().sum() for name in mine)).sqrt().item()
