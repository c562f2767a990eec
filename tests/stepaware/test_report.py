import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from sparsedm.stepaware import report
from sparsedm.stepaware.report import plot_front, plot_proxy, plot_strategies, shades


@pytest.fixture
def drawn(monkeypatch):
    """What `Axes.plot` was asked to draw: (x, y) of every line."""
    lines, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *a, **k: (lines.append((list(x), list(y))), plot(self, x, y, *a, **k))[1]
    )
    return lines


def test_the_front_is_drawn_over_shares_of_the_dearest(tmp_path, drawn):
    groups = {"uniform": [("dense", 4.0, 1.0), ("2:4", 2.0, 3.0)], "found": [("found 1", 3.0, 1.5)]}
    plot_front(tmp_path / "front.png", groups, [(1.0, 9.0)], 4.0, "distance", "title")
    assert drawn == [([0.25], [9.0]), ([0.5, 1.0], [3.0, 1.0]), ([0.75], [1.5])]
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_bands_have_the_colours_of_their_networks_in_their_order(tmp_path):
    """Read back from the picture: the first band goes from dark to light, the second is light."""
    plot_strategies(tmp_path / "s.png", [("a", (0, 0, 1)), ("b", (1, 1, 1))], ("dense", "2:4"), [1.0, 0.5, 0.0])
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    dark, light = ((np.array(colour[:3]) * 255).astype(int) for colour in shades(2))

    def where(colour):
        return np.argwhere((np.abs(pixels.astype(int) - colour) <= 1).all(-1))

    legend = 0.75 * len(pixels)  # its patches lie below
    dark, light = (found[found[:, 0] < legend] for found in (where(dark), where(light)))
    rows, columns = (dark.min(0) + dark.max(0)) / 2
    assert dark[:, 0].max() < light[light[:, 1] < columns][:, 0].min(), "the dark cells are in the upper band"
    upper = light[np.abs(light[:, 0] - rows) < 5]
    assert columns < upper[:, 1].min(), "and left of the light one"
    assert light[:, 1].min() < columns, "the lower band is light all along"
    assert 1.9 < len(light) / len(dark) < 2.1, "four light cells and two dark ones"


def test_the_legend_of_many_networks_fits_into_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    figures, names = [], [f"{pattern} {k}/8" for k in (8, 6, 4, 2) for pattern in ("dense", "2:4")]
    plot_strategies(tmp_path / "s.png", [("found 1: cost 31%, distance 1.23", (0, 7))], names, [1.0, 1e-18])
    (figure,) = figures
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1", "0"]


def test_the_proxy_is_drawn_relative_to_the_first_network(tmp_path, drawn):
    plot_proxy(
        tmp_path / "p.png", [[1.0, 2.0], [2.0, 3.0]], ("dense", "2:4"), [1.0, 0.0], [(1, 2), (3, 4)], 1.0, "quality"
    )
    assert drawn == [([0, 1], [1.0, 1.0]), ([0, 1], [2.0, 1.5]), ([1, 3], [2, 4])]


def test_the_costliest_network_is_the_darkest():
    colours = shades(4)
    assert colours[0] == colormaps["YlGnBu"](0.95)
    brightness = [sum(colour[:3]) for colour in colours]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize(("unit", "cost", "said"), [("MACs", 2.5e9, "2,500.0 M"), ("seconds", 0.0125, "12.500 ms")])
def test_the_report_is_in_its_units_and_its_cloud_of_the_same_count(unit, cost, said, tmp_path, monkeypatch):
    clouds = []
    for name in ("plot_front", "plot_strategies", "plot_proxy"):
        monkeypatch.setattr(report, name, lambda path, groups, cloud, *rest: clouds.append(cloud))
    entry = {"group": "uniform", "strategy": "dense", "cost": cost, "quality": 1.0, "indices": (0, 0)}
    given = {"family": "f", "steps": 2, "sampler": "ddim", "quality": "frechet", "features": "x", "unit": unit}
    given |= {"rows": [entry], "tried": [entry | {"proxy": 0.0}], "names": ["dense"], "times": [1, 0], "losses": []}
    given |= {"dearest": cost, "dearest_clock": None, "seconds": {}, "device": "CPU", "torch": "2"}
    given |= {"rank_correlation": {"logarithms": None, "losses": None}}
    for count in (10, 20):
        report.write_report(tmp_path, given | {"count": count, "final_count": 20})
    assert clouds[::3] == [[], [(cost, 1.0)]]
    assert said in (tmp_path / "report.md").read_text()
