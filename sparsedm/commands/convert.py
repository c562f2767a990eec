"""`sparsedm import`: write a foreign checkpoint as a model file of this package; see `models/convert.py`."""

import dataclasses
import os
from pathlib import Path

from sparsedm.errors import InputError
from sparsedm.files import check_writable
from sparsedm.model_files import save_model
from sparsedm.models import parse_overrides
from sparsedm.models.convert import read_foreign
from sparsedm.tensor_files import INDEX

EXAMPLES = ("cifar10_uvit_small.pth", "DiT-XL-2-256x256.pt", "ddpm-cifar10-32 --out ddpm.safetensors")


def add_arguments(parser):
    parser.add_argument(
        "source", metavar="FILE", help="a .pth, .pt, .bin or .safetensors file, or a folder of diffusers or U-ViT"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the model in FILE, if it is not recognised; ddpm-cifar10 for DDSM's plain network, which looks like its "
        "supernet",
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="correct what was recognised")
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="which to read if FILE holds both: averaged or last trained weights (default: average)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the file to write (default: the same name .safetensors, in the current folder)"
    )


def run(options):
    source = Path(options.source)
    out = Path(options.out or _name_of(source) + ".safetensors")
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: must end in .safetensors")
    if out.exists():
        raise InputError(f"{out} exists already: name another file with --out")
    check_writable(out)
    found = read_foreign(source, options.model, parse_overrides(options.set), options.weights)
    save_model(out, found.model)
    config = dataclasses.asdict(found.model.config)
    parameters = sum(p.numel() for p in found.model.parameters())
    print(f"{source}: {found.about}")
    print("  " + ", ".join(f"{name}={value}" for name, value in config.items()))
    print(f"  {parameters:,} parameters of {found.dtype}")
    for note in found.notes:
        print(f"  {note}")
    print(f"written to {out}   next: sparsedm inspect {out} --pattern 2:4")


def _name_of(source):
    name = os.path.basename(os.path.abspath(source))
    return name if source.is_dir() else Path(name.removesuffix(INDEX)).stem
