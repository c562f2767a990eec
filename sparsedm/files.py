"""Writing files so that a reader, or a crash, never sees half of one: write a temporary sibling, flush, rename."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path):
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and renamed to `path`.

    On an exception the temporary file is removed and whatever stood at `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix is kept because writers such as matplotlib choose the format by it
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=f".partial{path.suffix}")
    os.close(handle)
    try:
        yield Path(name)
        _flush(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a temporary folder beside `path`; on a clean exit its files are flushed and it is renamed to `path`.

    `path` must not exist yet. On an exception the temporary folder is removed. A `kill -9` leaves only a folder whose
    name starts with a dot and ends in `.partial`, which no reader looks at.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        yield folder
        for file in folder.rglob("*"):
            _flush(file)
        _flush(folder)
        os.chmod(folder, 0o777 & ~_umask())
        os.rename(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _flush(path.parent)


def write_text(path, text):
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` as readable JSON; refuses NaN and infinity, which JSON has no word for."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _flush(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
