import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.plots import check_grid, plot_losses, save_grid


def test_grid_shows_every_pixel_enlarged(tmp_path):
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(1, 3, 16, 16)
    save_grid(tmp_path / "grid.png", [("", image)])
    shown = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(shown[2:64:4, 2:64:4], image[0].permute(1, 2, 0).numpy())


def test_rows_stand_below_each_other_with_room_for_their_labels(tmp_path):
    black, white = torch.zeros(3, 1, 64, 64, dtype=torch.uint8), torch.full((2, 1, 64, 64), 255, dtype=torch.uint8)
    save_grid(tmp_path / "grid.png", [("black", black), ("white", white)])
    shown = np.asarray(Image.open(tmp_path / "grid.png"))
    tiles = shown[:, -3 * 66 :]
    assert shown.shape[0] == 2 * 66
    assert tiles[:64, :64].max() == 0
    assert tiles[:64, 2 * 66 : 2 * 66 + 64].max() == 0
    assert tiles[66:130].min() == 255, "the third place of the shorter row stays white"
    assert shown[:, : -3 * 66].min() < 128, "the labels are written in ink"


@pytest.mark.parametrize(("name", "most"), [("a.webp", 16_383), ("a.jpg", 65_500), ("a.png", None)])
def test_a_picture_that_its_format_cannot_hold_is_refused_before(name, most):
    """A tile of 8 x 8 is 66 pixels wide with its edge."""
    rows = (most or 10**6) // 66
    check_grid(name, rows, 16, (8, 8))
    if most:
        with pytest.raises(
            InputError, match=f"{name}: {66 * (rows + 1)} pixels on a side, .* holds {most}: write .png"
        ):
            check_grid(name, rows + 1, 16, (8, 8))
        with pytest.raises(InputError, match="pixels on a side"):
            check_grid(name, 1, rows + 1, (8, 8))


def test_an_empty_row_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is none in: none"):
        save_grid(tmp_path / "x.png", [("real", torch.zeros(1, 3, 8, 8)), ("none", torch.zeros(0, 3, 8, 8))])


def test_losses_are_drawn_one_stage_after_the_other(tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *a, **k: (drawn.append(list(x)), plot(self, x, y, *a, **k))[1])
    dense = [{"step": 1, "noise_loss": 1.0}, {"step": 2, "noise_loss": 0.5, "validation_loss": 0.6}]
    sparse = [{"step": 3, "noise_loss": 0.7}, {"step": 4, "diverged": True}]
    plot_losses(tmp_path / "loss.png", [("dense", dense), ("2:4", sparse)], batch_size=10)
    assert drawn == [[10, 20], [10, 20], [20], [50], [50]]
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_name_is_no_formula_and_may_hold_any_byte(tmp_path):
    records = [{"step": 1, "noise_loss": 0.3}, {"step": 2, "noise_loss": 0.02}]
    plot_losses(tmp_path / "$.png", [("$x_{$", records)], 10, "runs/$\\frac{$ caf\udce9")
    save_grid(tmp_path / "grid.png", [("caf\udce9 $x_{$", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))])
    inspect(torch.nn.Linear(4, 4), (torch.zeros(1, 4),)).plot(tmp_path / "layers.png", "$x_{$ caf\udce9")
    assert len(list(tmp_path.iterdir())) == 3


def test_losses_are_read_in_plain_numbers(tmp_path, monkeypatch):
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    plot_losses(
        tmp_path / "loss.png", [("dense", [{"step": 1, "noise_loss": 0.3}, {"step": 2, "noise_loss": 0.02}])], 9000
    )
    axes = saved[0].axes[0]
    assert {"0.02", "0.05", "0.1", "0.2"} <= {label.get_text() for label in axes.get_yticklabels()}
    assert "10,000" in {label.get_text() for label in axes.get_xticklabels()}
