"""Checkpoints and model files: safetensors and JSON, written so that no crash, kill or full disk leaves half of one.

A run folder:   options.json                    what made the run; the same command resumes it, another one is refused
                metrics.jsonl                   one record per log
                checkpoints/step-00001000/      model.safetensors  ema.safetensors  optimizer.safetensors  state.json
A model file:   one safetensors file whose header says what model it is, so that `load_model` can build it again. The
                network files inside a checkpoint are such files too.

Nothing of ours is pickled. A foreign .pth is read by torch's restricted unpickler, which refuses code.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from sparsedm.compressed import Conv2d24, Linear24
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, atomic_folder, write_json, writing
from sparsedm.model_files import fill, read_tensors, write_shards, write_tensors
from sparsedm.sparsify import compress, masked_layers, sparsify

# ---- a run folder ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(folder):
    """`folder_lock` of a run folder, which is also swept of what a killed run left half-written."""
    folder = Path(folder)
    with writing(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        for partial in (folder / "checkpoints").glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        yield


@contextlib.contextmanager
def folder_lock(folder):
    """Hold a folder for this process.

    Raises: InputError if another process holds it, or if nothing can be written there.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training in {folder}: wait for it or choose another folder") from None
        yield
    finally:
        os.close(handle)


def claim(folder, record, free=()):
    """Store what makes a run (a dict of JSON values) as folder/options.json, or check that it was made by the same.

    free: names, at any depth, that may differ, such as how often to log.
    Raises: InputError listing the differences, so that a run is never continued as another one.
    """
    file, record = Path(folder) / "options.json", json.loads(json.dumps(record))
    if not file.exists():
        write_json(file, record)
        return
    there, here = _flat(_read_json(file), free), _flat(record, free)
    different = [
        f"{name} is {there.get(name, 'not set')} there and {here.get(name, 'not set')} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name, "not set") != here.get(name, "not set")
    ]
    if different:
        more = f"; and {len(different) - 8} more" if len(different) > 8 else ""
        raise InputError(f"{folder} was made by other options, choose another folder: {'; '.join(different[:8])}{more}")


def _flat(value, free, prefix=""):
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    items = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items() if key not in free]
    return {name: leaf for key, inner in items for name, leaf in _flat(inner, free, key).items()}


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(folder, step, *, model, ema, optimizer, state, keep=2):
    """Write checkpoints/step-<step>/ and, once it stands, remove all but the last `keep`; returns its path.

    state: dict of JSON values, stored in state.json beside the step, the models' description and the versions.
    A checkpoint of the same step is left as it is: a step has one outcome.
    Raises: InputError if it cannot be written; what was saved before is then untouched.
    """
    path = Path(folder) / "checkpoints" / f"step-{step:08d}"
    if path.exists():
        return path
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}/{key}": value for parameter, slot in optimizer.state.items() for key, value in slot.items()
    }
    with atomic_folder(path) as partial:
        _write_model(partial / "model.safetensors", model)
        _write_model(partial / "ema.safetensors", ema)
        write_tensors(partial / "optimizer.safetensors", moments, {})
        versions = {"torch": torch.__version__}
        write_json(partial / "state.json", {"step": step, **state, "model": describe(model), "versions": versions})
    for old in _checkpoints(folder)[:-keep]:
        hidden = old.with_name(f".{old.name}.partial")  # gone at once, even if the removal is cut short
        old.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return path


def latest(folder):
    """The newest checkpoint of a run folder, or None."""
    return (_checkpoints(folder) or [None])[-1]


def load(path, model, ema):
    """Load the two networks of a checkpoint in place. Raises: InputError naming the file that is damaged or unfit."""
    for name, network in (("model", model), ("ema", ema)):
        file = Path(path) / f"{name}.safetensors"
        with _or_the_one_before(path):
            tensors = read_tensors(file)[0]
        fill(network, tensors, file)


def load_optimizer(path, model, optimizer):
    """Load the optimizer of a checkpoint in place; returns the checkpoint's state (a dict with `step`).

    optimizer: over `model.parameters()`, in that order. Raises: InputError naming the file that is damaged or unfit.
    """
    file = Path(path) / "optimizer.safetensors"
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    slots = {}
    with _or_the_one_before(path):
        state, moments = _read_json(Path(path) / "state.json"), read_tensors(file)[0]
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        if name not in places:
            raise InputError(f"{file} does not fit the model, which has no parameter {name}")
        slots.setdefault(places[name], {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return state


@contextlib.contextmanager
def _or_the_one_before(path):
    """Say of a damaged checkpoint how to go on from an older one, which is not done unasked: it repeats work."""
    try:
        yield
    except InputError as error:
        older = [other for other in _checkpoints(Path(path).parents[1]) if other.name < Path(path).name]
        if not older:
            raise
        raise InputError(f"{error}; to go on from {older[-1].name} instead, delete {path}") from error


def _checkpoints(folder):
    return sorted(Path(folder).glob("checkpoints/step-*"))


# ---- model files -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load_model` found. model is in eval mode; kind: "dense", "masked" or "compressed"."""

    model: nn.Module
    kind: str
    file: Path
    state: dict  # a checkpoint's state.json: step and so on; empty for a single file


def describe(model):
    """{"kind", "config", "patterns"}: what `load_model` needs, beside the tensors, to build the model again."""
    compressed = {name: "2:4" for name, m in model.named_modules() if isinstance(m, Linear24 | Conv2d24)}
    masked = {name: str(layer.pattern) for name, layer in masked_layers(model)}
    config = getattr(model, "config", None)
    return {
        "kind": "compressed" if compressed else "masked" if masked else "dense",
        "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config,
        "patterns": compressed or masked,
    }


def save_model(file, model, shard_bytes=None):
    """Write a dense, masked or compressed model as one self-describing .safetensors file, and return its path.

    shard_bytes: split it into files of at most that size beside FILE.index.json, whose path is returned.
    """
    if shard_bytes:
        return write_shards(file, model.state_dict(), _header(model), shard_bytes)
    with atomic_file(file) as partial:
        _write_model(partial, model)
    return Path(file)


def load_model(path, build, *, which="ema", config=None, convert=None):
    """Build a model from a run folder, a checkpoint folder, a model file, an index of shards, or a foreign file.

    build: config -> model; called with the config the file holds (a dict) or, where it holds none, with `config`.
    which: "ema" or "model", for the folders. Of a chain's folder the last stage that has a checkpoint is read.
    convert: for foreign files (.safetensors, .pth, .pt, .bin), their state dict -> ours. Returns Loaded, on the CPU.
    Raises: InputError: unreadable, truncated, holding code, or not fitting the model (keys and shapes are listed).
    """
    file, state = _find(Path(path), which)
    tensors, header = read_tensors(file)
    try:
        description = json.loads(header["sparsedm"]) if "sparsedm" in header else None
        patterns = description["patterns"] if description else {}
        config = description["config"] if description and description["config"] is not None else config
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{file} has a damaged description in its header") from None
    if config is None:
        raise InputError(f"{file} does not say what model it holds: name one (--model; in Python config=, for build)")
    model = build(config)
    if description:
        model = _as_described(model, description["kind"], patterns, tensors)
    elif convert:
        tensors = convert(tensors)
    fill(model, tensors, file)
    return Loaded(model.eval(), describe(model)["kind"], file, state)


def _as_described(model, kind, patterns, tensors):
    for pattern in dict.fromkeys(patterns.values()):  # makes every named layer one of ours
        sparsify(model, pattern, [name for name in patterns if patterns[name] == pattern])
    for name, pattern in patterns.items():
        layer = model.get_submodule(name)
        layer.set_pattern(pattern)
        layer.freeze_mask(f"{name}.mask" in tensors)
    return compress(model) if kind == "compressed" else model


def _find(path, which):
    if which not in ("ema", "model"):
        raise InputError(f"which={which!r}: 'ema' or 'model'")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        return path, {}
    runs = [path, *sorted(path.glob("[0-9][0-9]-*"), reverse=True)]
    found = path if (path / "state.json").exists() else next(filter(None, map(latest, runs)), None)
    if found is None:
        raise InputError(f"{path} holds no checkpoint")
    return found / f"{which}.safetensors", _read_json(found / "state.json")


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_model(file, model):
    write_tensors(file, model.state_dict(), _header(model))


def _header(model):
    return {"sparsedm": json.dumps(describe(model))}


def _read_json(file):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is missing or damaged: {error}") from error
