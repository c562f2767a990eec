import copy
import json
import math
import os
import shutil
import signal
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparsedm import diffusion, memory
from sparsedm.diffusion import VPSDE, DDPMSchedule
from sparsedm.errors import InputError
from sparsedm.model_files import load_model
from sparsedm.models import build_model
from sparsedm.sparsity import masked_layers, masks, sparsify
from sparsedm.train import run_folder, step
from sparsedm.train.chain import Start, check_batch, check_chain, check_stages, plan, run_chain
from sparsedm.train.data import batch_indices
from sparsedm.train.loop import Interrupted, train
from sparsedm.train.metrics import TrainingDiverged
from sparsedm.train.stages import Stage, divide, parse_chain
from tests.tiny import OPTIONS, Tiny, same_state, tiny, tiny_images

pytestmark = pytest.mark.usefixtures("python_signals")
IMAGES, SCHEDULE = tiny_images(), VPSDE()
STAGES = parse_chain("dense,3:4,2:4", 16)


def run(folder, stages=STAGES, model=None, options=OPTIONS, **settings):
    start = Start(model or tiny(), *(settings.pop(name, None) for name in ("ema", "speed", "build")))
    return run_chain(start, stages, IMAGES, SCHEDULE, options, folder, **{"progress": False, **settings})


def bits(results):
    files = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    return [(r.result.checkpoint / name).read_bytes() for r in results for name in files]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken"))


# ---- the chain -------------------------------------------------------------------------------------------------------


def test_each_student_is_a_model_of_its_own(unbroken):
    networks = [n for r in unbroken for n in (r.model, r.ema)]
    storages = {p.data_ptr() for n in networks for p in n.parameters()}
    assert len(storages) == sum(len(list(n.parameters())) for n in networks)
    for result, expected in zip(unbroken, (None, "3:4", "2:4")):
        for network in (result.model, result.ema):
            assert [str(layer.pattern) for _, layer in masked_layers(network)] == [expected] * 2 * bool(expected)
        assert result.folder.name == {None: "00-dense", "3:4": "01-3of4", "2:4": "02-2of4"}[expected]
        assert result.metrics[-1]["step"] == result.stage.steps
    assert [record["transfer_loss"] > 0 for r in unbroken for record in r.metrics[-1:]] == [False, True, True]


def test_a_variance_is_learned_on_the_schedule_that_trains(tmp_path):
    """Whatever the network's own configuration says."""
    for own, schedule in (("ddpm", VPSDE()), ("vp-sde", DDPMSchedule())):
        model = build_model("dit-tiny", learn_sigma=True, schedule=own, image_size=4, channels=2, dim=32, depth=2)
        arguments = (Start(model), parse_chain("dense", 1), IMAGES, schedule, OPTIONS, tmp_path / own)
        if own == "ddpm":
            with pytest.raises(InputError, match="a learned variance needs discrete times"):
                run_chain(*arguments)
            assert not (tmp_path / own).exists()
        else:
            check_chain(*arguments[:-1])


def test_the_home_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (found,) = run("~/chain", parse_chain("dense", 1))
    assert found.folder == tmp_path / "chain" / "00-dense"
    train(step.Student(tiny()), IMAGES, step.Loss(SCHEDULE), replace(OPTIONS, steps=1), "~/one", progress=False)
    assert (tmp_path / "one" / "options.json").exists()
    assert not (tmp_path / "~").exists()


def test_speeds_are_logged_against_the_dense_stage_and_said(tmp_path, caplog):
    caplog.set_level("INFO", "sparsedm.train.chain")
    results = run(tmp_path, speed=7.0, progress=True)
    speeds = [statistics.median(record["images_per_second"] for record in r.metrics) for r in results]
    for result, dense in zip(results, (7.0, speeds[0], speeds[0])):
        for record in result.metrics:
            assert record["speed_to_dense"] == record["images_per_second"] / dense
    shares = [speed / dense for speed, dense in zip(speeds, (7.0, speeds[0], speeds[0]))]
    assert [record.message for record in caplog.records] == [
        f"{r.folder.name}: {speed:,.0f} images/s in training, {share:.2f} times the dense network's"
        for r, speed, share in zip(results, speeds, shares)
    ]
    caplog.clear()
    run(tmp_path, progress=False)
    assert not caplog.records


def test_without_a_dense_stage_nothing_is_made_up(tmp_path, caplog):
    caplog.set_level("INFO", "sparsedm.train.chain")
    (result,) = run(tmp_path, [Stage("a", 3, "2:4")], progress=True)
    assert all("speed_to_dense" not in record for record in result.metrics)
    assert caplog.messages[0].endswith(" images/s in training")


def test_students_start_from_the_previous_network_and_average(tmp_path, unbroken):
    stages = [replace(stage, steps=0) if stage.name != "dense" else stage for stage in STAGES]
    dense, three, two = run(tmp_path, stages)
    assert bits([dense]) == bits(unbroken[:1])
    for student in (three, two):
        assert same_state(student.model.state_dict(), dense.model.state_dict())
        assert same_state(student.ema.state_dict(), dense.ema.state_dict())
        assert not same_state(student.model.state_dict(), student.ema.state_dict())


def test_neither_start_is_changed(tmp_path):
    model, ema = tiny(1), tiny(2)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.state_dict())
    run(tmp_path, STAGES[1:], model, ema=ema)
    assert same_state(model.state_dict(), before[0])
    assert same_state(ema.state_dict(), before[1])
    for network in (model, ema):
        assert not masked_layers(network)
        assert network.training
        assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("policy", ["dense", "previous"])
def test_teachers(tmp_path, monkeypatch, policy):
    stages = [*STAGES, Stage("tail", 2), Stage("last", 2, "1:4")]
    stages = [replace(stage, teacher=policy, w_kd=0.5) if stage.pattern != "dense" else stage for stage in stages]
    seen = []

    def spied(*args, teacher, w_kd, **settings):
        seen.append(teacher)
        return whole_loss(*args, teacher=teacher, w_kd=w_kd, **settings)

    whole_loss = diffusion.loss
    monkeypatch.setattr(diffusion, "loss", spied)
    results = run(tmp_path, stages)
    steps = [seen[sum(s.steps for s in stages[:index])] for index in range(5)]
    of = {"dense": [None, 0, 0, None, 3], "previous": [None, 0, 1, None, 3]}[policy]
    for teacher, expected in zip(steps, of):
        assert (teacher is None) == (expected is None)
        if expected is not None:
            assert teacher is results[expected].ema
            assert len(masked_layers(teacher)) == 2 * (results[expected].stage.pattern != "dense")


def test_stages_share_one_stream_of_batches(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        step, "batch_indices", lambda n, size, step, seed: seen.append(step) or batch_indices(n, size, step, seed)
    )
    run(tmp_path)
    assert seen == list(range(16))


def test_in_place_goes_on_with_optimizer_and_average(tmp_path):
    """Two stages in place under one pattern are one stage, to the bit: nothing was left behind at the switch."""
    one = run(tmp_path / "one", [Stage("whole", 10, "2:4", decay=2e-4)])
    two = run(tmp_path / "two", [Stage("a", 4, "2:4", decay=2e-4), Stage("b", 6, "2:4", decay=2e-4, inplace=True)])
    assert bits(one) == bits(two[1:])
    fresh = run(tmp_path / "fresh", [Stage("a", 4, "2:4", decay=2e-4), Stage("b", 6, "2:4", decay=2e-4)])
    assert bits(fresh[:1]) == bits(two[:1])
    assert bits(fresh[1:]) != bits(two[1:])


def test_in_place_changes_the_pattern_of_one_network(tmp_path):
    results = run(tmp_path, [Stage("a", 3, "3:4"), Stage("b", 3, "2:4", inplace=True)])
    assert results[0].model is results[1].model
    assert results[0].ema is not results[1].ema
    for network in (results[1].model, results[1].ema):
        assert {str(layer.pattern) for _, layer in masked_layers(network)} == {"2:4"}


def test_frozen_mask_is_kept_and_dropped_weights_rest(tmp_path):
    options = replace(OPTIONS, weight_decay=0.0, lr=0.1)
    model, ema = tiny(1), tiny(2)
    stage = Stage("asp", 8, "2:4", frozen_mask=True, dropped=0.0)
    [result] = run(tmp_path, [stage], model, options, ema=ema)
    chosen = masks(sparsify(copy.deepcopy(model), "2:4"))
    assert same_state(masks(result.model), chosen)
    assert same_state(masks(result.ema), chosen)
    for name, mask in chosen.items():
        moved = result.model.get_submodule(name).weight != model.get_submodule(name).weight
        assert not moved[~mask].any()
        assert moved[mask].float().mean() > 0.9
    free = run(tmp_path / "free", [replace(stage, frozen_mask=False)], model, options, ema=ema)
    assert not same_state(masks(free[0].model), chosen)
    loaded = load_model(result.folder, lambda config: tiny()).model
    assert same_state(masks(loaded), chosen)


def test_a_stage_after_a_frozen_one_chooses_again(tmp_path):
    frozen = Stage("asp", 3, "2:4", frozen_mask=True, dropped=0.0)
    for inplace in (False, True):
        results = run(tmp_path / str(inplace), [frozen, Stage("ste", 3, "2:4", inplace=inplace)])
        assert all(layer.mask is None and layer.rule.dropped == 1 for _, layer in masked_layers(results[1].model))


def test_random_start(tmp_path):
    dense, average = tiny(1), tiny(2)
    state = torch.random.get_rng_state()
    stage = Stage("random", 0, "2:4", init="random")
    build = partial(Tiny, dense.config)
    [first] = run(tmp_path / "a", [stage], dense, ema=average, build=build)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    [again] = run(tmp_path / "b", [stage], dense, ema=average, build=build)
    assert same_state(first.model.state_dict(), again.model.state_dict())
    assert not torch.equal(first.model.first.weight, dense.first.weight)
    assert not torch.equal(first.model.first.weight, tiny(OPTIONS.seed).first.weight)
    assert same_state(first.ema.state_dict(), average.state_dict())


# ---- stopping and resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [3, 9, 13], ids=["dense", "second", "third"])
def test_resumes_in_the_middle_of_a_stage(tmp_path, unbroken, monkeypatch, position):
    def stopping(n, size, step, seed):
        steps.append(step)
        if step == position and len(steps) == position + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_indices(n, size, step, seed)

    steps = []
    monkeypatch.setattr(step, "batch_indices", stopping)
    with pytest.raises(Interrupted, match="to resume"):
        run(tmp_path)
    assert bits(run(tmp_path)) == bits(unbroken)
    assert steps == list(range(16))  # no step twice, so finished stages were loaded
    assert bits(run(tmp_path)) == bits(unbroken)
    assert steps == list(range(16))


def test_in_place_resumes(tmp_path, monkeypatch):
    stages = [Stage("a", 4, "3:4"), Stage("b", 4, "2:4", inplace=True), Stage("c", 4, "1:4", inplace=True)]
    expected = bits(run(tmp_path / "unbroken", stages))
    for position in (2, 5, 7, 9):
        with monkeypatch.context() as patch:

            def stopping(n, size, step, seed, position=position):
                if step == position:
                    os.kill(os.getpid(), signal.SIGINT)
                return batch_indices(n, size, step, seed)

            patch.setattr(step, "batch_indices", stopping)
            with pytest.raises(Interrupted, match="to resume"):
                run(tmp_path / str(position), stages)
        assert bits(run(tmp_path / str(position), stages)) == expected


def test_another_chain_in_the_folder_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match=r"stages.2.pattern is 2:4 there and 1:4 here"):
        run(tmp_path, parse_chain("dense,3:4,1:4", 16))
    with pytest.raises(InputError, match=r"where is None there and all here"):
        run(tmp_path, where="all")
    with pytest.raises(InputError, match=r"data is not set there and cats here"):
        run(tmp_path, record={"data": "cats"})


def test_a_folder_without_a_checkpoint_is_free(tmp_path, monkeypatch):
    """A run that diverged in its first step is tried again with other options."""
    with monkeypatch.context() as patch:
        patch.setattr(step.Step, "__call__", lambda *_: torch.tensor([math.nan] * 4))
        with pytest.raises(TrainingDiverged, match="try a lower learning rate here: nothing is saved yet"):
            run(tmp_path)
    assert [path.name for path in tmp_path.glob("0*")] == ["00-dense"]
    with pytest.raises(InputError, match="holds 00-dense, which is no stage of this run: choose another folder"):
        run(tmp_path, [Stage("other", 2)])
    run(tmp_path, options=replace(OPTIONS, lr=2e-3))
    with pytest.raises(InputError, match=r"has other options, choose another folder: options\.lr is 0\.002 there"):
        run(tmp_path)


def test_two_processes_in_one_folder_are_refused_before_either_claims_it(tmp_path):
    with run_folder.folder_lock(tmp_path), pytest.raises(InputError, match="another process is at work in"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_start_that_lies_elsewhere_now_is_the_same(tmp_path):
    stages = [Stage("a", 2, "2:4", teacher="dense", w_kd=0.5)]
    for name in ("there", "here"):
        run(tmp_path, stages, ema=tiny(3), record={"init": name})
    with pytest.raises(InputError, match=r"init is there there and elsewhere here"):
        run(tmp_path, stages, ema=tiny(4), record={"init": "elsewhere"})


def test_a_teacher_that_was_changed_since_is_refused(tmp_path):
    """The run of --init may have gone on: what is resumed learned from another network, without a word."""
    stages = [Stage("a", 2, "2:4", teacher="dense", w_kd=0.5)]
    run(tmp_path, stages, ema=tiny(3))
    run(tmp_path, stages, ema=tiny(3))
    changed = tiny(3)
    changed.last.bias.data[0] += 1e-6
    with pytest.raises(InputError, match=r"the dense network that .* starts and learns from was changed since: start"):
        run(tmp_path, stages, ema=changed)
    held = json.loads((tmp_path / "options.json").read_text())
    del held["start"]  # of an older run
    (tmp_path / "options.json").write_text(json.dumps(held))
    run(tmp_path, stages, ema=changed)


def test_a_stage_or_checkpoint_of_another_run_is_refused(tmp_path):
    """The same options and shapes, so that nothing else tells them apart."""
    stages = [Stage("a", 2, "2:4"), Stage("b", 2, "2:4")]
    for name, model in (("ours", tiny(1)), ("theirs", tiny(2))):
        run(tmp_path / name, stages, model)
    saved = "checkpoints/step-00000002"
    for source in ("theirs/01-b", "ours/00-a"):
        shutil.move(tmp_path / "ours/01-b" / saved, tmp_path / "own")
        shutil.copytree(tmp_path / source / saved, tmp_path / "ours/01-b" / saved)
        with pytest.raises(InputError, match=f"ours/01-b/{saved} is of another run or stage: its number is"):
            run(tmp_path / "ours", stages, tiny(1))
        shutil.rmtree(tmp_path / "ours/01-b" / saved)
        shutil.move(tmp_path / "own", tmp_path / "ours/01-b" / saved)
    shutil.copytree(tmp_path / "theirs", tmp_path / "copy")
    shutil.copytree(tmp_path / "ours/00-a", tmp_path / "copy/00-a", dirs_exist_ok=True)
    with pytest.raises(InputError, match="00-a is of another run: its number is"):
        run(tmp_path / "copy", stages, tiny(1))
    (tmp_path / "ours/options.json").unlink()
    run(tmp_path / "ours", stages, tiny(1))  # the stages know the number


def test_a_folder_of_other_runs_is_refused_and_nothing_in_it_is_touched(tmp_path):
    run(tmp_path / "01-first", [Stage("a", 1, "2:4")])
    (tmp_path / "02-begun").mkdir()
    (tmp_path / "02-begun/options.json").write_text('{"options": {}}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="holds 01-first, which is no stage of this run: choose another folder"):
        run(tmp_path)
    with pytest.raises(InputError, match="holds 01-first, which is no stage of this run"):
        run(tmp_path, [Stage("b", 1, "2:4"), Stage("first", 1, "2:4")])  # of the same name
    shutil.rmtree(tmp_path / "01-first")
    with pytest.raises(InputError, match="holds 02-begun, which is no stage of this run: choose another folder"):
        run(tmp_path)
    assert set(before) > {path for path in tmp_path.rglob("*") if path.name != ".lock"}
    (tmp_path / "of-npm").mkdir()
    for others in ({"scripts": {}}, {"networks": {}, "data": "x", "seed": 0}, {"experiment": "arms", "data": "x"}):
        (tmp_path / "of-npm/options.json").write_text(json.dumps(others))
        with pytest.raises(InputError, match="holds no options of such a run: choose another folder"):
            run(tmp_path / "of-npm")
        assert (tmp_path / "of-npm/options.json").read_text() == json.dumps(others)


@pytest.mark.parametrize("lost", ["00-a", "01-b", "0*", "**"])
def test_lost_options_neither_free_a_folder_nor_end_a_run(tmp_path, lost):
    stages = [Stage("a", 2, "2:4"), Stage("b", 2, "2:4")]
    expected = bits(run(tmp_path, stages))
    for file in [*tmp_path.glob(f"{lost}/options.json")]:
        file.unlink()
    if lost != "**":
        with pytest.raises(InputError, match="has other options"):
            run(tmp_path, stages, options=replace(OPTIONS, lr=1e-3))
    assert bits(run(tmp_path, stages)) == expected


def test_a_run_from_before_runs_had_numbers_goes_on(tmp_path):
    stages = [Stage("a", 2, "2:4"), Stage("b", 2, "2:4")]
    expected = bits(run(tmp_path, stages))
    shutil.rmtree(tmp_path / "01-b")
    for file in [*tmp_path.rglob("options.json"), *tmp_path.rglob("state.json")]:
        held = json.loads(file.read_text())
        assert held.pop("run")
        held.get("sha256", {}).pop("state.json", None)  # nor did a state know its own checksum
        file.write_text(json.dumps(held))
    for _ in range(2):
        assert bits(run(tmp_path, stages)) == expected


def test_stage_settings_reach_the_layers(tmp_path, monkeypatch):
    settings = []

    def spied(student, images, loss, *args, **kwargs):
        settings.append(
            [(layer.rule.decay, layer.rule.dropped) for _, layer in masked_layers(student.model)] + [loss.w_noise]
        )
        return train(student, images, loss, *args, **kwargs)

    monkeypatch.setattr("sparsedm.train.chain.train", spied)
    stages = [Stage("a", 1, "2:4", decay=0.5), Stage("b", 1, "2:4", dropped=0.25), Stage("c", 1, "2:4", w_noise=0.0)]
    results = run(tmp_path, [*stages, Stage("d", 1, lr=0.5)])
    assert settings == [[(0.5, 1), (0.5, 1), 1], [(0, 0.25), (0, 0.25), 1], [(0, 1), (0, 1), 0], [1]]
    assert [r.metrics[0]["lr"] for r in results] == [0.0025, 0.0025, 0.0025, 0.125]  # the first of four warm-up steps


# ---- chains as text, plans, refusals ---------------------------------------------------------------------------------


def test_parse_chain():
    assert [(s.name, s.pattern, s.steps) for s in parse_chain("dense, 3:4,2:4", 100)] == [
        ("dense", "dense", 50), ("3of4", "3:4", 25), ("2of4", "2:4", 25)
    ]  # fmt: skip
    assert [(s.w_kd, s.teacher, s.decay) for s in parse_chain("dense,2:4", 9)] == [(0, "none", 0), (0.1, "dense", 2e-4)]
    assert [s.steps for s in parse_chain("dense", 7)] == [7]
    assert [s.steps for s in parse_chain("3:4,2:4", 7)] == [4, 3]
    assert [s.steps for s in parse_chain("dense,3:4,2:4", 100, "2,1,7")] == [20, 10, 70]
    assert parse_chain("dense,2:4", 9, [1, 2], w_kd=0.0, teacher="none", lr=1.0)[1] == Stage(
        "2of4", 6, "2:4", decay=2e-4, lr=1.0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dense,3:2", 100), "pattern 3:2"),
        (("dense,,2:4", 100), "unknown pattern ''"),
        (("sparse", 100), "unknown pattern 'sparse'"),
        (("dense,2:4", 1), "1 steps are too few for 2 stages"),
        (("dense,2:4", 100, "1"), r"split \[1.0\] must be 2 positive numbers"),
        (("dense,2:4", 100, [1, 0]), "must be 2 positive numbers"),
        (("dense,2:4", 100, [1, float("nan")]), "must be 2 positive numbers"),
        (("dense,2:4", 100, "1,two"), "split '1,two' must be numbers"),
    ],
)
def test_parse_chain_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_chain(*arguments)


def test_divide_keeps_the_sum():
    for steps in range(7, 40):
        parts = divide(steps, [1, 2, 1, 1.5, 1], 5)
        assert sum(parts) == steps
        assert all(abs(part - steps * share / 6.5) < 1 for part, share in zip(parts, [1, 2, 1, 1.5, 1]))


def test_plan_writes_nothing_and_matches_the_run(tmp_path, unbroken):
    rows = plan(STAGES, OPTIONS, tiny(), tmp_path / "new")
    assert not list(tmp_path.iterdir())
    model, weights = tiny(), sum(p.numel() * 4 for p in tiny().parameters())
    masked_weights = model.first.weight.numel() + model.second.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    assert [row["parameters_kept"] for row in rows] == [total, total - masked_weights // 4, total - masked_weights // 2]
    assert [row["memory_bytes"] for row in rows] == [5 * weights, 6 * weights, 6 * weights]
    assert [row["images"] for row in rows] == [8 * stage.steps for stage in STAGES]
    assert [row["steps_done"] for row in rows] == [0, 0, 0]
    done = plan(STAGES, OPTIONS, tiny(), unbroken[0].folder.parent)
    assert [row["steps_done"] for row in done] == [stage.steps for stage in STAGES]
    assert [row["folder"] for row in done] == [str(r.folder) for r in unbroken]
    written = sum(
        (unbroken[0].result.checkpoint / f).stat().st_size for f in ("model.safetensors", "optimizer.safetensors")
    )
    assert 0 < rows[0]["checkpoint_bytes"] - weights <= written
    with torch.device("meta"):
        assert plan(STAGES, OPTIONS, tiny(), tmp_path)[1]["parameters_kept"] == rows[1]["parameters_kept"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "2:5"}, "pattern 2:5"),
        ({"name": "a/b"}, "stage name 'a/b' must be letters"),
        ({"teacher": "parent"}, "teacher='parent' must be one of none, dense, previous"),
        ({"init": "zero"}, "init='zero' must be one of previous, random"),
        ({"steps": -1}, "steps=-1 must be 0 or more"),
        ({"w_kd": math.nan, "teacher": "dense"}, "w_kd=nan must be 0 or more, and finite"),
        ({"decay": -1.0}, "decay=-1.0 must be 0 or more"),
        ({"lr": 0.0}, "lr=0.0 must be more than 0"),
        ({"w_kd": 0.1}, "w_kd=0.1 needs a teacher"),
        ({"inplace": True, "init": "random"}, "in place cannot start at random"),
    ],
)
def test_stage_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        Stage(**{"name": "a", "steps": 1, **fields})


def test_a_batch_is_refused_for_what_its_backward_pass_keeps(monkeypatch):
    network, options = build_model("uvit-tiny", image_size=8), replace(OPTIONS, batch_size=1024)

    def kept(batch):  # of real tensors
        found = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.data_ptr(): t}), lambda nothing: None
        )
        with hooks:
            network(*network.example_inputs(batch))
        return sum(tensor.nbytes for tensor in found.values())

    needed = 1024 * (kept(3) - kept(1)) // 2
    monkeypatch.setattr(os, "sysconf", lambda name: math.isqrt(needed * 5 // 4))
    check_batch(network, options, parts=1)
    monkeypatch.setattr(os, "sysconf", lambda name: math.isqrt(needed * 4 // 5))
    check_batch(network, options, parts=2)
    with pytest.raises(InputError, match="not enough memory: --batch-size 1024 takes"):
        check_batch(network, options, parts=1)


def test_what_a_batch_needs_is_not_measured_where_it_surely_fits(monkeypatch):
    monkeypatch.setattr(memory, "_on_meta", None)
    check_batch(build_model("uvit-tiny"), OPTIONS, parts=1)


def test_a_chain_longer_than_its_numbers_is_refused():
    with pytest.raises(InputError, match="a chain of 101 stages is too long: at most 100"):
        check_stages([Stage("dense", 1)] * 101, None, None)


def test_what_could_not_be_finished_is_not_begun(tmp_path):
    taught = {"w_kd": 0.1, "pattern": "2:4"}
    for stages, ema, message in (
        ([], None, "at least one stage"),
        ([Stage("a", 1, teacher="dense", **taught)], None, "stage a needs a dense teacher"),
        ([Stage("a", 1, teacher="dense", **taught)], sparsify(tiny(), "2:4"), "stage a needs a dense teacher"),
        ([Stage("a", 1, teacher="previous", **taught)], None, "stage a needs a previous teacher"),
        ([Stage("a", 1), Stage("b", 1, init="random")], None, "stage b starts at random: Start needs build="),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path, stages, ema=ema)
    assert not list(tmp_path.iterdir())
    run(tmp_path, [Stage("a", 1, teacher="dense", pattern="2:4")])  # with w_kd = 0 no teacher is needed
