"""The pictures of a search: the front of cost and quality, which network works at which step, and the proxy."""

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from sparsedm.files import atomic_file
from sparsedm.plots import COLOURS

MARKS = {"uniform": "s", "random": "x", "by hand": "^", "found": "o"}


def shades(count):
    """A colour per network of a family, the costliest darkest."""
    return [colormaps["YlGnBu"](value) for value in np.linspace(0.95, 0.2, count)]


def plot_front(path, groups, cloud, dearest, quality, title=""):
    """Quality over cost as a share of `dearest`.

    groups: {one of MARKS: [(label, cost, quality)]}; cloud: [(cost, quality)] of all that was tried while searching.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    if cloud:
        axes.plot(*_shares(cloud, dearest), ".", color="#cccccc", markersize=5, label="tried (search noise)", zorder=1)
    for colour, (name, mark) in zip(COLOURS, MARKS.items()):
        points = sorted((cost, value, label) for label, cost, value in groups.get(name, ()))
        if points:
            line = "-" if name in ("uniform", "found") else ""
            pairs = [(cost, value) for cost, value, _ in points]
            axes.plot(*_shares(pairs, dearest), mark + line, color=colour, linewidth=1.2, label=name, zorder=2)
        if name in ("uniform", "by hand"):
            for cost, value, label in points:
                place = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 8, "color": colour}
                axes.annotate(label, (cost / dearest, value), **place)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("cost of one image, as a share of the costliest network at every step")
    axes.set_ylabel(quality)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    _save(figure, path, axes)


def plot_strategies(path, rows, names, times, title=""):
    """Which network works at which step, one band per strategy. rows: [(label, indices)]; times: of the steps, 0..1."""
    figure = Figure(figsize=(9, 1.7 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = shades(len(names))
    bands, line = np.array([indices for _, indices in rows]), {"edgecolors": "white", "linewidth": 2}
    cells = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(names) - 0.5}
    axes.pcolormesh(bands, **cells, **(line if len(times) <= 60 else {}))
    axes.hlines(range(1, len(rows)), 0, len(times), color="white", linewidth=6)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [label for label, _ in rows], fontsize=9)
    axes.invert_yaxis()
    _mark_times(axes, times, 12, 0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names)]
    lines = -(-len(names) // 5)
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(names) // lines), frameon=False)
    _save(figure, path)


def plot_proxy(path, table, names, times, pairs, correlation, quality):
    """Left: how much worse than the first network each is, step by step. Right: quality as sampled over the proxy."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, name, row in zip(shades(len(names)), names, np.asarray(table)):
        left.plot(range(len(times)), row / np.asarray(table)[0], "o-", color=colour, markersize=4, label=name)
    _mark_times(left, times, 5)
    left.set_ylabel(f"validation loss, relative to {names[0]}")
    left.legend(frameon=False)
    right.plot(*zip(*pairs), ".", color=COLOURS[0])
    right.set_xlabel("proxy: sum of the logarithms of the losses")
    right.set_ylabel(quality)
    right.set_title(f"rank correlation {correlation:.2f} over {len(pairs)} strategies", loc="left", fontsize=10)
    left.set_title("what the cheap networks lack, and where", loc="left", fontsize=10)
    _save(figure, path, left, right)


def _mark_times(axes, times, most, offset=0.0):
    steps = sorted({round(step) for step in np.linspace(0, len(times) - 1, min(len(times), most))})
    axes.set_xticks([step + offset for step in steps], [f"{round(times[step], 4):.2g}" for step in steps])
    axes.set_xlabel("time of the step, from noise (left) to image (right)")


def _shares(pairs, dearest):
    costs, values = zip(*pairs)
    return [cost / dearest for cost in costs], values


def _save(figure, path, *graphs):
    for axes in graphs:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120)
