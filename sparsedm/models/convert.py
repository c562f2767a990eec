"""`sparsedm import`: other people's checkpoints of our networks as self-describing .safetensors files.

    U-ViT       official .pth (github.com/baofff/U-ViT), also nnet_ema.pth
    DiT         official .pt (github.com/facebookresearch/DiT), also a training checkpoint: its average is taken
    DDPM, DiT   a diffusers folder of a UNet2DModel or DiTTransformer2DModel, or of a pipeline around one; also sharded

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
from sparsedm.model_files import INDEX, fill, read_tensors, save_model
from sparsedm.models import MODELS, build_model, model_config, parse_overrides
from sparsedm.models.diffusers import config_from_diffusers, from_diffusers


def add_arguments(parser):
    parser.add_argument("source", metavar="FILE", help="a .pth, .pt, .bin or .safetensors file, or a diffusers folder")
    parser.add_argument("--model", metavar="NAME", help="what it holds, if that is not recognised")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="correct what was recognised")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: its name, as .safetensors, here)")


def run_import(options):
    source = Path(options.source)
    out = Path(options.out or _name_of(source) + ".safetensors")
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: must end in .safetensors")
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


def _name_of(source):
    name = source.resolve().name
    return name if source.is_dir() else Path(name.removesuffix(INDEX)).stem


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
        file, config, about, notes = _diffusers_folder(source)
    tensors, header = read_tensors(file)
    if "sparsedm" in header:
        raise InputError(f"{file} is a file of this package already")
    if config is None and not name and _is_unet(tensors):
        raise InputError(
            f"{file} holds a UNet2DModel without its configuration: take its folder, or name it with --model"
        )
    theirs = config is not None or _is_unet(tensors)
    if name:
        config, about = model_config(name), f"taken as {name}"
    if theirs:
        tensors = from_diffusers(tensors, config)
    elif config is None:
        config, about, notes = recognise(tensors, file, overrides)
    model = build_model(config, device="meta", **overrides)  # random weights would take as long as all the rest
    fill(model, tensors, file)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    return Found(model.float().eval(), about, " and ".join(dtypes), notes)


_AS_OFFICIAL = (
    "computed as by the official code, where the published weights come from: diffusers has another epsilon and other "
    "time frequencies, which weights trained there would need"
)


def _diffusers_folder(folder):
    """(weights' file, configuration, what they are, notes) of a diffusers model folder or pipeline folder."""
    inner = next((folder / part for part in ("unet", "transformer") if (folder / part).is_dir()), folder)
    try:
        options = json.loads((inner / "config.json").read_text(encoding="utf-8"))
        kind = options.get("_class_name", "model")
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{inner / 'config.json'} is missing or damaged ({reason}): no diffusers folder") from error
    config = config_from_diffusers(options)
    names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"]
    names.append("diffusion_pytorch_model.bin")
    file = next((inner / name for name in names if (inner / name).exists()), None)
    if file is None:
        raise InputError(f"{inner} holds none of {', '.join(names)}")
    notes = [_AS_OFFICIAL] if config.kind == "dit" else []
    return file, config, f"a {kind} of diffusers {options.get('_diffusers_version', '')}", notes


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
    assumed = ", ".join(f"{name}={value}" for name, value in hidden.items() if name not in overrides)
    notes = [f"the file does not show {assumed}: an assumption, which --set can change"] if assumed else []
    config = model_config(shown | hidden | overrides)
    return config, f"a {_family(key)} that is none of the published ones", notes


def _family(key):
    return "U-ViT" if key.startswith("patch") else "DiT"


def _is_unet(tensors):
    return "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in tensors)


def _shape(tensors, name, axes):
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise InputError(f"{name} has shape {shape}, which is that of no U-ViT or DiT")
    return shape


def _heads(dim):
    """Of 64 numbers each, as in most published networks, or somewhat more."""
    return next(heads for heads in range(max(dim // 64, 1), 0, -1) if dim % heads == 0)


def _side(tensors, patch, extra_tokens=0):
    positions = _shape(tensors, "pos_embed", 3)[1] - extra_tokens
    side = math.isqrt(max(positions, 0))
    if side * side != positions:
        raise InputError(
            f"pos_embed has {positions} places for patches, which is no square: --set what is wrong, or name the model"
        )
    return side * patch


def _labels(tensors, table, overrides):
    """(options that the table shows, option that it does not): of 1001 rows the last is taken for the null label."""
    if table not in tensors:
        return {"num_classes": 0}, {}
    rows = _shape(tensors, table, 2)[0]
    guess = rows == overrides["num_classes"] + 1 if type(overrides.get("num_classes")) is int else rows % 10 == 1
    null_label = overrides.get("null_label", guess)
    return {"num_classes": rows - (null_label is True)}, {"null_label": null_label}


def _uvit(tensors, overrides):
    dim, channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    labels, null_label = _labels(tensors, "label_emb.weight", overrides)
    hidden = {"heads": _heads(dim)} | null_label
    tokens, context = 0, {}
    if "context_embed.weight" in tensors:
        given = overrides.get("context_tokens")
        tokens = given if type(given) is int else 77
        hidden["context_tokens"] = tokens
        context = {"context_dim": _shape(tensors, "context_embed.weight", 2)[1]}
    shown = {
        "kind": "uvit",
        "image_size": _side(tensors, patch, 1 + bool(null_label) + tokens),
        "channels": channels,
        "patch_size": patch,
        "dim": dim,
        "depth": 2 * _count(tensors, "in_blocks"),
        "mlp_ratio": _shape(tensors, "mid_block.mlp.fc1.weight", 2)[0] // dim,
        "final_conv": "final_layer.weight" in tensors,
    }
    return shown | labels | context, hidden


def _dit(tensors, overrides):
    dim, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4)
    labels, null_label = _labels(tensors, "y_embedder.embedding_table.weight", overrides)
    outputs = _shape(tensors, "final_layer.linear.weight", 2)[0] // patch**2
    shown = {
        "kind": "dit",
        "image_size": _side(tensors, patch),
        "channels": channels,
        "patch_size": patch,
        "dim": dim,
        "depth": _count(tensors, "blocks"),
        "mlp_ratio": _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0] // dim,
        "learn_sigma": outputs == 2 * channels,
    }
    return shown | labels, {"heads": _heads(dim)} | null_label


def _count(tensors, blocks):
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})
