"""`sparsedm encode`: images as latents of an autoencoder, in a file to train on. Labels and texts come along."""

from pathlib import Path

import numpy as np
import torch

from sparsedm.commands.options import add_crop, add_seed_and_device, add_vae, count
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, check_writable
from sparsedm.models.autoencoder import load_autoencoder
from sparsedm.train.array_files import MIRRORED
from sparsedm.train.data import SPLITS, check_source, load_images

EXAMPLES = ("--data imagenet-train --vae stable-diffusion/vae --size 256 --out latents.npz",)


def add_arguments(parser):
    parser.add_argument("--data", required=True, help="the images, as for train")
    add_vae(parser, "encode by", required=True)
    parser.add_argument("--size", type=count, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="part of --data (default: train)")
    parser.add_argument("--limit", type=count, help="encode only so many images")
    add_crop(parser, "square")
    parser.add_argument("--mirror", action="store_true", help="encode every image mirrored, too: latents cannot be")
    parser.add_argument(
        "--store",
        choices=("moments", "latents"),
        default="moments",
        help="moments: training draws each latent anew, as U-ViT and DiT do; latents: one draw each, half the size",
    )
    parser.add_argument("--out", metavar="FILE.npz", required=True, help="the file to write")
    add_seed_and_device(parser)


def run(options):
    out = Path(options.out)
    if out.suffix != ".npz":
        raise InputError(f"--out {out}: must end in .npz")
    if out.exists():
        raise InputError(f"{out} exists already: name another file with --out")
    check_writable(out)
    check_source(options.data, out=out)
    autoencoder = load_autoencoder(options.vae, options.device, options.latent_scale)
    found = load_images(options.data, options.split, options.size, options.limit, options.crop or "square")
    if found.is_latent:
        raise InputError(f"data {options.data} holds latents already")
    images, told = found.images, {"labels": found.labels, "context": found.context}
    if options.mirror:
        images = torch.cat((images, images.flip(-1)))
        told = {name: tensor if tensor is None else torch.cat((tensor, tensor)) for name, tensor in told.items()}
    arrays = {"moments": autoencoder.moments(images, progress=True)}
    if options.store == "latents":
        mean, log_variance = arrays.pop("moments").chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(options.seed))
        arrays["images"] = mean + (log_variance / 2).exp() * noise
    told["null_context"] = found.null_context
    arrays |= {name: tensor for name, tensor in told.items() if tensor is not None}
    arrays = {name: tensor.numpy() for name, tensor in arrays.items()} | ({MIRRORED: True} if options.mirror else {})
    with atomic_file(out) as partial:
        np.savez(partial, **arrays)
    side = options.size // autoencoder.factor
    print(f"{options.store} of {len(images):,} images, {autoencoder.channels} x {side} x {side}, written to {out}")
    print(f"next: sparsedm train --data {out} with a model of image_size={side}, channels={autoencoder.channels}")
