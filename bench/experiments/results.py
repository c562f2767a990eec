"""results.csv: every measurement of an experiment, one a row. Its text form; what a row may hold.

x is the place of a value on a curve (a noise level, images seen), None for a single number.
"""

import csv
import io

from sparsedm.errors import InputError
from sparsedm.files import write_text

STAMPED = ("device", "threads", "torch", "sparsedm", "commit", "date", "command")
COLUMNS = ("experiment", "scale", "data", "features", "group", "run", "seed", "measure", "x", "value", *STAMPED)
EVERY_RUN = {"validation loss", "Fréchet distance", "samples", "reference images"}  # has these


def read(file, experiment=None, scale=None):
    """The rows of a results.csv. experiment, scale: names that they must have, None for any.

    Raises: InputError if it is missing, is none, is damaged, lacks a part of a run, or is of another experiment.
    """
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
        if not rows:
            raise ValueError("it holds no measurement")
        if absent := [name for name in COLUMNS if name not in rows[0]]:
            raise ValueError(f"it has no column {', '.join(absent)}")
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a row is cut short")
        rows = [
            row | {"seed": int(row["seed"]), "x": float(row["x"]) if row["x"] else None, "value": float(row["value"])}
            for row in rows
        ]
        measures = {}
        for row in rows:
            measures.setdefault((row["run"], row["seed"]), set()).add(row["measure"])
        for (run, seed), found in measures.items():
            if absent := EVERY_RUN - found:
                raise ValueError(f"run {run} of seed {seed} has no {', '.join(sorted(absent))}")
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise InputError(f"{file} cannot be read as the results of an experiment: {error}") from None
    for row in rows:
        if (row["experiment"], row["scale"]) != (experiment or row["experiment"], scale or row["scale"]):
            raise InputError(
                f"{file} holds results of {row['experiment']} ({row['scale']}), not of {experiment} ({scale})"
            )
    return rows


def write(file, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"x": "" if row["x"] is None else row["x"]} for row in rows)
    write_text(file, text.getvalue())
