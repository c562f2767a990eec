"""The results file: CSV, one row per measurement, whole at every moment (it is rewritten atomically as it grows).

Times are microseconds of one call. TFLOP/s are dense-equivalent: the operations of the dense product, of which a 2:4
product executes half, over the time. A row whose status is not "ok" has no times; its reason says why.
"""

import csv
import io
from pathlib import Path

from sparsedm.errors import InputError
from sparsedm.files import write_text

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


class Results:
    """Rows in memory and in the file `path`. resume: keep what the file already holds.

    What was begun and never finished, because its process crashed or was ended, is found as a failure on resuming: of
    the provider that was under way, or of all of them if none is named.
    """

    def __init__(self, path, resume=False):
        self.path = Path(path)
        self.rows = read(self.path) if resume and self.path.exists() else []
        if not resume and self.path.exists():
            raise InputError(f"{self.path} exists: remove it, choose another --out, or continue it with --resume")
        for row in self.rows:
            if row["status"] == "started":
                row |= {"status": "failed", "reason": "the process ended in the middle of this: a crash, or a hang"}
        self._text = _csv(self.rows, header=True)

    def begin(self, identity):
        """Note in the file that the measurement with this identity is under way, until `add` brings its rows."""
        write_text(self.path, self._text + _csv([identity | {"status": "started"}]))

    def add(self, rows):
        unknown = {column for row in rows for column in row} - set(COLUMNS)
        if unknown:
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        self.rows += rows
        self._text += _csv(rows)  # not all over again: a note is written before every provider
        write_text(self.path, self._text)

    def matching(self, identity):
        """The rows that have all these values."""
        return [row for row in self.rows if all(row.get(name, "") == value for name, value in identity.items())]


def write(path, rows):
    write_text(path, _csv(rows, header=True))


def _csv(rows, header=False):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value):
    if not isinstance(value, float):
        return value
    return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"


def read(*paths):
    """The rows of CSV files, one after the other; numbers as float (None where the cell is empty), the rest as text."""
    rows = []
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                if missing := set(COLUMNS) - set(reader.fieldnames or ()):
                    raise InputError(f"{path} is no results file: it has no column {', '.join(sorted(missing))}")
                rows += [_parsed(row, path) for row in reader]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
    return rows


def _parsed(row, path):
    if None in row or None in row.values():
        raise InputError(f"{path}: a row is broken or cut short: it has not {len(COLUMNS)} cells")
    try:
        return row | {name: float(row[name]) if row[name] else None for name in NUMBERS}
    except ValueError as error:
        raise InputError(f"{path}: a row is broken or cut short: {error}") from None
