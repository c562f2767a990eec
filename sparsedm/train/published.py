"""What the originals do with each published network: how it is trained, how its images are cropped, how it is sampled.

From the configurations of github.com/baofff/U-ViT, facebookresearch/DiT, ermongroup/ddim and EnVision-Research/DDSM.
The average of the weights keeps its warm-up (`TrainOptions.ema_warmup`), which no original has: it is forgotten within
a thousandth of their runs, and short runs need it.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sparsedm.models import MODELS, same_network
from sparsedm.train.run_folder import stored_options


class Published(NamedTuple):
    """training: options of `TrainOptions` that differ from its defaults. steps_trained: length of the original's run.
    steps: of the sampler; each is one evaluation of the network. crop: see `data.load`. latent_scale: None: the
    autoencoder's. guidance: see `samplers.guided`. Where U-ViT's code has DPM-Solver (singlestep, up to order 3), these
    rows have dpm++2m with as many evaluations."""

    training: dict
    steps_trained: int
    sampler: str = "dpm++2m"
    steps: int = 50
    clip: str = "never"
    crop: str = "square"
    latent_scale: float | None = None
    guidance: float | None = None


_UVIT = {"clip": 0.0, "betas": (0.99, 0.99), "warmup_most": 5000}
_LATENT = _UVIT | {"batch_size": 1024}
_COCO = Published(_UVIT | {"betas": (0.9, 0.9), "batch_size": 256}, 1_000_000, latent_scale=0.2301, guidance=1.0)
_ADAM = {"optimizer": "adam", "betas": (0.9, 0.999), "weight_decay": 0.0}
_DDPM = Published(_ADAM | {"warmup_most": 5000}, 800_000, "ddpm-large", 1000, "every")  # hojonathanho/diffusion
_SLIMMABLE = _ADAM | {"lr": 4e-4, "batch_size": 256, "warmup_most": 5000}
_DIT = _ADAM | {"optimizer": "adamw", "lr": 1e-4, "batch_size": 256, "warmup": 0, "clip": 0.0}
_SDE = ("euler-maruyama-uvit", 1000)

PUBLISHED = {  # by preset
    "uvit-cifar10-small": Published({"clip": 0.0}, 500_000, *_SDE),
    "uvit-celeba64-small": Published(_UVIT, 500_000, *_SDE, crop="celeba"),
    "uvit-imagenet64-mid": Published(_LATENT | {"lr": 3e-4}, 300_000),
    "uvit-imagenet64-large": Published(_LATENT | {"lr": 3e-4}, 300_000),
    "uvit-imagenet256-large": Published(_LATENT | {"label_dropout": 0.15}, 300_000, guidance=0.4),
    "uvit-imagenet256-huge": Published(_LATENT, 500_000, guidance=0.4),
    "uvit-imagenet512-large": Published(_LATENT | {"label_dropout": 0.15}, 500_000, guidance=0.7),
    "uvit-imagenet512-huge": Published(_LATENT, 500_000, guidance=0.7),
    "uvit-coco-small": _COCO,
    "uvit-coco-small-deep": _COCO,
    "ddpm-cifar10": _DDPM,
    "ddpm-celeba64": _DDPM._replace(crop="celeba", steps_trained=500_000),
    "slimmable-cifar10": Published(_SLIMMABLE, 450_000, "ddpm-large", 1000, "final"),
}
PUBLISHED |= {
    name: Published(_DIT, 7_000_000 if "256" in name else 3_000_000, "ddpm-learned", 250)
    for name in MODELS
    if name.startswith("dit-imagenet")
}
# the sampling of the paper's best FID, and sample_ddp.py's default; the other sizes were compared without guidance
PUBLISHED |= {
    name: PUBLISHED[name]._replace(guidance=0.5) for name in ("dit-imagenet256-xlarge", "dit-imagenet512-xlarge")
}


_RELEASED = {"groups": 32, "ddsm": 128}  # DDSM's own file differs from the preset


def published(config, any_dropout=False):
    """The Published row of a network that has the shape of one of the presets, None for any other; see `same_network`.

    any_dropout: also with another dropout, which a diffusers folder does not tell: for sampling.
    """
    free = ["dropout"] * any_dropout
    for name, row in PUBLISHED.items():
        shape = MODELS[name]
        released = replace(shape, **_RELEASED) if shape.kind == "slimmable" else shape
        if same_network(config, shape, *free) or same_network(config, released, *free):
            return row
    return None


def original_crop(config):
    """How the images of a network are cropped if nothing else is asked for, see `data.load`."""
    return (published(config) or Published({}, 0)).crop


def unrecorded_crop(config):
    """How images were cropped for a run whose folder records no crop: folders record what differs from this.

    Older versions had no recipe for SparseDM's networks, which have biases in qkv. They took the middle square.
    """
    return "square" if getattr(config, "qkv_bias", False) else original_crop(config)


def trained_crop(run, config):
    """How images were cropped for the networks of `run`; `original_crop` if it holds no run folder.

    run: a run folder, one of its stages, a folder of run folders, or the folder of a search that trained its family.
    """
    run = Path(run)
    run = run / "family" if (run / "family").is_dir() else run
    stage, alone = re.match(r"\d\d-", run.name), (run / "options.json").exists()
    places = (run, run.parent) if stage else (run,) if alone else sorted(run.glob("*/"))
    runs = [folder for folder in places if (folder / "options.json").exists()]
    recorded = (stored_options(folder).get("crop") for folder in runs)
    return next(filter(None, recorded), unrecorded_crop(config) if runs else original_crop(config))
