"""Models and their tensors in files: safetensors, whole or in shards, and other programs' .pth, .pt, .th, .bin.

The header of a model file describes the model, so that `load_model` can build it again. Reading a file never runs code
from it: our own files hold no pickles, and torch's restricted unpickler, which refuses code, reads a foreign .pth.

Shards are laid out as on the model hubs: name.safetensors.index.json lists which tensor is in which
name-00001-of-00003.safetensors. The index is written last. If writing is interrupted there is no index, so old and new
shards are never mixed.
"""

import argparse
import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sparsedm.errors import InputError
from sparsedm.files import atomic_file, parse_json, read_json, regular_file, write_json, writing
from sparsedm.kernels.masked_matmul import STE, GradientRule
from sparsedm.layers import Compressed
from sparsedm.sparsity import compress, is_sharded, masked_layers, parameter_names, sparsify

INDEX = ".index.json"
KINDS = ("dense", "masked", "compressed")
FORMAT = 2  # of a model file. A file without this number has format 1: every compressed layer is 2:4
# the names that training scripts give to a network and to its averaged weights
AVERAGES = ("ema", "model_ema", "ema_model", "net_ema", "nnet_ema", "state_dict_ema", "ema_state_dict", "params_ema")
NETWORKS = ("model", "state_dict", "net", "nnet", "net_model", "network", "params", "module", "_orig_mod", "unet")

# ---- tensors ---------------------------------------------------------------------------------------------------------


def write_tensors(file, tensors, header):
    """Write named tensors as one .safetensors file. header: dict of texts. Raises: OSError. Not atomic by itself."""
    # the format has no strides: a channels-last weight is written in the usual order
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    addresses = set()
    for name, value in tensors.items():  # nor shared memory: a tied weight is written twice
        if value.numel() and value.data_ptr() in addresses:
            tensors[name] = value.clone()
        addresses.add(value.data_ptr())
    try:
        save_file(tensors, file, metadata=header or None)
    except SafetensorError as error:
        raise OSError(str(error)) from error  # such as a full disk


def write_shards(file, tensors, header, shard_bytes):
    """Write named tensors as files of at most `shard_bytes` (or one tensor), and FILE.index.json. Returns its path."""
    file = Path(file)
    shards = [{}]
    for name, value in tensors.items():
        held = sum(other.numel() * other.element_size() for other in shards[-1].values())
        if shards[-1] and held + value.numel() * value.element_size() > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    index = file.with_name(file.name + INDEX)
    with writing(index):
        index.unlink(missing_ok=True)
    names = [f"{file.stem}-{i:05d}-of-{len(shards):05d}{file.suffix}" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        with atomic_file(file.with_name(name)) as partial:
            write_tensors(partial, shard, {})
    places = {key: name for name, shard in zip(names, shards) for key in shard}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    write_json(index, {"metadata": header | {"total_size": size}, "weight_map": places})
    return index


def read_tensors(file, weights="average"):
    """(tensors by name, header) of a .safetensors file, an index of shards, or a foreign file.

    A foreign file may hold several state dicts. By default the averaged weights are read, if present; weights="raw"
    reads the trained weights. If there was a choice, header["taken"] says which was read.
    Raises: InputError if the file is missing or truncated, holds code, or holds no state dict.
    """
    file = Path(file)
    regular_file(file)
    try:
        if file.name.endswith(INDEX):
            return _read_shards(file)
        if file.suffix not in (".pth", ".pt", ".th", ".bin", ".ckpt"):
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        # many training scripts add a Namespace of options, which is as safe as a dict;
        # torch's warning about pickle protocols is of no use to the reader
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} is refused: it is damaged, or holds more than tensors and might run code") from error
    except InputError:
        raise
    except Exception as error:  # torch's unpickler may raise anything on a damaged file
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise InputError(f"{file} is missing, truncated or of another format: {reason}") from error
    header = {}
    if isinstance(tensors, list | tuple):  # ermongroup/ddim: network, optimizer, epoch, step, EMA if any
        states = list(filter(_is_state_dict, tensors))
        tensors = dict(zip(("model", "ema"), [states[0], *states[1:][-1:]])) if states else None
    if isinstance(tensors, dict) and not _is_state_dict(tensors):
        tensors, header = _choose({name: v for name, v in tensors.items() if _is_state_dict(v)}, weights)
    if not _is_state_dict(tensors):
        raise InputError(f"{file} is not a state dict: it must map names to tensors")
    return tensors, header


def one_network(tensors, weights="average"):
    """Strips a prefix that all names share, such as "module.". Returns (tensors, header).

    If the prefixes name several networks, one is chosen as in `read_tensors`.
    """
    header = {}
    while True:
        groups = {}
        for name, value in tensors.items():
            if name != "n_averaged":  # the count of torch's AveragedModel
                first, _, rest = name.partition(".")
                groups.setdefault(first, {})[rest] = value
        if not groups or not set(groups) <= {*AVERAGES, *NETWORKS}:
            return tensors, header
        tensors, taken = _choose(groups, weights)
        header |= taken


def _is_state_dict(found):
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    )


def _choose(states, weights):
    """Choose the averaged or the trained weights from {name: state dict}. Returns (state dict or None, header)."""
    order = AVERAGES + NETWORKS if weights == "average" else NETWORKS + AVERAGES
    found = [name for name in order if states.get(name)]
    others = ", ".join(map(repr, found[1:]))
    header = {"taken": f"{found[0]!r} was read, {others} ignored"} if others else {}
    return (states[found[0]] if found else None), header


def _read_shards(index):
    listing = read_json(index, weight_map=dict)
    places, header = listing["weight_map"], listing.get("metadata")
    if not places or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{index} is damaged: it must map each tensor to its file under weight_map")
    shards = sorted({Path(place).name for place in places.values()})  # only files beside the index
    if any(shard.endswith(INDEX) for shard in shards):
        raise InputError(f"{index} is damaged: it names an index as a file of tensors")
    tensors = {}
    for shard in shards:
        tensors |= read_tensors(index.with_name(shard))[0]
    missing = [name for name in places if name not in tensors]
    if missing:
        raise InputError(f"the files of {index} lack {len(missing)} tensors ({', '.join(missing[:6])})")
    return {name: tensors[name] for name in places}, {
        key: text for key, text in (header if isinstance(header, dict) else {}).items() if isinstance(text, str)
    }


def _kind(tensor):
    return tensor.is_floating_point(), tensor.is_complex()


def fill(model, tensors, file):
    """Load `tensors` into `model`. A model on the meta device uses the tensors themselves, without a copy.

    Raises: InputError that lists what is missing, unexpected, or of another shape or kind.
    """
    expected = model.state_dict()
    for name, value in tensors.items():
        words = value.dtype in (torch.int16, torch.int32) and value.dim() > 0
        if words and name in expected and expected[name].dtype == torch.uint8:
            tensors = tensors | {name: value.view(torch.uint8)}  # metadata in older files
    tied = [[name for name in names if name in tensors] for names in parameter_names(model)]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
            for name, value in tensors.items()
            if name in expected and value.shape != expected[name].shape
        ],
        "tied in the model but different in the file": [
            name for names in tied for name in names[1:] if not torch.equal(tensors[name], tensors[names[0]])
        ],
        "of another kind": [
            f"{name} {str(value.dtype).removeprefix('torch.')}"
            for name, value in tensors.items()
            if name in expected and _kind(value) != _kind(expected[name])
        ],
    }
    listed = [
        f"{len(names)} {problem} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if listed:
        raise InputError(f"{file} does not fit the model: {'; '.join(listed)}")
    assign = any(value.is_meta for value in expected.values())
    model.load_state_dict(tensors, assign=assign)
    if assign:  # assigning unties the weights
        for names in tied:
            for name in names[1:]:
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, model.get_parameter(names[0]))


# ---- models ----------------------------------------------------------------------------------------------------------


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
}


def _inside(module):
    """The attribute in which a wrapper of torch holds its module; None if `module` is no such wrapper."""
    return _WRAPPERS.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None


def unwrapped(model):
    """Returns (model, plain): the model inside torch.compile, DDP and similar wrappers, and a function of a name.

    plain(name): the name without the parts of wrappers.
    """
    while inside := _inside(model):
        model = getattr(model, inside)
    wrappers = {f"{name}.{_inside(m)}" for name, m in model.named_modules() if _inside(m)}

    def plain(name):
        parts = name.split(".")
        return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in wrappers)

    return model, plain


def describe(model):
    """{"kind", "config", "patterns"}: what `load_model` needs in addition to the tensors to build the model again.

    Raises: InputError if `model.config` is neither a dataclass nor JSON.
    """
    model, plain = unwrapped(model)
    compressed = {plain(name): str(m.pattern) for name, m in model.named_modules() if isinstance(m, Compressed)}
    masked = {plain(name): str(layer.pattern) for name, layer in masked_layers(model)}
    config = getattr(model, "config", None)
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{type(model).__name__}.config cannot be saved: it is not JSON: {error}") from None
    return {
        "kind": "compressed" if compressed else "masked" if masked else "dense",
        "config": config,
        "patterns": compressed or masked,
    }


def save_model(file: str | PathLike, model: nn.Module, shard_bytes: int | None = None) -> Path:
    """Write a dense, masked or compressed model as one self-describing .safetensors file, and return its path.

    Wrappers such as torch.compile and DDP are left out. shard_bytes: split the model into files of at most this size
    and write FILE.index.json; returns the path of the index.
    Raises: InputError, before anything is written, for another suffix, a config that is not JSON, or sharded weights.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: a model file must be named .safetensors")
    tensors, header = _contents(model)
    if shard_bytes:
        return write_shards(file, tensors, header, shard_bytes)
    with atomic_file(file) as partial:
        write_tensors(partial, tensors, header)
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
    convert: state dict of a foreign file (.safetensors, .pth, .pt, .bin) -> ours. Returns Loaded, on the CPU.
    Raises: InputError if the file is unreadable or truncated, holds code, or does not fit the model (keys and shapes
    are listed).
    """
    file, state = _find(Path(path), which)
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
        config = description["config"] if description.get("config") is not None else config
    if config is None:
        raise InputError(f"{file} does not say what model it holds: name one (--model; in Python config=, for build)")
    model = build(config)
    if not description and tensors.keys() != model.state_dict().keys():
        tensors = one_network(tensors)[0]
    if description:
        model = _as_described(model, description["kind"], patterns, tensors, description.get("rules", {}), file)
    elif convert:
        tensors = convert(tensors)
    fill(model, tensors, file)
    return Loaded(model.eval(), describe(model)["kind"], file, state)


def _as_described(model, kind, patterns, tensors, rules, file):
    for pattern in dict.fromkeys(patterns.values()):  # makes every named layer one of ours
        sparsify(model, pattern, [name for name in patterns if patterns[name] == pattern])
    for name, pattern in patterns.items():
        layer = model.get_submodule(name)  # `sparsify` has found it
        layer.set_pattern(pattern)
        layer.freeze_mask(f"{name}.mask" in tensors)
        try:
            layer.rule = GradientRule(*map(float, rules.get(name, STE)))
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"{file} has a damaged description in its header: the gradient rule of {name}") from None
    return compress(model) if kind == "compressed" else model


def _find(path, which):
    if which not in ("ema", "model"):
        raise InputError(f"which={which!r}: 'ema' or 'model'")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        return path, {}
    runs = [path, *sorted(path.glob("[0-9][0-9]-*"), reverse=True)]
    found = path if (path / "state.json").exists() else next(filter(None, map(checkpoints, runs)), [None])[-1]
    if found is None:
        raise InputError(f"{path} holds no checkpoint")
    return found / f"{which}.safetensors", read_json(found / "state.json")


def checkpoints(folder):
    """The checkpoints of a run folder, oldest first."""
    return sorted(Path(folder).glob("checkpoints/step-*"))


def write_model(file, model):
    """Like `save_model` to one file, but not atomic."""
    write_tensors(file, *_contents(model))


def _contents(model):
    """(tensors by name, header) of a model's file."""
    description = describe(model)
    model, plain = unwrapped(model)
    rules = {plain(name): list(layer.rule) for name, layer in masked_layers(model) if layer.rule != STE}
    tensors = {plain(name): tensor for name, tensor in model.state_dict().items()}
    sharded = [name for name, tensor in tensors.items() if is_sharded(tensor)]
    if sharded:
        raise InputError(f"{sharded[0]} is sharded over processes: gather the model before it is saved")
    return tensors, {"sparsedm": json.dumps({"format": FORMAT} | description | ({"rules": rules} if rules else {}))}
