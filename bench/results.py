"""Results files: CSV, one row per measurement, always complete (rewritten atomically); stamps; speed-ups.

Times are microseconds of one call. TFLOP/s are dense-equivalent: the operations of the dense product divided by the
time (a 2:4 product executes half of them). If a row's status is not "ok", it has no times; its reason says why.
"""

import csv
import functools
import io
import math
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from sparsedm import __version__
from sparsedm.errors import InputError
from sparsedm.files import MOST_TEXT, check_writable, regular_file, write_text
from sparsedm.kernels.cpu.library import cpu_name

ONEDNN = "dense oneDNN"  # on a CPU: the best dense product that torch has
COMPILED = "dense compiled"
DENSE = ("dense", "dense fused", COMPILED, ONEDNN)  # the denominators of speed-ups; nothing else is
COLUMNS = (
    *("suite", "kernel", "model", "shape", "provider", "mode", "metric", "dtype", "M", "N", "K", "layers"),
    *("status", "reason", "p20_us", "p50_us", "p80_us", "samples", "method", "value", "unit"),
    *("error", "allowed", "dense_equivalent_tflops", "gbps", "detail"),
    *("device", "capability", "threads", "sm_mhz", "memory_mhz", "power_w", "driver", "cuda", "torch", "triton"),
    *("cusparselt", "sparsedm", "commit", "date", "command"),
)
NUMBERS = ("M", "N", "K", "layers", "p20_us", "p50_us", "p80_us", "samples", "value", "error", "allowed") + (
    "dense_equivalent_tflops",
    "gbps",
)
IDENTITY = ("suite", "shape", "mode", "dtype")  # of what `measure` does in one go
ENDED = "the process ended in the middle of this: a crash, or a hang"
# a later row with the same values, and on a CPU of as many threads, replaces the earlier one
ONCE = (*IDENTITY, "provider", "metric")


class Results:
    """Rows in memory and in the file `path`. resume: keep the rows of the file.

    If a process crashed or was killed during a measurement, resuming records it as a failure: of the provider that was
    running, or of all providers if none is named.
    """

    def __init__(self, path, resume=False):
        self.path = Path(path)
        self.rows = read(self.path) if resume and self.path.exists() else []
        if not resume and self.path.exists():
            held = regular_file(self.path)
            raise InputError(f"{held} exists: remove it, choose another --out, or continue it with --resume")
        check_writable(self.path)
        for row in self.rows:
            if row["status"] == "started":
                row |= {"status": "failed", "reason": ENDED}
        self._text = _csv(self.rows, header=True)

    def begin(self, identity):
        """Note in the file that the measurement with this identity is running, until `add` writes its rows."""
        write_text(self.path, self._text + _csv([identity | {"status": "started"}]))

    def add(self, rows):
        unknown = {column for row in rows for column in row} - set(COLUMNS)
        if unknown:
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        new = {_once(row) for row in rows}
        kept = [row for row in self.rows if _once(row) not in new]
        if len(kept) < len(self.rows):  # else not all over again: this is done before every provider
            self._text = _csv(kept, header=True)
        self.rows = kept + rows
        self._text += _csv(rows)
        write_text(self.path, self._text)

    def matching(self, identity):
        """The rows that have all these values."""
        return [row for row in self.rows if all(row.get(name, "") == value for name, value in identity.items())]


def _once(row):
    return *(row.get(name) or "" for name in ONCE), threads_of(row)


def threads_of(row):
    """The number of threads, as text, of a row from a CPU, where times depend on it; "" from a GPU."""
    return "" if row.get("capability") else str(row.get("threads") or "")


def write(path, rows):
    write_text(path, _csv(rows, header=True))


def _csv(rows, header=False):
    return csv_text([{key: _cell(value) for key, value in row.items()} for row in rows], COLUMNS, header)


def _cell(value):
    if not isinstance(value, float):
        return value
    whole = value.is_integer() or 1e6 <= abs(value) < 1e15  # six digits of one and all of another change their order
    return f"{value:.0f}" if whole else f"{value:.6g}"


def csv_text(rows, columns, header=True):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read(*paths):
    """The rows of results files, one after the other."""
    return [row for path in paths for row in read_csv(path, COLUMNS, NUMBERS, _measurement)]


def _measurement(row):
    """See `check` of `read_csv`. A difference may be infinite or NaN, because a wrong output may be."""
    differences = {"error", "allowed"} | ({"value"} if row["metric"] == "image difference" else set())
    _check_finite(row, [name for name in NUMBERS if name not in differences])
    if timed([row]):
        p20, p50, p80 = times = [row[name] for name in ("p20_us", "p50_us", "p80_us")]
        if None in times or not 0 < p20 <= p50 <= p80:
            raise ValueError(f"its times {p20}, {p50}, {p80} are not 0 < p20_us <= p50_us <= p80_us")
    return (row["device"], *_once(row)) if row["status"] == "ok" else None


def _check_finite(row, names):
    for name in names:
        if row[name] is not None and not math.isfinite(row[name]):
            raise ValueError(f"its {name} is {row[name]}, which is not a finite number")


def read_csv(path, columns, numbers, check=lambda row: None):
    """The rows of a CSV file; `numbers` as float (None where the cell is empty), the rest as text.

    check: row -> what no other row may have in common with it, or None. It raises ValueError for a bad row.

    Raises: InputError if it cannot be read, lacks one of the `columns`, or a row is broken or there twice.
    """
    rows, seen = [], set()
    try:
        with open(regular_file(path, MOST_TEXT), encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise InputError(f"{path} is no results file: it has no column {', '.join(missing)}")
            for row in reader:
                rows.append(_parsed(row, numbers))
                if (only := check(rows[-1])) in seen:
                    same = ", ".join(str(value) for value in only if value not in (None, ""))
                    raise ValueError(f"an earlier row measures the same: {same}")
                seen |= {only} - {None}
            return rows
    except InputError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}, line {reader.line_num}: a row is broken or cut short: {error}") from None


def _parsed(row, numbers):
    if None in row or None in row.values():
        raise ValueError("it has too many or too few cells")
    return row | {name: float(row[name]) if row[name] else None for name in numbers}


# ---- speed-ups


class Speedup(NamedTuple):
    """row: the provider's. p50, and the band low .. high: slow provider against fast dense, and the reverse."""

    row: dict
    p50: float
    low: float
    high: float


def key(row):
    """What rows share whose times may be divided by one another."""
    return *(row[name] for name in ("device", "suite", "shape", "mode", "dtype")), threads_of(row)


def timed(rows, suites=None):
    """The rows that hold a time of the computation itself, not of packing."""
    return [r for r in rows if r["metric"] == "time" and r["status"] == "ok" and (not suites or r["suite"] in suites)]


def speedups(rows, suites=None):
    """[Speedup] of every timed row that is not in DENSE, against the fastest dense one at the same `key`."""
    timed_rows = timed(rows, suites)
    dense = {}
    for row in timed_rows:
        if row["provider"] in DENSE:
            dense[key(row)] = min(row, dense.get(key(row), row), key=lambda r: r["p50_us"])
    found = []
    for row in timed_rows:
        base = dense.get(key(row))
        if base and row["provider"] not in DENSE:
            ratios = (base[d] / row[s] for d, s in (("p50_us", "p50_us"), ("p20_us", "p80_us"), ("p80_us", "p20_us")))
            found.append(Speedup(row, *ratios))
    return found


def uncompiled(rows, found):
    """A remark if `rows` lack the compiled dense form, which may be the fastest, of some of the Speedups `found`."""
    every, compiled = {key(s.row) for s in found}, {key(r) for r in timed(rows) if r["provider"] == COMPILED}
    without = len(every - compiled)
    return f"{COMPILED} not measured in {without} of {len(every)}" if without else ""


# ---- what every measurement is stamped with

COMMIT = "SPARSEDM_COMMIT"  # environment variable: the commit, where the code was copied without its repository
SENSORS = ("clocks.sm", "clocks.mem", "power.draw.instant")  # MHz, MHz, W


def stamp(device):
    """{column: text} for measurements on `device` now. A value that cannot be read is an empty text, never a guess."""
    now = {"threads": str(torch.get_num_threads()), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    return {**_fixed(str(device)), **sensors(device), **now}


@functools.cache
def _fixed(device):
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else "",
        "driver": _nvidia_smi(device, "driver_version")[0] if cuda else "",
        "cuda": (torch.version.cuda or "") if cuda else "",
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cusparselt": str(torch.backends.cusparselt.version() or "") if cuda else "",
        "sparsedm": __version__,
        "commit": commit(),
        "command": shlex.join([*settings(), Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def settings():
    """The environment variables that choose kernels, as before a command."""
    names = ("SPARSEDM_AUTOTUNE", "SPARSEDM_BACKEND")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def sensors(device):
    """SM clock and memory clock in MHz and power in W, as nvidia-smi reads them now. An old one tells only the power of
    the last second."""
    values = [""] * len(SENSORS)
    if torch.device(device).type == "cuda":
        values = _nvidia_smi(device, *SENSORS)
        if not values[-1]:
            values = _nvidia_smi(device, *SENSORS[:-1], "power.draw")
    return dict(zip(("sm_mhz", "memory_mhz", "power_w"), values))


def _nvidia_smi(device, *fields):
    number = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"  # nvidia-smi does not count as torch does
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", number]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [""] * len(fields)
    values = [value.strip() for value in answer.strip().split(",")]
    return ["" if value.startswith("[") else value for value in values]  # such as [N/A]


@functools.cache
def commit():
    """The commit of the running code, with +dirty if files differ from it. $SPARSEDM_COMMIT replaces it."""
    if os.environ.get(COMMIT):
        return os.environ[COMMIT]
    here = Path(__file__).parent
    try:
        git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=20, check=True)
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])  # fails in somebody else's repository
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+dirty" if changed else "")


def _installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---- experiments: every measurement one row; x: its place on a curve (noise level, images seen), None: a single number

STAMPED = ("device", "threads", "torch", "sparsedm", "commit", "date", "command")
OF_EXPERIMENTS = ("experiment", "scale", "data", "features", "group", "run", "seed", "measure", "x", "value", *STAMPED)
EVERY_RUN = {"validation loss", "Fréchet distance", "samples", "reference images"}  # has these
POSITIVE = {"validation loss", "sampling speed-up", "sampling seconds", "sampling seconds, fp32"}  # are divided by


def read_experiment(file, experiment=None, scale=None):
    """The rows of an experiment's results.csv. experiment, scale: the names they must have; None: any.

    Raises: InputError if it is damaged or empty, lacks a part of a run, or belongs to another experiment.
    """
    rows = read_csv(file, OF_EXPERIMENTS, ("x", "value"), _of_run)
    if not rows:
        raise InputError(f"{file} holds no row")
    measures = {}
    for row in rows:
        measures.setdefault((row["run"], row["seed"]), set()).add(row["measure"])
    for (run, seed), found in measures.items():
        if absent := EVERY_RUN - found:
            raise InputError(f"{file}: run {run} of seed {seed} has no {', '.join(sorted(absent))}")
    for row in rows:
        if (row["experiment"], row["scale"]) != (experiment or row["experiment"], scale or row["scale"]):
            holds = f"{file} holds results of {row['experiment']} ({row['scale']})"
            raise InputError(f"{holds}, not of {experiment} ({scale})")
    return rows


def _of_run(row):
    """See `check` of `read_csv`. Makes the seed a number: as a float a large one would become another seed."""
    if not (row["seed"].isascii() and row["seed"].isdecimal()):
        raise ValueError(f"its seed {row['seed']!r} is not a whole number")
    if row["value"] is None:
        raise ValueError("it has no value")
    row["seed"] = int(row["seed"])
    _check_finite(row, ("x",) if row["measure"] == "distance to dense weights" else ("x", "value"))
    if row["measure"] in POSITIVE and row["value"] <= 0:
        raise ValueError(f"its {row['measure']} is {row['value']:g}, and must be more than 0")
    return tuple(row[name] for name in ("run", "seed", "measure", "x"))


def write_experiment(file, rows):
    write_text(file, csv_text(rows, OF_EXPERIMENTS))
