"""One style for all pictures and text tables; a grid of samples, training curves."""

import contextlib
import itertools
import math
from pathlib import Path

import numpy as np

from sparsedm.errors import InputError
from sparsedm.files import atomic_file

INK, PAPER, GREY = (40, 40, 40), (255, 255, 255), "#c8c8c8"
GAP = 2  # white pixels between images
MOST_PIXELS = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500}  # of a side
# Okabe and Ito: safe for the colour-blind
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = {
    "text.parse_math": False,  # names of files and folders may hold a $
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@contextlib.contextmanager
def picture(path, size=None, dpi=120, **style):
    """Yield an empty matplotlib Figure of `size` inches. On a clean exit it is written to `path` (format by suffix).

    An empty figure is not written. style: more rc parameters.
    """
    from matplotlib import rc_context  # late: code without pictures need not wait for it
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with rc_context(STYLE | style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        if not figure.axes:
            return
        for text in figure.findobj(Text):
            text.set_text(printable(text.get_text()))
        with atomic_file(path) as partial:
            figure.savefig(partial, dpi=dpi)


def printable(text):
    """`text` with escapes for characters without font or encoding, such as bytes of a name that is not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def table(head, rows, left=(0,), rule=False):
    """Rows of cells as text with aligned columns. left: the columns to align left; rule: a line below the head."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    if rule:
        cells.insert(1, ["-" * width for width in widths])
    aligned = [[c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))] for r in cells]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def check_grid(path, rows, columns, shape):
    """Raise InputError if a picture of rows x columns images of `shape`, (h, w), has more pixels than its format."""
    sides = (count * (side * _enlarged(shape) + GAP) for count, side in zip((rows, columns), shape))
    most = MOST_PIXELS.get(Path(path).suffix.lower(), math.inf)
    if (side := max(sides)) > most:
        raise InputError(
            f"{path}: {side} pixels on a side, and such a file holds {most}: write .png, or numbers as .npz"
        )


def save_grid(path, rows):
    """Write images as one PNG, a row of tiles per entry of `rows`. Small images are enlarged by a whole factor.

    rows: [(label, uint8 (n, 3 or 1, h, w))], all of one size. Shorter rows end in white space.
    Raises: InputError for a row without images.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [(printable(label), images) for label, images in rows]
    empty = [label for label, images in rows if not len(images)]
    if empty or not rows:
        raise InputError(f"a grid needs at least one image in each row, but there is none in: {', '.join(empty)}")
    scale = _enlarged(rows[0][1].shape[-2:])
    strips = [np.concatenate([_tile(image, scale) for image in images.cpu().numpy()], axis=1) for _, images in rows]
    font = ImageFont.load_default(size=15)
    margin = max(12 + int(font.getlength(label)) if label else 0 for label, _ in rows)
    height = strips[0].shape[0]
    canvas = Image.new("RGB", (margin + max(s.shape[1] for s in strips), height * len(strips)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, ((label, _), strip) in enumerate(zip(rows, strips)):
        canvas.paste(Image.fromarray(strip), (margin, index * height))
        draw.text((4, (index + 0.5) * height), label, fill=INK, font=font, anchor="lm")
    with atomic_file(path) as partial:
        canvas.save(partial)


def _enlarged(shape):
    return max(1, round(64 / max(shape)))


def _tile(image, scale):
    """uint8 (c, h, w) -> uint8 (h * scale + GAP, w * scale + GAP, 3), with a white right and bottom edge."""
    image = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    image = image.repeat(scale, 0).repeat(scale, 1)
    return np.pad(image, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)


def plot_losses(path, stages, batch_size, title=""):
    """Write the training curves of a chain to `path`: noise-prediction loss over images seen, one colour per stage.

    stages: [(name, records of its metrics.jsonl)], in training order. Thin lines: as logged; thick lines: smoothed;
    dots: validation loss of the EMA weights.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    with picture(path, (8, 4.2)) as figure:
        axes, start = figure.add_subplot(), 0
        for colour, (name, records) in zip(itertools.cycle(COLOURS), stages):
            records = [r for r in records if "noise_loss" in r]
            seen = [start + r["step"] * batch_size for r in records]
            losses = [r["noise_loss"] for r in records]
            axes.plot(seen, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(seen, _smooth(losses), color=colour, label=name)
            validated = [(x, r["validation_loss"]) for x, r in zip(seen, records) if "validation_loss" in r]
            if validated:
                axes.plot(*zip(*validated), "o", color=colour, markeredgecolor="white")
            start = seen[-1] if seen else start
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="images seen", ylabel="noise-prediction loss", title=title)
        axes.grid(which="both")
        axes.legend(title="dots: validation, averaged weights", alignment="left")


def _smooth(values):
    """Exponential moving average, corrected for its start."""
    values = np.asarray(values, dtype=float)
    smooth, mass, out, weight = 0.0, 0.0, [], 0.7
    for value in values:
        smooth, mass = weight * smooth + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(smooth / mass)
    return out
