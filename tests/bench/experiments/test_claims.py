"""Verdicts by thresholds that were written before any run: on made-up numbers, one claim at a time."""

import pytest

from bench.experiments import claims
from tests.bench.experiments.tiny_plan import planned

THIRD = claims.THIRD


def verdict(number, runs):
    """(verdict, what was said) of claim `number`. runs: {name: (losses, distances)}, one number per seed."""
    values = {}
    for run, measures in runs.items():
        for measure, numbers in zip((claims.LOSS, claims.DISTANCE, claims.SPEED), measures):
            values[run, measure] = dict(enumerate([(None, n)] for n in numbers))
    return claims.verdicts(values)[number][1:]


def both(chain, straight=(1, 1), distances=(1, 1)):
    return {f"{p} {name}": (losses, distances if name == "chain" else (1, 1))
            for p in ("2:4", "1:8") for name, losses in (("chain", chain), ("straight", straight))}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "runs", "expected"),
    [
        (0, both((0.99, 0.98)), "confirmed"),
        (0, both((0.99, 0.98), distances=(1, 1.05)), "undecided"),
        (0, both((0.99, 1.01)), "undecided"),
        (0, both((1.01, 1.02)), "refuted"),
        (0, both((1.001, 1.001)), "undecided"),
        (0, {"1:8 chain": ((0.9,), (1,))}, "not run"),
        (2, {"1:8 in place": ((1.01, 1.02), (1.05, 1.06)), "1:8 chain": ((1, 1), (1, 1))}, "confirmed"),
        (2, {"1:8 in place": ((1.001, 0.9), (1.03, 0.9)), "1:8 chain": ((1, 1), (1, 1))}, "refuted"),
        (2, {"1:8 in place": ((1.01, 1.02), (1.03, 1.06)), "1:8 chain": ((1, 1), (1, 1))}, "undecided"),
        (3, {"2:4 straight": ((1.004, 1.0), (1.03, 0.9)), "dense": ((1, 1), (1, 1))}, "confirmed"),
        (3, {"2:4 straight": ((1.004, 1.0), (1.05, 1.05)), "dense": ((1, 1), (1, 1))}, "refuted"),
        (3, {"2:4 straight": ((1.004, 1.0), (1.05, 1.03)), "dense": ((1, 1), (1, 1))}, "undecided"),
    ],
)
def test_verdicts(number, runs, expected):
    assert verdict(number, runs)[0] == expected


def test_a_seed_without_its_runs_decides_nothing():
    runs = {"2:4 straight": ((1.0,), (1.0,)), "dense": ((1, 1), (1, 1))}
    assert verdict(3, runs)[0] == "undecided"
    assert verdict(3, runs | {"2:4 straight": ((1.0, 1.0), (1, 1))})[0] == "confirmed"


def test_other_seeds_than_the_planned_decide_nothing():
    for seeds, verdict in (({0, 1}, "confirmed"), ({0, 1, 2}, "confirmed"), ({0, 2}, "undecided")):
        assert claims._verdict(lambda seed: True, lambda seed: False, seeds, {0, 1}) == verdict


def test_one_seed_decides_nothing_and_the_table_says_so():
    runs = {"2:4 straight": ((1.0,), (1.0,)), "dense": ((1,), (1,))}
    assert verdict(3, runs)[0] == "undecided"
    values = {("dense", claims.LOSS): {4: [(None, 1.0)]}}
    assert claims.table(values).endswith("A verdict needs 2 seeds; these runs have 1.")
    values["chain", claims.LOSS] = {5: [(None, 1.0)]}
    assert "needs 2 seeds" not in claims.table(values)


def test_the_seeds_are_those_of_all_runs():
    """Without a dense run, too."""
    names = "activations 2:4, first block dense", "2:4 straight, first block dense"
    runs = {name: ((loss, loss), (1, 1)) for name, loss in zip(names, (0.9, 1.0))}
    assert verdict(4, runs)[0] == "confirmed"
    assert verdict(4, runs | {"2:4 asp": ((1, 1, 1), (1, 1, 1))})[0] == "undecided"


def test_changes_are_said_in_the_order_of_the_seeds():
    values = {(run, claims.LOSS): {seed: [(None, 1 + seed * more)] for seed in (1, 0)}
              for run, more in (("a", 0.5), ("b", 0.0))}  # fmt: skip
    assert claims._Compare(values).said("a", "b") == "a against b: +0.00%, +50.00%, -"


def test_fewer_samples_than_the_thresholds_are_of_are_said():
    values = {("dense", "samples"): {0: [(None, 2000.0)], 1: [(None, 2000.0)]}}
    assert claims.table(values).endswith("fixed for distances of 5,000 samples; these have 2,000.")
    values["dense", "samples"] = {0: [(None, 5000.0)]}
    assert "fixed" not in claims.table(values)


@pytest.mark.parametrize(("short", "said"), [((1.03, 1.03), True), ((1.03, 1.015), False), ((1.03,), False)])
def test_a_chain_that_lacks_images_is_said_to(short, said):
    runs = both((1.01, 1.01)) | {f"1:8 chain{THIRD}": (short, (1, 1)), f"1:8 straight{THIRD}": ((1, 1), (1, 1))}
    assert any("a matter of budget" in line for line in verdict(0, runs)[1]) == said


@pytest.mark.parametrize(
    ("gain", "slope", "expected"),
    [(0.002, 1.0, "confirmed"), (0.002, 1.05, "refuted"), (0.0007, 1.0, "undecided"), (0.0003, 1.0, "refuted")],
)
def test_a_teacher_must_be_worth_its_time(gain, slope, expected):
    """A third of the images costs `slope` in loss; the teacher takes 1.3 times the time, which buys ln 1.3 / ln 3."""
    runs = {f"1:8 straight{THIRD}": ((slope * (1 - gain),) * 2, (1, 1), (1, 1))}
    for p in ("2:4", "1:8"):
        runs |= {f"{p} straight": ((1 - gain,) * 2, (1, 1), (100, 100))}
        runs |= {f"{p} straight, no teacher": ((1, 1), (1, 1), (130, 130))}
    assert verdict(1, runs)[0] == expected
    del runs[f"1:8 straight{THIRD}"]  # without it the teacher's time has no price
    assert verdict(1, runs)[0] == "undecided"


@pytest.mark.parametrize(("loss", "expected"), [(0.99, "confirmed"), (1.01, "refuted"), (1.001, "undecided")])
def test_activations_against_weights(loss, expected):
    names = "activations 2:4, first block dense", "2:4 straight, first block dense"
    assert verdict(4, {names[0]: ((loss, loss), (1, 1)), names[1]: ((1, 1), (1, 1))})[0] == expected


def test_the_plan_holds_every_run_that_a_verdict_asks_for():
    asked = []

    class Asks(dict):
        def get(self, key, default=None):
            asked.append(key[0])
            return {0: [(None, 5000.0)]}

    text = claims.table(Asks())
    assert sum(line.startswith("|") for line in text.splitlines()) == 7
    assert set(asked) <= {run.name for run in planned("claims", "cpu")[2]}


ONES = (1, 1)

TAUGHT = {f"{p} straight{more}": (ONES, ONES, (100, 100)) for p in ("2:4", "1:8") for more in ("", ", no teacher")}


@pytest.mark.parametrize(
    ("number", "runs", "expected"),
    [
        (0, both((1.01, 1.02)) | {"2:4 chain": (ONES, ONES)}, "undecided"),
        (0, both((0.99, 0.98)) | {"2:4 chain": (ONES, ONES)}, "undecided"),
        (
            1,
            TAUGHT | {f"1:8 straight{THIRD}": (ONES, ONES), "2:4 straight": ((0.99, 0.99), ONES, (100, 100))},
            "undecided",
        ),
        (2, {"1:8 in place": ((1.001, 1.002), (1.05, 1.06)), "1:8 chain": (ONES, ONES)}, "undecided"),
        (3, {"2:4 straight": ((1.006, 1.2), (1.0, 0.9)), "dense": (ONES, ONES)}, "refuted"),
    ],
)
def test_every_part_of_a_rule_counts(number, runs, expected):
    """Both patterns, and the loss and the distance: each alone decides nothing, or refutes."""
    assert verdict(number, runs)[0] == expected
