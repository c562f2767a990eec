"""Each target is found in the rows that answer it, and nowhere else. The rows are made up, not measured."""

import pytest

from bench import targets
from bench.results import COLUMNS, write
from bench.targets import LINEAR_MODELS, STEPS, findings, main, report


def row(suite, shape, mode, provider, p50, **changes):
    base = {"suite": suite, "shape": shape, "mode": mode, "provider": provider, "metric": "time", "status": "ok"}
    base |= {"model": shape.split()[0], "dtype": "bfloat16", "layers": 1.0, "M": 8.0, "N": 8.0, "K": 8.0}
    base |= {"p20_us": 0.9 * p50, "p50_us": p50, "p80_us": 1.1 * p50, "method": "cuda graph", "device": "Some GPU"}
    return dict.fromkeys(COLUMNS, "") | base | {"commit": "abc", "date": "2030-01-02"} | changes


def met():
    """Every target met, by little."""
    rows = [row("gemm", "square 8192", "plain", p, t) for p, t in (("dense", 1700), ("dense compiled", 1601))]
    times = (("cuSPARSELt", 1500), ("cuSPARSELt tuned", 1400), (targets.OURS, 1000))
    rows += [row("gemm", "square 8192", "plain", p, t) for p, t in times]
    times = (("dense", 150), ("dense compiled", 131), ("cuSPARSELt tuned", 125), (targets.OURS, 100))
    for model in LINEAR_MODELS:
        rows += [row("gemm", f"{model} fc1", "epilogue", p, t) for p, t in times]
    times = (("dense", 99), ("cuSPARSELt tuned", 101), (targets.OURS, 100))
    rows += [row("gemm", "grid 8", "plain", p, t) for p, t in times]
    for shape, wanted in STEPS.items():
        times = (("dense", 2000), ("dense compiled", 1001 * wanted), (targets.OURS, 1200))
        rows += [row("end-to-end", shape, "step", p, t) for p, t in times]
        rows += [row("end-to-end", shape, "step", "sparsedm 2:4 compiled", 1000)]
    times = (("dense", 90), ("dense compiled", 95), ("sparsedm masked", 120), ("sparsedm masked compiled", 94))
    rows += [row("train", "uvit-cifar10-small@128", "training step", p, t) for p, t in times]
    for n, rate in ((8, 1.0), (16, 8.1)):
        sizes = {"N": n, "K": n, "gbps": rate}
        rows.append(row("mask", f"square {n}", "choose", "sparsedm choose + pack", 9, **sizes))
    return [*rows, row("ceiling", "copy of 1024 MiB", "", "torch", 9, kernel="copy", gbps=10.0)]


def verdicts(rows):
    return [finding.met for finding in findings(rows)]


def test_targets_that_are_met():
    found = findings(met())
    assert [f.met for f in found] == [True] * 10
    mean = (1.4 * 1.25**3 * 1.01) ** (1 / 5)
    expected = [1.601, 1.01, mean, 1.31, 0.99, 1001 * 1.35 / 1000, 1001 * 1.35 / 1000, 1.1011, 94 / 90, 0.81]
    assert [f.measured for f in found] == pytest.approx(expected)
    assert found[0].note == "1.31 to 1.96"
    assert found[1].note == "grid 8, plain; 5 products"
    assert found[4].note == "grid 8, plain; 5 products; dense compiled not measured in 1 of 5"
    assert found[5].note == "sparsedm 2:4 compiled 1.00 ms, dense compiled 1.35 ms"
    assert found[8].note == "uvit-cifar10-small@128: sparsedm masked compiled 0.09 ms, dense 0.09 ms"
    assert found[9].note == "square 16: 8 of 10 GB/s", "the largest weight, not the smaller one"


@pytest.mark.parametrize(
    ("which", "missed"),
    [
        (("gemm", "square 8192", "dense compiled"), {0, 4}),
        (("gemm", "square 8192", "cuSPARSELt tuned"), {1, 2}),
        (("gemm", "grid 8", "cuSPARSELt tuned"), {1, 2}),
        (("gemm", "dit-imagenet256-xlarge@64 fc1", "dense compiled"), {3, 4}),
        (("gemm", "grid 8", "dense"), {4}),
        (("end-to-end", "uvit-imagenet256-huge@64", "dense compiled"), {5}),
        (("end-to-end", "uvit-imagenet256-large@64", "dense compiled"), {6}),
        (("end-to-end", "uvit-cifar10-small@64", "dense compiled"), {7}),
        (("train", "uvit-cifar10-small@128", "dense"), {8}),
    ],
)
def test_each_is_missed_where_its_rival_is_quicker(which, missed):
    rows = met()
    for r in rows:
        if (r["suite"], r["shape"], r["provider"]) == which:
            r["p50_us"] /= 2
    assert {i for i, verdict in enumerate(verdicts(rows)) if verdict is False} == missed


def test_a_slow_pass_over_masks_misses_its_target():
    rows = met()
    rows[-1]["gbps"] = 10.2
    assert verdicts(rows) == [True] * 9 + [False]


@pytest.mark.parametrize("status", ["failed", "wrong"])
def test_a_product_that_fails_is_no_target_met(status):
    found = findings([*met(), row("gemm", "grid 9", "plain", targets.OURS, 1, status=status)])
    assert [f.met for f in found].count(False) == 1
    assert (found[4].met, "failed at grid 9" in found[4].note) == (False, True)


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert verdicts([]) == [None] * 10
    for suite, silent in (("gemm", {0, 1, 2, 3, 4}), ("end-to-end", {5, 6, 7}), ("train", {8}), ("ceiling", {9})):
        rows = [r for r in met() if r["suite"] != suite]
        assert {i for i, verdict in enumerate(verdicts(rows)) if verdict is None} == silent
    assert verdicts([r | {"dtype": "float16"} for r in met()]) == [None] * 10


def test_without_the_compiled_dense_network_there_is_no_verdict_and_products_say_so():
    found = findings([r for r in met() if r["provider"] != "dense compiled"])
    assert [f.met for f in found[5:9]] == [None] * 4
    assert found[5].note == "no time of dense compiled"
    assert "dense compiled not measured in 3 of 3" in found[3].note


def test_one_model_of_three_is_no_mean():
    found = findings([r for r in met() if not r["shape"].startswith("dit")])
    assert (found[3].met, found[3].note) == (None, "not measured: dit-imagenet256-xlarge@64")


def test_layers_count_as_often_as_they_stand_in_the_network():
    rows = [*met(), row("gemm", "dit-imagenet256-xlarge@64 fc2", "epilogue", "dense", 400, layers=7.0)]
    rows.append(row("gemm", "dit-imagenet256-xlarge@64 fc2", "epilogue", targets.OURS, 100, layers=7.0))
    found = findings(rows)[3]
    assert found.measured == pytest.approx((1.31**3 * 4**7) ** (1 / 10))
    assert found.note.startswith("1.73 over the 4 shapes; dense compiled not measured in 1 of 4")


def test_times_that_were_taken_in_different_ways_are_named():
    rows = [r | {"method": "cuda events"} if r["provider"] == "dense compiled" else r for r in met()]
    assert findings(rows)[5].note.endswith("; timed in different ways: cuda events and cuda graph")


def test_the_table(tmp_path, capsys):
    write(tmp_path / "r.csv", met())
    assert main([str(tmp_path / "r.csv"), "--out", str(tmp_path / "targets.md")]) == 0
    text = (tmp_path / "targets.md").read_text()
    assert text.startswith("Some GPU; commit abc.\n")
    assert "| 2:4 product of 8192 x 8192 x 8192 against dense | at least 1.6 | 1.601 | met | 1.31 to 1.96 |" in text
    assert main([str(tmp_path / "r.csv")]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    assert report([]).count("| not measured |") == 10
    assert main([str(tmp_path / "none.csv")]) == 2
