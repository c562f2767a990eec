"""Tensors by name in files: safetensors, whole or in shards, and other programs' .pth, .pt, .th, .bin, .ckpt.

Reading a file never runs code from it: our own files hold no pickles, and torch's restricted unpickler, which refuses
code, reads a foreign .pth.

Shards are laid out as on the model hubs: name.safetensors.index.json lists which tensor is in which
name-00001-of-00003.safetensors. Everything is written before the first shard takes its name, and the index takes it
last, so old and new shards are never mixed.
"""

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import nn

from sparsedm.compression import parameter_names
from sparsedm.errors import InputError, check_memory
from sparsedm.files import atomic_file, check_writable, json_text, read_json, regular_file, writing
from sparsedm.layers import is_sharded

INDEX = ".index.json"
# the names that training scripts give to averaged weights and to a network
_WORDS = r"(emas?|swa|avg|averaged?|shadow|polyak)"
AVERAGE = re.compile(rf"(?i:(^|[^a-z]){_WORDS}([^a-z]|$))|[a-z](EMA|Ema|SWA|Avg|Averaged?)(?![a-z])|^ema(?=[A-Z])")
NETWORKS = ("model", "state_dict", "net", "nnet", "net_model", "network", "params", "module", "_orig_mod", "unet")
NETWORKS += ("online_model", "diffusion_model", "model_state_dict", "model_state")
IN_OPTIMIZER = re.compile(r"(?i:(^|[^a-z])(emas?|swa|shadow|polyak)([^a-z]|$))")  # its exp_avg is no average of weights
WRAPPED = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
COUNTS = {"n_averaged", "num_updates", "decay", "initted", "step"}  # beside the tensors of an average


def write_tensors(file, tensors, header):
    """Write named tensors as one .safetensors file. header: dict of texts. Raises: OSError. Not atomic by itself."""
    # the format has no strides: a channels-last weight is written in the usual order
    tensors = {name: value.detach().cpu().contiguous().resolve_neg().resolve_conj() for name, value in tensors.items()}
    end = 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        value = tensors[name]
        if value.numel() and value.data_ptr() < end:  # nor shared memory: a tied weight or a view is written twice
            tensors[name] = value.clone()
        end = max(end, value.data_ptr() + value.nbytes)
    try:
        save_file(tensors, file, metadata=header or None)
    except KeyError as error:
        raise InputError(f"cannot write {file}: safetensors have no dtype {error}") from error
    except SafetensorError as error:
        raise OSError(str(error)) from error  # such as a full disk


def write_shards(file, tensors, header, shard_bytes):
    """Write named tensors as files of at most `shard_bytes` (or one tensor), and FILE.index.json. Returns its path.

    FILE itself, and what this package has written so before, is removed.
    """
    file = Path(file)
    index = file.with_name(file.name + INDEX)
    check_writable(index)
    shards = [{}]
    for name, value in tensors.items():
        held = sum(other.numel() * other.element_size() for other in shards[-1].values())
        if shards[-1] and held + value.numel() * value.element_size() > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    names = [f"{file.stem}-{i:05d}-of-{len(shards):05d}{file.suffix}" for i in range(1, len(shards) + 1)]
    places = {key: name for name, shard in zip(names, shards) for key in shard}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    with contextlib.ExitStack() as renamed:  # in reverse: the index last
        listing = renamed.enter_context(atomic_file(index))
        listing.write_text(json_text({"metadata": header | {"total_size": size}, "weight_map": places}))
        for name, shard in zip(names, shards):
            write_tensors(renamed.enter_context(atomic_file(file.with_name(name))), shard, {})
        remove_shards(file, (index.name, *names))
    with writing(file):
        file.unlink(missing_ok=True)
    return index


def remove_shards(file, again=()):
    """Remove the index and the shards of FILE, if they are of this package. again: names that are written again."""
    index = file.with_name(file.name + INDEX)
    listed = {}
    with contextlib.suppress(InputError):  # none, or not ours
        listed = read_json(index, metadata=dict, weight_map=dict)
    if "sparsedm" not in listed.get("metadata", {}):
        return
    # a copied index lists the shards of another model
    ours = re.compile(rf"{re.escape(file.stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(file.suffix)}")
    with writing(file):
        for name in (index.name, *filter(ours.fullmatch, {*map(str, listed["weight_map"].values())})):
            path = file.with_name(name)
            (path.resolve() if name in again else path).unlink(missing_ok=True)  # the links of `again` stay


def is_index(name):
    """Whether a file of this name lists shards: X.index.json, or X.index.fp16.json as diffusers writes it."""
    return re.search(r"\.index(\.\w+)?\.json$", name) is not None


def read_tensors(file, weights="average"):
    """(tensors by name, header) of a .safetensors file, an index of shards, or a foreign file.

    A foreign file may hold several state dicts. By default the averaged weights are read, if present; weights="raw"
    reads the trained weights. If there was a choice, header["taken"] says which was read.
    Raises: InputError if the file is missing or truncated, holds code, or holds no state dict.
    """
    file = Path(file)
    check_memory(regular_file(file).stat().st_size, f"reading {file}")
    try:
        if is_index(file.name):
            return _read_shards(file)
        if file.suffix not in (".pth", ".pt", ".th", ".bin", ".ckpt"):
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        if zipfile.is_zipfile(file):  # torch writes without compression, but reads what is compressed
            with zipfile.ZipFile(file) as archive:
                check_memory(sum(member.file_size for member in archive.infolist()), f"unpacking {file}")
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
        states = {name: state for name, value in tensors.items() if (state := _state_in(value, name))}
        size = min(map(len, states.values()), default=1)
        try:
            hidden = next(_averages({k: v for k, v in tensors.items() if k not in states}, size), None)
        except RecursionError:
            raise InputError(f"{file} is no state dict: it is nested too deeply") from None
        if hidden is not None and weights == "average":
            raise InputError(
                f"{file} holds {hidden!r}, perhaps the average of the weights, in an unknown form: "
                "sparsedm import --weights raw takes the network beside it"
            )
        tensors, header = _choose(states, weights)
    if not _is_state_dict(tensors):
        raise InputError(f"{file} is not a state dict: it must map names to tensors")
    for name, value in tensors.items():
        if reason := unwritable(value):
            raise InputError(f"{file} holds {name}, which is {reason}")
    check_memory(sum(value.nbytes for value in tensors.values()), f"holding {file}")  # strides of 0 cost a file nothing
    return tensors, header


def one_network(tensors, weights="average"):
    """Strips a prefix that all names share, such as "module.". Returns (tensors, header).

    If the prefixes name several networks, one is chosen as in `read_tensors`.
    """
    header, tensors = {}, {WRAPPED.sub("", name): value for name, value in tensors.items()}
    while True:
        tensors = {name: value for name, value in tensors.items() if name not in COUNTS}
        groups = {}
        for name, value in tensors.items():
            first, _, rest = name.partition(".")
            groups.setdefault(first, {})[rest] = value
        beside = [name for name, group in groups.items() if list(group) == [""] and group[""].dim() < 2]
        if any(name in NETWORKS and name not in beside for name in groups):  # a schedule, as Lightning keeps it
            groups = {name: group for name, group in groups.items() if name not in beside}
        if not groups or (len(groups) > 1 and not all(AVERAGE.search(g) or g in NETWORKS for g in groups)):
            return tensors, header
        if any("" in group for group in groups.values()):  # a name without a dot
            return tensors, header
        names = {name.replace(".", ""): name for group in groups.values() for name in group if "." in name}
        tensors, taken = _choose(groups, weights)
        if tensors is None:
            first, tensors = next(iter(groups.items()))
            taken = {"taken": f"all names begin with {first}., which was left away"}
        if "model_ema" in groups and not any("." in name for name in tensors):  # as latent diffusion's LitEma writes it
            tensors = {names.get(name, name): value for name, value in tensors.items()}
        header |= taken


def _is_state_dict(found):
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    )


def _state_in(value, name):
    """The state dict that a value is, or that lies alone among other things in it; else None."""
    if _is_state_dict(value):
        return value
    known = AVERAGE.search(str(name))
    items = value.items() if isinstance(value, dict) else ()
    inside = [v for k, v in items if v and _is_state_dict(v) and (known or not AVERAGE.search(str(k)))]
    return inside[0] if len(inside) == 1 else None


def _tensors_in(value):
    """The number of tensors in nested dicts and lists."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 if isinstance(value, torch.Tensor) else sum(map(_tensors_in, inside))


def _averages(values, size, words=AVERAGE):
    """The names in nested dicts and lists that speak of an average and hold at least half as many tensors as the
    network has.

    size: this number of the network. words: what speaks of an average.
    """
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if words.search(str(name)) and 2 * _tensors_in(value) >= size:
            yield name
        elif isinstance(value, dict | list | tuple):
            yield from _averages(value, size, IN_OPTIMIZER if "optim" in str(name) else words)


def _choose(states, weights):
    """Choose the averaged or the trained weights from {name: state dict}. Returns (state dict or None, header)."""
    states = {name: state for name, state in states.items() if state}
    kinds = [name for name in states if AVERAGE.search(name)], [name for name in NETWORKS if name in states]
    rest = [name for name in states if name not in (*kinds[0], *kinds[1])]
    if weights == "raw" and kinds[0] and rest and not kinds[1]:
        raise InputError(f"which of {', '.join(map(repr, rest))} is the trained network is unknown: the average is")
    found = [name for names in (kinds if weights == "average" else kinds[::-1]) for name in names]
    others = ", ".join(map(repr, [*found[1:], *(rest if found and found[0] in kinds[0] else ())]))
    header = {"taken": f"{found[0]!r} was read, {others} ignored"} if others else {}
    return (states[found[0]] if found else None), header


def _read_shards(index):
    listing = read_json(index, weight_map=dict)
    places, header = listing["weight_map"], listing.get("metadata")
    if not places or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{index} is damaged: it must map each tensor to its file under weight_map")
    shards = sorted({Path(place).name for place in places.values()})  # only files beside the index
    if any(map(is_index, shards)):
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
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.uint8  # of packed words


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


def has_dtype(dtype):
    """Whether safetensors have this dtype."""
    with contextlib.suppress(KeyError):
        return bool(save({"": torch.empty(0, dtype=dtype, device="cpu")}))
    return False


def unwritable(value):
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, no tensor"
    if nn.parameter.is_lazy(value):
        return "not initialised yet"
    if is_sharded(value):
        return "sharded over processes: gather the model before it is saved"
    if value.is_meta:
        return "on the meta device and has no values"
    return None if value.layout == torch.strided and not value.is_quantized else "sparse or quantised"
