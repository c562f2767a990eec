"""From measured rows to ratios: each provider against the fastest dense one at the same shape, mode, dtype, device."""

from typing import NamedTuple

from bench.providers import DENSE


class Speedup(NamedTuple):
    """row: the provider's. p50, and the band low .. high: slow provider over quick dense, and the reverse."""

    row: dict
    p50: float
    low: float
    high: float


def key(row):
    return tuple(row[name] for name in ("device", "suite", "shape", "mode", "dtype"))


def timed(rows, suites=None):
    """The rows that hold a time of the thing itself, not of packing."""
    return [r for r in rows if r["metric"] == "time" and r["status"] == "ok" and (not suites or r["suite"] in suites)]


def speedups(rows, suites=None):
    """[Speedup] of every timed row that is not a denominator and has one."""
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
