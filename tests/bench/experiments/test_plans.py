"""Plans are equal terms by construction."""

from dataclasses import replace

import pytest

from bench.experiments.plans import EXPERIMENTS, SCALES
from sparsedm.kernels.pattern import Pattern
from sparsedm.models import build_model
from sparsedm.sparsity import masked_layers, sparsify
from sparsedm.train.stages import LADDER, METHODS
from tests.bench.experiments.tiny_plan import planned


@pytest.mark.parametrize("scale", ["smoke", "cpu", "cpu-short", "lite", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_runs_of_a_plan_are_distinct_and_spend_the_same(name, scale):
    _, scale, runs = planned(name, scale)
    assert len({run.name for run in runs}) == len(runs)
    spent = {run.name: sum(stage.steps for stage in run.stages) for run in runs}
    exceptions = {name: 0 for name in spent if "shot" in name}
    exceptions |= {name: scale.steps // 3 for name in spent if "a third" in name}
    exceptions["small-dense"] = scale.base_steps + scale.steps
    assert spent == {name: exceptions.get(name, scale.steps) for name in spent}


@pytest.mark.parametrize("scale", ["smoke", "cpu", "cpu-short", "lite", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_run_of_a_plan_is_made_twice_under_two_names(name, scale):
    plan, _, runs = planned(name, scale)
    made = [
        (tuple(replace(stage, name="-") for stage in run.stages), run.where, run.first_dense, run.kind) for run in runs
    ]
    assert len({*made}) == len(made)
    assert plan.control in {run.name for run in runs}


def test_what_the_plans_vary():
    def stages(experiment):
        return {run.name: run.stages for run in planned(experiment, "full")[2]}

    assert [s.pattern for s in stages("arms")["chain"]] == ["31:32", "15:16", "7:8", "3:4", "2:4"]
    ratio = {run.name: run.x for run in planned("ratio", "full")[2]}
    assert ratio == {"dense": 1.0} | {p: Pattern.parse(p).density for p in LADDER}
    others = {"small-dense", "chain of eighths", "first block dense", "oneshot, calibrated", "activations"}
    assert set(stages("arms")) == {*METHODS, *others}
    assert [s.pattern for s in stages("arms")["chain of eighths"]] == ["7:8", "6:8", "5:8", "4:8", "2:4"]
    ablate = stages("ablate")
    changed = {name: stages[0] for name, stages in ablate.items()}
    assert [changed[f"w_kd={w}"].w_kd for w in ("0", "0.01", "1")] == [0, 0.01, 1]
    assert [changed[f"decay={d}"].decay for d in ("0", "2e-05", "0.002")] == [0, 2e-5, 2e-3]
    assert (changed["default"].w_kd, changed["default"].decay, changed["default"].teacher) == (0.1, 2e-4, "dense")
    assert {s.teacher for s in ablate["5 students, teacher previous"]} == {"previous"}
    assert {s.learns_from for s in ablate["5 students, no teacher"]} == {"none"}
    assert ablate["teacher alone"][0].w_noise == 0
    assert [len(ablate[name]) for name in ("default", "3 students", "5 students")] == [1, 3, 5]
    where = {run.name: run.where for run in planned("ablate", "full")[2] if run.where}
    for model, absent in (("dit-tiny", set()), ("ddpm-tiny", {"masked: MLPs"})):
        scale = replace(SCALES["full"], model=model, overrides={})
        found = {run.name: run.where for run in EXPERIMENTS["ablate"].runs(scale) if run.where}
        assert found == {name: layers for name, layers in where.items() if name not in absent}
        for layers in found.values():
            names = [name for name, _ in masked_layers(sparsify(build_model(model, device="meta"), "2:4", layers))]
            assert layers == "all" or not any("embed" in name for name in names)
    assert all(stage.inplace for stage in stages("fixed-vs-inplace-vs-chain")["inplace"])


def test_what_answers_the_question_comes_first():
    first = {name: [run.name for run in planned(name, "lite")[2]][:2] for name in EXPERIMENTS}
    assert first["arms"] == first["fixed-vs-inplace-vs-chain"] == ["dense", "chain"]
    assert first["ratio"] == ["dense", "2:4"]
    assert first["ablate"][0] == EXPERIMENTS["ablate"].control


@pytest.mark.parametrize(("name", "base", "run"), [("cpu", 2_000_000, 240_000), ("cpu-short", 200_000, 39_936)])
def test_a_scale_trains_on_as_many_images_as_it_says(name, base, run):
    """And as many as bench/results/README.md and NOTES.md say."""
    scale = SCALES[name]
    assert (scale.base_steps * scale.options.batch_size, scale.steps * scale.options.batch_size) == (base, run)
    assert f"{base:,} images for the dense network and {run:,} for each run" in scale.summary
    assert (scale.options.lr, scale.lr, scale.options.betas, scale.seeds) == (2e-3, 1e-3, (0.9, 0.99), 2)
