"""The search is proved on planted problems: additive quality and cost, where each step decides for itself."""

import itertools
import json
import math
import sys
import threading

import numpy as np
import pytest
import torch
from scipy import stats

from sparsedm.errors import InputError
from sparsedm.stepaware.search import (
    Evaluation,
    Evaluations,
    SearchOptions,
    best_so_far,
    first_generation,
    front,
    proxy_optima,
    rank_correlation,
    search,
)

NETWORKS, STEPS = 3, 8
COSTS = np.array([4.0, 2.0, 1.0])
TABLE = np.random.default_rng(0).random((NETWORKS, STEPS)).cumsum(0)  # a cheaper network is worse at every step


def measure(indices):
    return float(sum(TABLE[index, step] for step, index in enumerate(indices)))


def cost(indices):
    return float(sum(COSTS[index] for index in indices))


def optimum(weight):
    return tuple(np.argmin(TABLE + weight * COSTS[:, None], 0).tolist())


def dominated(one, others):
    return any(o.cost <= one.cost and o.quality <= one.quality and o != one for o in others)


def test_ddsm_finds_the_planted_optimum():
    options = SearchOptions(population=40, generations=30, weight=0.3, seed=1)
    tried = search(Evaluations(measure, cost), NETWORKS, STEPS, options)
    best = min(tried, key=lambda e: e.quality + 0.3 * e.cost)
    assert best.indices == optimum(0.3)
    assert set(best.indices) == set(range(NETWORKS))
    assert best.indices not in {tuple(s) for s in first_generation(NETWORKS, STEPS, options).tolist()}
    assert len(tried) == len({e.indices for e in tried}) <= 40 * 30


def test_the_weight_decides_what_survives():
    light, heavy = (
        search(Evaluations(measure, cost), NETWORKS, STEPS, SearchOptions(12, 8, weight=weight, seed=1))
        for weight in (0.0, 100.0)
    )
    assert {e.indices for e in light[:12]} == {e.indices for e in heavy[:12]}
    assert np.mean([e.cost for e in heavy[-12:]]) < np.mean([e.cost for e in light[-12:]])


def test_nsga2_finds_the_planted_front():
    """Every strategy of the true front, by trying all 3^8, is matched within 2 % of the front's own extent."""
    tried = search(Evaluations(measure, cost), NETWORKS, STEPS, SearchOptions(population=40, generations=25))
    found = front(tried)
    every = front(Evaluation(cost(s), measure(s), s) for s in itertools.product(range(NETWORKS), repeat=STEPS))
    extent = every[0].quality - every[-1].quality
    for best in every:
        rival = min(e.quality for e in found if e.cost <= best.cost)
        assert rival - best.quality <= 0.02 * extent, best


@pytest.mark.parametrize("weight", [None, 0.3])
def test_no_uniform_strategy_beats_the_front(weight):
    tried = search(Evaluations(measure, cost), NETWORKS, STEPS, SearchOptions(6, 2, weight=weight))
    uniform = [e for e in tried if len(set(e.indices)) == 1]
    assert len(uniform) == NETWORKS
    assert not any(dominated(e, uniform) for e in front(tried))
    assert not any(dominated(e, tried) for e in front(tried))


@pytest.mark.parametrize(("mutation", "mixed"), [(0.0, False), (1.0, True)])
def test_mutation_is_the_chance_that_a_step_is_drawn_anew(mutation, mixed):
    """Of uniform strategies, a crossover alone makes strategies that change their network once at most."""
    tried = search(Evaluations(measure, cost), NETWORKS, STEPS, SearchOptions(3, 2, mutation=mutation, seed=1))
    changes = [sum(a != b for a, b in itertools.pairwise(e.indices)) for e in tried]
    assert (max(changes) > 1) == mixed


def test_front_by_hand():
    a, b, c, d = Evaluation(1, 5, (0,)), Evaluation(2, 5, (1,)), Evaluation(3, 2, (2,)), Evaluation(2, 4, (3,))
    twin = Evaluation(3, 2, (4,))
    assert front([c, b, a, d, twin]) == [a, d, c]
    assert front([]) == []
    assert best_so_far([a, b, c, d], None) == "front of 3, quality 2 to 5"
    assert best_so_far([a, c, d], 1.5) == "best quality 5 at cost 1"


def test_the_first_generation():
    given = (0, 1) * 4
    first = first_generation(NETWORKS, STEPS, SearchOptions(population=6, seed=2), [given, (1,) * 8]).tolist()
    assert first[:4] == [[0] * 8, [1] * 8, [2] * 8, list(given)]
    assert len({tuple(s) for s in first}) == 6
    assert first == first_generation(NETWORKS, STEPS, SearchOptions(population=6, seed=2), [given]).tolist()
    assert first != first_generation(NETWORKS, STEPS, SearchOptions(population=6, seed=3), [given]).tolist()


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, 0.3])
def test_an_interrupted_search_goes_on(tmp_path, weight):
    options, calls = SearchOptions(12, 4, weight=weight, seed=5), []

    def stops(indices):
        if len(calls) == 20:
            raise KeyboardInterrupt
        calls.append(indices)
        return measure(indices)

    whole = search(Evaluations(measure, cost), NETWORKS, STEPS, options)
    with pytest.raises(KeyboardInterrupt):
        search(Evaluations(stops, cost, tmp_path / "log.jsonl"), NETWORKS, STEPS, options)
    resumed = Evaluations(measure, cost, tmp_path / "log.jsonl")
    assert search(resumed, NETWORKS, STEPS, options) == whole
    assert resumed.asked == len(whole) - 20
    again = Evaluations(stops, cost, tmp_path / "log.jsonl")
    assert search(again, NETWORKS, STEPS, options) == whole
    assert again.asked == 0
    assert again.all() == whole


def test_workers_change_neither_what_is_found_nor_its_order(tmp_path):
    together = threading.Barrier(2, timeout=30)  # passes only if two strategies are measured at once

    def slow(indices):
        together.wait()
        return measure(indices)

    first = [(0, 1), (1, 0), (0, 1), (2, 2), (0, 2)]
    both = Evaluations(slow, cost, tmp_path / "both.jsonl", workers=2)
    alone = Evaluations(measure, cost)
    assert list(both.each(first)) == [alone(indices) for indices in first]
    assert list(both.known) == list(alone.known) == first[:2] + first[3:]
    assert list(Evaluations(measure, cost, tmp_path / "both.jsonl").known) == list(alone.known)
    options = SearchOptions(12, 4, seed=5)
    whole = search(Evaluations(measure, cost), NETWORKS, STEPS, options)
    assert search(Evaluations(measure, cost, workers=3), NETWORKS, STEPS, options) == whole


def test_what_was_being_measured_when_a_search_was_interrupted_is_remembered(tmp_path):
    begun, interrupted = threading.Event(), threading.Event()

    def slow(indices):
        if indices == (0, 1):
            begun.wait(30)
            interrupted.set()
            raise KeyboardInterrupt
        begun.set()
        interrupted.wait(30)
        assert torch.get_num_threads() == 1
        return measure(indices)

    threads = torch.get_num_threads()
    evaluate = Evaluations(slow, cost, tmp_path / "log.jsonl", workers=2)
    with pytest.raises(KeyboardInterrupt):
        list(evaluate.each([(0, 1), (1, 0), (2, 2), (1, 1), (2, 0)]))
    kept = list(Evaluations(measure, cost, tmp_path / "log.jsonl").known)
    assert kept[0] == (1, 0)
    assert (0, 1) not in kept
    assert torch.get_num_threads() == threads, "the threads of the caller are its own"
    with pytest.raises(InputError, match="workers is 0: at least 1 is needed"):
        Evaluations(measure, cost, workers=0)


def test_a_record_cut_short_is_made_again(tmp_path):
    file, calls = tmp_path / "log.jsonl", []

    def counted(indices):
        calls.append(indices)
        return measure(indices)

    evaluate = Evaluations(counted, cost, file)
    first, second = evaluate((0, 1)), evaluate((1, 1))
    file.write_text(file.read_text()[:-4])
    again = Evaluations(counted, cost, file)
    assert [again((0, 1)), again((1, 1))] == [first, second]
    assert calls == [(0, 1), (1, 1), (1, 1)]
    assert [json.loads(line)["indices"] for line in file.read_text().splitlines()] == [[0, 1], [1, 1]]


def test_what_cannot_be_believed_is_refused(tmp_path):
    file = tmp_path / "log.jsonl"
    with pytest.raises(InputError, match=r"\(0, 1\) has the quality nan"):
        Evaluations(lambda indices: math.nan, cost, file)((0, 1))
    assert not file.exists()
    file.write_text('{"indices": [0, 1], "quality": 1.0, "seconds": 0.5}\nnonsense\n')
    with pytest.raises(InputError, match=r"log.jsonl, line 2, is damaged"):
        Evaluations(measure, cost, file)


# ---- the proxy -------------------------------------------------------------------------------------------------------


def test_proxy_optima_are_optimal_for_some_price_of_cost_and_all_are_there():
    costs = np.repeat(COSTS[:, None], STEPS, 1)
    found = proxy_optima(TABLE, costs)
    prices = np.concatenate([[0], np.geomspace(1e-3, 1e3, 2000)])
    assert {optimum(price) for price in prices} == set(found)
    assert [cost(s) for s in found] == sorted((cost(s) for s in found), reverse=True)
    assert (found[0], found[-1]) == ((0,) * 8, (2,) * 8)


def test_rank_correlation_is_spearmans():
    random = np.random.default_rng(0)
    a, b = random.integers(5, size=30), random.normal(size=30)  # a with many equal ones
    assert abs(rank_correlation(a, b) - stats.spearmanr(a, b).statistic) < 1e-12
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == -1
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("networks", "steps", "population", "start", "message"),
    [
        (3, 8, 2, (), "population of 2 is too small: the 3 uniform strategies and 0 given"),
        (3, 8, 4, [(0, 1) * 4, (1, 0) * 4], "population of 4 is too small: the 3 uniform strategies and 2 given"),
        (2, 2, 5, (), "population of 5 is more than the 4 strategies there are"),
        (1, 8, 5, (), "with 1 network and 8 steps there is nothing to search"),
        (3, 1, 3, (), "with 3 network and 1 steps there is nothing to search"),
    ],
)
def test_searches_that_cannot_be(networks, steps, population, start, message):
    with pytest.raises(InputError, match=message):
        search(Evaluations(measure, cost), networks, steps, SearchOptions(population), start=start)


@pytest.mark.parametrize(
    "option",
    [{"population": 1}, {"generations": 0}, {"mutation": 1.5}, {"weight": -1.0}, {"weight": math.inf}, {"seed": -1}],
)
def test_options_out_of_range(option):
    (name,) = option
    with pytest.raises(InputError, match=f"search option {name}="):
        SearchOptions(**option)


def test_without_pymoo_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.optimize", None)
    with pytest.raises(InputError, match=r"pip install 'sparsedm\[search\]'"):
        search(Evaluations(measure, cost), NETWORKS, STEPS, SearchOptions(6, 2))
