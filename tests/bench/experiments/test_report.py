"""Tables and pictures come from the results file alone."""

import itertools
import shutil

import pytest
from matplotlib.figure import Figure

from bench import results
from bench.experiments import claims, report
from bench.experiments.plans import EXPERIMENTS
from tests.bench.experiments.tiny_plan import RUNS, command, numbers, planned


def test_the_report_needs_the_results_file_alone(done, tiny, tmp_path, capsys):
    shutil.copy(done / "results.csv", tmp_path)
    assert command(tmp_path, "--report-only") == 0
    assert (tmp_path / "report.md").read_text() == (done / "report.md").read_text()
    assert (tmp_path / "compare.png").read_bytes() == (done / "compare.png").read_bytes()
    assert "| chain |" in capsys.readouterr().out


def test_the_table_is_the_mean_and_half_the_range():
    assert report._cell([0.02, 0.04], "validation loss") == "0.0300 ± 0.0100"
    assert report._cell([3.0], "Fréchet distance") == "3.00"
    assert report._cell([float("nan")], "distance to dense weights") == "-"


def test_the_report_says_whether_a_run_is_as_good_as_dense(done, text_alone, tmp_path):
    """Within 5% of the control of the same seed; and that the measure sees nothing, where it does not."""
    distances = {"dense": (10, 20), "chain": (10.4, 20.9), "small-dense": (10.4, 21.1), "oneshot": (11, 40)}

    def rows(distances):
        found = results.read_experiment(done / "results.csv")
        planted = [row for row in found if row["measure"] == "Fréchet distance"]
        others = [row for row in found if row["measure"] != "Fréchet distance"]
        return [*(row | {"value": distances[row["run"]][row["seed"]]} for row in planted), *others]

    text = report.write(tmp_path, rows(distances), EXPERIMENTS["arms"])
    assert "| against dense | Fréchet distance | validation loss | within 5% |" in text
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if line.count("|") == 5}
    assert lines["chain"][0] == "1.042 ± 0.002"
    assert {run: line[-1] for run, line in lines.items() if run in RUNS} == {
        "chain": "yes |",
        "small-dense": "in some seeds |",
        "oneshot": "no |",
    }
    losses = [numbers(done, run, "validation loss", s)[0][1] for s in (0, 1) for run in ("chain", "dense")]
    first, second = losses[0] / losses[1], losses[2] / losses[3]
    assert lines["chain"][1] == f"{(first + second) / 2:.3f} ± {abs(first - second) / 2:.3f}"
    assert "Even pruning without training" not in text
    text = report.write(tmp_path, rows(distances | {"oneshot": (10, 20)}), EXPERIMENTS["arms"])
    assert "Even pruning without training is within it" in text
    as_in_claims = [row | {"run": row["run"].replace("oneshot", "2:4 one-shot")} for row in rows(distances)]
    assert "Even pruning" not in report.write(tmp_path, as_in_claims, EXPERIMENTS["claims"])
    close = [
        row | {"run": row["run"].replace("oneshot", "2:4 one-shot")} for row in rows(distances | {"oneshot": (10, 20)})
    ]
    assert "Even pruning without training is within it" in report.write(tmp_path, close, EXPERIMENTS["claims"])
    alone = [row for row in rows(distances) if row["run"] != "dense"]
    assert "against dense" not in report.write(tmp_path, alone, EXPERIMENTS["arms"])


def test_a_noise_level_without_a_loss_of_the_control_is_left_out():
    measure = "loss at noise level"
    values = {("dense", measure): {0: [(0.5, 2.0), (1.0, 0.0)]}}
    values |= {("chain", measure): {0: [(0.25, 1.0), (0.5, 3.0), (1.0, 1.0)]}}
    figure, plan = Figure(), EXPERIMENTS["arms"]
    assert report._levels(figure, values, report._styles(["dense", "chain"], plan.control), plan)
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "chain")
    assert line.get_xydata().tolist() == [[0.5, 1.5]]


def test_noise_levels_are_compared_within_a_seed():
    """Dense networks of two seeds may differ more than a run and its own dense network."""
    measure = "loss at noise level"
    values = {
        ("dense", measure): {0: [(0.5, 1.0)], 1: [(0.5, 4.0)]},
        ("chain", measure): {0: [(0.5, 2.0)], 1: [(0.5, 8.0)]},
    }
    figure, plan = Figure(), EXPERIMENTS["arms"]
    report._levels(figure, values, report._styles(["dense", "chain"], plan.control), plan)
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "chain")
    assert line.get_xydata().tolist() == [[0.5, 2.0]]
    assert len({y for path in figure.axes[0].collections[0].get_paths() for _, y in path.vertices}) == 1


def test_a_plan_with_an_axis_is_drawn_over_it(done, tmp_path):
    rows = results.read_experiment(done / "results.csv")
    for run, x in (("dense", 1.0), ("chain", 0.5)):
        rows += [{**rows[0], "run": run, "seed": seed, "measure": "axis", "x": None, "value": x} for seed in (0, 1)]
    rows = [row for row in rows if row["run"] in ("dense", "chain")]
    text = report.write(tmp_path, rows[::-1], EXPERIMENTS["ratio"])
    assert (tmp_path / "ratio.png").stat().st_size > 5000
    assert text.index("| dense |") < text.index("| chain |"), "from the densest, in whatever order they were made"


def test_every_run_of_a_plan_has_a_line_of_its_own(done, tmp_path, monkeypatch):
    save = report._save
    monkeypatch.setattr(report, "_save", lambda path, *rest: path.name == "training.png" and save(path, *rest))
    names = {name: [run.name for run in planned(name, "full")[2]] for name in EXPERIMENTS}
    for name, runs in names.items():
        assert len({*report._styles(runs, EXPERIMENTS[name].control).values()}) == len(runs)
    longest = max(names, key=lambda name: len(names[name]))
    rows = [row for row in results.read_experiment(done / "results.csv") if row["run"] == "chain"]
    report.write(tmp_path, [row | {"run": run} for run in names[longest] for row in rows], EXPERIMENTS[longest])
    assert (tmp_path / "training.png").stat().st_size > 5000


@pytest.mark.parametrize("drawn", [(0.98, 1.1), (0.08, 0.17), (1, 90)])
def test_every_range_has_several_numbers_on_its_axis(drawn):
    axes = Figure().subplots()
    axes.plot(drawn)
    report._logarithmic(axes)
    axes.figure.draw_without_rendering()
    shown = [label for label in axes.get_yticklabels() if drawn[0] <= label.get_position()[1] <= drawn[1]]
    assert 3 <= len({label.get_text() for label in shown}) == len(shown) <= 7


def test_the_table_says_which_runs_have_fewer_seeds_and_what_they_ran_on(done, text_alone, tmp_path):
    rows = [row for row in results.read_experiment(done / "results.csv") if (row["run"], row["seed"]) != ("chain", 1)]
    rows[-1]["device"] = "another"
    text = report.write(tmp_path, rows, EXPERIMENTS["arms"])
    assert "Mean of 2 seeds ± half their range (chain has 1)." in text
    assert f"{rows[0]['device']}, {rows[0]['threads']} threads" in text
    assert " and another, " in text


def test_the_report_says_how_its_runs_were_made_and_not_how_they_were_timed(done, text_alone, tmp_path):
    rows = [row | {"command": f"made {row['run']}"} for row in results.read_experiment(done / "results.csv")]
    rows = [row for row in rows if row["run"] in ("chain", "dense")]
    timed = report.SPEED, report.SAMPLING, report.SAMPLING + report.FP32
    rows += [row | {"command": "--time", "measure": measure} for row in rows[:1] for measure in timed]
    text = report.write(tmp_path, rows, EXPERIMENTS["arms"])
    assert text.split("\n\n")[1].endswith("`made dense`, `made chain`")


def test_outside_of_a_repository_the_version_stands_for_the_commit(done, text_alone, tmp_path):
    rows = [row | {"commit": ""} for row in results.read_experiment(done / "results.csv")]
    assert f"commit {rows[0]['sparsedm']}" in report.write(tmp_path, rows, EXPERIMENTS["arms"])


def test_the_picture_of_speed_says_so_and_names_each_run_beside_its_uppermost_dot(tmp_path, monkeypatch):
    runs = {"dense": (1.0, (2.0, 4.0)), "2:4": (0.5, (3.0, 7.0))}
    values = {(run, report.SPEED): {0: [(None, faster)]} for run, (faster, _) in runs.items()}
    for measure in (report.DISTANCE, "validation loss"):
        values |= {(run, measure): {s: [(None, y)] for s, y in enumerate(ys)} for run, (_, ys) in runs.items()}
    figure, plan = Figure(), EXPERIMENTS["ratio"]
    assert report._speed(figure, values, report._styles(list(runs), plan.control), plan)
    for axes in figure.axes:
        assert {text.get_text(): text.xy for text in axes.texts} == {"dense": (1.0, 4.0), "2:4": (0.5, 7.0)}
    titles, save = {}, lambda path, draw, values, styles, plan, title: titles.update({path.name: title})
    monkeypatch.setattr(report, "_save", save)
    monkeypatch.setattr(report, "markdown", lambda *arguments: "")
    row = {"experiment": "ratio", "scale": "smoke", "run": "dense", "seed": 0, "measure": "loss", "x": None, "value": 1}
    report.write(tmp_path, [row], plan)
    assert titles["speed.png"] == "ratio (smoke): quality against the speed of sampling"
    assert titles["ratio.png"] == "ratio (smoke): quality against density"


def test_speeds_of_two_machines_decide_no_claim(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report.claims, "table", lambda values, scale: seen.append((set(values), scale)) or "")
    monkeypatch.setattr(report, "markdown", lambda *arguments: "")
    monkeypatch.setattr(report, "_save", lambda *arguments: False)
    row = {"experiment": "claims", "scale": "smoke", "run": "dense", "x": None, "value": 1.0, "threads": "1"}
    measures = ("loss", claims.SPEED)
    rows = [row | {"seed": s, "device": "A", "measure": measure} for s in (0, 1) for measure in measures]
    report.write(tmp_path, rows, EXPERIMENTS["claims"])
    report.write(tmp_path, [*rows[:-1], rows[-1] | {"device": "B"}], EXPERIMENTS["claims"])
    assert [(len(names), scale) for names, scale in seen] == [(2, "smoke"), (1, "smoke")]


def test_a_run_of_fewer_seeds_says_so_in_every_picture(done, text_alone, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "_save", lambda path, draw, values, styles, *rest: seen.append((values, styles)))
    rows = [row for row in results.read_experiment(done / "results.csv") if (row["run"], row["seed"]) != ("chain", 1)]
    text = report.write(tmp_path, rows, EXPERIMENTS["arms"])
    for values, styles in seen:
        assert {run for run, _ in values} == set(styles)
        assert {"dense", "chain (1 of 2 seeds)"} <= set(styles)
    (line,) = (
        line for line in text.splitlines() if line.startswith("| chain |") and " ± " not in line and "seeds" in line
    )
    assert line.endswith(" (1 of 2 seeds) |")


def test_names_of_runs_of_fewer_seeds_do_not_lie_on_one_another():
    runs = [*(f"1:{n} (1 of 2 seeds)" for n in (16, 8, 4)), "2:4", "3:4 (1 of 2 seeds)", "dense"]
    measures = "axis", report.DISTANCE, "validation loss"
    values = {(run, measure): {0: [(None, place)]} for place, run in enumerate(runs) for measure in measures}
    figure = Figure(layout="constrained")
    assert report._axis(figure, values, runs, EXPERIMENTS["ratio"])
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
