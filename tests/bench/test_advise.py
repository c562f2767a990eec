import argparse
import re

import pytest
import torch

from bench import advise as advice
from bench.advise import Layer, recommended, report, where
from bench.results import read
from bench.shapes import LinearShape
from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.sparsity import masked_layers, sparsify


def layer(names, dense, ours, reason=""):
    def row(provider, time):
        return {"provider": provider, "metric": "time", "status": "ok" if time else "unsupported", "p50_us": time}

    rows = [row("dense", dense), row("dense compiled", dense + 5), row(advice.OURS, ours) | {"reason": reason}]
    return Layer(LinearShape("m", names[0], 8, 8, 8), names, rows)


NETWORK = [
    {"provider": p, "metric": "time", "status": "ok", "p50_us": t, "dtype": "bfloat16", "device": "Some GPU"}
    for p, t in (("dense", 1100.0), ("dense compiled", 1000.0), (advice.OURS, 910.0))
]


def test_the_recommendation_is_arithmetic():
    layers = [layer(["a.0", "a.1"], 100, 50), layer(["b.0"], 40, 41), layer(["c"], 7, None, "no groups of 4")]
    chosen = recommended(layers)
    assert chosen == ["a.0", "a.1"]
    text = report("net", 4, torch.device("cuda"), layers, NETWORK, chosen)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "2.00x" in lines["a.0"]
    assert "yes" in lines["a.0"]
    assert "0.98x" in lines["b.0"]
    assert lines["c"].endswith("no groups of 4")
    assert re.search(r"one step, dense: +1\.000 ms", text), "the compiled one is the faster"
    assert re.search(r"with 2:4 where it gains: +0\.900 ms \(1\.11x, by the table\)", text)
    assert re.search(r"the same, measured: +0\.910 ms \(1\.10x\)", text)
    assert r"""sparsedm.sparsify(model, "2:4", where='^(a\\.\\d+)$')""" in text
    assert "CPU" not in text


def test_a_gain_within_the_noise_is_no_recommendation():
    layers = [layer(["a"], 101, 100)]
    assert not recommended(layers)
    text = report("net", 4, torch.device("cuda"), layers, NETWORK[:2], [])
    assert "leave every layer dense for speed" in text
    assert "with 2:4" not in text


def test_a_network_that_does_not_run_is_said_to():
    failed = [row | {"status": "failed", "reason": "OutOfMemoryError: no room"} for row in NETWORK]
    text = report("net", 4, torch.device("cuda"), [layer(["a"], 100, 50)], failed, ["a"])
    assert "one step could not be timed: OutOfMemoryError: no room" in text
    assert "Recommended" in text


@pytest.mark.parametrize(
    ("chosen", "every", "expected"),
    [
        (["x.0.fc1", "x.12.fc1"], ["x.0.fc1", "x.12.fc1", "x.0.fc2"], r"^(x\.\d+\.fc1)$"),
        (["x.0.fc1"], ["x.0.fc1", "x.1.fc1"], ["x.0.fc1"]),
        (["x.0.a", "mid.b"], ["x.0.a", "mid.b", "midxb"], r"^(x\.\d+\.a|mid\.b)$"),
    ],
)
def test_where_selects_exactly_the_chosen(chosen, every, expected):
    assert where(chosen, every) == expected


def test_where_works_in_sparsify():
    model = build_model("uvit-tiny", device="meta")
    every = [name for names in advice.layer_groups("uvit-tiny", 1).values() for name in names]
    chosen = [name for name in every if name.endswith(("fc1", "attn.qkv"))]
    sparsify(model, "2:4", where(chosen, every))
    assert {name for name, _ in masked_layers(model)} == set(chosen)


def advised(*arguments):
    parser = argparse.ArgumentParser()
    advice.add_arguments(parser)
    parser.set_defaults(device=torch.device("cpu"), seed=0)
    advice.advise(parser.parse_args(arguments))


def test_the_command_measures_every_layer_and_admits_the_cpu(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    advised("--model", "uvit-tiny", "--seconds-per-layer", "0", "--out", str(out))
    text = capsys.readouterr().out
    assert "It says nothing about a GPU" in text
    assert len([line for line in text.splitlines() if line.startswith("in_blocks.0.")]) == 4
    rows = read(out)
    assert {r["suite"] for r in rows} == {"advice"}
    assert {r["kernel"] for r in rows} == {"linear", "conv", "network"}
    assert not [r for r in rows if r["status"] in ("wrong", "failed")]
    assert sum(r["layers"] for r in rows if r["provider"] == "dense" and r["kernel"] != "network") == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "uvit-gigantic"], "unknown model 'uvit-gigantic'"),
        (["--model", "uvit-tiny", "--batch", "0"], "--batch 0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        advised(*arguments)
