"""The claims of the papers, and the rules by which the experiment `claims` confirms or refutes them.

A comparison is between two runs of one seed: the same dense network, batches and noise. A claim is confirmed or refuted
only if every seed says so, and there are two at least. Otherwise, or if a run is missing in a seed, it is undecided.
The thresholds stand here (CLEAR, FAR, and the docstring of each claim). They were fixed before the runs, for scale
`cpu`: there losses resolve 0.15% at 2:4 and 0.5% at 1:8, and Fréchet distances, of SAMPLES samples, 4%.
"""

import math
import statistics

LOSS, DISTANCE = "validation loss", "Fréchet distance"
CLEAR = {"2:4": 0.0015, "1:8": 0.005}  # relative loss
FAR = 0.04  # relative Fréchet distance
SAMPLES = 5000
SEEDS = 2  # that a verdict needs at least
SPEED = "training images per second"  # the total of seconds holds pauses and other work of the machine
THIRD = ", a third of the images"


def table(values, scale="cpu"):
    """Markdown: each claim, its verdict, and its numbers. values: {(run, measure): {seed: [(x, value)]}}."""
    lines = [f"| {claim} | {verdict} | {'; '.join(said)} |" for claim, verdict, said in verdicts(values)]
    text = "\n".join(["| claim | verdict | loss, Fréchet distance: change, by seed |", "|---|---|---|", *lines])
    compare = _Compare(values)
    if scale != "cpu":
        text += f"\n\nThe thresholds were fixed for scale cpu; at scale {scale} these verdicts are no more than hints."
    if len(compare.seeds()) < SEEDS:
        text += f"\n\nA verdict needs {SEEDS} seeds; these runs have {len(compare.seeds())}."
    fewest = min(compare.numbers("dense", "samples").values(), default=SAMPLES)
    if fewest < SAMPLES:
        text += f"\n\nThe thresholds were fixed for distances of {SAMPLES:,} samples; these have {fewest:,.0f}."
    return text


def verdicts(values):
    """[(claim, "confirmed" | "refuted" | "undecided" | "not run", [numbers])]"""
    compare = _Compare(values)
    return [
        ("a chain of students beats going straight", *_chain(compare)),
        ("a dense teacher helps", *_teacher(compare)),
        ("raising the sparsity inside one network fails", *_in_place(compare)),
        ("2:4 keeps the quality", *_quality(compare)),
        ("activations tolerate 2:4 better than weights (RT-Lynx)", *_activations(compare)),
    ]


class _Compare:
    """Relative changes of one run against another, seed by seed, and their description."""

    def __init__(self, values):
        self.values = values

    def __call__(self, run, other, measure=LOSS):
        """{seed: run / other - 1} of the seeds that have both."""
        mine, theirs = self.numbers(run, measure), self.numbers(other, measure)
        return {seed: mine[seed] / theirs[seed] - 1 for seed in sorted(mine) if theirs.get(seed)}

    def seeds(self):
        """The seeds of all runs."""
        return {seed for (_, measure), found in self.values.items() if measure == LOSS for seed in found}

    def numbers(self, run, measure):
        return {seed: points[0][1] for seed, points in self.values.get((run, measure), {}).items()}

    def said(self, run, other):
        both = [", ".join(f"{c:+.2%}" for c in self(run, other, m).values()) or "-" for m in (LOSS, DISTANCE)]
        return f"{run} against {other}: {both[0]}, {both[1]}"


def _verdict(confirmed, refuted, seeds, planned):
    """seeds: those that have the runs of the claim. planned: those that should."""
    if not seeds:
        return "not run"
    if len(planned) < SEEDS or not planned <= set(seeds):
        return "undecided"
    return "confirmed" if all(map(confirmed, seeds)) else "refuted" if all(map(refuted, seeds)) else "undecided"


def _chain(compare):
    """Confirmed: less loss, clearly and for both patterns, and under 4% more distance; refuted: clearly more loss."""
    pairs = {
        p: (compare(f"{p} chain", f"{p} straight"), compare(f"{p} chain", f"{p} straight", DISTANCE)) for p in CLEAR
    }
    seeds = set.intersection(*(set(losses) for losses, _ in pairs.values()))

    def better(seed):
        return all(losses[seed] < -CLEAR[p] and distances[seed] < FAR for p, (losses, distances) in pairs.items())

    def worse(seed):
        return all(losses[seed] > CLEAR[p] for p, (losses, _) in pairs.items())

    verdict = _verdict(better, worse, seeds, compare.seeds())
    said = [compare.said(f"{p} chain", f"{p} straight") for p in CLEAR]
    short, long = compare(f"1:8 chain{THIRD}", f"1:8 straight{THIRD}"), pairs["1:8"][0]
    both = set(short) & set(long)
    if both:
        said.append(compare.said(f"1:8 chain{THIRD}", f"1:8 straight{THIRD}"))
        if verdict == "refuted" and both >= compare.seeds() and all(short[seed] > 2 * long[seed] for seed in both):
            said.append("the gap shrinks by more than half with three times the images: a matter of budget")
    return verdict, said


def _teacher(compare):
    """Confirmed: 0.1% less loss, and more than the teacher's time buys; refuted: under 0.05%, or less than that."""
    pairs = [(f"{p} straight", f"{p} straight, no teacher") for p in CLEAR]
    gains = [{seed: -change for seed, change in compare(*pair).items()} for pair in pairs]
    seeds, bought = set.intersection(*map(set, gains)), _bought_by_time(compare, pairs)
    verdict = "undecided"
    if seeds <= set(bought):
        verdict = _verdict(
            lambda seed: all(gain[seed] > max(0.001, bought[seed]) for gain in gains),
            lambda seed: all(gain[seed] < max(0.0005, bought[seed]) for gain in gains),
            seeds,
            compare.seeds(),
        )
    said = [compare.said(*pair) for pair in pairs]
    if bought:
        said.append(f"its time buys {', '.join(f'{share:.2%}' for share in bought.values())} of the loss")
    return verdict, said


def _bought_by_time(compare, pairs):
    """{seed: the share of the loss that more training in the teacher's time would save}, by the slope over images."""
    slope = compare(f"1:8 straight{THIRD}", "1:8 straight")
    longer = [compare(alone, taught, SPEED) for taught, alone in pairs]
    found = {}
    for seed, fall in slope.items():
        more = [1 + times[seed] for times in longer if times.get(seed, -1) > -1]
        if more:
            found[seed] = max(0.0, math.log(1 + fall) / math.log(3) * math.log(statistics.fmean(more)))
    return found


def _in_place(compare):
    """Confirmed: 4% more distance and 0.5% more loss than the chain; refuted: neither."""
    losses, distances = (compare("1:8 in place", "1:8 chain", measure) for measure in (LOSS, DISTANCE))
    verdict = _verdict(
        lambda seed: losses[seed] > CLEAR["1:8"] and distances[seed] > FAR,
        lambda seed: losses[seed] <= CLEAR["1:8"] and distances[seed] <= FAR,
        losses,
        compare.seeds(),
    )
    return verdict, [compare.said("1:8 in place", "1:8 chain")]


def _quality(compare):
    """Confirmed: within 0.5% loss and 4% distance of the dense control. Refuted: outside."""
    losses, distances = (compare("2:4 straight", "dense", measure) for measure in (LOSS, DISTANCE))

    def within(seed):
        return losses[seed] <= 0.005 and distances[seed] <= FAR

    verdict = _verdict(within, lambda seed: not within(seed), losses, compare.seeds())
    return verdict, [compare.said("2:4 straight", "dense")]


def _activations(compare):
    pair = "activations 2:4, first block dense", "2:4 straight, first block dense"
    losses = compare(*pair)
    clear = CLEAR["2:4"]
    verdict = _verdict(lambda s: losses[s] < -clear, lambda s: losses[s] > clear, losses, compare.seeds())
    return verdict, [compare.said(*pair)]
