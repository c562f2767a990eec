"""Charts from made-up rows (no measurement), and from the committed results files alone."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bench import charts, plot
from bench.baselines import PROVIDERS
from bench.results import COLUMNS, ONEDNN, read, speedups, write
from sparsedm.errors import InputError

pytestmark = pytest.mark.usefixtures("_small_pictures")
COMMITTED = sorted((Path(__file__).parents[2] / "bench/results").glob("*/results.csv"))


@pytest.fixture
def _small_pictures(monkeypatch):
    monkeypatch.setattr(plot, "DPI", 20)  # a fifth of the pixels in each direction, and of the time


def row(provider, p50, **changes):
    base = {"suite": "gemm", "kernel": "linear", "model": "square", "shape": "square 256", "mode": "plain"}
    base |= {"metric": "time", "dtype": "bfloat16", "M": 256, "N": 256, "K": 256, "layers": 1, "status": "ok"}
    base |= {
        "p20_us": 0.9 * p50,
        "p50_us": p50,
        "p80_us": 1.2 * p50,
        "device": "Some GPU",
        "date": "2030-01-02T03:04:05",
    }
    base |= {"dense_equivalent_tflops": 100 / p50, "gbps": 50 / p50, "value": None, "torch": "9.9", "commit": "abc"}
    return dict.fromkeys(COLUMNS, "") | base | {"provider": provider} | changes


def made_up():
    """Rows for every chart."""
    rows = []
    for size in (256, 512, 1024):
        sizes = {"shape": f"square {size}", "M": size, "N": size, "K": size}
        rows += [row("dense", 10, **sizes), row(charts.OURS, 8, **sizes), row("cuSPARSELt", 12, **sizes)]
    for m in (128, 256):
        sizes = {"model": "grid", "shape": f"grid {m}", "M": m}
        rows += [row("dense", 10, **sizes), row(charts.OURS, 5, **sizes)]
    rows += [r | {"model": "m-sweep", "shape": f"m-sweep {r['M']}"} for r in rows[:9]]
    rows += [r | {"model": "net@4", "shape": "net@4 fc", "mode": "epilogue"} for r in rows[:3]]
    network = {"model": "net", "shape": "net@4", "mode": "step", "M": 4, "N": None, "K": None}
    for suite in ("end-to-end", "train"):
        rows += [row(p, t, suite=suite, **network) for p, t in (("dense", 9), (charts.OURS, 7))]
    cell = {"suite": "table3", "model": "one block, width 8, patch 2, mlp 4", "shape": "t"}
    rows += [row("dense", 9, **cell), row(charts.OURS, 7, **cell)]
    rows += [row("sparsedm choose", 9, suite="mask", shape="square 256", mode="choose")]
    for provider, rate in (("dense", 700.0), ("wgmma 0", 1100.0), ("cuSPARSELt", 900.0)):
        first = {"suite": "first", "shape": "square 8192", "dense_equivalent_tflops": rate, "detail": "so big"}
        rows.append(row(provider, 9, **first))
        rows.append(row(provider, 9, metric="held", power_w="699.5", sm_mhz="1500", **first))
    for kernel, value in (("copy", 4000.0), ("dense", 700.0), ("mma.sp", 900.0)):
        ceiling = {"suite": "ceiling", "shape": kernel, "kernel": kernel, "metric": "rate"}
        rows.append(row("torch", 1, **ceiling, gbps=value, value=value))
    return rows


def test_speed_up_is_against_the_fastest_dense_and_nothing_else():
    rows = [row("dense", 10), row("dense compiled", 8), row("ours", 4), row("sparsedm 2:4 dense", 9)]
    rows += [row("ours", 1, metric="packing"), row("ours", 1, status="wrong"), row("ours", 4, shape="no dense here")]
    found = {s.row["provider"]: s for s in speedups(rows)}
    assert set(found) == {"ours", "sparsedm 2:4 dense"}
    assert found["ours"].p50 == 2
    assert found["ours"].low == pytest.approx(0.9 * 8 / (1.2 * 4))
    assert found["ours"].high == pytest.approx(1.2 * 8 / (0.9 * 4))


@pytest.mark.parametrize("other", [{"dtype": "float16"}, {"mode": "epilogue"}, {"device": "Another GPU"}])
def test_denominators_are_not_borrowed(other):
    assert not speedups([row("dense", 10, **other), row("ours", 5)])


def test_every_chart_is_drawn_for_light_and_dark_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "DPI", 20)
    write(tmp_path / "r.csv", made_up())
    names = {path.name for path in plot.draw_all([tmp_path / "r.csv"], tmp_path / "plots")}
    wanted = {"speedup-square", "speedup-m-sweep", "roofline", "heat", "layers-net-batch4", "end-to-end", "train"}
    wanted |= {"table3", "masks", "first-contact"}
    assert names == {f"{name}{suffix}.png" for name in wanted for suffix in ("", "-dark")} | {"targets.md"}
    light, dark = (np.array(Image.open(tmp_path / f"plots/heat{s}.png").convert("L")) for s in ("", "-dark"))
    assert light[0, 0] > 240
    assert dark[0, 0] < 30


def test_a_cpu_is_named_in_large_letters_and_a_gpu_is_not(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: saved.append(figure))
    for device, on_cpu in (("CPU: abacus", True), ("Some GPU", False)):
        rows = [r | {"device": device} for r in made_up()]
        assert plot.save(tmp_path / "x.png", "Title", charts.heat, (6, 4), rows, plot.THEMES[""])
        figure = saved[-1]
        large = [t for t in figure.texts if t.get_text() == "CPU"]
        assert [t.get_fontsize() >= 100 for t in large] == [True] * on_cpu
        assert ("no GPU was measured" in figure.get_suptitle()) is on_cpu
        assert device in figure.get_supxlabel()


def test_the_caption_says_what_was_measured_when_and_with_what():
    rows = [row("dense", 1, driver="600.1"), row("dense", 1, date="2030-02-01T00:00:00", commit="def")]
    text = plot.caption(rows)
    assert text.startswith("Some GPU, bfloat16, 2030-01-02 to 2030-02-01, sparsedm abc, def\ndriver 600.1, torch 9.9\n")
    assert "TFLOP/s are dense-equivalent" in text


def test_no_two_providers_look_alike():
    names = [p.name for p in PROVIDERS["linear"]]
    assert len(names) > len(charts.COLOURS)
    for i in (1, 2, 3):  # colour and marker, colour and dash, colour and hatching
        assert len({(look[0], look[i]) for look in charts.looks(names).values()}) == len(names)


def test_ceilings_that_lie_close_together_are_labelled_apart():
    rows = [*made_up(), row("torch", 1, suite="ceiling", kernel="mma", metric="rate", value=710.0)]
    figure = Figure()
    assert charts.roofline(figure, rows)
    labels = {t.get_text(): t.xy[1] for t in figure.axes[0].texts}
    assert labels[" dense product 700"] == 700
    assert labels[" mma 710"] > 1.05 * 700


def test_a_cpu_s_two_measurements_of_one_square_are_two_charts():
    """Suite `cpu` measures squares of the same size as suite `gemm`, by another clock and other threads."""
    squares = [row(p, t, shape="square 128x128->128", M=128, N=128, K=128) for p, t in (("dense", 4), (charts.OURS, 1))]
    figure, alone = Figure(), Figure()
    charts.sweep(figure, [*made_up(), *squares], "square")
    charts.sweep(alone, made_up(), "square")
    lines, before = ([line.get_xydata().tolist() for line in f.axes[0].lines] for f in (figure, alone))
    assert lines == before


def test_the_losing_region_is_shaded_up_to_one():
    figure = Figure()
    axes = figure.subplots()
    charts.losing_region(axes)
    (patch,) = axes.patches
    edges = patch.get_patch_transform().transform_path(patch.get_path()).vertices[:, 1]  # a polygon in matplotlib 3.8
    assert (min(edges), max(edges)) == (0, 1)
    assert sorted(line.get_ydata()[0] for line in axes.lines) == [1, 2]


@pytest.mark.parametrize("device", ["Some GPU", "CPU: abacus"])
def test_what_others_published_is_grey_named_and_beside_ours(device):
    figure = Figure()
    assert charts.sweep(figure, [r | {"device": device} for r in made_up()], "square")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    published = {label: line for label, line in lines.items() if label.endswith("(published)")}
    assert {label.split(", ")[1] for label in published} == {
        "A100 (published)", "RTX 4090 (published)", "H100 PCIe (published)", "B200 (published)", "RTX 5080 (published)",
    }  # fmt: skip
    assert {line.get_color() for line in published.values()} == {charts.GREY}
    h100 = published["cuSPARSELt, H100 PCIe (published)"]
    assert dict(zip(h100.get_xdata(), h100.get_ydata()))[8192] == 1.59
    assert "arXiv 2603.05232" in figure.legends[0].get_title().get_text()
    assert lines[charts.OURS].get_color() in charts.COLOURS


def test_published_curves_are_of_the_dtype_that_was_measured_and_of_real_sizes():
    for name in ("square", "m-sweep"):
        for dtype in ("bfloat16", "float16"):
            curves = charts.published(name, dtype)
            missing = {"H100 PCIe"} if dtype == "float16" else set()  # they published none in fp16
            assert set(curves) == set(charts.CARDS.values()) - missing
            assert {m for m, _ in curves["A100"]} == {64 << i for i in range(9)}
        assert charts.published(name, "bfloat16") != charts.published(name, "float16")


def test_first_contact_says_rate_ratio_and_power():
    figure = Figure()
    assert charts.first(figure, made_up())
    said = [t.get_text().strip() for t in figure.axes[0].texts]
    assert "1100 (1.57x)" in said
    assert "1100 (1.57x, 700 W, 1500 MHz)" in said


def test_first_contact_is_drawn_as_far_as_it_was_measured():
    """A CPU holds no second; a process may have ended before; dense may have failed; a driver may know no power."""
    for gone, said in (
        (lambda r: r["metric"] == "held", "1100 (1.57x)"),
        (lambda r: r["metric"] == "time", "1100 (1.57x, 700 W, 1500 MHz)"),
        (lambda r: r["provider"] == "dense", "1100 (700 W, 1500 MHz)"),
    ):
        figure = Figure()
        assert charts.first(figure, [r for r in made_up() if not (r["suite"] == "first" and gone(r))])
        assert said in [t.get_text().strip() for t in figure.axes[0].texts]
    figure = Figure()
    assert charts.first(figure, [r | {"power_w": "", "sm_mhz": ""} for r in made_up()])
    assert [t.get_text().strip() for t in figure.axes[0].texts].count("1100 (1.57x)") == 2


def test_heat_shows_each_ratio_in_its_cell():
    figure = Figure()
    assert charts.heat(figure, made_up())
    assert [t.get_text() for t in figure.axes[0].texts] == ["2.00", "2.00"]


def test_heat_leaves_cells_empty_that_were_not_measured():
    corner = {"model": "grid", "shape": "grid corner", "M": 128, "N": 512}
    figure = Figure()
    assert charts.heat(figure, [*made_up(), row("dense", 10, **corner), row(charts.OURS, 40, **corner)])
    assert [t.get_text() for t in figure.axes[0].texts] == ["2.00", "0.25", "2.00"], "three of four cells"


@pytest.mark.parametrize(
    ("draw", "suite", "shape", "mode"),
    [
        (lambda *a: charts.layers(*a, "net@4", "epilogue"), "gemm", "net@4 fc", "epilogue"),
        (lambda *a: charts.networks(*a, "end-to-end"), "end-to-end", "net@4", "step"),
        (lambda *a: charts.sweep(*a, "square"), "gemm", "square 256", "plain"),
    ],
    ids=["layers", "networks", "sweep"],
)
def test_a_chart_says_where_the_compiled_dense_form_was_not_measured(draw, suite, shape, mode):
    compiled = row("dense compiled", 20, suite=suite, shape=shape, mode=mode)
    for rows, said in ((made_up(), True), ([*made_up(), compiled], suite == "gemm" and shape == "square 256")):
        figure = Figure()
        assert draw(figure, rows)
        (label,) = {text for a in figure.axes for text in (a.get_xlabel(), a.get_ylabel()) if "times as fast" in text}
        assert ("dense compiled not measured in" in label) == said
        assert "the fastest dense" in label


def test_the_roofline_draws_the_measured_ceilings():
    figure = Figure()
    assert charts.roofline(figure, made_up())
    said = " ".join(t.get_text() for t in figure.axes[0].texts)
    assert "copy 4000 GB/s" in said
    assert "dense product 700" in said
    assert "mma.sp 900" in said


def test_calls_are_compared_where_eager_torch_was_timed():
    network = {"suite": "end-to-end", "shape": "net@4", "mode": "step", "device": "CPU: X", "dtype": "float32"}
    rows = [row(p, t, **network) for p, t in ((ONEDNN, 8), (charts.OURS, 5))]
    assert not charts.calls(Figure(), rows)
    rows += [row(p, t, **network | {"shape": "net@8"}) for p, t in (("dense", 10), (ONEDNN, 8), (charts.OURS, 5))]
    figure = Figure()
    assert charts.calls(figure, rows)
    assert {t.get_text() for t in figure.axes[0].texts} == {" 1.25", " 2.00 (1.60)"}


def test_training_steps_are_compared_where_onednn_cannot_train():
    step = {"suite": "train", "shape": "net@4", "mode": "training step", "device": "CPU: X", "dtype": "float32"}
    figure = Figure()
    assert charts.calls(figure, [row("dense", 10, **step), row(charts.OURS, 8, **step)])
    assert {t.get_text() for t in figure.axes[0].texts} == {" 1.25 (1.25)"}
    for other in ({"device": "NVIDIA H200"}, {"dtype": "bfloat16"}):
        rows = [row("dense", 10, **step | other), row(charts.OURS, 8, **step | other)]
        assert not charts.calls(Figure(), rows), "the chart is titled: on a CPU, fp32"


def test_a_time_is_divided_by_one_of_as_many_threads():
    cpu = {"device": "CPU: X", "dtype": "float32"}
    rows = [row("dense", 10, threads="1", **cpu), row("dense", 4, threads="2", **cpu)]
    rows += [row(charts.OURS, 5, threads="1", **cpu), row("sparsedm masked", 2, threads=2, **cpu)]
    assert [(s.row["provider"], s.p50) for s in speedups(rows)] == [(charts.OURS, 2.0), ("sparsedm masked", 2.0)]
    gpu = [row("dense", 10, threads="1", capability="9.0"), row(charts.OURS, 5, threads="2", capability="9.0")]
    assert [s.p50 for s in speedups(gpu)] == [2.0], "a GPU's times do not depend on them"


def test_a_square_without_a_dense_time_is_left_out_of_the_patterns():
    cpu = {"device": "CPU: X", "dtype": "float32"}
    rows = [row(p, t, shape="square 256->256", **cpu) for p, t in (("dense", 10), (ONEDNN, 8), ("sparsedm 2:4", 5))]
    rows.append(row("sparsedm 2:4", 5, shape="square 128->128", M=128, **cpu))
    figure = Figure()
    assert charts.patterns(figure, rows)
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines["2:4"] == [256]


def test_nothing_to_draw_writes_nothing(tmp_path):
    write(tmp_path / "r.csv", [row("dense", 1)])
    drawn = [path.stem for path in plot.draw_all([tmp_path / "r.csv"], tmp_path)]
    assert drawn == ["targets"], "a roofline needs its ceilings"


def test_devices_are_not_mixed(tmp_path):
    write(tmp_path / "r.csv", [row("dense", 1), row("dense", 1, device="Another GPU")])
    with pytest.raises(InputError, match="a plot shows one device, these files hold Another GPU and Some GPU"):
        plot.draw_all([tmp_path / "r.csv"], tmp_path)


def test_each_dtype_has_its_own_charts(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "THEMES", {"": plot.THEMES[""]})
    monkeypatch.setattr(plot, "save", lambda path, title, draw, size, rows, theme: drawn.update({path.stem: rows}))
    rows = [*made_up(), *(r | {"dtype": "float16"} for r in made_up() if r["suite"] != "ceiling")]
    write(tmp_path / "r.csv", rows)
    plot.draw_all([tmp_path / "r.csv"], tmp_path)
    assert {r["dtype"] for r in drawn["heat-float16"]} == {"float16"}
    assert {r["dtype"] for r in drawn["heat-bfloat16"]} == {"bfloat16"}
    assert "heat" not in drawn


def test_files_without_a_measurement_are_refused(tmp_path, capsys):
    write(tmp_path / "r.csv", [row("dense", 1, status="wrong")])
    assert plot.main([str(tmp_path / "r.csv"), "--out", str(tmp_path)]) == 2
    assert "these files hold no measurement" in capsys.readouterr().err


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.parent.name)
def test_committed_results_are_enough_for_the_charts(path, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "THEMES", {"": plot.THEMES[""]})  # half the time
    monkeypatch.setattr(plot, "DPI", 20)
    written, rows = {p.stem for p in plot.draw_all([path], tmp_path)}, read(path)
    of_suite_cpu = any(row["provider"] == ONEDNN for row in rows)
    wanted = {"speedup-square", "roofline", "heat", "end-to-end", "masks"}
    assert written >= ({"cpu-patterns", "cpu-networks"} if of_suite_cpu else wanted)
    assert ("targets" in written) is not rows[0]["device"].startswith("CPU"), "the targets are for a GPU"


def test_there_are_committed_results():
    assert COMMITTED


def test_points_and_the_roof_lie_where_the_rows_say():
    figure, ceiling = Figure(), [r for r in made_up() if r["suite"] == "ceiling"]
    assert charts.roofline(figure, [*ceiling, row("dense", 1, dense_equivalent_tflops=600.0, gbps=3000.0)])
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    assert lines[0].tolist() == [[200.0, 600.0]], "operations per byte"
    (roof,) = (line for line in lines[1:] if line[0, 1] != line[1, 1])
    assert roof[:, 1] == pytest.approx(4000.0 * roof[:, 0] / 1e3)
    figure = Figure()
    charts.masks(figure, [row("sparsedm choose", 9, suite="mask", N=256, K=1024, gbps=70.0)])
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[256 * 1024, 70.0]]


def test_table3_has_patches_beside_and_ratios_above_each_other():
    rows, figure = [], Figure()
    for (patch, ratio), took in {(2, 4): 5, (2, 8): 4, (1, 4): 2}.items():
        cell = {"suite": "table3", "model": f"g, width 8, patch {patch}, mlp {ratio}", "shape": f"{patch} {ratio}"}
        rows += [row("dense", 20, **cell), row(charts.OURS, took, **cell)]
    charts.table3(figure, rows)
    axes = figure.axes[0]
    ticks = [[t.get_text() for t in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)]
    assert ticks == [["1", "2"], ["4", "8"]]
    assert {t.get_position(): t.get_text() for t in axes.texts} == {(0, 0): "10.00", (1, 0): "4.00", (1, 1): "5.00"}


def test_whiskers_are_the_band_and_the_ratio_is_to_the_best_dense():
    figure = Figure()
    network = {"suite": "train", "shape": "n", "model": "n"}
    charts.networks(figure, [row("dense", 9, **network), row(charts.OURS, 6, **network)], "train")
    (bars,) = figure.axes[0].collections
    assert bars.get_segments()[0][:, 0] == pytest.approx([1.5 * 0.9 / 1.2, 1.5 * 1.2 / 0.9])
    first, figure = {"suite": "first", "shape": "square 8192", "detail": ""}, Figure()
    rates = {"dense": 700.0, "dense compiled": 600.0, "wgmma 0": 1050.0}
    charts.first(figure, [row(p, 9, **first, dense_equivalent_tflops=rate) for p, rate in rates.items()])
    assert "1050 (1.50x)" in [t.get_text().strip() for t in figure.axes[0].texts]
