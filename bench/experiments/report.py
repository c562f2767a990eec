"""report.md with the table, and the pictures, only from the rows of results.csv. Bars and bands: every seed's value.

compare.png       Fréchet distance and validation loss of each run; the control and the range within 5% of it are marked
ratio.png         the same over the axis of the experiment, if it has one
speed.png         the same over the speed of sampling, as a multiple of the fastest dense network's, after --time;
                  dotted: its fastest form in fp32, where bf16 is faster
training.png      validation loss over the images seen
noise-levels.png  validation loss over t, relative to the control: where sparsity hurts
health.png        flip rate, density and distance to the dense weights over training
flips.png         flip rate of each layer over training
"""

import itertools
import re
import statistics

from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from bench.experiments import claims
from sparsedm.files import write_text
from sparsedm.plots import COLOURS, picture

FLIPS = "flip rate of "  # and a layer's name: a measure
DISTANCE = "Fréchet distance"  # on the first features, which decide; with ", NAME" behind it, on others
SPEED, SAMPLING = "sampling speed-up", "sampling seconds"  # over the fastest dense network; of one image
FP32 = ", fp32"  # behind SAMPLING: of a dense network's fastest form in fp32, where its fastest form may be in bf16
CLOSE = 0.05  # a Fréchet distance that is larger by at most this share is as good as the control's
TABLE = ("validation loss", DISTANCE, "distance to dense weights", "MACs", "parameters", "images", "seconds")


def write(folder, rows, plan):
    """Write report.md and the pictures into `folder`. Returns the table as Markdown. plan: an `Experiment`."""
    values = _values(rows)
    runs = _in_order(list(dict.fromkeys(row["run"] for row in rows)), values)
    title = f"{rows[0]['experiment']} ({rows[0]['scale']}): {plan.summary}" if rows else ""
    text = f"{markdown(rows, values, runs)}{_against(values, runs, plan.control)}"
    if rows and rows[0]["experiment"] == "claims":
        machines = {(row["device"], row["threads"]) for row in rows if row["measure"] == claims.SPEED}
        alike = {at: found for at, found in values.items() if len(machines) == 1 or at[1] != claims.SPEED}
        text += f"\n\n{claims.table(alike, rows[0]['scale'])}"
    pictures = {"compare.png": _compare, "training.png": _training, "noise-levels.png": _levels, "health.png": _health}
    pictures |= {"flips.png": _flips, "ratio.png": _axis, "speed.png": _speed}
    labels = _labels(values, runs, plan.control)
    values = {(labels[run], measure): found for (run, measure), found in values.items()}
    styles = _styles(labels.values(), plan.control)
    titles = {"speed.png": f"{title.partition(':')[0]}: quality against the speed of sampling"}
    drawn = [
        name
        for name, draw in pictures.items()
        if _save(folder / name, draw, values, styles, plan, titles.get(name, title))
    ]
    shown = "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in drawn)
    write_text(folder / "report.md", f"# {title}\n\n{text}\n\n{shown}\n")
    return text


def _labels(values, runs, control):
    """{run: its name in pictures}, which says so where other runs have more seeds: a mean over other seeds misleads."""
    seeds = {run: {s for (name, _), found in values.items() if name == run for s in found} for run in runs}
    count = len(set().union(*seeds.values()))
    few = {run: f"{run} ({len(seeds[run])} of {count} seeds)" for run in runs if len(seeds[run]) < count}
    return {run: few.get(run, run) if run != control else run for run in runs}


def _values(rows):
    """{(run, measure): {seed: [(x, value)]}}"""
    values = {}
    for row in rows:
        seeds = values.setdefault((row["run"], row["measure"]), {})
        seeds.setdefault(row["seed"], []).append((row["x"], row["value"]))
    return values


def _in_order(runs, values):
    """In the order of the plan, or along the axis of the experiment, if it has one."""
    places = {run: _single(values, run, "axis") for run in runs}
    return sorted(runs, key=lambda run: -places[run][0]) if all(places.values()) else runs


def _single(values, run, measure):
    """One number per seed; [] where it was not measured."""
    return [points[0][1] for points in values.get((run, measure), {}).values()]


def of_time(measure):
    """Whether --time made it."""
    return measure in (SPEED, SAMPLING, SAMPLING + FP32)


def markdown(rows, values, runs):
    more = dict.fromkeys(m for _, m in values if m.startswith(f"{DISTANCE}, ") or m in (SPEED, SAMPLING))
    columns = (*TABLE, *more)
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run in runs:
        cells = [_cell(_single(values, run, measure), measure) for measure in columns]
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    last = rows[-1]
    seeds = sorted({row["seed"] for row in rows})
    counts = {measure: _single(values, runs[0], measure)[0] for measure in ("samples", "reference images")}
    commits = ", ".join(dict.fromkeys(row["commit"] or row["sparsedm"] for row in rows))
    machines = dict.fromkeys(f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in rows)
    where = f"{' and '.join(machines)}, commit {commits}"
    commands = dict.fromkeys(row["command"] for row in rows if not of_time(row["measure"]))
    spread = f"Mean of {len(seeds)} seeds ± half their range" if len(seeds) > 1 else "One seed"
    have = {run: len(_single(values, run, "samples")) for run in runs}
    fewer = [f"{run} has {count}" for run, count in have.items() if count < len(seeds)]
    spread += f" ({', '.join(fewer)})." if fewer else "."
    note = f"""{spread} Fréchet distance on {last["features"]} features,
of {counts["samples"]:,.0f} samples against {counts["reference images"]:,.0f} real images ({last["data"]}). {where}.
{", ".join(f"`{command}`" for command in commands)}"""
    return "\n".join([*lines, "", note])


def _against(values, runs, control):
    """Markdown: is each run as good as the control? "" if there is nothing to compare."""
    lines, count = [], len({seed for found in values.values() for seed in found})
    for run in runs:
        distances, losses = (_ratios(values, run, control, m) for m in (DISTANCE, "validation loss"))
        if run != control and distances:
            close = [ratio <= 1 + CLOSE for ratio in distances]
            verdict = "yes" if all(close) else "in some seeds" if any(close) else "no"
            verdict += f" ({len(close)} of {count} seeds)" if len(close) < count else ""
            lines.append(f"| {run} | {_spread(distances)} | {_spread(losses)} | {verdict} |")
    if not lines:
        return ""
    head = f"| against {control} | Fréchet distance | validation loss | within {CLOSE:.0%} |"
    note = f"""Ratios to {control} of the same seed: the same start, batches, noise and features; 1.05 is 5% worse.
Within {CLOSE:.0%}: whether the Fréchet distance is at most {1 + CLOSE:g} times that of {control}, in every seed."""
    if any(re.match(r"\| (\S+ )?one-?shot \|", line) and line.endswith(" yes |") for line in lines):
        note += "\nEven pruning without training is within it: so short a training says nothing about the others."
    return "\n".join(["", "", head, "|---|---|---|---|", *lines, "", note])


def _ratios(values, run, control, measure):
    """The run's value divided by the control's, for each seed that both have."""
    mine, theirs = ({s: p[0][1] for s, p in values.get((name, measure), {}).items()} for name in (run, control))
    return [mine[seed] / theirs[seed] for seed in mine if theirs.get(seed)]


def _spread(numbers, digits=3):
    half = (max(numbers) - min(numbers)) / 2
    return f"{statistics.fmean(numbers):.{digits}f}" + (f" ± {half:.{digits}f}" if len(numbers) > 1 else "")


def _cell(numbers, measure):
    numbers = [n for n in numbers if n == n]
    if not numbers:
        return "-"
    mean = statistics.fmean(numbers)
    if measure in ("MACs", "parameters"):
        return f"{mean / 1e6:.2f} M"
    if measure in ("images", "seconds"):
        return f"{mean:,.0f}"
    return _spread(numbers, 2 if measure.startswith(DISTANCE) or measure == SPEED else 4)


# ---- pictures --------------------------------------------------------------------------------------------------------


def _styles(runs, control):
    """{run: (line style, colour)}, the same in every picture. The control has its own colour."""
    others = [colour for colour in COLOURS if colour != COLOURS[1]]
    styles = itertools.cycle(itertools.product(("-", "--", ":", "-."), others))
    return {run: ("-", COLOURS[1]) if run == control else next(styles) for run in runs}


def _save(path, draw, values, runs, plan, title):
    """runs: see `_styles`. draw: (figure, values, runs, plan) -> whether there was anything to draw."""
    with picture(path) as figure:
        drawn = draw(figure, values, runs, plan)
        if drawn:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        else:
            figure.clear()
    return drawn


def _logarithmic(axes):
    """With several plain numbers on the axis also where what is drawn spans less than a power of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _compare(figure, values, runs, plan):
    """Dots: seeds. Bars: means, from the best. The line: the mean of the control, the band: up to 5% more."""
    figure.set_size_inches(11, 1.6 + 0.32 * len(runs))
    for axes, measure in zip(figure.subplots(1, 2), (DISTANCE, "validation loss")):
        found = {run: _single(values, run, measure) for run in runs}
        order = sorted((run for run in runs if found[run]), key=lambda run: -statistics.fmean(found[run]))
        for place, run in enumerate(order):
            colour = COLOURS[1] if run == plan.control else COLOURS[0]
            axes.barh(place, statistics.fmean(found[run]), color=colour, alpha=0.55, height=0.7)
            axes.plot(found[run], [place] * len(found[run]), "o", color=colour, markeredgecolor="white", markersize=6)
        meaning = "less is better; dots: seeds"
        if found.get(plan.control):
            meaning += f"; shaded: +{CLOSE:.0%}"
            mean = statistics.fmean(found[plan.control])
            axes.axvline(mean, color=COLOURS[1], linewidth=1, linestyle="--")
            axes.axvspan(mean, mean * (1 + CLOSE), color=COLOURS[1], alpha=0.12, linewidth=0)
        axes.set_yticks(range(len(order)), order)
        axes.set_xlabel(f"{measure}\n({meaning})")
    return True


def _axis(figure, values, runs, plan):
    placed = sorted((_single(values, run, "axis")[0], run) for run in runs if _single(values, run, "axis"))
    if not placed:
        return False
    figure.set_size_inches(10, 4.2)
    for axes, measure in zip(figure.subplots(1, 2), (DISTANCE, "validation loss")):
        seeds = [_single(values, run, measure) for _, run in placed]
        axes.plot([statistics.fmean(s) for s in seeds], color=COLOURS[0])
        for place, numbers in enumerate(seeds):
            axes.plot([place] * len(numbers), numbers, "o", color=COLOURS[0], markeredgecolor="white")
        # evenly spaced: on any scale of numbers 15:16, 31:32 and dense would lie on one another
        axes.set_xticks(range(len(placed)), [run.replace(" (", "\n(") for _, run in placed], fontsize=8)
        axes.set(xlabel=f"{plan.axis}, in order", ylabel=f"{measure} (dots: seeds)")
    return True


def _speed(figure, values, runs, plan):
    """Quality over the measured speed of sampling: faster runs are to the right of the control."""
    placed = {run: statistics.fmean(found) for run in runs if (found := _single(values, run, SPEED))}
    if not placed:
        return False
    fastest, in_fp32 = (_single(values, plan.control, f"{SAMPLING}{form}") for form in ("", FP32))
    figure.set_size_inches(11, 4.5)
    for axes, measure in zip(figure.subplots(1, 2), (DISTANCE, "validation loss")):
        for run, faster in placed.items():
            seeds = _single(values, run, measure)
            colour = COLOURS[1] if run == plan.control else COLOURS[0]
            axes.plot([faster] * len(seeds), seeds, "o", color=colour, markeredgecolor="white", markersize=7)
            place = {"xytext": (7, 4), "textcoords": "offset points", "fontsize": 8, "color": colour}
            axes.annotate(run, (faster, max(seeds)), **place)
        if plan.control in placed:
            level = statistics.fmean(_single(values, plan.control, measure))
            axes.axhline(level, color=COLOURS[1], linewidth=1, linestyle="--")
        if in_fp32 and in_fp32 != fastest:
            slower = statistics.fmean(fastest) / statistics.fmean(in_fp32)
            axes.axvline(slower, color=COLOURS[1], linewidth=1, linestyle=":")
            where = {"xycoords": ("data", "axes fraction"), "xytext": (4, 4), "textcoords": "offset points"}
            axes.annotate("dense in fp32", (slower, 0), fontsize=8, color=COLOURS[1], **where)
        axes.set(xlabel="images per second in sampling, over the fastest dense network's")
        axes.set_ylabel(f"{measure} (dots: seeds)")
        axes.margins(x=0.15)
    return True


def _curves(axes, values, runs, measure):
    """One line per run: the mean over seeds, with a band from least to greatest. Returns whether there was any."""
    drawn = False
    for run, (style, colour) in runs.items():
        seeds = [dict(points) for points in values.get((run, measure), {}).values()]
        xs = sorted(set.intersection(*map(set, seeds))) if seeds else []
        if not xs:
            continue
        columns = [[points[x] for points in seeds] for x in xs]
        axes.plot(xs, [statistics.fmean(c) for c in columns], style, color=colour, label=run)
        axes.fill_between(xs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)
        drawn = True
    return drawn


def _legend(figure, axes):
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _training(figure, values, runs, plan):
    figure.set_size_inches(9, 4.5)
    axes = figure.subplots()
    drawn = _curves(axes, values, runs, "validation over training")
    axes.set(xlabel="images seen after the dense start", ylabel="validation loss (band: seeds)")
    _logarithmic(axes)
    _legend(figure, axes)
    return drawn


def _levels(figure, values, runs, plan):
    figure.set_size_inches(9, 4.5)
    axes, measure = figure.subplots(), "loss at noise level"
    control = {seed: dict(points) for seed, points in values.get((plan.control, measure), {}).items()}
    others = {run: style for run, style in runs.items() if run != plan.control or not control}
    if control:  # seed by seed: two dense networks differ by more than a run and its own
        values = {
            (run, measure): {
                seed: [(x, loss / control[seed][x]) for x, loss in points if control[seed].get(x)]
                for seed, points in values.get((run, measure), {}).items()
                if seed in control
            }
            for run in others
        }
    drawn = _curves(axes, values, others, measure)
    if control:
        axes.axhline(1, color=COLOURS[1], linewidth=1, linestyle="--")
    axes.set(xlabel="t: 0 image, 1 noise")
    axes.set_ylabel("validation loss" + (f", relative to {plan.control}" if control else ""))
    _logarithmic(axes)
    _legend(figure, axes)
    return drawn


def _health(figure, values, runs, plan):
    figure.set_size_inches(13, 4.2)
    sparse = _sparse(values, runs)
    panels = figure.subplots(1, 3)
    measures = {
        "flip rate": "mask entries changed since the last log",
        "density": "density of the masked layers",
        "distance over training": "distance to the dense weights (1: their norm)",
    }
    drawn = [_curves(axes, values, sparse, measure) for axes, measure in zip(panels, measures)]
    for axes, label in zip(panels, measures.values()):
        axes.set(xlabel="images seen after the dense start", ylabel=label)
    _legend(figure, panels[0])
    return any(drawn)


def _flips(figure, values, runs, plan):
    """A map for each run whose masks change: layers from the first to the last, over the images seen."""
    maps = {run: _flip_map(values, run) for run in _sparse(values, runs)}
    maps = {run: found for run, found in maps.items() if found and any(max(row) > 0 for row in found[2])}
    if not maps:
        return False
    columns = min(4, len(maps))
    lines = -(-len(maps) // columns)
    figure.set_size_inches(3.4 * columns + 1.2, 3.4 * lines)
    top = max(max(row) for _, _, rates in maps.values() for row in rates)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (run, (layers, seen, rates)) in zip(grid.flat, maps.items()):
        image = axes.pcolormesh(seen, range(len(layers)), rates, vmin=0, vmax=top, cmap="viridis", shading="nearest")
        axes.invert_yaxis()
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(title=run, xlabel="images seen", ylabel="layer, from the first to the last")
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, label="mask entries changed since the last log")
    return True


def _flip_map(values, run):
    """(layers, images seen, [rates of a layer]), means over seeds; None without logs."""
    layers = [measure for name, measure in values if name == run and measure.startswith(FLIPS)]
    curves = {layer: [dict(points) for points in values[run, layer].values()] for layer in layers}
    if not layers:
        return None
    seen = sorted(set.intersection(*(set(points) for seeds in curves.values() for points in seeds)))
    rates = [[statistics.fmean(points[x] for points in seeds) for x in seen] for seeds in curves.values()]
    return (layers, seen, rates) if seen else None


def _sparse(values, runs):
    """The runs that have masks."""
    densities = {run: values.get((run, "density"), {}).values() for run in runs}
    return {run: runs[run] for run in runs if any(density < 1 for seed in densities[run] for _, density in seed)}
