"""Run folders: their lock, their options, and whether a run may go on in them.

A run folder:   options.json                    the options of the run, and its number; resuming with others is refused
                metrics.jsonl                   one record per log
                checkpoints/step-00001000/      see `checkpoint.py`
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None

from sparsedm.errors import InputError
from sparsedm.files import read_json, write_json, writing
from sparsedm.model_files import checkpoints, read_state
from sparsedm.plots import printable

KINDS = {"stages", "stage", "experiment", "networks"}  # each is an option of chains, their stages, studies or searches


@contextlib.contextmanager
def lock(folder):
    """`folder_lock` of a run folder. Also deletes half-written checkpoints of a killed run."""
    with folder_lock(folder, "checkpoints"):
        for partial in (Path(folder) / "checkpoints").glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        yield


@contextlib.contextmanager
def folder_lock(folder, *inside):
    """Lock a folder for this process; the folder, and folders of the names `inside` in it, are made if need be.

    If the block ends in an InputError, the lock and empty folders that were made are removed again.
    Raises: InputError if another process has locked it, or if nothing can be written there.
    """
    folder = Path(folder)
    file, folders = folder / ".lock", [folder / name for name in inside]
    made = [path for path in (file, *folders, folder, *folder.parents) if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write {folder}: it is no folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if not _locked(handle, file):
            raise InputError(f"another process is at work in {folder}: wait for it or choose another folder")
        try:
            with writing(folder):
                for path in folders:
                    path.mkdir(exist_ok=True)
            yield
        except InputError:
            for path in made:
                with contextlib.suppress(OSError):  # the folder holds something
                    path.unlink() if path == file else path.rmdir()
            raise
    finally:
        os.close(handle)


def _locked(handle, file):
    """Lock an open file for this process; whether that succeeded, and the file still has its name."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), file.stat())  # else its last holder has removed it
    except (BlockingIOError, FileNotFoundError):
        return False


def number(folder):
    """A number that tells a run from all others: a text in its options.json and in each of its checkpoints.

    A new run draws one. None: the run began before runs had numbers.
    """
    if (Path(folder) / "options.json").exists():
        return stored_options(folder).get("run")
    saved = latest(folder)
    found = read_state(saved).get("run") if saved else secrets.token_hex(8)
    return found and str(found).partition(".")[0]


def identity(folder):
    """What a checkpoint says of its run: the number, and the step at which this stage begins; None as above."""
    stored = stored_options(folder) if (Path(folder) / "options.json").exists() else {}
    return f"{stored['run']}.{stored.get('first_step')}" if stored.get("run") else None


def stored_options(folder):
    """The stored options of a run folder. Raises: InputError if there are none or they are damaged."""
    file = Path(folder) / "options.json"
    stored = read_json(file)
    if not isinstance(stored, dict) or not stored:
        raise InputError(f"{file} is damaged: it must hold the options of the run")
    return stored


def claim(folder, record, free=(), classes=(), may_grow=None, started=True):
    """Store the options of a run (a dict of JSON values) as folder/options.json, or compare them with the stored ones.

    started: whether there is work that depends on the stored options; without any, they are replaced.
    free: names, at any depth, that may differ, such as how often to log. classes: dataclasses whose defaults fill in
    options that an older folder did not store. may_grow: {name: None} of numbers that may increase on resume, such as
    "options.steps"; {name: reason} of those that may not, and the reason shown.
    Raises: InputError that lists the differences, so that a run never continues with other options; or if the file is
    damaged, or would be replaced and is not of such a run.
    """
    file, record = Path(folder) / "options.json", json.loads(json.dumps(record))
    if printable(folder) != str(folder):
        raise InputError(f"the name of the run folder {folder} is not UTF-8: safetensors cannot read files in it")
    stored = stored_options(folder) if file.exists() else {}
    alike = [KINDS & options.keys() for options in (stored, record)]
    if stored and not started and (alike[0] != alike[1] or not stored.keys() & record.keys()):
        raise InputError(f"{file} holds no options of such a run: choose another folder")
    if not (started and stored):
        write_json(file, record)
        return
    for name in stored.keys() & record.keys():
        if isinstance(record[name], dict | list) and type(stored[name]) is not type(record[name]):
            raise InputError(f"{file} is damaged: {name} must be of type {type(record[name]).__name__}")
    there, here = _flat(stored, free), _flat(record, free)
    options = (field for kind in classes for field in dataclasses.fields(kind))
    defaults = {option.name: option.default for option in options if option.default is not dataclasses.MISSING}
    there = {name: defaults[last] for name in here if (last := name.rpartition(".")[2]) in defaults} | there
    if there.get("run", "none") != here.get("run", "none"):
        own = f"its number is {there.get('run', 'none')}, not {here.get('run', 'none')}"
        raise InputError(f"{folder} is of another run: {own}")
    different = _differing(there, here)
    numbers = [name for name in may_grow or () if {type(side.get(name)) for side in (there, here)} <= {int, float}]
    grown = [name for name in numbers if there[name] < here[name]]
    if different and different.keys() <= set(grown):
        reasons = {name: may_grow[name] for name in different}
        if not any(reasons.values()):
            write_json(file, record)
            return
        different = {name: f"{text}: {reasons[name]}" if reasons[name] else text for name, text in different.items()}
    if different:
        raise InputError(f"{folder} has other options, choose another folder: {_listed(different)}")


def differences(first, second, places, free=()):
    """How two stored options differ, in words; "" if a run may go on in both. places: what the words call the two."""
    return _listed(_differing(_flat(first, free), _flat(second, free), places))


def _differing(there, here, places=("there", "here")):
    """{name: how it differs} of two options of `_flat`."""
    one, other = places
    pairs = {name: (there.get(name, "not set"), here.get(name, "not set")) for name in dict.fromkeys([*there, *here])}
    return {name: f"{name} is {a} {one} and {b} {other}" for name, (a, b) in pairs.items() if not _same(a, b)}


def _listed(different):
    more = f"; and {len(different) - 8} more" if len(different) > 8 else ""
    return f"{'; '.join(list(different.values())[:8])}{more}"


def has_started(folder):
    """Whether a run folder, or a folder in it, has a checkpoint."""
    return any(checkpoints(folder)) or any(map(checkpoints, Path(folder).glob("*/")))


def holds_work(folder):
    """Whether a folder holds anything but options and a lock."""
    folder = Path(folder)
    return folder.is_dir() and any(path.name not in ("options.json", ".lock") for path in folder.iterdir())


def _same(there, here):
    """Whether two options are equal, or two names of one file or folder."""
    if there == here or not isinstance(there, str) or not isinstance(here, str):
        return there == here
    there, here = os.path.expanduser(there), os.path.expanduser(here)
    return os.path.exists(there) and os.path.exists(here) and os.path.samefile(there, here)


def _flat(value, free, prefix=""):
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    items = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items() if key not in free]
    return {name: leaf for key, inner in items for name, leaf in _flat(inner, free, key).items()}


def latest(folder):
    """The newest checkpoint of a run folder, or None."""
    return (checkpoints(folder) or [None])[-1]
