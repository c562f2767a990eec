"""The project's targets and the measured values: `python -m bench.targets results.csv`.

Only rows of a results file count: bf16, the median, against the fastest dense at the same shape. A target without a
measurement is "not measured", never met. Where the compiled dense form was not measured, a ratio that is large enough
is "undecided".
"""

import math
import sys
from typing import NamedTuple

from bench import command_line, program
from bench.providers import OURS
from bench.results import COMPILED, DENSE, key, read, speedups, timed, uncompiled
from sparsedm.errors import InputError
from sparsedm.files import write_text

# the ratio that is wanted, and what a model of the kernels (1.6 GHz, 64 GB/s of L2 for each multiprocessor, ideal
# multicast: subtract 5 to 10%) predicts of the configurations that share tiles in a cluster
SQUARES = {8192: (1.6, "1.50 to 1.66"), 2048: (1.2, "1.40 to 1.51"), 1024: (1.0, "0.83 to 0.89")}
LINEARS = {
    "uvit-imagenet256-large@64": (1.55, "1.37 to 1.53"),
    "uvit-imagenet256-huge@64": (1.4, "1.30 to 1.45"),
    "dit-imagenet256-xlarge@64": (1.4, "1.30 to 1.49"),
}
STEPS = {"uvit-imagenet256-huge@64": 1.35, "uvit-imagenet256-large@64": 1.35, "uvit-cifar10-small@64": 1.1}


class Finding(NamedTuple):
    """measured: a ratio, or None. met: None if unknown. note: facts that the ratio does not show. predicted: before any
    measurement."""

    target: str
    wanted: str
    measured: float | None = None
    met: bool | None = None
    note: str = ""
    predicted: str = ""


def at_least(target, wanted, measured, note="", spoiled=False, missing=""):
    """spoiled: a measurement that the target needs has failed. missing: what may lower the ratio, for the note."""
    met = False if measured < wanted or spoiled else None if missing else True
    return Finding(target, f"at least {wanted:g}", measured, met, "; ".join(filter(None, (note, missing))))


def findings(rows):
    """[Finding], in the order of the targets. rows: all of a results file."""
    rows = [row for row in rows if row["dtype"] == "bfloat16"]
    return [
        *(square(rows, size) for size in SQUARES),
        *against_cusparselt(rows),
        *(linears(rows, model) for model in LINEARS),
        never_slower(rows),
        *(step(rows, shape, wanted) for shape, wanted in STEPS.items()),
        training(rows),
        choosing(rows),
    ]


def square(rows, size):
    name, (wanted, predicted) = f"2:4 product of {size} x {size} x {size} against dense", SQUARES[size]
    for s in speedups(rows, {"gemm"}):
        if (s.row["provider"], s.row["shape"], s.row["mode"]) == (OURS, f"square {size}", "plain"):
            found = at_least(name, wanted, s.p50, f"{s.low:.2f} to {s.high:.2f}", missing=uncompiled(rows, [s]))
            return found._replace(predicted=predicted)
    return Finding(name, f"at least {wanted:g}", predicted=predicted)


def against_cusparselt(rows):
    """The least and the geometric mean over all products that both libraries can compute."""
    times = {}
    for row in timed(rows, {"gemm"}):
        times.setdefault(key(row), {})[row["provider"]] = row["p50_us"]
    ratios = {}
    for at, of in times.items():
        theirs = min((of[name] for name in ("cuSPARSELt", "cuSPARSELt tuned") if name in of), default=None)
        if theirs and OURS in of:
            ratios[at] = theirs / of[OURS]
    least, mean = "against cuSPARSELt, the least of all products", "against cuSPARSELt, geometric mean of all products"
    if not ratios:
        return Finding(least, "at least 1"), Finding(mean, "at least 1.15")
    worst = min(ratios, key=ratios.get)
    untuned = sum("cuSPARSELt tuned" not in times[at] for at in ratios)
    note = f"{len(ratios)} products" + (f", its algorithms not searched in {untuned}" if untuned else "")
    return (
        at_least(least, 1.0, ratios[worst], f"{worst[2]}, {worst[3]}; {note}"),
        at_least(mean, 1.15, geometric_mean(ratios.values()), note),
    )


def linears(rows, model):
    """Every layer of the network counts once; the note gives the mean over distinct shapes."""
    name, (wanted, predicted) = f"linear layers of {model}, with epilogue, geometric mean", LINEARS[model]
    found = [s for s in speedups(rows, {"gemm"}) if (s.row["provider"], s.row["mode"]) == (OURS, "epilogue")]
    found = [s for s in found if s.row["model"] == model]
    if not found:
        return Finding(name, f"at least {wanted:g}", predicted=predicted)
    mean = geometric_mean([s.p50 for s in found], [s.row["layers"] for s in found])
    shapes = f"{geometric_mean([s.p50 for s in found]):.2f} over the {len(found)} shapes"
    tried = {r["shape"] for r in rows if (r["suite"], r["mode"], r["model"]) == ("gemm", "epilogue", model)}
    untimed = tried - {s.row["shape"] for s in found}
    lacking = f"no time of {len(untimed)} of {len(tried)} shapes" if untimed else ""
    missing = "; ".join(filter(None, (uncompiled(rows, found), lacking)))
    return at_least(name, wanted, mean, shapes, missing=missing)._replace(predicted=predicted)


def never_slower(rows):
    name, wanted = "any product or convolution through the dispatcher against dense, the least", 0.98
    found = [s for s in speedups(rows, {"gemm", "conv"}) if s.row["provider"] == OURS]
    tried = [r for r in rows if r["provider"] == OURS and r["suite"] in ("gemm", "conv")]
    broken = {r["shape"] for r in tried if r["status"] in ("failed", "wrong")}
    failed = f"; failed at {', '.join(sorted(broken))}" if broken else ""
    if not found:
        return Finding(name, f"at least {wanted:g}", note=failed.removeprefix("; "))
    worst = min(found, key=lambda s: s.p50)
    note = f"{worst.row['shape']}, {worst.row['mode']}; {len(found)} products{failed}"
    missing = uncompiled(rows, found)  # few are compiled: that takes longer than all other measurements
    finding = at_least(name, wanted, worst.p50, note, spoiled=bool(broken), missing=missing)
    some = any(not uncompiled(rows, [s]) for s in found)
    return finding._replace(met=True) if finding.met is None and some else finding


def step(rows, shape, wanted):
    name = f"whole sampler step of {shape} against dense compiled, both as CUDA graphs"
    of = best(rows, "end-to-end", shape, "step")
    ours = min((row for p, row in of.items() if p.startswith(OURS)), key=microseconds, default=None)
    if not ours or COMPILED not in of:
        missing = "dense compiled" if ours else "2:4"
        return Finding(name, f"at least {wanted:g}", note=f"no time of {missing}")
    dense = min((of[p] for p in DENSE if p in of), key=microseconds)
    ways = {ours["method"], dense["method"]}
    note = f"{ours['provider']} {ours['p50_us'] / 1e3:.2f} ms, {dense['provider']} {dense['p50_us'] / 1e3:.2f} ms"
    return at_least(name, wanted, dense["p50_us"] / ours["p50_us"], note + unlike(ways))


def training(rows):
    """The worst of the networks that were trained."""
    name, wanted = "masked training step, time over the time of dense compiled", 1.0
    ratios = {}
    for shape in dict.fromkeys(row["shape"] for row in timed(rows, {"train"})):
        of = best(rows, "train", shape, "training step")
        masked = min((row for p, row in of.items() if p.startswith("sparsedm masked")), key=microseconds, default=None)
        if masked and COMPILED in of:
            dense = min((of[p] for p in DENSE if p in of), key=microseconds)
            note = f"{shape}: {masked['provider']} {masked['p50_us'] / 1e3:.2f} ms, "
            note += f"{dense['provider']} {dense['p50_us'] / 1e3:.2f} ms"
            ratios[masked["p50_us"] / dense["p50_us"]] = note + unlike({masked["method"], dense["method"]})
    predicted = "about 1.04"
    if not ratios:
        note = "needs times of both in the suite train"
        return Finding(name, f"at most {wanted:g}", note=note, predicted=predicted)
    return Finding(name, f"at most {wanted:g}", max(ratios), max(ratios) <= wanted, ratios[max(ratios)], predicted)


def choosing(rows):
    """At the largest weight: the smaller ones fit into the cache."""
    name, wanted = "mask, cast and 2:4 form of a weight in one pass, share of the bandwidth of a copy", 0.8
    copies = [r["gbps"] for r in rows if r["suite"] == "ceiling" and r["kernel"] == "copy" and r["status"] == "ok"]
    passes = [row for row in timed(rows, {"mask"}) if row["provider"] == "sparsedm choose + pack"]
    if not copies or not passes:
        return Finding(name, f"at least {wanted:g}", note="needs the suites ceiling and mask")
    largest = max(passes, key=lambda row: row["N"] * row["K"])
    note = f"{largest['shape']}: {largest['gbps']:.0f} of {max(copies):.0f} GB/s"
    return at_least(name, wanted, largest["gbps"] / max(copies), note)


def best(rows, suite, shape, mode):
    """{provider: its row} of the providers timed there."""
    return {row["provider"]: row for row in timed(rows, {suite}) if (row["shape"], row["mode"]) == (shape, mode)}


def microseconds(row):
    return row["p50_us"]


def geometric_mean(values, weights=None):
    values = list(values)
    weights = weights or [1] * len(values)
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights)) / sum(weights))


def unlike(methods):
    return f"; timed in different ways: {' and '.join(sorted(methods))}" if len(methods) > 1 else ""


def report(rows):
    """The table in Markdown, under the device and the commits it was measured with. rows: of one device."""
    measured = [row for row in rows if row["status"] == "ok"]
    if len(several := sorted({row["device"] for row in measured})) > 1:
        raise InputError(f"these are rows of {' and '.join(several)}: give the files of one device")
    devices, commits = (", ".join(dict.fromkeys(r[c] for r in measured)) for c in ("device", "commit"))
    verdict = {True: "met", False: "**missed**", None: "undecided"}
    lines = [
        f"{devices or 'Nothing was measured'}; commit {commits or 'unknown'}.",
        "",
        "| target | wanted | predicted | measured | | |",
        "|---|---|---|---|---|---|",
    ]
    for f in findings(rows):
        value, said = ("", "not measured") if f.measured is None else (f"{f.measured:.3f}", verdict[f.met])
        lines.append(f"| {f.target} | {f.wanted} | {f.predicted} | {value} | {said} | {f.note} |")
    return "\n".join([*lines, "", "Quality is measured by `python -m bench.experiments`, not here.", ""])


@program("bench")
def main(arguments=None):
    """Returns the exit code."""
    parser = command_line("bench.targets", __doc__)
    parser.add_argument("results", nargs="+", help="CSV files of `bench.run`, all of one device")
    parser.add_argument("--out", help="Markdown file (default: print it)")
    options = parser.parse_args(arguments)
    found = report(read(*options.results))
    if options.out:
        write_text(options.out, found)
    else:
        print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
