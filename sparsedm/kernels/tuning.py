"""The fastest configuration of an operation on this GPU: measured once, stored in tables.

Environment variables:
  SPARSEDM_AUTOTUNE  'off': take the safe default where the tables have no entry, instead of tuning once ('on', default)
  SPARSEDM_CACHE     the user's cache folder (see `files.cache_folder`), whose tuned/ holds the tables made here
"""

import contextlib
import functools
import hashlib
import inspect
import logging
import math
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: tables are not locked there
    fcntl = None

from sparsedm.errors import InputError
from sparsedm.files import cache_folder, read_json, write_json
from sparsedm.kernels.launch import capturing, device_is_lost, device_name, reason_of, setting, triton

SHIPPED = Path(__file__).parent / "tuned"  # tables in the package, one JSON file per GPU; none so far
REMEMBERED = 24 * 3600  # seconds; so long a candidate that ended a process, or that was refused, is not tried
log = logging.getLogger(__name__)


def bucket(size):
    """The smallest power of two, at least 16, that is not below `size`. Numbers of rows are tuned by it."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


def median_microseconds(run):
    """With a cold L2, as for layers in a network. It takes 60 ms, so that ten candidates take less than a second."""
    return 1000 * triton.testing.do_bench(run, warmup=10, rep=40, quantiles=[0.5])


MEASURED, RULE = "measured", "the rule"  # the basis of a verdict: tables or a measurement; no measurement
FOR_NOW = "nothing yet"  # nothing could be measured in this call; the next one tries


class NotFinite(Exception):
    """The default's result has infinities or NaN, as in an overflow of fp16: candidates cannot be compared."""


@dataclass(frozen=True)
class Verdict:
    """All results for one operation at one size. Pairs, because candidates are dicts."""

    config: dict  # the candidate to take
    times: tuple = ()  # (candidate, microseconds) of every candidate that was timed, the default first
    failed: tuple = ()  # (candidate, why) of those that raised, or gave another result
    basis: str = RULE


class Autotuner:
    """Stores the fastest candidate of one operation, and the times of all, per GPU, dtype and shape.

    name: of the operation. candidates: at most about eight JSON-able dicts; the first is the safe default.
    kernels: functions or files; if their source changes, old measurements are ignored. timer: run -> microseconds.

    The candidate is looked up in memory, in the user's table, then in the shipped table. If no table has it, all
    candidates are timed once and the user's table gets the result. Under SPARSEDM_AUTOTUNE=off and while a CUDA graph
    is captured, the default is used instead. Both cases are logged at level info. Without a GPU the default is used
    silently.

    A candidate is not used if it raises, if an earlier process died while trying it, if `refuse` was called, or if an
    entry of its result differs from the reference's, which is the first candidate that is not refused. A table's
    candidate is checked in the same way once per process, except while a CUDA graph is captured. No table is written if
    the default wins and another one raised or was wrong: later processes, perhaps with another Triton, try again. If a
    candidate was refused, the user's table holds what won without it, until it may be tried again. If the reference's
    result is not finite, nothing is compared or stored: the next call tries again.
    """

    def __init__(self, name, candidates, kernels, timer=median_microseconds):
        self.name, self.candidates, self.timer = name, list(candidates), timer
        self._kernels = kernels
        self._known, self._told = {}, set()

    def best(self, run, device, **options):
        """The candidate to use. Arguments as in `verdict`."""
        return self.verdict(run, device, **options).config

    def verdict(self, run, device, *, check=None, candidates=None, default=None, **key):
        """The `Verdict` for `key` (dtype, sizes ...) on `device`.

        run(candidate) does the work, any number of times, and returns the result: one or more tensors that nobody else
        reads. check(candidate) returns what to compare; None: the result of run. candidates: for this key, instead of
        the tuner's. default: the candidate to use if nothing may be measured; None: the first.
        """
        candidates = candidates or self.candidates
        default = default or candidates[0]
        if device.type != "cuda":
            return Verdict(default)
        known = (device, *key.items())
        if known not in self._known:
            shape = " ".join(f"{k}={v}" for k, v in key.items())
            try:
                found = self._find(run, check or run, device_name(device), shape, candidates, default)
            except NotFinite:
                log.info("%s: %s has no finite result to compare; the default %s is used", self.name, shape, default)
                found = Verdict(default, basis=FOR_NOW)
            if found.basis == FOR_NOW:
                return found
            self._known[known] = found
        return self._known[known]

    @functools.cached_property
    def section(self):
        """The section of a table for this operation: its name, Triton's version, the hash of the source."""
        source = "".join(
            kernel.read_text() if isinstance(kernel, Path) else inspect.getsource(getattr(kernel, "fn", kernel))
            for kernel in self._kernels
        )
        version = getattr(triton, "__version__", "none")
        return f"{self.name}, triton {version}, source {hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def _find(self, run, check, gpu, shape, candidates, default):
        reference = next((c for c in candidates if self._refusal(c) is None), candidates[0])
        may_tune = setting("SPARSEDM_AUTOTUNE", ("on", "off"), "on") == "on" and not capturing()
        for folder in (cache_folder() / "tuned", SHIPPED):
            entry = read_table(table_path(folder, gpu)).get(self.section, {}).get(shape, {})
            config, failed = entry.get("config"), _pairs(entry.get("failed"))
            # a shipped table comes from another computer: what was refused there has no note here
            if config not in candidates or (may_tune and folder != SHIPPED and self._may_try_again(failed)):
                continue
            if capturing() or self._is_right(check, config, reference):
                return Verdict(config, _pairs(entry.get("times")), failed, FOR_NOW if capturing() else MEASURED)
        if not may_tune:
            log.info("%s: %s is not tuned for %s; the default %s is used", gpu, self.name, shape, default)
            return Verdict(default, basis=FOR_NOW if capturing() else RULE)
        log.info("%s: tuning %s for %s, once", gpu, self.name, shape)
        times, failed = self._measure(run, check, candidates, reference)
        if not times:
            log.warning("%s: nothing could be timed for %s; the default %s is used", gpu, shape, default)
            return Verdict(default, (), failed)
        config, microseconds = min(times, key=lambda pair: pair[1])
        if config == candidates[0] and not all(_was_refused(why) for _, why in failed):
            log.warning("%s: %s takes %s for %s, in this process only: see above", gpu, self.name, config, shape)
        else:
            entry = {"config": config, "microseconds": microseconds, "times": times, "failed": failed}
            merge_table(table_path(cache_folder() / "tuned", gpu), self.section, shape, entry)
        return Verdict(config, times, failed, MEASURED)

    def _measure(self, run, check, candidates, reference):
        """(candidate, microseconds) of those that run and are right, (candidate, why) of the others."""
        times, failed = [], []
        for candidate in candidates:
            expected = _expected(check(reference))  # each time anew: it spoils the memory that it gives back
            on_its_device = torch.cuda.device_of(expected[0])  # the timer's events are of the current one
            with self._passing_over(candidate, failed), self.trying(candidate), on_its_device:
                _compare(check(candidate), expected)
                times.append((candidate, round(self.timer(functools.partial(run, candidate)), 3)))
        return tuple(times), tuple(failed)

    def trying(self, candidate):
        """A context to run a candidate in. If the process dies inside, later processes do not try it for a day."""
        return _noted(self._noted_as(candidate))

    def refuse(self, candidate, why):
        """No process tries the candidate for a day. why: one line, for logs and tables."""
        name, folder = _name(self._noted_as(candidate)), cache_folder() / "tuned"
        with contextlib.suppress(OSError):  # a read-only folder
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}{WRONG}").write_text(why, encoding="utf-8")

    def _noted_as(self, candidate):
        return f"{self.section}, {candidate}"

    def _may_try_again(self, failed):
        """Whether one of these candidates was refused then, and is not now."""
        return any(_was_refused(why) and self._refusal(candidate) is None for candidate, why in failed)

    def _refusal(self, candidate):
        return _refusal(_name(self._noted_as(candidate)))

    def _is_right(self, check, candidate, reference):
        if candidate == reference:
            return True
        expected = _expected(check(reference))
        with self._passing_over(candidate, []), self.trying(candidate):
            _compare(check(candidate), expected)
            return True
        return False

    @contextlib.contextmanager
    def _passing_over(self, candidate, failed):
        try:
            yield
        except Exception as error:  # it may not compile, or need more registers or shared memory than this GPU has
            reason = reason_of(error)
            failed.append((candidate, reason))
            level = logging.INFO if reason in self._told else logging.WARNING
            self._told.add(reason)
            log.log(level, "%s: candidate %s is passed over: %s", self.name, candidate, reason)
            if device_is_lost():
                raise


class Refused(RuntimeError):
    """A process died while it ran this, or `Autotuner.refuse` was called."""


def _was_refused(reason):
    return reason.startswith(Refused.__name__)  # as `reason_of` writes it


ENDED = "a process ended while it ran"
RUNNING, WRONG = ".running", ".wrong"  # of the names of notes
_running = set()  # names of the notes of this process; after an exec the list is empty


@contextlib.contextmanager
def _noted(what):
    """Leaves a note while `what` runs. Raises Refused if a process on this computer died and left such a note.

    A hanging kernel ends only with its process, and a device fault ends the process. Both would stop every later
    process at the same place. A process that restarts itself by `exec` keeps its number: a note with this number that
    is not in `_running` is from before. After a day `what` is tried again: the process may have died for another
    reason.
    """
    name, folder = _name(what), cache_folder() / "tuned"
    if why := _refusal(name):
        raise Refused(why)
    mine = folder / f"{name}.{os.getpid()}{RUNNING}"
    with contextlib.suppress(OSError):  # a read-only folder
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(_started(os.getpid()))
    _running.add(name)
    keep = False
    try:
        yield
    except Exception:
        keep = device_is_lost()
        raise
    finally:
        _running.discard(name)
        with contextlib.suppress(OSError):
            if not keep:
                mine.unlink()


def _name(what):
    """Of the notes on `what`: they are this computer's."""
    return hashlib.sha256(f"{platform.node()}, {what}".encode()).hexdigest()[:16]


def _refusal(name):
    """Why what has notes of this name is not tried today, or None."""
    for note in (cache_folder() / "tuned").glob(f"{name}.*"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished
            if time.time() - note.stat().st_mtime >= REMEMBERED:
                continue
            if note.suffix == WRONG or not _in_progress(note, name):
                why = note.read_text(encoding="utf-8", errors="replace") if note.suffix == WRONG else ENDED
                return f"{why}; to try it again today, delete {note}"
    return None


def _in_progress(note, name):
    """Whether the process that left the note still runs."""
    process = int(note.name.split(".")[1])
    if process == os.getpid():
        return name in _running
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return note.read_text() in ("", _started(process))  # "": it is being written; else another one has its number now


def _started(process):
    """The start time of a process, in the system's unit; "" if the system does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _pairs(entries):
    return tuple((candidate, value) for candidate, value in entries or ())


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _expected(result):
    """Copies of the default's result. Raises NotFinite.

    The result itself is spoiled: the allocator gives its memory to the candidate, which must write every entry.
    """
    if not all(t.isfinite().all() for t in _tensors(result)):
        raise NotFinite
    copies = [t.clone() for t in _tensors(result)]
    for tensor in _tensors(result):
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    return copies


def _compare(result, expected):
    if not all(map(_agree, _tensors(result), expected)):
        raise ArithmeticError("it gives another result than the default")


def _agree(result, expected):
    """Integers exactly. Floating point to 2% in the norm, and each entry to 2% of it and 10% of the root mean square:
    this finds wrong kernels and tiles, not rounding errors."""
    if not expected.is_floating_point():
        return torch.equal(result, expected)
    expected = expected.float()
    difference, norm = (result.float() - expected).abs_(), expected.norm()
    allowed = expected.abs().mul_(0.02).add_(0.1 * norm / max(1, expected.numel()) ** 0.5)
    return bool((difference.norm() <= 0.02 * norm) & (difference <= allowed).all())


def table_path(folder, gpu):
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()) + ".json")


def read_table(path):
    """{section: {shape: {"config", "microseconds", "times", "failed"}}}; empty if there is no table."""
    try:
        table = read_json(path) if path.exists() else {}
        if is_table(table):
            return table
        reason = "an entry is of another form, a time is not a number, or the cause of a failure not text"
    except (InputError, OSError) as error:
        reason = error
    log.warning("the tuned table %s is ignored: %s", path, reason)
    return {}


def is_table(table):
    """Whether a JSON value is what `read_table` returns."""
    try:
        return all(_is_entry(entry) for section in table.values() for entry in section.values())
    except (AttributeError, TypeError, ValueError):
        return False


def _is_entry(entry):
    times, failed = ([(config, value) for config, value in entry.get(key) or ()] for key in ("times", "failed"))
    return all(isinstance(value, int | float) for _, value in times) and all(isinstance(why, str) for _, why in failed)


def merge_table(path, section, shape, entry):
    """Add one entry to a table; other processes may add entries at the same time. A read-only folder only warns."""
    try:
        with _locked(path):
            table = read_table(path)
            table.setdefault(section, {})[shape] = entry
            write_json(path, table)
    except (OSError, InputError) as error:
        log.warning("the tuned table %s cannot be written, so tuning is repeated next time: %s", path, error)


@contextlib.contextmanager
def _locked(path):
    """Lock the lock file beside `path`. The system releases it if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
