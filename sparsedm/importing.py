"""`sparsedm import`: other people's checkpoints of our networks as self-describing .safetensors files.

    U-ViT       official .pth (github.com/baofff/U-ViT), also nnet_ema.pth
    DiT         official .pt (github.com/facebookresearch/DiT), also a training checkpoint: its average is taken
    DDPM        a diffusers folder of a UNet2DModel, or of a pipeline around one; whole or sharded

What the network looks like is read from the shapes of its tensors, but for the number of heads and the image size of a
model with text tokens, which they do not show: there the published networks are the guide, and --set corrects.
Loading is safe: nothing that a file might hold is run.
"""

import dataclasses
import json
import math
from pathlib import Path

from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.models import MODELS, build_model, model_config, parse_overrides
from sparsedm.models.ddpm_diffusers import config_from_diffusers, from_diffusers
from sparsedm.tensor_files import fill, read_tensors
from sparsedm.train.checkpoint import save_model


def add_arguments(parser):
    parser.add_argument("source", metavar="FILE", help="a .pth, .pt, .bin or .safetensors file, or a diffusers folder")
    parser.add_argument("--model", metavar="NAME", help="what it holds, if that is not recognised")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="correct what was recognised")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: its name, as .safetensors, here)")


def run_import(options):
    source = Path(options.source)
    out = Path(options.out or source.resolve().with_suffix(".safetensors").name)
    if out.exists():
        raise InputError(f"{out} exists already: name another file with --out")
    found = read_foreign(source, options.model, parse_overrides(options.set))
    save_model(out, found.model)
    config = dataclasses.asdict(found.model.config)
    parameters = sum(p.numel() for p in found.model.parameters())
    print(f"{source}: {found.about}")
    print("  " + ", ".join(f"{name}={value}" for name, value in config.items()))
    print(f"  {parameters:,} parameters of {found.dtype}, schedule {type(schedule_of(found.model)).__name__}")
    for note in found.notes:
        print(f"  {note}")
    print(f"written to {out}   next: sparsedm inspect {out} --pattern 2:4")


@dataclasses.dataclass(frozen=True)
class Found:
    """What `read_foreign` made of a file. about: one phrase; notes: what was assumed, a sentence each."""

    model: object
    about: str
    dtype: str
    notes: list


def read_foreign(source, name=None, overrides=None):
    """Build our network from somebody else's checkpoint.

    source: path. name: a model name, where the file is not to be recognised by itself. overrides: options of its
    configuration that recognition got wrong. Returns Found, the model in eval mode and fp32.
    Raises: InputError: unreadable, not recognised, or not fitting (missing and unexpected keys are listed).
    """
    source, overrides = Path(source), overrides or {}
    if not source.exists():
        raise InputError(f"{source} does not exist")
    file, config, about, notes = source, None, None, []
    if source.is_dir():
        file, config, about = _diffusers_folder(source)
    tensors, header = read_tensors(file)
    if "sparsedm" in header:
        raise InputError(f"{file} is a file of this package already")
    if config is not None or _is_unet(tensors):
        tensors = from_diffusers(tensors)
    if name:
        config, about = model_config(name), f"taken as {name}"
    elif config is None:
        config, about, notes = recognise(tensors, file, overrides)
    model = build_model(config, **overrides).eval()
    fill(model, tensors, file)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    return Found(model, about, " and ".join(dtypes), notes)


def _diffusers_folder(folder):
    """(the weights, their configuration, what they are) of a diffusers model folder or pipeline folder."""
    inner = next((folder / part for part in ("unet", "transformer") if (folder / part).is_dir()), folder)
    try:
        options = json.loads((inner / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{inner / 'config.json'} is missing or damaged: {error}") from error
    kind = options.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise InputError(
            f"{inner} holds a {kind}, and only UNet2DModel has a counterpart here: sparsify the diffusers model itself"
        )
    names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"]
    names.append("diffusion_pytorch_model.bin")
    file = next((inner / name for name in names if (inner / name).exists()), None)
    if file is None:
        raise InputError(f"{inner} holds none of {', '.join(names)}")
    return file, config_from_diffusers(options), f"a UNet2DModel of diffusers {options.get('_diffusers_version', '')}"


# ---- what the shapes say ---------------------------------------------------------------------------------------------


def recognise(tensors, file, overrides):
    """(configuration, what it is, notes) of a U-ViT or DiT state dict. Raises: InputError if it is neither."""
    read = {"patch_embed.proj.weight": _uvit, "x_embedder.proj.weight": _dit}
    key = next((key for key in read if key in tensors), None)
    if key is None:
        first = ", ".join(list(tensors)[:4])
        raise InputError(
            f"{file} is not recognised: neither U-ViT, DiT nor UNet2DModel has keys such as {first}; name the model "
            "with --model, and take a diffusers folder instead of the file inside"
        )
    try:
        shown, hidden = read[key](tensors, overrides)
    except KeyError as error:
        raise InputError(f"{file} looks like {_family(key)} but lacks {error.args[0]}") from None
    alike = [
        (name, config)
        for name, config in MODELS.items()
        if config.kind == shown["kind"] and all(getattr(config, option) == value for option, value in shown.items())
    ]
    if alike:
        return alike[0][1], f"the weights of {alike[0][0]}", []
    note = ", ".join(f"{name}={value}" for name, value in hidden.items())
    notes = [f"the file does not show {note}: an assumption, which --set can change"]
    return model_config(shown | hidden), f"a {_family(key)} that is none of the published ones", notes


def _family(key):
    return "U-ViT" if key.startswith("patch") else "DiT"


def _is_unet(tensors):
    return "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in tensors)


def _side(positions, patch, file_part):
    side = math.isqrt(positions)
    if side * side != positions:
        raise InputError(f"{file_part} has {positions} places for patches, which is no square: name the model")
    return side * patch


def _uvit(tensors, overrides):
    dim, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    label_rows = len(tensors.get("label_emb.weight", ()))
    context = tensors.get("context_embed.weight")
    hidden = {"heads": max(dim // 64, 1)}
    context_tokens = 0
    if context is not None:
        context_tokens = overrides.get("context_tokens", 77)
        hidden["context_tokens"] = context_tokens
    null_label = label_rows % 10 == 1  # 1001 rows are 1000 classes and the null label, 1000 are classes alone
    if label_rows:
        hidden["null_label"] = null_label
    positions = tensors["pos_embed"].shape[1] - 1 - bool(label_rows) - context_tokens
    return {
        "kind": "uvit",
        "image_size": _side(positions, patch, "pos_embed"),
        "channels": channels,
        "patch_size": patch,
        "dim": dim,
        "depth": 2 * _count(tensors, "in_blocks"),
        "mlp_ratio": len(tensors["mid_block.mlp.fc1.weight"]) // dim,
        "num_classes": label_rows - null_label if label_rows else 0,
        "final_conv": "final_layer.weight" in tensors,
    } | ({} if context is None else {"context_dim": context.shape[1]}), hidden


def _dit(tensors, overrides):
    dim, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    label_rows = len(tensors.get("y_embedder.embedding_table.weight", ()))
    null_label = label_rows % 10 == 1
    outputs = len(tensors["final_layer.linear.weight"]) // patch**2
    hidden = {"heads": max(dim // 64, 1)} | ({"null_label": null_label} if label_rows else {})
    return {
        "kind": "dit",
        "image_size": _side(tensors["pos_embed"].shape[1], patch, "pos_embed"),
        "channels": channels,
        "patch_size": patch,
        "dim": dim,
        "depth": _count(tensors, "blocks"),
        "mlp_ratio": len(tensors["blocks.0.mlp.fc1.weight"]) // dim,
        "num_classes": label_rows - null_label if label_rows else 0,
        "learn_sigma": outputs == 2 * channels,
    }, hidden


def _count(tensors, blocks):
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})
