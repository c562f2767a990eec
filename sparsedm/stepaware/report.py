"""The report of a search: report.json, report.md with the table, and all pictures except the samples."""

import numpy as np

from sparsedm.files import write_json, write_text
from sparsedm.plots import COLOURS, GREY, picture, table

NOTE = """\
found: the front of the search; best: the least of quality + weight x cost, if a weight was given. The search used one
set of noises; the table measures all strategies on another set. So it shows the real gain of the search. One seed, no
error bars."""
MARKS = {"uniform": "s", "random": "x", "by hand": "^", "found": "o"}


def write_report(folder, report):
    """Write all files into `folder`. report: the result of `study.study`."""
    write_json(folder / "report.json", report)
    title = f"{report['family']}: {report['steps']} steps of {report['sampler']}"
    text = summary(report)
    write_text(folder / "report.md", f"# Which network at which step\n\n{title}\n\n```\n{text}\n```\n\n{NOTE}\n")

    quality = "proxy" if report["quality"] == "proxy" else f"Fréchet distance ({report['features']})"
    groups = {}
    for row in report["rows"]:
        groups.setdefault(row["group"], []).append((row["strategy"], row["cost"], row["quality"]))
    cloud = [(e["cost"], e["quality"]) for e in report["tried"]] if report["count"] == report["final_count"] else []
    plot_front(folder / "front.png", groups, cloud, report["dearest"], quality, title)
    bands = [(_band(row, report), row["indices"]) for row in report["rows"] if row["group"] in ("found", "by hand")]
    plot_strategies(folder / "strategies.png", bands, report["names"], report["times"], title)
    pairs = [(e["proxy"], e["quality"]) for e in report["tried"]]
    correlation = report["rank_correlation"]["logarithms"]
    plot_proxy(folder / "proxy.png", report["losses"], report["names"], report["times"], pairs, correlation, quality)


def summary(report):
    """The report's table and totals, as text."""
    clocked, whole = report["dearest_clock"] is not None, f"{report['names'][0]} at every step"
    costs, meaning = ("cost", "share"), f"cost: {report['unit']} of one image; share: of {whole}"
    if clocked:
        costs = ("summed cost", "summed share", "by the clock", "clock share")
        meaning = f"summed cost: its networks' seconds for one image; by the clock: whole sampling; shares: of {whole}"
    head = ("strategy", *costs, "distance", "networks, from noise to image")
    rows = [
        (
            row["strategy"],
            f"{row['cost'] / 1e6:,.1f} M" if report["unit"] == "MACs" else f"{row['cost'] * 1e3:.3f} ms",
            f"{row['cost'] / report['dearest']:.0%}",
            *([f"{row['clock'] * 1e3:.3f} ms", f"{row['clock'] / report['dearest_clock']:.0%}"] if clocked else []),
            f"{row['quality']:.3f}",
            "".join(str(index) for index in row["indices"]) if len(report["names"]) <= 10 else "",
        )
        for row in report["rows"]
    ]
    correlation = report["rank_correlation"]
    distance = "the proxy (sum of the logarithms of the validation losses), nothing was sampled for it"
    if report["quality"] != "proxy":
        distance = f"Fréchet ({report['features']}) of {report['final_count']:,} images"
    networks = ", ".join(f"{index} = {name}" for index, name in enumerate(report["names"]))
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in report["seconds"].items())
    return f"""{table(head, rows, left=(0, len(head) - 1))}

networks: {networks}
distance: {distance}; {meaning}
rank correlation of the proxy with {report["quality"]}, over {len(report["tried"])} strategies: \
{_rounded(correlation["logarithms"])} (plain sum of the losses: {_rounded(correlation["losses"])})
spent: {spent}
machine: {report["device"]}, torch {report["torch"]}"""


def _rounded(correlation):
    return "unknown" if correlation is None else f"{correlation:.2f}"


def _band(row, report):
    return f"{row['strategy']}: cost {row['cost'] / report['dearest']:.0%}, distance {row['quality']:.3g}"


# ---- pictures


def shades(count):
    """A colour per network of a family; the costliest network is darkest."""
    from matplotlib import colormaps

    return [colormaps["YlGnBu"](value) for value in np.linspace(0.95, 0.2, count)]


def plot_front(path, groups, cloud, dearest, quality, title=""):
    """Quality over cost as a share of `dearest`.

    groups: {one of MARKS: [(label, cost, quality)]}. cloud: [(cost, quality)] of all strategies that the search tried.
    """
    from matplotlib.ticker import PercentFormatter

    with picture(path, (8, 5)) as figure:
        axes = figure.add_subplot()
        if cloud:
            axes.plot(*_shares(cloud, dearest), ".", color=GREY, markersize=5, label="tried (search noise)", zorder=1)
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
        axes.set(xlabel="cost of one image, as a share of the costliest network at every step")
        axes.set(ylabel=quality, title=title)
        axes.legend()


def plot_strategies(path, rows, names, times, title=""):
    """The network of each step, one band per strategy. rows: [(label, indices)]. times: the steps' times, 0..1."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    with picture(path, (9, 1.7 + 0.42 * len(rows))) as figure:
        axes, colours = figure.add_subplot(), shades(len(names))
        axes.grid(False)
        bands, line = np.array([indices for _, indices in rows]), {"edgecolors": "white", "linewidth": 2}
        cells = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(names) - 0.5}
        axes.pcolormesh(bands, **cells, **(line if len(times) <= 60 else {}))
        axes.hlines(range(1, len(rows)), 0, len(times), color="white", linewidth=6)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [label for label, _ in rows], fontsize=9)
        axes.invert_yaxis()
        _mark_times(axes, times, 12, 0.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names)]
        lines = -(-len(names) // 5)
        figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(names) // lines))


def plot_proxy(path, losses, names, times, pairs, correlation, quality):
    """Left: each network's loss relative to the first network, per step. Right: sampled quality over the proxy."""
    with picture(path, (10, 4.2)) as figure:
        left, right = figure.subplots(1, 2)
        for colour, name, row in zip(shades(len(names)), names, np.asarray(losses)):
            left.plot(range(len(times)), row / np.asarray(losses)[0], "o-", color=colour, markersize=4, label=name)
        _mark_times(left, times, 5)
        left.set_ylabel(f"validation loss, relative to {names[0]}")
        left.legend()
        right.plot(*zip(*pairs), ".", color=COLOURS[0])
        right.set(xlabel="proxy: sum of the logarithms of the losses", ylabel=quality)
        right.set_title(f"rank correlation {_rounded(correlation)} over {len(pairs)} strategies", fontsize=10)
        left.set_title("loss of the cheaper networks at each step", fontsize=10)


def _mark_times(axes, times, most, offset=0.0):
    steps = sorted({round(step) for step in np.linspace(0, len(times) - 1, min(len(times), most))})
    axes.set_xticks([step + offset for step in steps], [f"{round(times[step], 4):.2g}" for step in steps])
    axes.set_xlabel("time of the step, from noise (left) to image (right)")


def _shares(pairs, dearest):
    costs, values = zip(*pairs)
    return [cost / dearest for cost in costs], values
