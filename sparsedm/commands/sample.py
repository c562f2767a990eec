"""`sparsedm sample`: draw images from a trained model, or with --strategy from several networks of a run folder."""

import functools
import time
from pathlib import Path

import numpy as np
import torch

from sparsedm.commands.drawing import (
    add_sampling_arguments,
    autoencoder_of,
    batch_size_of,
    beside,
    conditions_of,
    draw,
    network_dtype,
    source_of,
)
from sparsedm.commands.options import check_out, picture_name
from sparsedm.compression import bake, compress
from sparsedm.errors import InputError
from sparsedm.features import to_uint8
from sparsedm.files import atomic_file
from sparsedm.plots import check_grid, save_grid
from sparsedm.sparsity import masked_layers
from sparsedm.timing import interleaved_seconds
from sparsedm.train import distributed

EXAMPLES = (
    "runs/quickstart",
    "runs/quickstart --count 64 --sampler ddim --sampling-steps 100 --compress",
    "runs/search-smoke-chain/family --strategy runs/search-smoke-chain/strategies/found-3.json",
)


def add_arguments(parser):
    add_sampling_arguments(parser, images=64)
    parser.add_argument("--compress", action="store_true", help="store and multiply sparse weights in compressed form")
    parser.add_argument(
        "--out",
        help="the picture, or FILE.npz for numbers (default: drawn.png in the run folder; for a model file, in the "
        "current folder)",
    )


def run(options):
    source = source_of(options)
    conditions = conditions_of(source, options)
    out = Path(options.out or beside(options.run) / "drawn.png")
    latents = source.config.channels not in (1, 3) and options.vae is None
    if out.suffix != ".npz":
        picture_name(out)
        if latents:
            raise InputError(
                f"{options.run} makes latents of {source.config.channels} channels, not a picture: "
                "decode them with --vae DIR, or write the numbers with --out FILE.npz"
            )
    autoencoder = autoencoder_of(source.config, options)
    classes = 1 if options.label is not None else source.config.num_classes or 1
    width = 16 // classes * classes or 16  # each column shows one class
    if out.suffix != ".npz":
        side = source.config.image_size * (autoencoder.factor if autoencoder else 1)
        check_grid(out, -(-options.count // width), min(width, options.count), (side, side))
    masked = source.networks[0]
    if options.compress:
        if source.compressed:
            raise InputError(f"--compress: {source.words} is compressed already: leave the option out")
        source = _compressed(source, options.strategy is None)
    check_out(out, options.run, options.strategy, options.context, options.vae)
    with distributed.process_group(options.device):
        start = time.perf_counter()
        images = draw(source, conditions, options)
        rate = options.count / (time.perf_counter() - start)
    if images is None:
        return
    if autoencoder:
        images = autoencoder.decode(images, progress=True)
    if latents and (broken := int((~images.flatten(1).isfinite()).any(1).sum())):
        raise InputError(f"{broken} of {len(images)} samples hold NaN or infinity: nothing was written")
    images = images.float() if latents else to_uint8(images)
    if out.suffix == ".npz":
        with atomic_file(out) as partial:
            np.savez(partial, images=images.numpy())
    else:
        save_grid(out, [("", row) for row in images.split(width)])
    guidance = f", guidance {source.guidance:g}" if source.guidance else ""
    how = f"{source.how}{guidance}, schedule {source.config.schedule}, seed {options.seed}"
    print(f"{len(images)} samples of {source.words}, {how}: {out}")
    if options.compress and options.strategy is None:
        count = min(options.count, batch_size_of(options))
        ours, dense = _milliseconds(source.networks[0], bake(masked), conditions.y, count, options)
        print(f"{rate:,.1f} images/s, with all that happens once, such as the choice of kernels")
        print(
            f"one call on {count} images: {ours:,.1f} ms; of the same network dense: {dense:,.1f} ms (medians of three)"
        )


def _compressed(source, must):
    """The Source with its masked networks compressed. must: refuse a network that is not masked; else it stays."""
    small = {id(n): compress(n) if must or masked_layers(n) else n for n in source.networks}
    return source._replace(
        words=f"{source.words}, compressed", networks=[small[id(n)] for n in source.networks], compressed=True
    )


@torch.no_grad()
def _milliseconds(network, dense, y, count, options):
    """The times of one call of `network` and of one of `dense`, in turns, on `count` images."""
    config, dtype = network.config, network_dtype(options, compressed=True)
    dense.to(options.device, dtype)
    x = torch.randn(count, config.channels, config.image_size, config.image_size).to(options.device, dtype)
    t, y = torch.full((count,), 500.0, device=x.device), None if y is None else y[:count].to(x.device)
    calls = [functools.partial(each, x, t, y) for each in (network, dense)]
    return [1e3 * seconds for seconds in interleaved_seconds(calls, options.device, rounds=3)]
