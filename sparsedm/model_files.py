"""Models in files that describe themselves, so that `load_model` can build them again. Tensors: `tensor_files.py`."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from torch import nn

from sparsedm.compressed import Compressed
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, parse_json, read_json, regular_file, write_json
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.straight_through import STE, GradientRule
from sparsedm.layers import Masked, invalid_because
from sparsedm.sparsity import masked_layers, module_of, sparsify
from sparsedm.tensor_files import (
    fill,
    has_dtype,
    one_network,
    read_tensors,
    remove_shards,
    unwritable,
    write_shards,
    write_tensors,
)

KINDS = ("dense", "masked", "compressed")
FORMAT = 2  # of a model file. A file without this number has format 1: every compressed layer is 2:4


class Incomplete(InputError):
    """The file holds the weights of a network that is more than its weights."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The result of `load_model`. model: in eval mode. kind: "dense", "masked" or "compressed"."""

    model: nn.Module
    kind: str
    file: Path
    state: dict  # a checkpoint's state.json: step and so on; empty for a single file


_WRAPPERS = {  # wrapper class of torch: the attribute that holds the module
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}


def _inside(module):
    """The attribute in which a wrapper of torch holds its module; None if `module` is no such wrapper."""
    return _WRAPPERS.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None


def unwrapped(model):
    """Returns (model, plain): the model inside torch.compile, DDP and similar wrappers, and a function of a name.

    plain(name): the name without the parts of wrappers.
    """
    model = module_of(model)
    while inside := _inside(model):
        model = getattr(model, inside)
    wrappers = {f"{name}.{_inside(m)}" for name, m in model.named_modules() if _inside(m)}

    def plain(name):
        parts = name.split(".")
        return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrappers)

    return model, plain


def describe(model):
    """{"kind", "config", "patterns"}: what `load_model` needs in addition to the tensors to build the model again.

    Raises: InputError if `model.config` is neither a dataclass nor JSON, or only some of the layers are compressed.
    """
    model, plain = unwrapped(model)
    compressed = {plain(name): str(m.pattern) for name, m in model.named_modules() if isinstance(m, Compressed)}
    masked = {plain(name): str(layer.pattern) for name, layer in masked_layers(model)}
    if compressed and masked:
        names = f"{next(iter(masked))} is masked and {next(iter(compressed))} compressed"
        raise InputError(f"{names}: a file holds one kind; call compress(model) or decompress(model) first")
    config = getattr(model, "config", None)
    try:
        config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
        parse_json(json.dumps({"config": config}, allow_nan=False), "it")  # as `load_model` reads it
        _check_names(config)
    except (TypeError, ValueError, RecursionError) as error:
        why = error.__cause__ or error
        raise InputError(f"{type(model).__name__}.config cannot be saved: it is not JSON: {why}") from None
    return {
        "kind": "compressed" if compressed else "masked" if masked else "dense",
        "config": config,
        "patterns": compressed or masked,
    }


def _check_names(value):
    """Raise TypeError for a name in nested dicts that is no text: JSON would make it one."""
    for name in value if isinstance(value, dict) else ():
        if not isinstance(name, str):
            raise TypeError(f"the name {name!r} is no text")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_names(inner)


def save_model(file: str | PathLike, model: nn.Module, shard_bytes: int | None = None) -> Path:
    """Write a dense, masked or compressed model as one self-describing .safetensors file, and return its path.

    The file holds patterns and `model.config`. For a model without a `.config`, `load_model` needs one: `config=`.
    Wrappers such as torch.compile and DDP are left out. `load_model` refuses the file of a model whose `unsaved` (a
    string) names what no file can hold, such as hooks that change its inputs. shard_bytes: split the model into files
    of at most this size and write FILE.index.json; returns the path of the index. What was saved under this name in the
    other way is removed.
    Raises: InputError, before anything is written, for another suffix, a config that is not JSON, sharded weights, or a
    dtype that safetensors lack.
    """
    file = Path(os.path.expanduser(file))
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: a model file must be named .safetensors")
    tensors, header = _contents(model)
    if shard_bytes is not None and not (isinstance(shard_bytes, int) and shard_bytes > 0):
        raise InputError(f"shard_bytes={shard_bytes!r}: must be a whole number, at least 1")
    if shard_bytes:
        return write_shards(file, tensors, header, shard_bytes)
    with atomic_file(file) as partial:
        write_tensors(partial, tensors, header)
    remove_shards(file)
    return file


def load_model(
    path: str | PathLike,
    build: Callable[..., nn.Module],
    *,
    which: str = "ema",
    config: object = None,
    convert: Callable[[dict], dict] | None = None,
) -> Loaded:
    """Build a model from a run folder, a checkpoint folder, a model file, an index of shards, or a foreign file.

    build: config -> model. It gets the config in the file (a dict), or `config` if the file has none.
    which: "ema" or "model", for folders. In the folder of a chain, the last stage with a checkpoint is read.
    convert: state dict of a foreign file (.safetensors, .pth, .pt, .bin) -> ours. Returns Loaded, on the CPU, in the
    dtype that `build` gives.
    Raises: InputError if the file is unreadable or truncated, holds code, or does not fit the model (keys and shapes
    are listed); Incomplete if the model was more than its weights.
    """
    file, state = _find(Path(os.path.expanduser(path)), which)
    tensors, header = read_tensors(file)
    description = patterns = None
    if "sparsedm" in header:
        description = parse_json(header["sparsedm"], f"the header of {file}", kind=str, patterns=dict)
        patterns, version = description["patterns"], description.get("format", 1)
        if type(version) is not int or version < 1:
            raise InputError(f"the header of {file} is damaged: its format is {version!r}")
        if version > FORMAT:
            raise InputError(f"{file} is of format {version}, and this sparsedm reads up to {FORMAT}: update sparsedm")
        if description["kind"] not in KINDS or not all(isinstance(pattern, str) for pattern in patterns.values()):
            raise InputError(
                f"the header of {file} is damaged: it must name a kind of {', '.join(KINDS)}, and patterns"
            )
        if unsaved := description.get("unsaved"):
            raise Incomplete(f"{file} cannot be run: the network had {unsaved}, which no file holds")
        config = description["config"] if description.get("config") is not None else config
    if config is None:
        why = ", because the saved model had no .config" if description else ""
        advice = "name one (--model; in Python config=, which build gets)"
        raise InputError(f"{file} does not say what model it holds{why}: {advice}")
    model = build(config)
    if not isinstance(model, nn.Module):
        raise InputError(f"build gave a {type(model).__name__}, which is no model: an nn.Module is needed")
    if _inside(model):
        raise InputError(f"build gave a {type(model).__name__}: load into the network itself, and wrap it afterwards")
    if not description and tensors.keys() != (names := model.state_dict().keys()):
        found = one_network(tensors)[0]
        tensors = found if found.keys() & names else tensors
    if description:
        model = _as_described(model, description["kind"], patterns, tensors, description.get("rules", {}), file)
    elif convert:
        tensors = convert(tensors)
    fill(model.eval(), tensors, file)  # in eval mode masks freeze without a warning
    check_digest(file, state)
    return Loaded(model, describe(model)["kind"], file, state)


def _as_described(model, kind, patterns, tensors, rules, file):
    for name, rule in rules.items() if isinstance(rules, dict) else [(str(rules), None)]:
        three = name in patterns and isinstance(rule, list) and len(rule) == 3
        if not three or not all(type(number) in (int, float) and 0 <= number < 1e308 for number in rule):
            raise InputError(f"{file} has a damaged description in its header: the gradient rule of {name}")
    layers = dict(model.named_modules(remove_duplicate=False))
    for name, pattern in patterns.items():
        if not isinstance(layer := layers.get(name), nn.Linear | nn.Conv2d):
            found = "is missing" if layer is None else f"is a {type(layer).__name__}"
            raise InputError(f"{file} does not fit the model: its {pattern} layer {name} {found} there")
        if reason := invalid_because(layer.weight, Pattern.parse(pattern)):
            raise InputError(f"{file} does not fit the model: {name} is {pattern} in the file, but {reason} there")
    for pattern in dict.fromkeys(patterns.values()):  # makes every named layer one of ours
        sparsify(model, pattern, [name for name in patterns if patterns[name] == pattern])
    for name, pattern in patterns.items():
        layer = layers[name]
        if not isinstance(layer, Masked):
            raise InputError(f"{file} does not fit the model: {name} is {pattern} in the file, and stays dense there")
        layer.set_pattern(pattern)
        layer.freeze_mask(f"{name}.mask" in tensors)
        layer.rule = GradientRule(*map(float, rules.get(name, STE)))
    return compress(model) if kind == "compressed" else model


def _find(path, which):
    if which not in ("ema", "model"):
        raise InputError(f"which={which!r}: 'ema' or 'model'")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_dir():
        return regular_file(path), {}
    runs = [path, *sorted(path.glob("[0-9][0-9]-*"), reverse=True)]
    found = path if (path / "state.json").exists() else next(filter(None, map(checkpoints, runs)), [None])[-1]
    if found is None:
        raise InputError(f"{path} holds no checkpoint")
    return found / f"{which}.safetensors", read_state(found)


def write_state(folder, state):
    """Write a checkpoint's state.json, with a SHA-256 of every file in the folder and of the state itself."""
    found = {}
    for file in sorted(Path(folder).iterdir()):
        with open(file, "rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    state = {**state, "sha256": found}
    found["state.json"] = _state_digest(state)
    write_json(Path(folder) / "state.json", state)


def read_state(folder, **kinds):
    """The state.json of a checkpoint, a dict. kinds: as in `read_json`. Raises: InputError if it is damaged."""
    file = Path(folder) / "state.json"
    state = read_json(file, **kinds)
    if not isinstance(state, dict) or not state:
        raise InputError(f"{file} is damaged: it must hold names and values")
    known = state.setdefault("sha256", {})  # older ones know none, or not their own
    if not isinstance(known, dict):
        raise InputError(f"{file} is damaged: sha256 must name files")
    if known.get(file.name, found := _state_digest(state)) != found:
        raise InputError(f"{file} is damaged: it is not what was written there")
    return state


def _state_digest(state):
    known = {name: digest for name, digest in state["sha256"].items() if name != "state.json"}
    return hashlib.sha256(json.dumps({**state, "sha256": known}).encode()).hexdigest()


def check_digest(file, state):
    """Raise InputError if a checkpoint's file is not the one that its state, of `read_state`, knows."""
    known = state.get("sha256", {}).get(file.name)
    if known is not None:
        with open(file, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != known:
                raise InputError(f"{file} is damaged: it is not what was written there")


def checkpoints(folder):
    """The checkpoints of a run folder, oldest first."""
    return sorted(path for path in Path(folder).glob("checkpoints/step-*") if re.fullmatch(r"step-\d{8,10}", path.name))


def write_model(file, model):
    """Like `save_model` to one file, but not atomic."""
    write_tensors(file, *_contents(model))


def _contents(model):
    """(tensors by name, header) of a model's file."""
    description = describe(model)
    model, plain = unwrapped(model)
    sparse = [*masked_layers(model), *((name, m) for name, m in model.named_modules() if isinstance(m, Compressed))]
    rules = {plain(name): list(layer.rule) for name, layer in sparse if layer.rule != STE}
    tensors = {plain(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        reason = unwritable(tensor)
        if not reason and not has_dtype(tensor.dtype):
            reason = f"of {tensor.dtype}, and safetensors have no such dtype"
        if reason:
            raise InputError(f"{name} cannot be kept in a model file: it is {reason}")
    unsaved = getattr(model, "unsaved", None)  # on a network of somebody else it may be anything
    more = {"rules": rules, "unsaved": unsaved if isinstance(unsaved, str) else None}
    more = {name: value for name, value in more.items() if value}
    return tensors, {"sparsedm": json.dumps({"format": FORMAT} | description | more)}
