"""Each target is found in the rows that answer it, and nowhere else. The rows are made up, not measured."""

import pytest

from bench import targets
from bench.results import COLUMNS, write
from bench.targets import LINEARS, SQUARES, STEPS, findings, main, report
from sparsedm.errors import InputError


def row(suite, shape, mode, provider, p50, **changes):
    base = {"suite": suite, "shape": shape, "mode": mode, "provider": provider, "metric": "time", "status": "ok"}
    base |= {"model": shape.split()[0], "dtype": "bfloat16", "layers": 1.0, "M": 8.0, "N": 8.0, "K": 8.0}
    base |= {"p20_us": 0.9 * p50, "p50_us": p50, "p80_us": 1.1 * p50, "method": "cuda graph", "device": "Some GPU"}
    return dict.fromkeys(COLUMNS, "") | base | {"commit": "abc", "date": "2030-01-02"} | changes


def met():
    """Every target met, by little."""
    rows = []
    for size, (wanted, _) in SQUARES.items():
        times = (("dense", 2000), ("dense compiled", 1001 * wanted), ("cuSPARSELt", 1500), ("cuSPARSELt tuned", 1400))
        rows += [row("gemm", f"square {size}", "plain", p, t) for p, t in (*times, (targets.OURS, 1000))]
    for model, (wanted, _) in LINEARS.items():
        times = (("dense", 170), ("dense compiled", 100.1 * wanted), ("cuSPARSELt tuned", 125), (targets.OURS, 100))
        rows += [row("gemm", f"{model} fc1", "epilogue", p, t) for p, t in times]
    times = (("dense", 99), ("cuSPARSELt tuned", 101), (targets.OURS, 100))
    rows += [row("gemm", "grid 8", "plain", p, t) for p, t in times]
    for shape, wanted in STEPS.items():
        times = (("dense", 2000), ("dense compiled", 1001 * wanted), (targets.OURS, 1200))
        rows += [row("end-to-end", shape, "step", p, t) for p, t in times]
        rows += [row("end-to-end", shape, "step", "sparsedm 2:4 compiled", 1000)]
    times = (("dense", 90), ("dense compiled", 95), ("sparsedm masked", 120), ("sparsedm masked compiled", 89))
    rows += [row("train", "uvit-cifar10-small@128", "training step", p, t) for p, t in times]
    for n, rate in ((8, 1.0), (16, 8.1)):
        sizes = {"N": n, "K": n, "gbps": rate}
        rows.append(row("mask", f"square {n}", "choose", "sparsedm choose + pack", 9, **sizes))
    return [*rows, row("ceiling", "copy of 1024 MiB", "", "torch", 9, kernel="copy", gbps=10.0)]


def verdicts(rows):
    return [finding.met for finding in findings(rows)]


def test_targets_that_are_met():
    found = findings(met())
    assert [f.met for f in found] == [True] * 14
    mean = (1.4**3 * 1.25**3 * 1.01) ** (1 / 7)
    expected = [
        1.6016,
        1.2012,
        1.001,
        1.01,
        mean,
        1.55155,
        1.4014,
        1.4014,
        0.99,
        1.35135,
        1.35135,
        1.1011,
        89 / 90,
        0.81,
    ]
    assert [f.measured for f in found] == pytest.approx(expected)
    assert found[0].note == "1.31 to 1.96"
    assert found[3].note == "grid 8, plain; 7 products"
    assert found[8].note == "grid 8, plain; 7 products; dense compiled not measured in 1 of 7"
    assert found[9].note == "sparsedm 2:4 compiled 1.00 ms, dense compiled 1.35 ms"
    assert found[12].note == "uvit-cifar10-small@128: sparsedm masked compiled 0.09 ms, dense 0.09 ms"
    assert found[13].note == "square 16: 8 of 10 GB/s", "the largest weight, not the smaller one"
    assert [f.predicted for f in found[:3]] == ["1.50 to 1.66", "1.40 to 1.51", "0.83 to 0.89"]


@pytest.mark.parametrize(
    ("which", "missed"),
    [
        (("gemm", "square 8192", "dense compiled"), {0, 8}),
        (("gemm", "square 2048", "dense compiled"), {1, 8}),
        (("gemm", "square 1024", "dense compiled"), {2, 8}),
        (("gemm", "square 8192", "cuSPARSELt tuned"), {3}),
        (("gemm", "grid 8", "cuSPARSELt tuned"), {3}),
        (("gemm", "dit-imagenet256-xlarge@64 fc1", "dense compiled"), {7, 8}),
        (("gemm", "grid 8", "dense"), {8}),
        (("end-to-end", "uvit-imagenet256-huge@64", "dense compiled"), {9}),
        (("end-to-end", "uvit-imagenet256-large@64", "dense compiled"), {10}),
        (("end-to-end", "uvit-cifar10-small@64", "dense compiled"), {11}),
        (("train", "uvit-cifar10-small@128", "dense"), {12}),
    ],
)
def test_each_is_missed_where_its_baseline_is_quicker(which, missed):
    rows = met()
    for r in rows:
        if (r["suite"], r["shape"], r["provider"]) == which:
            r["p50_us"] /= 2
    assert {i for i, verdict in enumerate(verdicts(rows)) if verdict is False} == missed


def test_a_slow_pass_over_masks_misses_its_target():
    rows = met()
    rows[-1]["gbps"] = 10.2
    assert verdicts(rows) == [True] * 13 + [False]


@pytest.mark.parametrize("status", ["failed", "wrong"])
def test_a_product_that_fails_is_no_target_met(status):
    found = findings([*met(), row("gemm", "grid 9", "plain", targets.OURS, 1, status=status)])
    assert [f.met for f in found].count(False) == 1
    assert (found[8].met, "failed at grid 9" in found[8].note) == (False, True)


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert verdicts([]) == [None] * 14
    for suite, silent in (("gemm", {*range(9)}), ("end-to-end", {9, 10, 11}), ("train", {12}), ("ceiling", {13})):
        rows = [r for r in met() if r["suite"] != suite]
        assert {i for i, verdict in enumerate(verdicts(rows)) if verdict is None} == silent
    assert verdicts([r | {"dtype": "float16"} for r in met()]) == [None] * 14


def test_without_the_compiled_dense_form_nothing_is_met():
    rows = [r for r in met() if r["provider"] != "dense compiled"]
    found = findings(rows)
    assert [i for i, f in enumerate(found) if f.met is not None] == [3, 4, 13], "of cuSPARSELt and of masks"
    assert found[9].note == "no time of dense compiled"
    assert found[5].note.endswith("; dense compiled not measured in 1 of 1")
    assert report(rows).count("| undecided |") == 7
    for r in rows:
        r["p50_us"] *= 3 if r["provider"] == targets.OURS else 1
    missed = [i for i, f in enumerate(findings(rows)) if f.met is False]
    assert missed == [*range(9)], "what is slower than one dense product is slower than the fastest"


def test_layers_count_as_often_as_they_stand_in_the_network():
    rows = [*met(), row("gemm", "dit-imagenet256-xlarge@64 fc2", "epilogue", "dense", 400, layers=7.0)]
    rows.append(row("gemm", "dit-imagenet256-xlarge@64 fc2", "epilogue", targets.OURS, 100, layers=7.0))
    found = findings(rows)[7]
    assert found.measured == pytest.approx((1.4014 * 4**7) ** (1 / 8))
    assert found.note.startswith("2.37 over the 2 shapes; dense compiled not measured in 1 of 2")
    assert found.met is None


def test_times_that_were_taken_in_different_ways_are_named():
    rows = [r | {"method": "cuda events"} if r["provider"] == "dense compiled" else r for r in met()]
    assert findings(rows)[9].note.endswith("; timed in different ways: cuda events and cuda graph")


def test_the_table(tmp_path, capsys):
    write(tmp_path / "r.csv", met())
    assert main([str(tmp_path / "r.csv"), "--out", str(tmp_path / "targets.md")]) == 0
    text = (tmp_path / "targets.md").read_text()
    assert text.startswith("Some GPU; commit abc.\n")
    row = (
        "| 2:4 product of 8192 x 8192 x 8192 against dense | at least 1.6 | 1.50 to 1.66 | 1.602 | met | 1.31 to 1.96 |"
    )
    assert row in text
    assert main([str(tmp_path / "r.csv")]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    assert report([]).count("| not measured |") == 14
    assert main([str(tmp_path / "none.csv")]) == 2
    assert main([str(tmp_path / "r.csv"), "--out=--"]) == 2


@pytest.mark.parametrize("status", ["wrong", "failed", "unsupported"])
def test_a_network_whose_layers_have_no_time_is_undecided(status):
    (model, _), *_ = LINEARS.items()
    rows = [*met(), row("gemm", f"{model} qkv", "epilogue", targets.OURS, 1, status=status)]
    (found,) = (f for f in findings(rows) if f.target.startswith(f"linear layers of {model},"))
    assert found.met is None
    assert "no time of 1 of 2 shapes" in found.note


def test_rows_of_two_devices_are_no_measurement_of_either():
    with pytest.raises(InputError, match="rows of NVIDIA A100 and NVIDIA H200: give the files of one device"):
        report([row("gemm", "s", "plain", "dense", 1, device=f"NVIDIA {name}") for name in ("H200", "A100")])


def test_the_worst_network_the_quickest_rival_and_the_best_copy_decide():
    shape = next(iter(STEPS))
    rows = [r | {"p50_us": 900} if (r["shape"], r["provider"]) == (shape, "dense") else r for r in met()]
    rows = [r | {"p50_us": 97} if (r["shape"], r["provider"]) == ("grid 8", "dense") else r for r in rows]
    rows += [
        row("train", "other@8", "training step", p, t) for p, t in (("dense compiled", 100), ("sparsedm masked", 150))
    ]
    rows.append(row("ceiling", "copy of 64 MiB", "", "torch", 9, kernel="copy", gbps=20.0))
    found = findings(rows)
    assert [found[i].measured for i in (8, 9, 12, 13)] == pytest.approx([0.97, 0.9, 1.5, 0.405])
    assert [found[i].met for i in (8, 9, 12, 13)] == [False] * 4
    assert found[12].note.startswith("other@8: ")
