"""The charts: each function takes rows of a results file and fills a figure, or returns False if the rows hold nothing.

The colours are Okabe and Ito's, for the colour-blind. Lines also differ in marker and dash, bars in hatching, so that a
grey print can be read. Every speed-up chart shades the losing region, where dense is faster.
"""

import itertools
import statistics
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import LogLocator, NullFormatter

from bench.providers import OURS
from bench.results import DENSE, ONEDNN, Speedup, key, read_csv, speedups, timed, uncompiled
from bench.shapes import SWEEPS
from sparsedm import plots
from sparsedm.kernels.launch import BACKENDS

# cycles of different lengths, so that a colour which comes again brings another marker, dash and hatching
COLOURS = plots.COLOURS[:6]  # the last is black, invisible on a dark page
MARKERS, DASHES, HATCHES = "os^DvPX", ("-", "--", "-.", ":", (0, (5, 1))), ("", "//", "..", "xx", "||")
GREY = "#808080"  # not our measurements of a provider: ceilings, whiskers, published values
PUBLISHED = Path(__file__).with_name("published")
SOURCE = "grey: cuSPARSELt against cuBLASLt as published\n(arXiv 2603.05232), never mixed with ours"
LAYERS = "layers of models"  # of `cpu.PLAN`
CARDS = {"A100": "A100", "RTX4090": "RTX 4090", "H100": "H100 PCIe", "B200": "B200", "RTX5080": "RTX 5080"}
FORCED = tuple(f"{OURS} {backend}" for backend in BACKENDS)  # the kernels that it chooses from


def looks(names):
    """{name: (colour, marker, dash, hatch)}, the same for the same list of names."""
    cycles = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), itertools.cycle(DASHES), itertools.cycle(HATCHES))
    return dict(zip(dict.fromkeys(names), cycles))


def losing_region(axes, vertical=False):
    """Shade below 1x, draw the lines at 1x and 2x."""
    span, line = (axes.axvspan, axes.axvline) if vertical else (axes.axhspan, axes.axhline)
    span(0, 1, color="#d55e00", alpha=0.12, linewidth=0, zorder=0)
    line(1, color=axes.xaxis.label.get_color(), linewidth=1.2, zorder=1)
    line(2, color=axes.xaxis.label.get_color(), linewidth=0.8, linestyle=":", zorder=1)


def plain_log(axis, values):
    """A logarithmic axis whose ticks are the values themselves, as plain numbers."""
    axis.set_ticks(values, [f"{value:g}" for value in values], rotation=45 if len(values) > 8 else 0)
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(numticks=1))


def published(name, dtype):
    """{card: [(M, speed-up of cuSPARSELt over cuBLASLt)]}, measured by others: for square products, or the geometric
    mean over the linear layers of several language models. See published/README.md."""
    kind = {"square": "square", "m-sweep": "model_kernel"}[name]
    file = PUBLISHED / f"slidesparse_{kind}_{'FP16' if dtype == 'float16' else 'BF16'}.csv"
    found = {}
    for row in read_csv(file, ("GPU", "M", "2:4"), ("M", "2:4")):
        if row["GPU"] in CARDS and row["2:4"]:
            found.setdefault(CARDS[row["GPU"]], {}).setdefault(row["M"], []).append(row["2:4"])
    return {card: [(m, statistics.geometric_mean(r)) for m, r in sorted(by.items())] for card, by in found.items()}


def sweep(figure, rows, name):
    """Speed-up over dense against the size of a sweep ("square": M = N = K, "m-sweep": M), with its p20-p80 band."""
    found = [s for s in speedups(rows, {"gemm"}) if s.row["model"] == name and not _of_suite_cpu(s.row)]
    modes = list(dict.fromkeys(s.row["mode"] for s in found))
    if not found:
        return False
    look, theirs = looks(s.row["provider"] for s in found), published(name, found[0].row["dtype"])
    for axes, mode in zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes):
        for (card, line), marker, dash in zip(theirs.items(), MARKERS, DASHES):
            style = dict(color=GREY, marker=marker, linestyle=dash, markersize=3.5, linewidth=1, alpha=0.8, zorder=1.5)
            of = "" if name == "square" else ", layers of LLMs"
            axes.plot(*zip(*line), label=f"cuSPARSELt, {card}{of} (published)", **style)
        for provider, (colour, marker, dash, _) in look.items():
            line = sorted((s for s in found if (s.row["provider"], s.row["mode"]) == (provider, mode)), key=_rows)
            x = [_rows(s) for s in line]
            style = dict(color=colour, marker=marker, linestyle=dash, markersize=5, linewidth=1.6)
            axes.plot(x, [s.p50 for s in line], label=provider, **style)
            axes.fill_between(x, [s.low for s in line], [s.high for s in line], color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        plain_log(axes.xaxis, sorted({_rows(s) for s in found} | {m for line in theirs.values() for m, _ in line}))
        losing_region(axes)
        highest = [1.1 * ratio for line in theirs.values() for _, ratio in line]
        axes.set_ylim(min(0.4, *(s.p50 / 1.3 for s in found)), max([*highest, *(s.p50 * 1.3 for s in found)]))
        axes.set_title(mode, loc="left")
        axes.set_xlabel("M = N = K" if name == "square" else "M (rows of x)")
    figure.axes[0].set_ylabel(f"times as fast as {denominator(rows, found)}")
    lines, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: "(published)" in labels[i])  # ours first
    legend = dict(fontsize=8, loc="outside right upper", title=SOURCE, title_fontsize=7)
    figure.legend([lines[i] for i in order], [labels[i] for i in order], alignment="left", **legend)
    return True


def denominator(rows, found):
    """The denominator of the Speedups `found` in `rows`, in words."""
    return f"the fastest dense\n({'; '.join(filter(None, (uncompiled(rows, found), 'shaded: slower')))})"


def _rows(speedup):
    return speedup.row["M"]


def _of_suite_cpu(row):
    """Whether suite `cpu` measured a product. Its rows are of suite `gemm`, too, but their shapes have an arrow."""
    return "->" in row["shape"]


def first(figure, rows):
    """Bars: TFLOP/s of each configuration of our kernels and of each library, in single calls and over a second."""
    found = [r for r in rows if r["suite"] == "first" and r["metric"] in ("time", "held")]
    shapes = list(dict.fromkeys(r["shape"] for r in found))
    if not found:
        return False
    names = list(dict.fromkeys(r["provider"] for r in found))
    details = {r["provider"]: textwrap.fill(r["detail"], 46) for r in found}
    labels = [f"{name}\n{details[name]}" for name in names]
    for axes, shape in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes):
        here = {(r["provider"], r["metric"]): r for r in found if r["shape"] == shape}
        dense = {}
        for (name, metric), row in here.items():
            if name in DENSE:
                dense[metric] = max(dense.get(metric, 0), row["dense_equivalent_tflops"])
        right = 1.5 * max(r["dense_equivalent_tflops"] for r in here.values())
        for metric, offset, colour in (("time", -0.2, COLOURS[0]), ("held", 0.2, COLOURS[4])):
            for name, row in ((n, r) for (n, m), r in here.items() if m == metric):
                at, rate = names.index(name) + offset, row["dense_equivalent_tflops"]
                axes.barh(at, rate, 0.38, color=colour, zorder=2)
                notes = [f"{rate / dense[metric]:.2f}x"] if metric in dense else []
                if metric == "held" and row["power_w"]:
                    notes += [f"{float(row['power_w']):.0f} W", f"{row['sm_mhz']} MHz"]
                said = f" ({', '.join(notes)})" if notes else ""
                axes.text(rate, at, f" {rate:.0f}{said}", va="center", fontsize=7)
            if metric in dense:
                axes.axvline(dense[metric], color=colour, linewidth=1.2, linestyle="--", zorder=1)
        if dense:
            axes.axvspan(0, min(dense.values()), color=COLOURS[1], alpha=0.12, linewidth=0, zorder=0)
        axes.set_xlim(0, right)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), labels, fontsize=7)
        axes.grid(False, axis="y")
        axes.set_title(shape, loc="left")
        axes.set_xlabel("TFLOP/s, dense-equivalent (lines: dense; shaded: slower)")
    bars = [figure.axes[0].barh(0, 0, color=colour) for colour in (COLOURS[0], COLOURS[4])]
    labels = ["single calls, cold cache", "a second without a pause"]
    figure.legend(bars, labels, ncols=2, loc="outside lower right")
    return True


def roofline(figure, rows):
    """Dense-equivalent TFLOP/s against arithmetic intensity, under the ceilings measured on the same device."""
    linear = [r for r in timed(rows, {"gemm"}) if r["dense_equivalent_tflops"] and r["gbps"]]
    linear = [r for r in linear if r["provider"] not in FORCED]
    ceilings = [r for r in rows if r["suite"] == "ceiling" and r["status"] == "ok"]
    if not linear or not ceilings:
        return False
    axes = figure.subplots()
    intensity = {id(r): 1e3 * r["dense_equivalent_tflops"] / r["gbps"] for r in linear}
    size, alpha = (5, 0.8) if len(linear) < 400 else (2.5, 0.5)
    for provider, (colour, marker, *_) in looks(r["provider"] for r in linear).items():
        mine = [r for r in linear if r["provider"] == provider]
        points = [intensity[id(r)] for r in mine], [r["dense_equivalent_tflops"] for r in mine]
        axes.plot(*points, marker, color=colour, markersize=size, alpha=alpha, linestyle="none", label=provider)
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, right = min(intensity.values()) / 1.5, max(intensity.values()) * 1.5
    grey, flat = dict(color=GREY, linewidth=1.2, zorder=0), {}
    for row in ceilings:
        if row["kernel"] == "copy":
            axes.plot([left, right], [row["gbps"] * x / 1e3 for x in (left, right)], **grey)
            axes.annotate(f" copy {row['gbps']:.0f} GB/s", (left, row["gbps"] * left / 1e3), color=GREY, fontsize=8)
        else:
            flat[row["kernel"]] = max(row["value"], flat.get(row["kernel"], 0))
    lowest = min(r["dense_equivalent_tflops"] for r in linear) / 2
    highest = max([r["dense_equivalent_tflops"] for r in linear] + list(flat.values())) * 3
    apart, above = (highest / lowest) ** 0.025, 0.0  # a line of text in this range
    for kernel, rate in sorted(flat.items(), key=lambda item: item[1]):
        axes.axhline(rate, **grey)
        above = max(rate, above * apart)
        name = "dense product" if kernel == "dense" else kernel
        label = dict(color=GREY, fontsize=8, va="center", annotation_clip=False)
        axes.annotate(f" {name} {rate:.0f}", (right, above), **label)
    axes.set_xlim(left, right)
    axes.set_ylim(lowest, highest)
    axes.set_xlabel("dense-equivalent operations per byte that has to move")
    axes.set_ylabel("dense-equivalent TFLOP/s")
    axes.legend(fontsize=8, loc="lower right", markerscale=5 / size)
    return True


def heat(figure, rows):
    """Speed-up of the dispatcher over (M, N) at fixed K; below 1 dense is faster."""
    found = [s for s in speedups(rows, {"gemm"}) if s.row["model"] == "grid" and s.row["provider"] == OURS]
    modes = list(dict.fromkeys(s.row["mode"] for s in found))
    if not found:
        return False
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes):
        cells = {(int(s.row["M"]), int(s.row["N"])): s.p50 for s in found if s.row["mode"] == mode}
        _table(axes, cells, "N", "M")
        axes.set_title(f"{mode}, K = {found[0].row['K']:.0f}", loc="left")
    return True


def _table(axes, cells, x_name, y_name):
    """A heat map of speed-ups with the numbers in its cells: orange loses, purple wins, white is 1."""
    ys, xs = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    grid = np.array([[cells.get((y, x), np.nan) for x in xs] for y in ys])
    # logarithmic, so that half as fast is as dark as twice as fast
    image = axes.imshow(np.log2(grid), cmap="PuOr", norm=TwoSlopeNorm(0, -1, 1), origin="lower", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if np.isnan(value):  # not measured
            continue
        ink = "#000000" if abs(np.log2(value)) < 0.5 else "#ffffff"
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9, color=ink)
    axes.set_xticks(range(len(xs)), [f"{v:g}" for v in xs])
    axes.set_yticks(range(len(ys)), [f"{v:g}" for v in ys])
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.grid(False)
    return image


def layers(figure, rows, model, mode):
    """Bars: the speed-up of every layer shape of one model at one batch size, without the back ends that are forced."""
    found = [s for s in speedups(rows, {"gemm", "conv"}) if s.row["model"] == model]
    found = [s for s in found if s.row["provider"] not in FORCED]
    found = [s for s in found if s.row["mode"] == mode or s.row["suite"] == "conv"]
    if not found:
        return False
    names = list(dict.fromkeys(s.row["shape"] for s in found))
    sizes = {
        s.row["shape"]: f"{s.row['layers']:.0f} x {s.row['M']:.0f}x{s.row['N']:.0f}x{s.row['K']:.0f}" for s in found
    }
    labels = [f"{name.removeprefix(model).strip()}\n{sizes[name]}" for name in names]
    entries = [(names.index(s.row["shape"]), s.row["provider"], s) for s in found]
    _bars(figure, entries, labels, denominator(rows, found))
    return True


def networks(figure, rows, suite):
    """Bars: the speed-up of whole networks, a sampler step, whole sampling or a training step."""
    found = speedups(rows, {suite})
    if not found:
        return False
    names = list(dict.fromkeys((s.row["shape"], s.row["mode"]) for s in found))
    labels = [f"{shape}\n{mode}" for shape, mode in names]
    entries = [(names.index((s.row["shape"], s.row["mode"])), s.row["provider"], s) for s in found]
    _bars(figure, entries, labels, denominator(rows, found))
    return True


def _bars(figure, entries, labels, over, beside=lambda speedup: ""):
    """entries: (row of the chart, provider, Speedup). over: the denominator, in words. Numbers stand beside the bars,
    with more text from `beside`. Whiskers are p20 to p80.
    """
    axes = figure.subplots()
    look = looks(provider for _, provider, _ in entries)
    height = 0.8 / len(look)
    right = max(2.2, *(s.p50 * 1.25 for *_, s in entries))
    for i, (provider, (colour, _, _, hatch)) in enumerate(look.items()):
        mine = [(row, s) for row, name, s in entries if name == provider]
        y = [row - 0.4 + height * (i + 0.5) for row, _ in mine]
        whiskers = [[s.p50 - s.low for _, s in mine], [s.high - s.p50 for _, s in mine]]
        style = dict(color=colour, hatch=hatch, edgecolor=axes.get_facecolor(), linewidth=0)
        axes.barh(y, [s.p50 for _, s in mine], height * 0.92, label=provider, **style)
        axes.errorbar([s.p50 for _, s in mine], y, xerr=whiskers, fmt="none", ecolor=GREY, elinewidth=1)
        for at, (_, s) in zip(y, mine):
            behind = dict(facecolor=axes.get_facecolor(), edgecolor="none", pad=0.5, alpha=0.8)  # whiskers may cross it
            text = f" {s.p50:.2f}{beside(s)}"
            axes.text(min(s.high, right * 0.93), at, text, va="center", fontsize=8, bbox=behind)
    losing_region(axes, vertical=True)
    axes.set_xlim(0, right)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"times as fast as {over}")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def table3(figure, rows):
    """SparseDM's speed table: patch by MLP ratio, one panel per width and depth, of a step and of whole sampling."""
    found = [s for s in speedups(rows, {"table3"}) if s.row["provider"] == OURS]
    panels = {}
    for s in found:
        grid, patch, ratio = s.row["model"].rsplit(", ", 2)
        panels.setdefault(f"{grid}: {s.row['mode']}", {})[int(ratio.split()[1]), int(patch.split()[1])] = s.p50
    if not panels:
        return False
    for axes, (grid, cells) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        _table(axes, cells, "patch", "MLP ratio")
        axes.set_title(grid, loc="left")
    return True


def masks(figure, rows):
    """Bandwidth of selecting, casting and packing masks, against the plain cast and the measured copy."""
    found = [r for r in timed(rows, {"mask"}) if r["gbps"]]
    if not found:
        return False
    axes = figure.subplots()
    for provider, (colour, marker, dash, _) in looks(r["provider"] for r in found).items():
        line = sorted((r["N"] * r["K"], r["gbps"]) for r in found if r["provider"] == provider)
        name = "cast without a mask" if provider == "dense" else provider
        axes.plot(*zip(*line), color=colour, marker=marker, linestyle=dash, markersize=5, label=name)
    for row in rows:
        if row["suite"] == "ceiling" and row["kernel"] == "copy":
            axes.axhline(row["gbps"], color=GREY, linewidth=1.2)
            axes.annotate(f"copy {row['gbps']:.0f} GB/s", (line[0][0], row["gbps"]), color=GREY, va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("weights")
    axes.set_ylabel("GB/s of the bytes that have to move")
    axes.legend(fontsize=8)
    return True


def patterns(figure, rows):
    """On a CPU: speed-up of every pattern over the best dense product against size; and over the layers of models, its
    geometric mean over the best dense product and over `F.linear`."""
    rows = [r for r in timed(rows, {"gemm"}) if r["mode"] == "plain" and r["model"] in ("square", LAYERS)]
    rows = [r for r in rows if _of_suite_cpu(r)]
    best, eager = times_of(rows)
    names = [p for p in dict.fromkeys(r["provider"] for r in rows) if ":" in p.split()[-1]]
    if not names or ONEDNN not in {r["provider"] for r in rows}:
        return False
    left, right = figure.subplots(1, 2)
    for name, (colour, marker, dash, _) in (looks(names) | {"dense": (GREY, "x", "-", "")}).items():
        square = [r for r in rows if (r["provider"], r["model"]) == (name, "square") and key(r) in best]
        line = sorted((r["M"], best[key(r)] / r["p50_us"]) for r in square)
        label = "F.linear" if name == "dense" else name.split()[-1]
        style = dict(color=colour, marker=marker, linestyle=dash, label=label)
        left.plot([m for m, _ in line], [ratio for _, ratio in line], **style)
    left.set_xscale("log", base=2)
    plain_log(left.xaxis, sorted({r["M"] for r in rows if r["model"] == "square"}))
    left.set(xlabel="M = N = K", ylabel="times as fast as the best dense product\n(shaded: slower)")
    left.set_title("square products", loc="left")
    left.legend(fontsize=8)
    losing_region(left)
    models = [r for r in rows if r["model"] == LAYERS]
    for offset, base, colour, label in (
        (-0.2, best, COLOURS[0], "the best dense product"),
        (0.2, eager, COLOURS[4], "F.linear"),
    ):
        for place, name in enumerate(names):
            ratios = [base[key(r)] / r["p50_us"] for r in models if r["provider"] == name and key(r) in base]
            if not ratios:
                continue
            mean = statistics.geometric_mean(ratios)
            right.bar(place + offset, mean, 0.38, color=colour, label=label if not place else None, zorder=2)
            right.plot([place + offset] * len(ratios), ratios, ".", color=GREY, markersize=3, zorder=3)
            right.text(place + offset, max(ratios), f"{mean:.2f}", ha="center", va="bottom", fontsize=8, zorder=4)
    right.set_xticks(range(len(names)), [name.split()[-1] for name in names])
    shapes = len({r["shape"] for r in models})
    right.set_title(f"{shapes} layers of models: geometric mean (dots: each)", loc="left")
    right.set(xlabel="pattern", ylabel="times as fast as")
    if models:
        right.legend(fontsize=8, loc="upper left")
    losing_region(right)
    return True


def times_of(rows):
    """({key: microseconds of the fastest dense provider}, {key: of "dense", torch as it is called})."""
    dense = [r for r in rows if r["provider"] in DENSE]
    best = {}
    for row in dense:
        best[key(row)] = min(row["p50_us"], best.get(key(row), row["p50_us"]))
    return best, {key(r): r["p50_us"] for r in dense if r["provider"] == "dense"}


def calls(figure, rows):
    """On a CPU: whole networks, a call or a training step, as many times as fast as eager torch; in brackets the same
    against the best dense network."""
    rows = [r for r in timed(rows, {"end-to-end", "train"}) if r["mode"] in ("step", "training step")]
    rows = [r for r in rows if r["device"].startswith("CPU") and r["dtype"] == "float32"]
    best, eager = times_of(rows)
    # oneDNN cannot train everywhere, and then `dense` is the best
    needed = {"step": {"dense", ONEDNN}, "training step": {"dense"}}
    rows = [r for r in rows if needed[r["mode"]] <= {o["provider"] for o in rows if key(o) == key(r)}]
    if not rows:
        return False
    names = list(dict.fromkeys((r["shape"], r["mode"]) for r in rows))
    entries = []
    for row in (r for r in rows if r["provider"] != "dense"):
        provider = "best dense network" if row["provider"] == ONEDNN else row["provider"]
        ratio = eager[key(row)] / (best[key(row)] if row["provider"] == ONEDNN else row["p50_us"])
        entries.append((names.index((row["shape"], row["mode"])), provider, Speedup(row, ratio, ratio, ratio)))
    times = {(r["shape"], r["mode"]): eager[key(r)] / 1e3 for r in rows}

    def against_best(speedup):
        return "" if speedup.row["provider"] == ONEDNN else f" ({best[key(speedup.row)] / speedup.row['p50_us']:.2f})"

    labels = [f"{s}\n{m}, torch: {times[s, m]:,.0f} ms" for s, m in names]
    _bars(figure, entries, labels, "eager torch (in brackets: as the best dense network; shaded: slower)", against_best)
    return True


SWEEP_NAMES = [name for name in SWEEPS if name != "grid"]
