import json

import pytest
import torch

from sparsedm.sparsity import masks, set_masking, sparsify
from sparsedm.train.metrics import MetricsLog, Reference, TrainingDiverged, read_metrics, usual_speed, weight_distance
from tests.tiny import tiny
from tests.tolerance import assert_as_good_as_torch

CPU = torch.device("cpu")


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_reads_all_but_lines_that_were_cut_short(tmp_path):
    assert read_metrics(tmp_path) == []
    write(tmp_path, '{"step": 1}\n', '{"step": 2}\n', '{"st\n', '{"step": 4}\n', '{"step": 5}')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 4}]
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\n\xff\n{"step": 6}\n')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("damaged", ['"images_per_second": "a"', '"noise_loss": null', '"flip_rates": [1]', '"x": [1]'])
def test_reads_all_but_a_record_of_other_types(tmp_path, damaged):
    write(tmp_path, '{"step": 1, "distance": null}\n', f'{{"step": 2, {damaged}}}\n', '{"step": 3}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "distance": None}, {"step": 3}]


def test_forgets_what_the_resumed_run_will_log_again(tmp_path):
    write(tmp_path, '{"step": 1}\n', '{"step": 2, "diverged": "loss nan"}\n', '{"step": 2}\n', '{"step": 3}\n', '{"st')
    log = MetricsLog(tmp_path, tiny(), 2, CPU, Reference())
    log.write({"step": 3, "again": True})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_means_and_masks_since_the_last_record(tmp_path):
    model = sparsify(tiny(), "3:4")
    log = MetricsLog(tmp_path, model, 0, CPU, Reference())
    log.add(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1)
    log.add(torch.tensor([3.0, 4.0, 5.0, 6.0]), 2)
    with torch.no_grad():  # one group of four now drops its last entry instead of another, or the same one
        model.first.weight[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        before = log.masks["first"][0, :4].clone()
    record = log.close(2, batch_size=8)
    means = [record[name] for name in ("loss", "noise_loss", "transfer_loss", "gradient_norm")]
    assert means == [2, 3, 4, 5]
    assert record["density"] == 0.75
    flipped = int((before != torch.tensor([True, True, True, False])).sum())
    assert flipped == 2  # seed 0 drops another one at first
    assert record["flip_rate"] == flipped / (64 * 32 + 64 * 64)
    assert record["flip_rates"] == {"first": flipped / (64 * 32), "second": 0}
    assert record["images_per_second"] == 2 * 8 / record["seconds"]
    log.restart()
    log.add(torch.ones(4), 3)
    assert log.close(3, 8)["flip_rate"] == 0
    json.dumps(record, allow_nan=False)


def test_the_usual_speed_is_not_that_of_the_first_record(tmp_path):
    assert usual_speed(tmp_path) is None
    write(tmp_path, *(f'{{"step": {i}, "images_per_second": {n}}}\n' for i, n in enumerate((1, 50, 60))))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "diverged": "loss nan"}\n')
    assert usual_speed(tmp_path) == 50


def test_the_speed_is_logged_against_the_dense_one(tmp_path):
    for speed in (None, 40.0):
        log = MetricsLog(tmp_path, tiny(), 0, CPU, Reference(speed=speed))
        log.add(torch.ones(4), 1)
        record = log.close(1, batch_size=8)
        assert record.get("speed_to_dense") == (speed and record["images_per_second"] / speed)


def test_dense_and_frozen_networks_have_no_flips(tmp_path):
    for model in (tiny(), sparsify(tiny(), "2:4")):
        if model.first.pattern:
            set_masking(model, frozen=True)
        log = MetricsLog(tmp_path, model, 0, CPU, Reference())
        with torch.no_grad():
            model.first.weight.copy_(model.first.weight.flip(1))
        log.add(torch.ones(4), 1)
        record = log.close(1, 8)
        assert record["flip_rate"] == 0
        assert record["density"] == (0.5 if model.first.pattern else 1)


@pytest.mark.parametrize("place", [0, 3], ids=["loss", "gradient norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_is_remembered_until_somebody_looks(tmp_path, place, value):
    log = MetricsLog(tmp_path, tiny(), 0, CPU, Reference())
    bad = torch.ones(4)
    bad[place] = value
    with pytest.raises(TrainingDiverged, match=f"diverged at step 1 .*{value}"):
        log.add(bad, 1)

    log = MetricsLog(tmp_path, tiny(), 0, CPU, Reference())
    log.looks_each_step = False
    for step in range(1, 4):
        log.add(bad if step == 1 else torch.ones(4), step)
    with pytest.raises(TrainingDiverged, match=r"in the 3 steps up to 3 .*nothing is saved yet"):
        log.close(3, 8)
    assert read_metrics(tmp_path)[-1]["diverged"]


def test_the_distance_to_the_dense_weights(tmp_path):
    """Of what multiplies x, over the masked layers alone; none where the networks have different shapes."""
    dense = tiny()
    model = sparsify(tiny(), "2:4")
    log = MetricsLog(tmp_path, model, 0, CPU, Reference(dense))
    log.add(torch.ones(4), 1)
    weights = [dense.first.weight, dense.second.weight]
    dropped = torch.cat([weight[~mask] for weight, mask in zip(weights, masks(model).values())])
    whole = torch.cat([weight.flatten() for weight in weights])
    low, high = dropped.norm() / whole.norm(), dropped.double().norm() / whole.double().norm()
    assert_as_good_as_torch(torch.tensor(log.close(1, 8)["distance"]), high, low)
    assert weight_distance(dense, tiny()) == 0
    assert weight_distance(tiny(width=32), dense) is None
    alone = MetricsLog(tmp_path, model, 0, CPU, Reference())
    alone.add(torch.ones(4), 1)
    assert "distance" not in alone.close(1, 8)
