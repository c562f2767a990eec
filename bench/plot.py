"""Every chart, only from results files: `python -m bench.plot results.csv --out plots`.

Each chart is written twice, for light and dark pages (NAME.png, NAME-dark.png). The caption gives device, date and
versions. A chart of a CPU says so in large letters, because its ratios say nothing about a GPU.
"""

import functools
import sys
import tempfile
import zipfile
from pathlib import Path

from bench import charts, command_line, program, targets
from bench.results import read
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, write_text
from sparsedm.plots import picture

DPI = 110
THEMES = {"": ("#ffffff", "#222222", "#d9d9d9"), "-dark": ("#0d1117", "#e6edf3", "#30363d")}  # paper, ink, grid


def draw_all(paths, folder):
    """Draw every chart for which the CSV files `paths` have data, for each dtype by itself: if there are several, its
    name is part of the file's. For a GPU also write targets.md, its results against the project's targets. Returns the
    files written.

    Raises: InputError if the files hold no measurement, or measurements of several devices.
    """
    every = read(*paths)
    rows = [row for row in every if row["status"] == "ok"]
    devices = sorted({row["device"] for row in rows})
    if len(devices) != 1:
        held = " and ".join(devices) or "no measurement"
        raise InputError(f"{', '.join(map(str, paths))}: a plot shows one device, these files hold {held}")
    by_dtype = {row["dtype"]: [] for row in rows}
    for row in rows:
        by_dtype[row["dtype"]].append(row)
    written = []
    for dtype, same in by_dtype.items():
        of = f"-{dtype}" if len(by_dtype) > 1 else ""
        for name, (title, draw, size) in all_charts(same).items():
            for suffix, theme in THEMES.items():
                path = Path(folder) / f"{name}{of}{suffix}.png"
                if save(path, title, draw, size, same, theme):
                    written.append(path)
    if not on_cpu(rows):
        written.append(Path(folder) / "targets.md")
        write_text(written[-1], targets.report(every))
    return written


def draw_archive(paths, archive):
    """The same pictures in one ZIP file. Raises like `draw_all`."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = [path for path in draw_all(paths, folder) if path.suffix == ".png"]
        with atomic_file(archive) as partial, zipfile.ZipFile(partial, "w") as held:
            for path in pictures:
                held.write(path, path.name)


def on_cpu(rows):
    return rows[0]["device"].startswith("CPU")


def all_charts(rows):
    """{file name: (title, function of figure and rows, size in inches)}."""
    wide, square = (11, 4.8), (9, 6)
    found = {
        f"speedup-{name}": (f"Sparse against dense: {name}", functools.partial(charts.sweep, name=name), wide)
        for name in charts.SWEEP_NAMES
    }
    count = len({r["provider"] for r in rows if r["suite"] == "first"})
    found["first-contact"] = ("First contact: every configuration", charts.first, (13, 2 + 0.5 * count))
    found["roofline"] = ("Roofline under measured ceilings", charts.roofline, square)
    found["heat"] = (f"{charts.OURS} against dense, at fixed K", charts.heat, wide)
    for model in dict.fromkeys(r["model"] for r in rows if "@" in r["model"] and r["suite"] in ("gemm", "conv")):
        draw = functools.partial(charts.layers, model=model, mode="epilogue")
        count = len({r["shape"] for r in rows if r["model"] == model and r["suite"] in ("gemm", "conv")})
        found[f"layers-{model.replace('@', '-batch')}"] = (f"Layers of {model}", draw, (9, 2.5 + 0.7 * count))
    for suite, title in (
        ("end-to-end", "Whole networks: step and sampling"),
        ("train", "Whole networks: training step"),
    ):
        count = len({(r["shape"], r["mode"]) for r in rows if r["suite"] == suite})
        found[suite] = (title, functools.partial(charts.networks, suite=suite), (9, 2.5 + 0.8 * count))
    found["cpu-patterns"] = ("N:M on a CPU, fp32, against dense products", charts.patterns, wide)
    networks = len({(r["shape"], r["mode"]) for r in rows if r["suite"] in ("end-to-end", "train")})
    found["cpu-networks"] = ("Whole networks on a CPU, fp32", charts.calls, (9, 2.2 + 0.75 * networks))
    found["table3"] = ("U-ViT by patch and MLP ratio: 2:4 against dense", charts.table3, wide)
    found["masks"] = ("Choosing and packing masks", charts.masks, square)
    return found


def save(path, title, draw, size, rows, theme):
    """Draw one chart into `path`. Returns False, and writes nothing, if there is nothing to draw."""
    paper, ink, grid = theme
    style = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper)
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    style |= {"grid.color": grid, "grid.alpha": 1, "font.size": 10, "hatch.linewidth": 0.6}
    style["text.parse_math"] = True  # the powers of ten on a logarithmic axis; no name of a file is drawn
    with picture(path, size, DPI, **style) as figure:
        if not draw(figure, rows):
            figure.clear()
            return False
        of_a_cpu = Path(path).name.startswith("cpu-")  # these are about CPUs, the others would be about a GPU
        warned = on_cpu(rows) and not of_a_cpu
        figure.suptitle(title + ("\nCPU (no GPU was measured)" if warned else ""), x=0.01, ha="left", fontsize=13)
        figure.supxlabel(caption(rows, of_a_cpu), x=0.01, ha="left", fontsize=7)
        if warned:
            figure.text(0.5, 0.5, "CPU", fontsize=140, weight="bold", alpha=0.10, ha="center", va="center", rotation=25)
    return True


CPU_TERMS = """\
F.linear is torch's product as users call it (MKL); the best dense product is the faster of it and oneDNN's on a weight
packed once; the best dense network is eager torch or one with these and our attention. Medians of CPU time."""


def caption(rows, of_a_cpu=False):
    """Device, dates, versions and commits of all rows, in three lines. of_a_cpu: also what the two denominators are."""

    def values(column):
        return ", ".join(dict.fromkeys(row[column] for row in rows if row[column]))

    dates = sorted(row["date"][:10] for row in rows)
    versions = [
        f"{name} {values(name)}" for name in ("driver", "cuda", "torch", "triton", "cusparselt") if values(name)
    ]
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    first = f"{values('device')}, {values('dtype')}, {when}, sparsedm {values('commit') or values('sparsedm')}"
    meaning = CPU_TERMS if of_a_cpu else "TFLOP/s are dense-equivalent. Bands and whiskers: 20th to 80th percentile."
    return f"{first}\n{', '.join(versions)}\n{meaning}"


@program("bench")
def main(arguments=None):
    """Returns the exit code."""
    parser = command_line("bench.plot", __doc__)
    parser.add_argument("results", nargs="+", help="CSV files of `bench.run`, all of one device")
    parser.add_argument("--out", default="plots", help="folder for the pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    written = draw_all(options.results, options.out)
    print(f"{len(written)} files in {options.out}: {', '.join(p.stem for p in written if '-dark' not in p.stem)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
