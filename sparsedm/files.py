"""Writing files so that a reader, or a crash, never sees half of one: write a temporary sibling, flush, rename."""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import secrets
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from sparsedm.errors import InputError


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
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and renamed to `path`.

    On an exception the temporary file is removed and whatever stood at `path` stays as it was. Where the system refuses
    to write (permission, disk full, a file where a folder should be), that exception is an InputError naming `path`.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"cannot write {path}: it is a folder")
    # the suffix is kept because writers such as matplotlib choose the format by it
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        try:
            yield partial
            os.chmod(partial, mode)  # some writers, safetensors among them, put a private file in its place
            _flush(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def check_writable(path):
    """Raise InputError now, rather than after hours of work, if no file can be written at `path`. Leaves nothing."""
    path = Path(path)
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    with writing(path):
        probe = folder / f".{secrets.token_hex(4)}.partial"
        probe.touch(exist_ok=False)
        probe.unlink()


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a temporary folder beside `path`; on a clean exit its files are flushed and it is renamed to `path`.

    `path` must not exist yet (an empty folder may). On an exception the temporary folder is removed; a refusal by the
    system is an InputError as in `atomic_file`. A `kill -9` leaves only a folder whose name starts with a dot and ends
    in `.partial`, which no reader looks at.
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
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` as readable JSON; refuses NaN and infinity, which JSON has no word for."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(file):
    """The value in a JSON file. Raises: InputError if it is missing, unreadable or no JSON."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is missing or damaged: {error}") from error


def cache_folder():
    """For downloads and decoded data: $SPARSEDM_CACHE, else $XDG_CACHE_HOME/sparsedm, else ~/.cache/sparsedm."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsedm"
    return Path(os.environ.get("SPARSEDM_CACHE") or default)


def download(url, path, *, md5=None, sha256=None, progress=True):
    """Fetch `url` to `path` and return `path` as a Path; a file that is already there is only checked.

    url: http or https. md5, sha256: exactly one of them, the lower-case hexadecimal digest the whole file must have.
    progress: a bar on stderr, on a terminal only. An interrupted download leaves `path` + ".partial", which the next
    call continues; nothing appears at `path` before its checksum is right. InputError: no connection (the message names
    the URL, and the path where the file may be put by hand), a wrong checksum, no permission or space to write.
    """
    if (md5 is None) == (sha256 is None):
        raise TypeError("download takes exactly one of md5 and sha256")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"the URL {url!r} must start with http:// or https://")
    path, kind, expected = Path(path), "sha256" if md5 is None else "md5", md5 or sha256
    partial = path.with_name(f"{path.name}.partial")
    if not path.exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "ab") as file:
                # two runs may want the same file; where a file system has no locks, the checksum still finds the mix-up
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not path.exists():
                    try:
                        _fetch(url, file, path, kind, expected, progress)
                    except InputError:
                        if not file.tell():  # nothing that a next call could continue
                            partial.unlink(missing_ok=True)
                        raise
                    os.fsync(file.fileno())
                    os.replace(partial, path)
            _flush(path.parent)
    found = _digest(path, kind)
    if found != expected:
        raise InputError(f"{path} has {kind} {found} but must have {expected}: delete it, then it is downloaded again")
    return path


def _fetch(url, file, path, kind, expected, progress):
    """Append to the open `file` what it lacks of `url`, until its digest is the expected one."""
    from tqdm import tqdm

    while _digest(file.name, kind) != expected:
        had, failure = file.seek(0, os.SEEK_END), None
        try:
            body = _body(url, had)
            start, total = next(body)
            file.truncate(start)
            shown = dict(desc=path.name, unit="B", unit_scale=True, disable=None if progress else True)
            with tqdm(total=total, initial=start, **shown) as bar:
                for chunk in body:
                    file.write(chunk)
                    bar.update(len(chunk))
        except ConnectionError as error:
            failure = error
        file.flush()
        have = file.seek(0, os.SEEK_END)
        if failure and have <= had:  # otherwise go on from where the connection broke
            by_hand = f"run the same command again with a connection, or put the file at {path} by hand"
            raise InputError(f"cannot download {url} ({failure}): {by_hand}") from failure
        if not failure and (found := _digest(file.name, kind)) != expected:
            file.truncate(0)  # if it was continued, what lay here may be the culprit: once more from the start
            if start == 0:
                raise InputError(f"{url} gave a file with {kind} {found}, but it must have {expected}")


def _body(url, start):
    """Yield (offset, total bytes or None), then the bytes of `url` from that offset on; ConnectionError if that fails.

    The offset is `start`, or 0 where the server knows nothing but whole files.
    """
    try:
        headers = {"User-Agent": "sparsedm"} | ({"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            offset = start if response.status == 206 else 0
            length = response.headers["Content-Length"]
            total = offset + int(length) if length else None
            yield offset, total
            received = offset
            while chunk := response.read(1 << 18):
                received += len(chunk)
                yield chunk
        if total is not None and received < total:
            raise ConnectionError(f"the connection broke after {received} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise ConnectionError(f"HTTP {error.code} {error.reason}") from error
        yield from _body(url, 0)  # nothing lies beyond `start`, so what we have is not the beginning of this file
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(getattr(reason, "strerror", None) or reason) from error


def _digest(path, kind):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _flush(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
