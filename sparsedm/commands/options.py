"""Shared by several commands: types of options, and the model that the command line names."""

import argparse
import contextlib
import functools
import math
import os
import time
from pathlib import Path

import torch

from sparsedm.errors import InputError
from sparsedm.files import check_writable
from sparsedm.model_files import load_model
from sparsedm.models import MODELS, build_model, model_config, parse_overrides, schedule_note
from sparsedm.models.diffusers import from_diffusers
from sparsedm.train.distributed import local_device
from sparsedm.train.image_files import CROPS

MOST = 2**31 - 1  # of anything that is counted
LARGEST = torch.finfo(torch.float32).max  # of a number that networks compute with
READ = {"options.json", "state.json", "metrics.jsonl", "dataset.json", "config.json"}  # by name, in runs, data, models
RESERVE = 40  # seconds of --minutes for the work after the deadline: a checkpoint, a record, the report


def add_model_arguments(parser, note=""):
    parser.add_argument("--model", metavar="NAME", help=f"one of {', '.join(MODELS)}{note}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an option of the model, VALUE as JSON; a wrong NAME lists them",
    )


def add_crop(parser, default="as in the training of the model, or in its original"):
    parser.add_argument(
        "--crop",
        choices=CROPS,
        help="square: the largest centred square; celeba: images of 178x218 to 128x128 at (25, 57), like U-ViT and "
        f"DDIM (default: {default})",
    )


def add_vae(parser, what, required=False):
    parser.add_argument(
        "--vae",
        metavar="DIR",
        required=required,
        help=f"{what} the diffusers AutoencoderKL (safetensors) in this folder",
    )
    parser.add_argument(
        "--latent-scale", type=positive, help="factor of its latents (default: the folder's; U-ViT for COCO had 0.2301)"
    )


def add_seed_and_device(parser):
    parser.add_argument("--seed", type=seed, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--device", type=device, default=device("auto"), help="auto, cpu, cuda, cuda:1 (default: auto)")


def seed(text):
    return _whole(text, 0, 2**63 - 1)


def whole(text):
    return _whole(text, 0, MOST)


def count(text):
    return _whole(text, 1, MOST)


def sampling_steps(text):
    """The type of --sampling-steps."""
    return _whole(text, 1, 100_000)


def _whole(text, least, most):
    if not (text.isascii() and text.isdecimal()) or len(text) > 20 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
    return int(text)


def betas(text):
    return tuple(finite(beta) for beta in text.split(","))


def finite(text):
    with contextlib.suppress(ValueError):
        if text.isascii() and "_" not in text and abs(float(text)) <= LARGEST:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number of 32 bits")


def positive(text):
    if finite(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0")
    return finite(text)


def device(text):
    if text == "auto":
        return local_device()
    try:
        found = torch.device(text)
    except (RuntimeError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device, such as cpu, cuda or cuda:1") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported: use cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return found


def deadline_of(minutes):
    """The value of time.monotonic() at which to stop, RESERVE seconds before `minutes` are over; None: never.

    Raises: InputError for too few minutes.
    """
    if minutes is None:
        return math.inf
    if 60 * minutes <= RESERVE:
        raise InputError(f"--minutes {minutes:g}: more than {RESERVE} seconds are needed to stop cleanly")
    return time.monotonic() + 60 * minutes - RESERVE


def check_out(out, *inputs):
    """Raise InputError if `out` cannot be written, or is one of `inputs`, or a part of them that is read later.

    inputs: files or folders that the command reads, or names that are neither, or None.
    """
    check_writable(out)
    out_path = Path(os.path.realpath(out))
    for given in filter(None, inputs):
        source = Path(os.path.realpath(os.path.expanduser(given)))
        inside = out_path.relative_to(source).parts if out_path.is_relative_to(source) else None
        if inside is not None and (not inside or inside[-1] in READ or "checkpoints" in inside):
            raise InputError(f"{out} is an input of this command, or of a later one: write to another file")


def picture_name(path):
    """`path` as a Path. Raises InputError if it is no name of a picture: before hours of sampling, not after."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"{path} must end in .png, .jpg, .jpeg or .webp")
    return Path(path)


def dense_part(run):
    """The path of the dense network of a run: the first stage of a chain's folder; else `run` itself."""
    return next(iter(sorted(Path(run).glob("[0-9][0-9]-*"))), Path(run))


def check_dense(loaded, option):
    """Raise InputError unless a network that was loaded for `option`, such as "--init FILE", is dense."""
    if loaded.kind != "dense":
        raise InputError(f"{option}: {loaded.file} holds a {loaded.kind} network, not a dense one")


def dense_start(options):
    """The dense network of --init: its weights, and its EMA weights."""
    path = dense_part(options.init)
    ema = load_named(options, path)
    check_dense(ema, f"--init {options.init}")
    return load_named(options, path, which="model").model, ema.model


def load_named(options, path=None, which="ema"):
    """Load the model file or run folder of the command line. --model and --set describe a foreign file.

    Raises: InputError if the file describes another model itself, or as `load_model`.
    """
    path = Path(path or options.run)
    named = options.model or options.set
    config = model_config(options.model or "uvit-tiny", **parse_overrides(options.set)) if named else None
    convert = functools.partial(from_diffusers, config=config) if config and config.kind == "ddpm" else None
    loaded = load_model(path, build_model, which=which, config=config, convert=convert)
    if config and config != loaded.model.config:
        raise InputError(f"{loaded.file} describes its own model: leave out --model and --set")
    if note := schedule_note(loaded.model.config):
        print(note)
    return loaded
