"""Search for strategies (which network at which step, see `family.py`) by evolution.

    DDSM       minimise quality + weight * cost                     (DDSM, arXiv 2310.03337; `weight` is a number)
    NSGA-II    find the whole front of (quality, cost) at once      (Deb et al. 2002; `weight` is None)

quality is any function of a strategy; less is better, such as a sampled Fréchet distance. Both methods start from all
uniform strategies, given ones, and random ones. Both use one-point crossover and replace single steps at random. pymoo
runs them. All evaluations are stored, and the front is taken from all of them.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sparsedm.errors import InputError
from sparsedm.files import append_json_line, read_json_lines

RECORD = {"indices": list, "quality": float, "seconds": float}  # a record of Evaluations' file, in addition to the cost


@dataclass(frozen=True)
class SearchOptions:
    """How to search. The defaults are DDSM's. Its weight on CIFAR-10 was 0.1 per GFLOP of a mean step. For a cost in
    MACs of a whole image (half as many as FLOPs, and summed over the steps) this is 2e-10 / steps."""

    population: int = 50
    generations: int = 10  # including the first
    mutation: float | None = None  # probability per step; None: one step of each strategy is drawn anew
    weight: float | None = None  # weight of the cost, for DDSM; None: NSGA-II
    seed: int = 0

    def __post_init__(self):
        rules = {
            "population": (self.population >= 2, "at least 2"),
            "generations": (self.generations >= 1, "at least 1"),
            "mutation": (self.mutation is None or 0 <= self.mutation <= 1, "from 0 to 1"),
            "weight": (self.weight is None or 0 <= self.weight < math.inf, "at least 0, and finite"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InputError(f"search option {name}={getattr(self, name)!r}: must be {rule}")


@dataclass(frozen=True, order=True)
class Evaluation:
    """An evaluated strategy: its cost, its quality (less is better), and the network of each step."""

    cost: float
    quality: float
    indices: tuple


class Evaluations:
    """Calls `measure(indices) -> quality` once per strategy and stores the result in a file, one JSON record per line.

    So the same call continues an interrupted search: the stored results are looked up. cost: indices -> number.
    file: None: store in memory only. An incomplete last line is dropped. workers: threads that measure at the same
    time. Each measurement uses one thread, so the bits do not depend on the number of workers (on all cores torch sums
    in another order).
    """

    def __init__(self, measure, cost, file=None, workers=1):
        if workers < 1:
            raise InputError(f"workers is {workers}: at least 1 is needed")
        self.measure, self.cost, self.file, self.workers = measure, cost, file and Path(file), workers
        self.known, self.asked = {}, 0  # indices -> quality; the number of measurements in this session
        self.seconds = 0.0  # of measuring, over all workers and sessions
        for number, record in enumerate(read_json_lines(self.file, **RECORD) if self.file else (), 1):
            if not all(type(index) is int for index in record["indices"]):
                raise InputError(f"{self.file} is damaged in line {number}: indices must be whole numbers")
            self.known[tuple(record["indices"])] = float(record["quality"])
            self.seconds += record["seconds"]

    def __call__(self, indices):
        """The Evaluation of a strategy. Raises InputError if its quality is not a finite number."""
        [evaluation] = self.each([indices])
        return evaluation

    def each(self, strategies):
        """Yield the Evaluation of each strategy, in order. Raises like a call.

        After a failure or an interruption the measurements in progress are finished and stored.
        """
        strategies = [tuple(int(index) for index in indices) for indices in strategies]
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        unknown = [indices for indices in dict.fromkeys(strategies) if indices not in self.known]
        measured = {indices: pool.submit(self._timed, indices) for indices in unknown}
        try:
            for indices in strategies:
                if indices in measured:
                    self._remember(indices, *measured.pop(indices).result())
                yield Evaluation(self.cost(indices), self.known[indices], indices)
        finally:
            pool.shutdown(cancel_futures=True)
            for indices, future in measured.items():
                if not future.cancelled() and not future.exception():
                    self._remember(indices, *future.result())

    def _timed(self, indices):
        start = time.perf_counter()
        quality = float(self.measure(indices))
        if not math.isfinite(quality):
            raise InputError(f"the strategy {indices} has the quality {quality}: that is not a finite number")
        return quality, time.perf_counter() - start

    def _remember(self, indices, quality, seconds):
        self.asked, self.seconds = self.asked + 1, self.seconds + seconds
        self.known[indices] = quality
        if self.file:
            record = {"indices": indices, "quality": quality, "cost": self.cost(indices), "seconds": seconds}
            append_json_line(self.file, record)

    def all(self):
        """All Evaluations, in the order in which they were made."""
        return list(self.each(list(self.known)))


def search(evaluate, networks, steps, options, *, start=(), progress=False):
    """Evolve strategies of `steps` indices below `networks`. Returns each Evaluation made or looked up once.

    evaluate: an `Evaluations`. start: strategies of the first generation, in addition to the uniform ones; random ones
    fill the rest.
    Raises: InputError if the population is smaller than these or larger than the number of strategies, or if pymoo is
    not installed.
    """
    first = first_generation(networks, steps, options, start)
    check_installed()
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.pntx import SinglePointCrossover
    from pymoo.optimize import minimize

    tried, rate = {}, options.mutation if options.mutation is not None else 1 / steps
    bar = tqdm(total=options.population * options.generations, desc="search", disable=None if progress else True)

    class Strategies(Problem):
        def __init__(self):
            super().__init__(n_var=steps, n_obj=2 if options.weight is None else 1, xl=0, xu=networks - 1, vtype=int)

        def _evaluate(self, strategies, out, *args, **kwargs):
            found = []
            for evaluation in evaluate.each(strategies):
                found.append(evaluation)
                tried[found[-1].indices] = found[-1]
                bar.update()
                bar.set_postfix_str(best_so_far(tried.values(), options.weight), refresh=False)
            pairs = np.array([(e.quality, e.cost) for e in found])
            out["F"] = pairs if options.weight is None else pairs @ [1, options.weight]

    class ResetSteps(Mutation):
        def _do(self, problem, strategies, random_state=None, **kwargs):
            anew = random_state.integers(networks, size=strategies.shape)
            return np.where(random_state.random(strategies.shape) < rate, anew, strategies)

    algorithm = (NSGA2 if options.weight is None else GA)(
        pop_size=options.population, sampling=first, crossover=SinglePointCrossover(), mutation=ResetSteps()
    )
    with bar:
        minimize(Strategies(), algorithm, ("n_gen", options.generations), seed=options.seed)
    return list(tried.values())


def check_installed():
    """Raise InputError if pymoo is not installed."""
    try:
        import pymoo.optimize  # noqa: F401
    except ImportError as error:
        raise InputError("the search needs pymoo: pip install 'sparsedm[search]'") from error


def first_generation(networks, steps, options, start=()):
    """int (population, steps): the uniform strategies, the strategies of `start`, and random ones, all different.

    Raises: InputError if there is nothing to choose, or no population of this size.
    """
    if networks < 2 or steps < 2:
        raise InputError(f"with {networks} network and {steps} steps there is nothing to search: 2 of each are needed")
    given = dict.fromkeys([(index,) * steps for index in range(networks)] + [tuple(s) for s in start])
    if options.population < len(given):
        raise InputError(
            f"a population of {options.population} is too small: the {networks} uniform strategies and "
            f"{len(given) - networks} given ones belong to the first generation"
        )
    if options.population > networks**steps:
        raise InputError(
            f"a population of {options.population} is more than the {networks**steps} strategies there are"
        )
    random = np.random.default_rng(options.seed)
    while len(given) < options.population:
        given.setdefault(tuple(random.integers(networks, size=steps).tolist()))
    return np.array(list(given))


def front(evaluations):
    """The Evaluations that no other one beats in quality and cost, cheapest first. Of equal ones the first."""
    best, found = math.inf, []
    for evaluation in sorted(evaluations, key=lambda e: (e.cost, e.quality)):
        if evaluation.quality < best:
            best = evaluation.quality
            found.append(evaluation)
    return found


def best_of(evaluations, weight):
    """The Evaluation of least quality + weight * cost, which a search with a weight is for; None without a weight."""
    return None if weight is None else min(evaluations, key=lambda e: (e.quality + weight * e.cost, e.cost))


def best_so_far(evaluations, weight):
    """A text for the progress bar."""
    if weight is None:
        found = front(evaluations)
        return f"front of {len(found)}, quality {found[-1].quality:.4g} to {found[0].quality:.4g}"
    best = best_of(evaluations, weight)
    return f"best quality {best.quality:.4g} at cost {best.cost:.4g}"


def proxy_optima(table, costs):
    """The strategies that minimise Σ table[index, step] + λ costs[index, step] for some λ >= 0, costliest first.

    table, costs (networks, steps). The sum is additive, so each step is minimised alone. The result is the exact convex
    hull of the proxy's front: good strategies to start a search with a better measure.
    """
    table, costs = np.asarray(table, dtype=float), np.asarray(costs, dtype=float)
    gain, saving = table[:, None] - table[None], costs[None] - costs[:, None]  # of choosing b (axis 1) over a (axis 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        prices = np.unique((gain / saving)[(saving > 0) & (gain > 0)])
    between = np.concatenate([[0.0], (prices[1:] + prices[:-1]) / 2, prices[-1:] * 2])
    return list(dict.fromkeys(tuple(np.argmin(table + price * costs, 0).tolist()) for price in between))


def rank_correlation(a, b):
    """Spearman's ρ of two lists of numbers. Equal numbers share their mean rank. NaN if a list is constant."""
    ranks = [np.searchsorted(np.sort(v), v, "left") + np.searchsorted(np.sort(v), v, "right") for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(rank) for rank in ranks) else math.nan
