"""Recognise and read foreign checkpoints of our networks (`sparsedm import`).

    U-ViT       official .pth (github.com/baofff/U-ViT), also SparseDM's, whose weights are dense until they are masked;
                or a checkpoint folder of their training
    DiT         official .pt (github.com/facebookresearch/DiT)
    DDPM        official in PyTorch (github.com/pesser/pytorch_diffusion, github.com/ermongroup/ddim)
    slimmable   DDSM's supernet (github.com/EnVision-Research/DDSM); DDPM by --model: its plain network
    DDPM, DiT   a diffusers folder of a UNet2DModel or DiTTransformer2DModel, or of a pipeline around one; also sharded

A training checkpoint may hold several networks: the averaged weights are read, and a note says so. The configuration is
read from the shapes of the tensors. They do not show the number of heads, the noise schedule, or the image size of a
U-Net or of a model with text tokens. These are taken from the published networks; --set corrects them. Loading never
runs code from a file.
"""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import torch

from sparsedm.errors import InputError
from sparsedm.files import read_json
from sparsedm.models import MODELS, build_model, model_config, schedule_note
from sparsedm.models.diffusers import config_from_diffusers, from_diffusers, rename_state
from sparsedm.tensor_files import AVERAGE, INDEX, fill, one_network, read_tensors


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of `read_foreign`. about: one phrase. notes: assumptions, one sentence each."""

    model: object
    about: str
    dtype: str
    notes: list


def read_foreign(source, name=None, overrides=None, weights="average"):
    """Build our network from a foreign checkpoint.

    source: path. name: a model name, if the file is not recognised. overrides: corrections of the recognised
    configuration. weights: "raw" for the trained weights, if the file also holds averaged ones. Returns Found; its
    model is in eval mode and fp32.
    Raises: InputError if the file is unreadable, not recognised, or does not fit (missing and unexpected keys are
    listed).
    """
    source, overrides = Path(source), overrides or {}
    if not source.exists():
        raise InputError(f"{source} does not exist")
    file, config, about, notes = source, None, None, []
    if any((source / name).is_file() for name in ("nnet.pth", "nnet_ema.pth")):
        file, notes = _uvit_folder(source, weights)
    elif source.is_dir():
        file, config, about, notes = _diffusers_folder(source, weights)
    tensors, header = read_tensors(file, weights)
    if "sparsedm" in header:
        raise InputError(f"{file} is a file of this package already")
    tensors, taken = one_network(tensors, weights)
    said = [note["taken"] for note in (header, taken) if "taken" in note] + _averages_beside(source, weights)
    if "temb.dense.0.weight" in tensors:
        tensors = _from_original_ddpm(tensors)
    supernet = "time_embedding.timembedding.1.weight" in tensors
    if supernet:
        tensors = _from_ddsm(tensors, file)
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
        config, about, more = recognise(tensors, file, overrides)
        notes = [*notes, *more]
    if supernet and config.kind in ("ddpm", "slimmable"):
        config, more = _of_ddsm(config, "ddpm" if name and config.kind == "ddpm" else "slimmable", overrides)
        about, notes = f"a network of DDSM's code{f', {about}' if name else ''}", [*notes, *more]
    model = build_model(config, device="meta", **overrides)  # random weights would double the time
    fill(model, tensors, file)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    notes = [*said, *notes, *filter(None, [schedule_note(model.config)])]
    if getattr(model.config, "qkv_bias", False):
        notes.append("qkv has biases, as SparseDM's sparse networks do: their mask is not in the file, sparsify to 2:4")
    return Found(model.float().eval(), about, " and ".join(dtypes), notes)


_AS_OFFICIAL = (
    "computed as by the official code, where the published weights come from: diffusers has another epsilon and other "
    "time frequencies, which weights trained there would need"
)


def _averages_beside(source, weights):
    """A note if another file or folder beside the source seems to hold the average of its weights."""
    if weights == "raw" or AVERAGE.search(source.stem):
        return []
    there = [path for path in source.absolute().parent.iterdir() if AVERAGE.search(path.stem)]
    found = sorted(path.name for path in there if path.suffix == source.suffix and path.is_dir() == source.is_dir())
    return [f"beside it lies {found[0]}, perhaps the average of these weights"] if found else []


def _uvit_folder(folder, weights):
    """(weights' file, notes) of a checkpoint folder of U-ViT's training."""
    trained, average = folder / "nnet.pth", folder / "nnet_ema.pth"
    if weights == "raw" and not trained.is_file():
        raise InputError(f"{folder} holds no nnet.pth, the raw weights: leave out --weights raw")
    if weights == "raw" or not average.is_file():
        return trained, []
    return average, ["'nnet_ema.pth' was read, 'nnet.pth' ignored"] if trained.is_file() else []


def _of_ddsm(config, kind, overrides):
    """(configuration, notes) of a network of DDSM's code with the shape of `config`."""
    own = {"kind": kind, "ddsm": config.width, "groups": 16 if kind == "ddpm" else 32}
    notes = []
    if kind == "slimmable":
        own |= {"passes": 3, "same_images": overrides.get("passes") != 0}
        if "groups" not in overrides:
            notes.append("the file does not show groups=32: DDSM's supernet g16 needs --set groups=16")
        notes.append(
            "the file does not show whether narrow widths were trained: they were not in DDSM's plain network, which "
            "--model ddpm-cifar10 reads"
        )
    return model_config(dataclasses.asdict(config) | own | overrides), notes


# how a network of diffusers must have been trained, and what a scheduler means that does not say it
_SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")  # `_SCHEDULER` are their defaults
_SCHEDULER_DEFAULTS = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}


def _check_scheduler(file):
    """Raise InputError if the scheduler of a diffusers pipeline has another noise schedule or target than DDPM's."""
    options = read_json(file, infinities=True)  # diffusers writes -Infinity for the least λ of its DPM-Solvers
    if not isinstance(options, dict):
        raise InputError(f"{file} is damaged: it must be an object")
    wanted = _SCHEDULER | _SCHEDULER_DEFAULTS
    defaults = wanted if options.get("_class_name") in _SCHEDULERS else _SCHEDULER_DEFAULTS
    for key, value in wanted.items():
        if (said := options.get(key, defaults.get(key))) != value:
            raise InputError(
                f"{file}: {key}={said!r}, and our network needs {value!r}: sparsify the diffusers model itself"
            )


def _diffusers_folder(folder, weights):
    """(weights' file, configuration, what they are, notes) of a diffusers model folder or pipeline folder.

    Of a training checkpoint the average is read, such as unet_ema.
    """
    parts = [folder / part for part in ("unet", "transformer")]
    averages = sorted(child for child in folder.iterdir() if AVERAGE.search(child.name) and child.is_dir())
    parts = averages + parts if weights == "average" else parts
    inner, *others = [part for part in parts if (part / "config.json").is_file()] or [folder]
    try:
        options = read_json(inner / "config.json")
        kind = options.get("_class_name", "model")
    except (InputError, AttributeError) as error:
        raise InputError(f"{inner} is no diffusers folder: {error}") from error
    try:
        config = config_from_diffusers(options)
    except InputError as error:
        raise InputError(f"{inner / 'config.json'}: {error}") from error
    # in one folder with the network; beside it; beside the checkpoint folder of a training
    above = inner.absolute()
    places = (above, above.parent / "scheduler", above.parent.parent / "scheduler")
    schedulers = [file for place in places if (file := place / "scheduler_config.json").is_file()]
    if schedulers:
        _check_scheduler(schedulers[0])
    stem = "diffusion_pytorch_model"
    names = [f"{stem}.safetensors", f"{stem}.safetensors{INDEX}"]
    names += [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.bin"]
    file = next((inner / name for name in names if (inner / name).exists()), None)
    if file is None:
        raise InputError(f"{inner} holds none of {', '.join(names)}")
    notes = [_AS_OFFICIAL] if config.kind == "dit" else []
    notes += [f"{inner.name!r} was read, {', '.join(repr(other.name) for other in others)} ignored"] if others else []
    return file, config, f"a {kind} of diffusers {options.get('_diffusers_version', '')}", notes


# ---- what the shapes say ---------------------------------------------------------------------------------------------


def recognise(tensors, file, overrides):
    """(configuration, name, notes) of a state dict. Raises: InputError if it is unknown or ambiguous."""
    key = next((key for key in _READERS if key in tensors), None)
    if key is None:
        first = ", ".join(list(tensors)[:4])
        raise InputError(
            f"{file} is not recognised: neither U-ViT, DiT, DDPM nor UNet2DModel has keys such as {first}; name the "
            "model with --model, and take a diffusers folder instead of the file inside"
        )
    family, read = _READERS[key]
    try:
        shown, hidden = read(tensors, overrides)
    except KeyError as error:
        raise InputError(f"{file} looks like {family} but lacks {error.args[0]}") from None
    # SparseDM's networks are the published ones with biases in all layers
    extra = {"qkv_bias": True} if shown.get("qkv_bias") else {}
    wanted = shown | {n: hidden[n] for n in ("null_label", "context_tokens") if n in hidden}
    for name, config in MODELS.items():
        if config.kind == shown["kind"] and all(getattr(config, n) == v for n, v in wanted.items() if n not in extra):
            return replace(config, **extra), f"the weights of {name}", []
    if "dim" in shown and "heads" not in overrides:
        hidden["heads"] = _heads(shown, file)
    assumed = ", ".join(f"{name}={value}" for name, value in hidden.items() if name not in overrides)
    notes = [f"the file does not show {assumed}: an assumption, which --set can change"] if assumed else []
    config = model_config(shown | hidden | overrides)
    return config, f"a {family} that is none of the published ones", notes


def _is_unet(tensors):
    return "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in tensors)


def _shape(tensors, name, axes):
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise InputError(f"{name} has shape {shape}, which is that of no U-ViT or DiT")
    return shape


def _heads(shown, file):
    """The number of heads of the published networks with this width and depth: a file shows no more."""
    sizes = [
        c for c in MODELS.values() if c.kind == shown["kind"] and (c.dim, c.depth) == (shown["dim"], shown["depth"])
    ]
    if not sizes:
        raise InputError(
            f"{file} does not show the number of heads, and no published network has width {shown['dim']} and depth "
            f"{shown['depth']}: say it with --set heads=..."
        )
    return sizes[0].heads


def _side(tensors, patch, extra_tokens=0):
    positions = _shape(tensors, "pos_embed", 3)[1] - extra_tokens
    side = math.isqrt(max(positions, 0))
    if side * side != positions:
        raise InputError(
            f"pos_embed has {positions} places for patches, which is no square: --set what is wrong, or name the model"
        )
    return side * patch


def _labels(tensors, table, overrides):
    """(options that the label table shows, option that it does not show). Of 1001 rows the last is the null label."""
    if table not in tensors:
        return {"num_classes": 0}, {}
    rows = _shape(tensors, table, 2)[0]
    guess = rows == overrides["num_classes"] + 1 if type(overrides.get("num_classes")) is int else rows % 10 == 1
    null_label = overrides.get("null_label", guess)
    return {"num_classes": rows - (null_label is True)}, {"null_label": null_label}


def _uvit(tensors, overrides):
    dim, channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    labels, null_label = _labels(tensors, "label_emb.weight", overrides)
    hidden = dict(null_label)
    tokens, context = 0, {"context_tokens": 0}
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
        "mlp_time_embed": "time_embed.0.weight" in tensors,
        "qkv_bias": "mid_block.attn.qkv.bias" in tensors,
    }
    hidden["schedule"] = "scaled-linear" if tokens or not shown["final_conv"] else "vp-sde"
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
    return shown | labels, null_label


def _ddpm(tensors, overrides):
    width, channels = _shape(tensors, "conv_in.weight", 4)[:2]
    levels = range(_count(tensors, "down"))
    attend = [i for i in levels if f"down.{i}.attns.0.qkv.weight" in tensors]
    size = overrides.get("image_size")
    if type(size) is not int:
        if not attend:
            raise InputError("the U-Net attends at no resolution, so it shows no image size: --set image_size=...")
        size = 16 << attend[0]
    labels, null_label = _labels(tensors, "label_embed.weight", overrides)
    shown = {
        "kind": "ddpm",
        "image_size": size,
        "channels": channels,
        "width": width,
        "multipliers": tuple(_shape(tensors, f"down.{i}.blocks.0.conv1.weight", 4)[0] // width for i in levels),
        "blocks": len({name.split(".")[3] for name in tensors if name.startswith("down.0.blocks.")}),
        "attention": tuple(size >> i for i in attend),
    }
    return shown | labels, {"image_size": size, "groups": 32, "dropout": 0.0} | null_label


_READERS = {
    "patch_embed.proj.weight": ("U-ViT", _uvit),
    "x_embedder.proj.weight": ("DiT", _dit),
    "time_embed.fc1.weight": ("DDPM", _ddpm),
}
_ORIGINAL_DDPM = {
    "temb.dense.0": "time_embed.fc1",
    "temb.dense.1": "time_embed.fc2",
    "block": "blocks",
    "attn": "attns",
    "block_1": "blocks.0",
    "attn_1": "attns.0",
    "block_2": "blocks.1",
    "temb_proj": "time_proj",
    "nin_shortcut": "shortcut",
    "proj_out": "proj",
}


def _from_original_ddpm(state):
    """DDPM's names in PyTorch -> ours. `up` counts from the highest resolution there; attention has 1x1 convs."""
    lowest = _count(state, "up") - 1
    ups = {f"up.{i}.": f"up.{lowest - i}." for i in range(lowest + 1)}
    state = {ups.get(name[:5], name[:5]) + name[5:]: value for name, value in state.items()}
    state = rename_state(state, _ORIGINAL_DDPM)
    return _flat_attention(state)


def _flat_attention(state):
    """The 1x1 convolutions of an attention as linear layers."""
    flat = [name for name in state if name.endswith((".qkv.weight", ".proj.weight")) and state[name].ndim == 4]
    return state | {name: state[name].flatten(1) for name in flat}


_DDSM = {
    "time_embedding.timembedding.1": "time_embed.fc1",
    "time_embedding.timembedding.3": "time_embed.fc2",
    "head": "conv_in",
    "tail.0": "norm_out",
    "tail.2": "conv_out",
}
_DDSM_BLOCK = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "time_proj",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "shortcut",
}


def _from_ddsm(state, file):
    """DDSM's names -> ours. Its blocks and resamplings lie in one list; sin and cos alternate; attention has 1x1 convs.

    Raises: InputError for a name that it does not have.
    """
    places = {f"middleblocks.{j}": ("mid", j) for j in range(_count(state, "middleblocks"))}
    for theirs, ours, last in (("downblocks", "down", "downsample"), ("upblocks", "up", "upsample")):
        level = block = 0
        for number in range(_count(state, theirs)):
            if f"{theirs}.{number}.main.weight" in state:
                places[f"{theirs}.{number}"] = (f"{ours}.{level}.{last}.conv", None)
                level, block = level + 1, 0
            else:
                places[f"{theirs}.{number}"] = (f"{ours}.{level}", block)
                block += 1
    found = {}
    for name, value in state.items():
        layer, _, end = name.rpartition(".")
        if layer in _DDSM:
            found[f"{_DDSM[layer]}.{end}"] = value
            continue
        place = ".".join(layer.split(".")[:2])
        part, (ours, block) = layer[len(place) + 1 :], places.get(place, (None, None))
        if part in _DDSM_BLOCK and block is not None:
            found[f"{ours}.blocks.{block}.{_DDSM_BLOCK[part]}.{end}"] = value
        elif part == "main":
            found[f"{ours}.{end}"] = value
        elif part in ("attn.group_norm", "attn.proj"):
            found[f"{ours}.attns.{block}.{part.removeprefix('attn.').removeprefix('group_')}.{end}"] = value
        elif part == "attn.proj_q":
            qkv = [state.get(f"{place}.attn.proj_{kind}.{end}") for kind in "qkv"]
            if any(one is None for one in qkv):
                raise InputError(f"{file} looks like DDSM's supernet but lacks a projection of {place}.attn")
            found[f"{ours}.attns.{block}.qkv.{end}"] = torch.cat(qkv)
        elif part not in ("attn.proj_k", "attn.proj_v") and layer != "time_embedding.timembedding.0":
            raise InputError(f"{file} looks like DDSM's supernet, which has no {name}")
    found = _flat_attention(found)
    waves = found.get("time_embed.fc1.weight")
    return found | ({} if waves is None else {"time_embed.fc1.weight": torch.cat([waves[:, ::2], waves[:, 1::2]], 1)})


def _count(tensors, blocks):
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})
