"""Which configuration of an operation is the fastest on this GPU: measured once, remembered in tables.

Environment variables:
  SPARSEDM_AUTOTUNE  'off': take the safe default where the tables have no entry, instead of tuning once ('on', default)
  SPARSEDM_CACHE     the user's cache folder (see `files.cache_folder`), whose tuned/ holds the tables made here
"""

import contextlib
import fcntl
import functools
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import time
from pathlib import Path

import torch

from sparsedm.errors import InputError
from sparsedm.files import cache_folder, write_json
from sparsedm.kernels.launch import device_name, setting, triton

SHIPPED = Path(__file__).parent / "tuned"  # tables measured on real GPUs by us, one JSON file per GPU
REMEMBERED = 24 * 3600  # seconds for which a candidate that ended a process is not tried
log = logging.getLogger(__name__)


def bucket(size):
    """The power of two, at least 16, that stands for all sizes up to it and above its half: tokens are tuned by it."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def median_microseconds(run):
    """With a cold L2, which is what layers of a network find. 60 ms, so that ten candidates take less than a second."""
    return 1000 * triton.testing.do_bench(run, warmup=10, rep=40, quantiles=[0.5])


class Autotuner:
    """Remembers, per GPU, dtype and shape, which candidate of one operation is fastest.

    name: of the operation. candidates: at most about eight JSON-able dicts; the first is the safe default.
    kernels: the functions or modules whose source the measurements belong to; when it changes they are forgotten.
    timer: run -> microseconds.

    A candidate is looked up in memory, in the user's table, in the shipped table. If none has it, all candidates are
    timed once and the user's table gets the winner, or, under SPARSEDM_AUTOTUNE=off and while a CUDA graph is being
    captured, the default is taken. Both are logged at level info. Off a GPU it is the default, without a word.

    A candidate that raises, or whose result differs from that of the first, is passed over: neither timed nor, if it is
    what a table says, taken. The table's is run once per process to see, except while a CUDA graph is being captured.
    So is one during which an earlier process ended.
    """

    def __init__(self, name, candidates, kernels, timer=median_microseconds):
        self.name, self.candidates, self.timer = name, list(candidates), timer
        self._kernels = kernels
        self._chosen = {}

    def best(self, run, device, *, default=None, **key):
        """The candidate for `key` (dtype, sizes ...) on `device`.

        run(candidate) does the work, any number of times, and returns the result: a tensor or several. default: the
        candidate to take where nothing may be measured, if a rule knows better than the first.
        """
        known = (device, *key.values())
        default = default or self.candidates[0]
        if device.type != "cuda":
            return default
        if known not in self._chosen:
            shape = " ".join(f"{k}={v}" for k, v in key.items())
            found = self._find(run, device_name(device), shape, default)
            if capturing():
                return found
            self._chosen[known] = found
        return self._chosen[known]

    @functools.cached_property
    def section(self):
        """The section of a table that holds this operation: its name, Triton's version, the hash of the source."""
        source = "".join(inspect.getsource(getattr(kernel, "fn", kernel)) for kernel in self._kernels)
        version = getattr(triton, "__version__", "none")
        return f"{self.name}, triton {version}, source {hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def _find(self, run, gpu, shape, default):
        for folder in (cache_folder() / "tuned", SHIPPED):
            entry = read_table(table_path(folder, gpu)).get(self.section, {}).get(shape, {})
            if entry.get("config") in self.candidates and (capturing() or self._is_right(run, entry["config"])):
                return entry["config"]
        if setting("SPARSEDM_AUTOTUNE", ("on", "off"), "on") == "off" or capturing():
            log.info("%s: %s is not tuned for %s; the default %s is used", gpu, self.name, shape, default)
            return default
        log.info("%s: tuning %s for %s, once", gpu, self.name, shape)
        times = self._measure(run)
        if not times:
            log.warning("%s: nothing could be timed for %s; the default %s is used", gpu, shape, default)
            return default
        best = min(times, key=times.get)
        entry = {"config": self.candidates[best], "microseconds": round(times[best], 3), "measured": len(times)}
        merge_table(table_path(cache_folder() / "tuned", gpu), self.section, shape, entry)
        return self.candidates[best]

    def _measure(self, run):
        """{index of the candidate: microseconds} of those that run and are right."""
        expected = [t.clone() for t in _tensors(run(self.candidates[0]))]
        times = {}
        with torch.cuda.device_of(expected[0]):  # the timer's events are of the current device
            for i, candidate in enumerate(self.candidates):
                with self._passing_over(candidate), _noted(f"{self.section}, {candidate}"):
                    if self._agrees(run(candidate), expected, candidate):
                        times[i] = self.timer(functools.partial(run, candidate))
        return times

    def _is_right(self, run, candidate):
        if candidate == self.candidates[0]:
            return True
        expected = [t.clone() for t in _tensors(run(self.candidates[0]))]
        with self._passing_over(candidate):
            return self._agrees(run(candidate), expected, candidate)
        return False

    def _agrees(self, result, expected, candidate):
        agrees = all(map(_agree, _tensors(result), expected))
        if not agrees:
            log.warning("%s: candidate %s gives another result than the default", self.name, candidate)
        return agrees

    @contextlib.contextmanager
    def _passing_over(self, candidate):
        try:
            yield
        except Exception as error:  # it may need more registers or shared memory than this GPU has
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            log.warning("%s: candidate %s does not run here: %s", self.name, candidate, reason)
            if device_is_lost():
                raise


@contextlib.contextmanager
def _noted(what):
    """Leaves a note while `what` runs, and refuses it where a process on this computer ended with such a note left.

    A kernel that hangs ends with its process only, and one that leaves the device in error ends it; either would stop
    every later process at the same place. After a day it is tried again: the process may have been ended for another
    reason.
    """
    name = hashlib.sha256(f"{platform.node()}, {what}".encode()).hexdigest()[:16]
    folder = cache_folder() / "tuned"
    for note in folder.glob(f"{name}.*.running"):
        if time.time() - note.stat().st_mtime < REMEMBERED and not _alive(int(note.name.split(".")[1])):
            raise RuntimeError(f"a process ended while it ran; to try it again today, delete {note}")
    mine = folder / f"{name}.{os.getpid()}.running"
    with contextlib.suppress(OSError):  # a read-only folder
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()
    keep = False
    try:
        yield
    except Exception:
        keep = device_is_lost()
        raise
    finally:
        with contextlib.suppress(OSError):
            if not keep:
                mine.unlink()


def device_is_lost(device=None):
    """Whether a kernel has faulted on a GPU (default: the current one), which answers this process nothing any more."""
    try:
        if (device is None or device.type == "cuda") and torch.cuda.is_available():
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _alive(process):
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _agree(result, expected):
    """Integers exactly; floating point to 2%: this is there to catch a wrong kernel, not to judge a rounding."""
    if not expected.is_floating_point():
        return torch.equal(result, expected)
    difference = (result.float() - expected.float()).norm()
    return bool(difference <= 0.02 * expected.float().norm())


def capturing():
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def table_path(folder, gpu):
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()) + ".json")


def read_table(path):
    """{section: {shape: {"config", "microseconds", "measured"}}}; empty if the file is missing or no such table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry, dict) for section in table.values() for entry in section.values()):
            return table
        reason = "an entry is not an object"
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, OSError) as error:
        reason = error
    log.warning("the tuned table %s is ignored: %s", path, reason)
    return {}


def merge_table(path, section, shape, entry):
    """Add one entry to a table, whatever other processes add at the same time; a read-only folder only warns."""
    try:
        with _locked(path):
            table = read_table(path)
            table.setdefault(section, {})[shape] = entry
            write_json(path, table)
    except (OSError, InputError) as error:
        log.warning("the tuned table %s cannot be written, so tuning is repeated next time: %s", path, error)


@contextlib.contextmanager
def _locked(path):
    """Hold the lock file beside `path`; the system releases it if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
