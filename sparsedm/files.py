"""Files. Writing is atomic: no reader sees half a file, not even after a crash. Bad input gives one clear sentence."""

import contextlib
import hashlib
import http.client
import json
import math
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from sparsedm.errors import InputError

MOST_TEXT = 1 << 28  # bytes of a file of text that is read whole
MOST_DEPTH = 32  # of JSON

# ---- writing


@contextlib.contextmanager
def writing(path):
    """Turn the system's refusal to write (disk full, no permission) into an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename and Path(error.filename).parent != path.parent
        culprit = f" ({error.filename})" if elsewhere else ""
        raise InputError(f"cannot write {path}: {error.strerror or error}{culprit}") from error


@contextlib.contextmanager
def atomic_file(path):
    """Yield a temporary path beside `path`. On a clean exit it is flushed to disk and renamed to `path`.

    On an exception the temporary file is removed and `path` is unchanged. If the system refuses to write (permission,
    full disk, a file in place of a folder), the exception is an InputError naming `path`. A link is followed.
    """
    path = Path(path)
    with writing(path):
        _check_replaceable(path)
        suffix, path = path.suffix, _followed(path)
        partial = _partial(path, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        try:
            yield partial
            os.chmod(partial, mode)  # some writers, such as safetensors, replace it by a private file
            _flush(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def _followed(path):
    """`path`, or what it links to: renaming a file to a link would replace the link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _partial(path, suffix):
    """A temporary path beside `path`. suffix: by which writers such as matplotlib choose the format."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{suffix}")


def check_writable(path):
    """Raise InputError now, rather than after hours of work, if no file can be written at `path`. Leaves nothing."""
    path = Path(path)
    with writing(path):
        _check_replaceable(path)
        path = _followed(path)
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        probe = folder / _partial(path, path.suffix).name
        probe.touch(exist_ok=False)
        probe.unlink()


def _check_replaceable(path):
    """Raise InputError if `path` is not a plain file: with enough rights a rename would replace even a device."""
    if "\0" in str(path):
        raise InputError(f"cannot write {str(path)!r}: no name holds a zero byte")
    if not path.name or (path.exists() and not path.is_file()):
        raise InputError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'a pipe, socket or device'}")


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a temporary folder beside `path`. On a clean exit its files are flushed and it is renamed to `path`.

    `path` must not exist, or be an empty folder. On an exception the temporary folder is removed; if the system refuses
    to write, it is an InputError as in `atomic_file`. A `kill -9` leaves only a hidden folder named `.*.partial`, which
    readers ignore.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            mode = partial.stat().st_mode
            for path_below in partial.rglob("*"):
                if path_below.is_file():
                    os.chmod(path_below, mode & 0o666)  # as in atomic_file
                _flush(path_below)
            _flush(partial)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _flush(path.parent)


def write_text(path, text):
    """Write UTF-8. Characters that UTF-8 cannot encode, such as odd bytes of a file name, are written as escapes."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value):
    """Write `value` as readable JSON. Refuses NaN and infinity, which JSON does not have."""
    write_text(path, json_text(value))


def json_text(value):
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def append_json_line(file, record):
    """Append a record to a file of one JSON value per line. An incomplete last line is removed."""
    file = Path(file)
    with writing(file), open(file, "ab+") as opened:
        size = opened.tell()
        opened.seek(max(0, size - 1))
        if size and opened.read(1) != b"\n":
            opened.seek(0)
            opened.truncate(opened.read().rfind(b"\n") + 1)
        opened.write((json.dumps(record) + "\n").encode())


def _flush(path):
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- reading


def regular_file(path, most=None):
    """`path` as a Path. Raises InputError if it is a folder, pipe or device, or has more than `most` bytes.

    Links are followed.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"{path} is missing or unreadable: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise InputError(f"{path} is {kind}: a plain file is needed")
    if most is not None and found.st_size > most:
        raise InputError(f"{path} has {found.st_size:,} bytes: at most {most:,} are read")
    return path


def read_text(file):
    """The text of a UTF-8 file. Raises: InputError."""
    with _readable(file):
        return regular_file(file, MOST_TEXT).read_text(encoding="utf-8")


@contextlib.contextmanager
def _readable(what):
    """Raise InputError for an error of the system, or bytes that are no UTF-8."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} is missing or unreadable: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is damaged: it is not UTF-8 text") from error


def parse_json(text, where, *, infinities=False, **kinds):
    """The JSON value of `text`. kinds: if given, it must be an object with these names, each of its type.

    where: the source of the text, for the message. The type float allows any number. Refused, although Python reads
    them: NaN, infinity (also 1e999), integers beyond 64 bits, a repeated name in an object, nesting beyond MOST_DEPTH.
    Raises: InputError.
    """
    try:
        value = json.loads(
            text,
            parse_constant=float if infinities else _refuse,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_object,
        )
        _check_depth(value)
    except (ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{where} is damaged: it holds no readable JSON ({error})") from error
    if kinds and not isinstance(value, dict):
        raise InputError(f"{where} is damaged: it must be an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name not in value:
            raise InputError(f"{where} is damaged: it lacks {name!r}")
        if type(value[name]) not in ((int, float) if kind is float else (kind,)):
            raise InputError(f"{where} is damaged: {name!r} must be of type {kind.__name__}")
    return value


def _refuse(word):
    raise ValueError(f"{word} is no JSON")


def _finite(text):
    return float(text) if math.isfinite(float(text)) else _refuse(text[:40])


def _integer(text):
    return int(text) if len(text) <= 20 and -(2**63) <= int(text) < 2**64 else _refuse(f"{text[:40]}, an integer,")


def _object(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse("one name twice in an object")
    return found


def _check_depth(value):
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not inner:
            return
        level = [item for items in inner for item in items]
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def read_json(file, *, infinities=False, **kinds):
    """The value in a JSON file; see `parse_json`. infinities: read Python's words for them, too. Raises: InputError."""
    return parse_json(read_text(file), file, infinities=infinities, **kinds)


def read_json_lines(file, **kinds):
    """Yield the records of a file of one JSON object per line. Skips an incomplete last line. No file: no records.

    kinds: see `parse_json`. Raises: InputError naming a damaged line, when the line is reached.
    """
    if not Path(file).exists():
        return
    with _readable(file), regular_file(file).open("rb") as lines:  # of any number: a long run has gigabytes
        for number, line in enumerate(iter(lambda: lines.readline(MOST_TEXT), b""), 1):
            where = f"{file}, line {number},"
            if line.endswith(b"\n"):
                with _readable(where):
                    line = line.decode()
                yield parse_json(line, where, **kinds)
            elif len(line) == MOST_TEXT:
                raise InputError(f"{where} has more than {MOST_TEXT:,} bytes")


def checksum(tensor):
    """The CRC-32 of a CPU tensor's bytes, dtype and shape, as text: safetensors files have no checksum of their own."""
    import torch  # late: see `download`

    form = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return str(zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), zlib.crc32(form)))


def cache_folder():
    """Where downloads and decoded data go: $SPARSEDM_CACHE, else $XDG_CACHE_HOME/sparsedm, else ~/.cache/sparsedm."""
    try:
        home = Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user without an entry
        home = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    default = Path(os.environ.get("XDG_CACHE_HOME") or home) / "sparsedm"
    return Path(os.environ.get("SPARSEDM_CACHE") or default)


def download(url, path, sha256, progress=True):
    """Download `url` to `path` and return `path` as a Path. If the file exists, it is only checked.

    url: http or https. sha256: the file's digest, lower-case hexadecimal; no file with another digest appears at
    `path`. progress: a bar on stderr, only on a terminal. Raises InputError: no connection (the message names the URL,
    and the path where you may put the file by hand), a wrong checksum, no permission or space to write.
    """
    import torch  # late: code that only reads and writes files need not wait for it

    if not url.startswith(("http://", "https://")):
        raise InputError(f"the URL {url!r} must start with http:// or https://")
    path, patience = Path(path), socket.getdefaulttimeout()
    if path.exists():
        with open(regular_file(path), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise InputError(f"{path} has sha256 {found} but must have {sha256}: delete it to download it again")
        return path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds without data
        try:
            urllib.request.Request(url)  # refuses some URLs, for which torch would leave an empty file
            torch.hub.download_url_to_file(url, str(path), sha256, progress=progress and sys.stderr.isatty())
        except RuntimeError as error:
            raise InputError(f"the download of {url} was incomplete, or is another file: {error}") from error
        except (http.client.InvalidURL, ValueError) as error:  # a connection would not mend the URL
            raise InputError(f"cannot download {url} ({error}): put the file at {path} by hand") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            by_hand = f"run the same command again with a connection, or put the file at {path} by hand"
            raise InputError(f"cannot download {url} ({error}): {by_hand}") from error
        finally:
            socket.setdefaulttimeout(patience)
    return path
