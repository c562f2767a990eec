"""A whole search on networks that know nothing, which is enough to see what is measured, kept and refused."""

import itertools
import json
import re
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsedm import evaluate, samplers
from sparsedm.cli import main, parse
from sparsedm.commands.drawing import source_of
from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.model_files import save_model
from sparsedm.models import build_model, model_config
from sparsedm.sparsity import sparsify
from sparsedm.stepaware import family as family_module
from sparsedm.stepaware import study as study_module
from sparsedm.stepaware.family import Strategy, family_of, load_strategy, sample
from sparsedm.stepaware.search import SearchOptions
from sparsedm.stepaware.study import Plan, study
from sparsedm.train import checkpoint, published, run_folder
from sparsedm.train.loop import OutOfTime, amp_of

UVIT = {"image_size": 12, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "num_classes": 5}


def save(folder, model, step=1):
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"updates": 1, "seconds": 2.5}
    checkpoint.save(folder, step, model=model, ema=model, optimizer=optimizer, state=state)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A run folder with a dense network, its 2:4 and its 1:4 student."""
    folder = tmp_path_factory.mktemp("run") / "chain"
    torch.manual_seed(0)
    model = build_model("uvit-tiny", **UVIT)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for number, pattern in enumerate(("dense", "2:4", "1:4")):
        save(folder / f"{number:02d}-{pattern.replace(':', 'of')}", sparsify(model, pattern))
    return folder


@pytest.fixture(autouse=True)
def _few_images(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study_module, "SHOWN", 2)
    monkeypatch.setattr(
        study_module, "load_images", lambda *a, limit=None, **more: LOAD(*a, limit=min(limit or 40, 40), **more)
    )


LOAD, LOSS_TABLE = study_module.load_images, study_module.loss_table


@pytest.fixture
def numbers_alone(monkeypatch):
    """Studies without report and pictures, which take most of their time."""
    for name in ("write_report", "_save_samples"):
        monkeypatch.setattr(study_module, name, lambda *arguments: None)


def plan(run, folder, **changes):
    options = SearchOptions(population=8, generations=2, seed=3)
    few = {"count": 6, "final_count": 8, "validation": 8, "search": options}
    return Plan(**{"run": run, "folder": folder, "data": "synthetic", "sampler": "ddim", "steps": 3} | few | changes)


def test_a_search_leaves_what_it_found_and_goes_on_where_it_stopped(chain, tmp_path, monkeypatch):
    drawn, draw = [], study_module._draw

    def stops(family, strategy, count, seed, clip, guidance):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append((strategy.indices, count, seed))
        return draw(family, strategy, count, seed, clip, guidance)

    def planted(images):
        first, second, third = drawn[-1][0]
        return 9 * (second != 0) + (first != 2) + (third != 2)

    monkeypatch.setattr(study_module, "_draw", stops)
    monkeypatch.setattr(study_module, "_distance_to", lambda images, plan: planted)
    with pytest.raises(KeyboardInterrupt):
        study(plan(chain, tmp_path))
    assert {(count, seed) for _, count, seed in drawn} == {(6, 3)}
    before = set(drawn)
    drawn[:] = [()] * 6
    report = study(plan(chain, tmp_path))
    made = drawn[6:]
    assert not before & set(made), "what was measured is not measured again"
    assert {(count, seed) for _, count, seed in made} == {(6, 3), (8, 4), (study_module.SHOWN, 4)}

    left = {p.name for p in tmp_path.iterdir()}
    assert left >= {"front.png", "strategies.png", "proxy.png", "samples.png", "report.md", "report.json"}
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    groups = {row["group"] for row in report["rows"]}
    assert groups == {"uniform", "random", "by hand", "found"}
    assert [row["cost"] for row in report["rows"]] == sorted((row["cost"] for row in report["rows"]), reverse=True)
    assert report["names"] == ("dense", "2:4", "1:4")
    assert report["seconds"]["training"] == 7.5
    found = next(row for row in report["rows"] if row["group"] == "found")
    strategy = load_strategy(tmp_path / "strategies" / f"{found['strategy'].replace(' ', '-')}.json")
    family = family_of(chain)
    assert strategy.indices == found["indices"]
    assert strategy.models(family, sampler="ddim", steps=3)
    assert family.cost("ddim", strategy.indices) == found["cost"]

    drawn[:] = [()] * 6
    assert study(plan(chain, tmp_path))["rows"] == report["rows"]
    assert {count for _, count, _ in drawn[6:]} == {study_module.SHOWN}, "only the picture is drawn again"
    with pytest.raises(InputError, match="steps is 3 there and 4 here"):
        study(plan(chain, tmp_path, steps=4))


@pytest.fixture
def one_thread():
    """As a worker of the search has: more threads add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_distances_are_those_of_the_samples(chain, tmp_path, one_thread, numbers_alone):
    report = study(plan(chain, tmp_path))
    family = family_of(chain)
    features = load_features()
    real = evaluate.summarize(study_module.load_images("synthetic", "train", 12).images, features, "real")
    row = next(row for row in report["rows"] if row["group"] == "random")
    strategy = Strategy(family.name, family.names, "ddim", row["indices"])
    for count, seed, value in ((6, 3, row["search_quality"]), (8, 4, row["quality"])):
        images = sample(family, strategy, count, seed=seed, y=torch.arange(count) % 5, clip="every")
        mine = evaluate.summarize(images, features, "ours")
        assert evaluate.frechet_distance(mine.mean, mine.covariance, real.mean, real.covariance) == value


def test_the_report_measures_what_it_says(chain, tmp_path, numbers_alone):
    report = study(plan(chain, tmp_path, quality="proxy"))
    logarithms = np.log(np.array(report["losses"]))
    for row in report["rows"]:
        assert (
            row["quality"] == row["search_quality"] == sum(logarithms[i, step] for step, i in enumerate(row["indices"]))
        )
    assert report["rank_correlation"]["logarithms"] == pytest.approx(1)
    by_hand = {row["strategy"]: row["indices"] for row in report["rows"] if row["group"] == "by hand"}
    assert by_hand == {"costly last": (2, 1, 0), "costly first": (0, 1, 2)}
    assert report["dearest"] == max(row["cost"] for row in report["rows"])


def test_a_slimmable_chain_is_a_family_of_both(tmp_path):
    model = build_model("slimmable-tiny", image_size=12, multipliers=(1, 1), attention=(), eighths=(4, 8))
    save(tmp_path / "00-dense", model)
    save(tmp_path / "01-2of4", sparsify(model, "2:4"))
    family = family_of(tmp_path)
    assert family.names == ("dense 8/8", "2:4 8/8", "dense 4/8", "2:4 4/8")
    assert list(family.costs) == sorted(family.costs, reverse=True)
    assert len(set(family.fingerprints)) == len(family.networks)


def test_one_image_is_not_enough_for_a_distance(chain, tmp_path):
    np.savez(tmp_path / "two.npz", x=np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3), np.uint8))
    with pytest.raises(InputError, match=r"two.npz holds 1 image to train on: a Fréchet distance needs 2"):
        study(plan(chain, tmp_path / "out", data=str(tmp_path / "two.npz")))
    assert not (tmp_path / "out").exists()


def test_latents_are_searched_by_the_proxy(tmp_path):
    """A three-level U-Net on 4-channel latents in an .npz: everything but the Fréchet distance and the samples."""
    np.savez(tmp_path / "latents.npz", x=np.random.default_rng(0).normal(size=(80, 4, 8, 8)).astype(np.float32))
    shape = {"image_size": 8, "channels": 4, "multipliers": (1, 1, 2), "attention": (4,)}
    save(tmp_path / "run" / "00-dense", build_model("slimmable-tiny", **shape))
    wanted = plan(tmp_path / "run", tmp_path / "out", data=str(tmp_path / "latents.npz"))
    with pytest.raises(InputError, match=r"holds latents.*--quality proxy"):
        study(wanted)
    assert not (tmp_path / "out").exists()
    report = study(replace(wanted, quality="proxy"))
    assert report["names"] == ("dense 8/8", "dense 6/8", "dense 4/8", "dense 2/8")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"front.png", "strategies.png", "report.md"}
    assert not (tmp_path / "out" / "samples.png").exists()
    found, drawn = min((tmp_path / "out" / "strategies").iterdir()), tmp_path / "drawn.npz"
    command = ["sample", str(tmp_path / "run"), "--strategy", str(found), "--count", "2", "--out", str(drawn)]
    assert main(command) == 0
    latents = np.load(drawn)["images"]
    assert latents.shape == (2, 4, 8, 8)
    assert np.isfinite(latents).all()


def test_measured_seconds_are_kept(chain, tmp_path, monkeypatch):
    """And with them the order of the networks, although another measurement would give another."""
    seconds = [1.0, 2.0, 3.0]  # of dense, 2:4, 1:4
    monkeypatch.setattr(family_module, "seconds_per_image", lambda networks, batch: seconds)
    wanted = plan(chain, tmp_path, quality="proxy", unit="seconds")
    first = study(wanted)
    assert first["unit"] == "seconds"
    assert first["names"] == ("1:4", "2:4", "dense")
    seconds.reverse()
    again = study(wanted)
    for name in ("names", "costs", "losses"):
        assert again[name] == first[name]
    for file in (tmp_path / "strategies").iterdir():
        assert load_strategy(file).models(family_of(chain)), "sorted by MACs, the family is the same"
    assert all(row["clock"] > 0 for row in first["rows"]), "and whole sampling, by the clock"
    assert [row["clock"] for row in again["rows"]] == [row["clock"] for row in first["rows"]]
    assert "by the clock" in (tmp_path / "report.md").read_text()


def test_equal_strategies_have_one_time_and_its_share(chain, tmp_path, monkeypatch):
    """Beside the share of the summed cost, which is another number."""
    finds(monkeypatch, (0, 1, 2))  # as one by hand
    asked = []

    def clock(calls, device, rounds):
        asked.extend(call.args[0] for call in calls)
        return [study_module.CLOCKED * (10 - sum(indices)) for indices in asked]

    monkeypatch.setattr(family_module, "seconds_per_image", lambda networks, batch: [3.0, 2.0, 1.0])
    monkeypatch.setattr(study_module, "interleaved_seconds", clock)
    report = study(plan(chain, tmp_path, quality="proxy", unit="seconds"))
    assert sorted({*asked}) == sorted(asked)
    assert all(row["clock"] == 10 - sum(row["indices"]) for row in report["rows"])
    assert (report["dearest"], report["dearest_clock"]) == (9, 10)
    head, *rows = (tmp_path / "report.md").read_text().splitlines()[5:]
    columns = [head.index(name) for name in ("summed share", "by the clock", "clock share")]
    found = next(row for row in rows if row.startswith("found 1"))
    assert [found[place:].split()[0] for place in columns] == ["67%", "7000.000", "70%"]


@pytest.mark.parametrize("unit", ["MACs", "seconds"])
def test_a_report_names_its_machine(chain, tmp_path, unit):
    report = study(plan(chain, tmp_path, quality="proxy", unit=unit))
    assert report["device"].startswith("CPU: ")
    assert report["device"].endswith(f", {torch.get_num_threads()} threads")
    assert f"machine: {report['device']}, torch {torch.__version__}" in (tmp_path / "report.md").read_text()


def test_seconds_of_another_machine_are_refused(chain, tmp_path, monkeypatch, numbers_alone):
    """MACs are the same everywhere. Evaluations stay."""
    plans = [plan(chain, tmp_path / unit, quality="proxy", unit=unit) for unit in ("MACs", "seconds")]
    for each in plans:
        study(each)
    monkeypatch.setattr(study_module, "cpu_name", lambda: "CPU: another")
    study(plans[0])
    with pytest.raises(
        InputError, match=r"table\.json: its seconds are of another machine \(CPU: .*CPU: another, .*remove"
    ):
        study(plans[1])
    (tmp_path / "seconds" / "table.json").unlink()
    assert study(plans[1])["device"].startswith("CPU: another, ")
    assert json.loads((tmp_path / "seconds" / "clock.json").read_text())["machine"].startswith("CPU: another, ")


def test_a_search_that_began_before_machines_were_recorded_goes_on(chain, tmp_path, numbers_alone):
    wanted = plan(chain, tmp_path, quality="proxy", unit="seconds")
    study(wanted)
    file = tmp_path / "table.json"
    known = json.loads(file.read_text())
    del known["machine"]
    file.write_text(json.dumps(known))
    assert list(study(wanted)["costs"]) == known["costs"]


@pytest.mark.parametrize(
    "damage", [lambda times: times[1:], lambda times: [*times[1:], "0.1"], lambda times: [*times[1:], 0]]
)
def test_a_damaged_clock_is_refused(chain, tmp_path, numbers_alone, damage):
    wanted = plan(chain, tmp_path, quality="proxy", unit="seconds")
    study(wanted)
    file = tmp_path / "clock.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"seconds": damage(known["seconds"])}))
    with pytest.raises(InputError, match=r"clock\.json is damaged: .*; remove it, and all are timed anew"):
        study(wanted)
    file.unlink()
    assert all(row["clock"] > 0 for row in study(wanted)["rows"])


def test_images_are_cropped_as_in_training(chain, tmp_path, monkeypatch, numbers_alone):
    crops, load = [], study_module.load_images
    monkeypatch.setattr(published, "original_crop", lambda config: "celeba")
    monkeypatch.setattr(
        study_module, "load_images", lambda *a, crop, **more: crops.append((a[1], crop)) or load(*a, crop=crop, **more)
    )
    run = shutil.copytree(chain, tmp_path / "run")
    study(plan(run, tmp_path / "own", quality="proxy"))
    assert crops == [("train", "celeba"), ("test", "celeba")]
    (run / "options.json").write_text('{"crop": "square"}')
    study(plan(run, tmp_path / "asked", quality="proxy"))
    assert crops[2:] == [("train", "square"), ("test", "square")]
    with pytest.raises(InputError, match="crop is celeba there and not set here"):
        study(plan(run, tmp_path / "own", quality="proxy"))


def test_the_proxy_of_networks_with_classes_is_told_the_labels(chain, tmp_path, monkeypatch):
    told = []
    real = study_module.loss_table
    monkeypatch.setattr(study_module, "loss_table", lambda *a, y, **s: told.append(y) or real(*a, y=y, **s))
    study_module._table(plan(chain, tmp_path), family_of(chain))
    assert torch.equal(told[0], LOAD("synthetic", "test", 12, limit=8).labels)


def test_guidance_costs_every_network_twice(chain, tmp_path, monkeypatch, numbers_alone):
    asked = []
    monkeypatch.setattr(study_module, "_distance_to", lambda images, plan: lambda drawn: float(len(asked)))
    monkeypatch.setattr(
        study_module, "sample", lambda *a, **s: asked.append(s["guidance"]) or torch.zeros(a[2], 3, 12, 12)
    )
    guided, family = study(plan(chain, tmp_path, guidance=0.5)), family_of(chain)
    assert guided["dearest"] == 2 * family.cost("ddim", (0, 0, 0))
    assert {*asked} == {0.5}
    assert guided["guidance"] == 0.5
    assert "guidance" not in plan(chain, tmp_path).facts(family), "which older folders do not know"


def test_guidance_needs_a_null_label(tmp_path):
    save(tmp_path / "00-dense", build_model("uvit-tiny", **UVIT | {"num_classes": 0}))
    save(tmp_path / "01-2of4", sparsify(build_model("uvit-tiny", **UVIT | {"num_classes": 0}), "2:4"))
    with pytest.raises(InputError, match=r"guidance 0\.5 needs networks with classes and a null label"):
        study(plan(tmp_path, tmp_path / "out", guidance=0.5))


def test_networks_are_chosen_or_left_out(chain, tmp_path):
    for asked in (("dense", "1:4"), ("1:4", "dense")):
        assert plan(chain, tmp_path, networks=asked).family().names == ("dense", "1:4"), "costliest first"
    assert plan(chain, tmp_path, exclude=("dense",)).family().names == ("2:4", "1:4")
    with pytest.raises(InputError, match="no network to leave out is named '8/8': dense, 2:4, 1:4"):
        plan(chain, tmp_path, exclude=("8/8",)).family()
    model = build_model("slimmable-tiny", image_size=12, multipliers=(1, 1), attention=(), eighths=(4, 7, 8))
    save_model(tmp_path / "supernet.safetensors", model)
    left = plan(tmp_path / "supernet.safetensors", tmp_path, exclude=("7/8", "8/8"))
    with pytest.raises(InputError, match="with 1 network"):
        study(left)


def finds(monkeypatch, *indices):
    """Let the search find these strategies."""
    found = [SimpleNamespace(indices=each) for each in indices]
    monkeypatch.setattr(study_module, "_evolved", lambda setting, tried: (found, None))


def test_a_strategy_knows_how_it_was_found(chain, tmp_path, monkeypatch, numbers_alone):
    """Its clipping and guidance hold for `sample` and `evaluate`, and guidance doubles its cost."""
    finds(monkeypatch, (0, 1, 2))
    study(plan(chain, tmp_path, guidance=0.5, clip="final"))
    file, family = tmp_path / "strategies" / "found-1.json", family_of(chain)
    found, once = load_strategy(file), family.cost("ddim", (0, 1, 2))
    assert (found.clip, found.guidance) == ("final", 0.5)
    changed = ["--clip", "never", "--guidance", "0"]
    for more, expected in ([], ("final", 0.5, 2 * once)), (changed, ("never", 0, once)):
        source = source_of(parse(["sample", str(chain), "--strategy", str(file), *more]))
        assert (source.clip, source.guidance, source.cost["macs_per_image"]) == expected
    y = torch.arange(2)
    drawn = sample(family, found, 2, y=y)
    assert torch.equal(drawn, sample(family, found, 2, y=y, clip="final", guidance=0.5))
    assert not torch.equal(drawn, sample(family, found, 2, y=y, clip="never", guidance=0.5))
    study(plan(chain, tmp_path / "proxy", quality="proxy"))
    assert load_strategy(tmp_path / "proxy" / "strategies" / "found-1.json").clip is None, "nothing was sampled"


def test_strategies_of_an_earlier_search_do_not_stay(chain, tmp_path, monkeypatch, numbers_alone):
    finds(monkeypatch, (0, 1, 2), (0, 0, 2), (0, 0, 1))
    study(plan(chain, tmp_path, quality="proxy"))
    strategies = tmp_path / "strategies"
    (strategies / "mine.json").write_bytes((strategies / "found-3.json").read_bytes())
    finds(monkeypatch, (1, 1, 2))
    study(plan(chain, tmp_path, quality="proxy"))
    assert sorted(path.name for path in strategies.iterdir()) == ["found-1.json", "mine.json"]
    assert load_strategy(strategies / "found-1.json").indices == (1, 1, 2)


def test_the_proxys_best_mixture_starts_the_search(monkeypatch, tmp_path):
    """Of these losses the least sum is no uniform strategy: an end of the hull is not left out for being an end."""
    losses = [[0.0100, 0.0202, 0.0303, 0.0403], [0.0101, 0.0200, 0.0301, 0.0404], [0.012, 0.023, 0.035, 0.0405]]
    family = SimpleNamespace(names=("a", "b", "c"), costs=(4.0, 2.0, 1.0))
    wanted = plan(tmp_path, tmp_path, steps=4, search=SearchOptions(population=20))
    setting = SimpleNamespace(plan=wanted, family=family, losses=np.array(losses))
    started = {}
    monkeypatch.setattr(study_module, "search", lambda *a, start, **more: started.update(found=start) or [])
    monkeypatch.setattr(study_module, "front", lambda every: every)
    study_module._evolved(setting, None)
    assert (0, 1, 1, 0) in started["found"]
    assert all(len(set(found)) > 1 for found in started["found"])


def test_equal_networks_have_no_rank_correlation(tmp_path):
    for number in range(2):
        torch.manual_seed(0)
        save(tmp_path / "run" / f"0{number}-x{number}", build_model("uvit-tiny", **UVIT))
    report = study(plan(tmp_path / "run", tmp_path / "out", quality="proxy"))
    assert report["rank_correlation"] == {"logarithms": None, "losses": None}
    assert "over 8 strategies: unknown" in (tmp_path / "out" / "report.md").read_text()


def test_run_folders_side_by_side_are_a_family(chain, tmp_path):
    """As the runs of a seed of an experiment: the last stage of each, by the name of its folder."""
    for name, stages in {"dense": ["00-dense"], "1-4": ["00-dense", "02-1of4"]}.items():
        for stage in stages:
            shutil.copytree(chain / stage, tmp_path / "seed-0" / name / stage)
    family = family_of(tmp_path / "seed-0")
    assert family.names == ("dense", "1-4")
    assert family.fingerprints == tuple(family_of(chain).fingerprints[place] for place in (0, 2))


def test_seconds_are_those_of_the_networks_in_the_search(chain, tmp_path, numbers_alone):
    """2.5 for each checkpoint: of the networks, and of what they started from."""
    wanted = plan(chain, tmp_path / "of-chain", quality="proxy", networks=("dense", "2:4"))
    assert study(wanted)["seconds"]["training"] == 5
    for name, stages in {"base": ["00-dense"], "2-4": ["01-2of4"], "1-4": ["00-dense", "02-1of4"]}.items():
        for stage in stages:
            shutil.copytree(chain / stage, tmp_path / "seed-0" / name / stage)
    wanted = plan(tmp_path / "seed-0", tmp_path / "of-runs", quality="proxy", exclude=("base",))
    assert study(wanted)["seconds"]["training"] == 10
    wanted = plan(tmp_path / "seed-0", tmp_path / "others", quality="proxy", exclude=("1-4",))
    assert study(wanted)["seconds"]["training"] == 5


def test_the_folder_of_a_search_holds_its_family(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "family")
    (tmp_path / "options.json").write_text('{"steps": 3}')
    assert family_of(tmp_path).fingerprints == family_of(chain).fingerprints
    (tmp_path / "family" / "options.json").write_text('{"crop": "celeba"}')
    assert plan(tmp_path, tmp_path).crop(family_of(tmp_path)) == "celeba"


def test_the_crop_of_run_folders_side_by_side(chain, tmp_path):
    for name in ("dense", "2-4"):
        shutil.copytree(chain / "00-dense", tmp_path / "seed-0" / name / "00-dense")
        (tmp_path / "seed-0" / name / "options.json").write_text('{"crop": "celeba"}')
    assert plan(tmp_path / "seed-0", tmp_path).crop(family_of(chain)) == "celeba"


def test_two_searches_do_not_share_a_folder(chain, tmp_path):
    with run_folder.folder_lock(tmp_path), pytest.raises(InputError, match="another process is at work in"):
        study(plan(chain, tmp_path, quality="proxy"))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_time_may_be_up_in_the_table_in_a_search_by_proxy_and_on_the_clock(chain, tmp_path, monkeypatch, numbers_alone):
    whole, table, measured, cuts = study(plan(chain, tmp_path / "whole", quality="proxy")), LOSS_TABLE, [], []
    monkeypatch.setattr(study_module, "loss_table", lambda f, *a, **m: measured.append(f.names) or table(f, *a, **m))
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)
    monkeypatch.setattr(study_module, "time", clock)
    for looks in (1, 2, 4, 8, 100):
        try:
            report = study(plan(chain, tmp_path / "cut", quality="proxy", deadline=next(ticks) + looks))
        except OutOfTime as error:
            cuts.append(str(error))
    assert measured == [("dense",), ("2:4",), ("1:4",)], "each once"
    assert [any(f"after {n} networks of the table" in cut for cut in cuts) for n in (0, 1)] == [True, True]
    assert "strategies of the search" in cuts[-1]
    assert (report["losses"], report["rows"]) == (whole["losses"], whole["rows"])
    assert report["seconds"]["table"] > 0
    late = SimpleNamespace(plan=plan(chain, tmp_path, deadline=0), draw=lambda *_: pytest.fail("drawn"))
    with pytest.raises(OutOfTime, match="which are timed anew"):
        study_module._clocked(late, [{"indices": (0, 1, 2)}])


def test_a_search_draws_as_many_images_at_a_time_as_other_commands(chain, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        study_module, "sample", lambda *a, **s: asked.append(s["batch_size"]) or torch.zeros(2, 3, 4, 4)
    )
    family = family_of(chain)
    study_module._draw(family, Strategy(family.name, family.names, "ddim", (0, 1)), 2, 0, "every")
    assert asked == [samplers.batch_of("cpu")]


def test_refusals(chain, tmp_path):
    with pytest.raises(InputError, match="one network only"):
        study(plan(chain / "00-dense", tmp_path))
    with pytest.raises(InputError, match="population of 2 is too small"):
        study(plan(chain, tmp_path, search=SearchOptions(2), quality="proxy"))
    with pytest.raises(InputError, match="count is 1: at least 2 images"):
        plan(chain, tmp_path, count=1)
    with pytest.raises(InputError, match="ddpm-learned needs a network that has learnt the variance"):
        study(plan(chain, tmp_path, sampler="ddpm-learned"))
    with pytest.raises(InputError, match="steps is 0"):
        plan(chain, tmp_path, steps=0)
    with pytest.raises(InputError, match="workers is 2: a GPU measures one strategy at a time"):
        plan(chain, tmp_path, workers=2, device="cuda")


def test_the_memory_of_all_workers_counts(chain, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study_module, "check_memory", lambda needed, what: asked.append(needed))
    wanted = plan(chain, tmp_path, workers=3, count=7)
    for final_count, most in ((5, 7), (9, 9)):
        replace(wanted, final_count=final_count).check(model_config("uvit-tiny", **UVIT), LOAD("synthetic", "test", 12))
        assert asked.pop() == 8 * 3 * most * 3 * 12 * 12


def test_networks_run_in_bf16_on_a_gpu_and_in_the_dtype_of_their_weights_on_a_cpu(chain, monkeypatch):
    """Here amp_of says of the CPU what it says of a GPU."""
    family, seen = family_of(chain), []
    for network in family.networks:
        layer = network.mid_block.mlp.fc1
        layer.register_forward_hook(lambda module, inputs, out: seen.append((torch.is_grad_enabled(), out.dtype)))
    strategy = Strategy(family.name, family.names, "ddim", (0, 1, 2))
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        monkeypatch.setattr(study_module, "amp_of", lambda _, device=device: amp_of(torch.device(device)))
        seen.clear()
        assert study_module._draw(family, strategy, 2, 0, "every").dtype == torch.uint8
        assert seen == [(False, dtype)] * 3


def test_workers_change_no_bit_of_what_is_measured(chain, tmp_path, numbers_alone):
    rows = [study(plan(chain, tmp_path / str(workers), workers=workers))["rows"] for workers in (1, 3)]
    assert rows[0] == rows[1]


def test_a_search_with_a_weight_reports_and_saves_its_best(chain, tmp_path):
    weight = 1e-9
    options = SearchOptions(population=8, generations=3, weight=weight, seed=3)
    report = study(plan(chain, tmp_path / "out", quality="proxy", search=options, steps=6))
    least = min(e["quality"] + weight * e["cost"] for e in report["tried"])
    (best,) = (row for row in report["rows"] if row["strategy"] == "best")
    assert best["group"] == "found"
    assert best["quality"] + weight * best["cost"] == pytest.approx(least, rel=1e-12)
    saved = json.loads((tmp_path / "out" / "strategies" / "best.json").read_text())
    assert tuple(saved["indices"]) == best["indices"]
    assert report["weight"] == weight
    free = study(plan(chain, tmp_path / "out", quality="proxy", steps=6))
    assert all(row["strategy"] != "best" for row in free["rows"])
    assert not (tmp_path / "out" / "strategies" / "best.json").exists(), "it was another search's"


@pytest.mark.parametrize("indices", [[7, 0, 0], [0, -1, 0], [0, 0], [0, 0, 0, 0]], ids=str)
def test_a_stored_strategy_of_another_family_is_named(chain, tmp_path, indices):
    study(plan(chain, tmp_path, quality="proxy"))
    with open(tmp_path / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({"indices": indices, "quality": 1.0, "cost": 1.0, "seconds": 0.1}) + "\n")
    with pytest.raises(InputError, match=rf"jsonl is damaged: {re.escape(str(indices))} is no strategy of 3 steps"):
        study(plan(chain, tmp_path, quality="proxy"))
