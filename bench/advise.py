"""`sparsedm bench --model NAME --batch B`: would 2:4 make these layers faster on this device?

Measures every distinct layer shape of the model, dense (eager and, on a GPU, compiled) against our 2:4 product with the
layer's own epilogue; then the whole network dense, and with the recommended layers 2:4.
"""

import collections
import re
from dataclasses import replace

import torch
from tqdm import tqdm

from bench import problems
from bench.baselines import PROVIDERS
from bench.measure import measure, release
from bench.networks import STEP_PROVIDERS, ModelShape, NetworkProblem
from bench.providers import OURS
from bench.results import DENSE, Results
from bench.run import DTYPES
from bench.shapes import LinearShape, trace
from bench.timing import clock_for
from sparsedm.errors import InputError
from sparsedm.models import build_model

SUITE = "advice"
WORTH = 1.02  # recommend a layer that gains at least this factor: less is within the noise
ON_A_CPU = """This was measured on a CPU, which has no sparse tensor cores: there 2:4 weights are decompressed for every
product, and a gain is an accident or noise. It says nothing about a GPU."""


def advise(options):
    """The command `sparsedm bench`: measure, print the table and the recommendation, write the rows if asked to."""
    if options.batch < 1:
        raise InputError(f"--batch {options.batch}: must be at least 1")
    dtype = DTYPES[options.dtype or ("bf16" if options.device.type == "cuda" else "fp32")]
    torch.manual_seed(options.seed)
    results = Results(options.out) if options.out else None
    limits = {"rounds": 8, "per_round": 3, "seconds": options.seconds_per_layer}
    groups = layer_groups(options.model, options.batch)
    layers = [
        _measured(shape, names, dtype, options.device, limits) for shape, names in tqdm(groups.items(), disable=None)
    ]
    chosen = recommended(layers)
    network = network_rows(options.model, options.batch, dtype, options.device, chosen, limits)
    if results:
        results.add([row for layer in layers for row in layer.rows] + network)
    print(report(options.model, options.batch, options.device, layers, network, chosen))


class Layer:
    """What was measured of all layers of one shape. dense, ours: microseconds of one call, None if it did not run."""

    def __init__(self, shape, names, rows):
        self.shape, self.names, self.rows = shape, names, rows
        times = {r["provider"]: r["p50_us"] for r in rows if r["metric"] == "time" and r["status"] == "ok"}
        self.dense = min((times[name] for name in DENSE if name in times), default=None)
        self.ours = times.get(OURS)
        mine = next(r for r in rows if r["provider"] == OURS and r["metric"] == "time")
        self.note = mine.get("reason") or mine.get("detail", "")

    @property
    def speedup(self):
        return self.dense / self.ours if self.dense and self.ours else None

    @property
    def gain(self):
        """Microseconds that one step saves with all layers of this shape in 2:4; negative where it loses."""
        return len(self.names) * (self.dense - self.ours) if self.speedup else 0.0


def layer_groups(model, batch):
    """{shape: names of the layers that have it}, in the order in which they run."""
    groups = collections.defaultdict(list)
    for name, shape in trace(build_model(model, device="meta"), f"{model}@{batch}", batch):
        groups[replace(shape, layer="")].append(name)
    return {replace(shape, layer=names[0], layers=len(names)): names for shape, names in groups.items()}


def _measured(shape, names, dtype, device, limits):
    kind, mode = (
        (problems.LinearProblem, "epilogue") if isinstance(shape, LinearShape) else (problems.ConvProblem, "plain")
    )
    providers = [p for p in PROVIDERS[kind.kernel] if p.name in (*DENSE, OURS)]
    found = measure(SUITE, kind(shape, mode, dtype, device), providers, clock_for(device), packing=False, **limits)
    rows = [row for rows in found for row in rows]
    release(device)
    return Layer(shape, names, rows)


def recommended(layers):
    """The names of the layers that 2:4 makes faster here."""
    return [name for layer in layers if (layer.speedup or 0) >= WORTH for name in layer.names]


def network_rows(model, batch, dtype, device, chosen, limits):
    """Rows of one step of the whole network: dense, and if there are any with the chosen layers compressed."""
    problem = NetworkProblem(ModelShape(model, batch), "step", dtype, device, where=chosen or None)
    wanted = [p for p in STEP_PROVIDERS if not p.sparse or (chosen and p.name.startswith(OURS))]
    found = measure(SUITE, problem, wanted, clock_for(device), packing=False, **limits)
    return [row for rows in found for row in rows]


def where(chosen, every):
    """A regular expression for `sparsify` that selects exactly the names `chosen` among `every`, or their list."""
    parts = [[r"\d+" if part.isdecimal() else re.escape(part) for part in name.split(".")] for name in chosen]
    forms = dict.fromkeys(r"\.".join(form) for form in parts)
    expression = f"^({'|'.join(forms)})$"
    return expression if {name for name in every if re.search(expression, name)} == set(chosen) else list(chosen)


def report(model, batch, device, layers, network, chosen):
    """The table, the step of the whole network, and the recommendation, as text."""
    row = network[0]
    parts = [table(layers), f"{model}, batch {batch}, {row['dtype']}, on {row['device']}", step_lines(layers, network)]
    if chosen:
        expression = where(chosen, [name for layer in layers for name in layer.names])
        parts.append(f'Recommended:\n    sparsedm.sparsify(model, "2:4", where={expression!r})')
    else:
        parts.append(f"Recommended: leave every layer dense for speed; 2:4 gains {WORTH}x in none of them here.")
    if device.type == "cpu":
        parts.append(ON_A_CPU)
    return "\n\n".join(parts)


def table(layers):
    head = ("layer", "count", "M", "N", "K", "dense us", "2:4 us", "speed-up", "2:4?", "computed by / why not")
    body = [_line(layer) for layer in layers]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rows = [head, tuple("-" * w for w in widths), *body]
    return "\n".join("  ".join(_aligned(*column) for column in zip(range(10), row, widths)).rstrip() for row in rows)


def step_lines(layers, network):
    """One step of the network: dense as measured, with the recommended layers 2:4 by the table and as measured."""
    times = {r["provider"]: r["p50_us"] / 1e3 for r in network if r["metric"] == "time" and r["status"] == "ok"}
    dense = min((time for name, time in times.items() if name in DENSE), default=None)
    if dense is None:
        return f"one step could not be timed: {network[0].get('reason', '')}"
    ours = min((time for name, time in times.items() if name.startswith(OURS)), default=None)
    gain = sum(layer.gain for layer in layers if (layer.speedup or 0) >= WORTH) / 1e3
    lines = [f"one step, dense:           {dense:10.3f} ms (measured, the fastest of eager and compiled)"]
    if gain:
        lines.append(
            f"with 2:4 where it gains:   {dense - gain:10.3f} ms ({dense / (dense - gain):.2f}x, by the table)"
        )
    if ours:
        lines.append(f"the same, measured:        {ours:10.3f} ms ({dense / ours:.2f}x)")
    return "\n".join(lines)


def _line(layer):
    def time(value):
        return "" if value is None else f"{value:,.1f}"

    shape, speedup = layer.shape, layer.speedup
    verdict = "" if speedup is None else "yes" if speedup >= WORTH else "no"
    sizes = (str(shape.M), str(shape.N), str(shape.K))
    ratio = "" if speedup is None else f"{speedup:.2f}x"
    return (shape.layer, str(len(layer.names)), *sizes, time(layer.dense), time(layer.ours), ratio, verdict, layer.note)


def _aligned(column, cell, width):
    return cell.ljust(width) if column in (0, 8, 9) else cell.rjust(width)


def add_arguments(sub):
    """The options of `sparsedm bench`, beyond those that every command has."""
    sub.add_argument("--model", required=True, metavar="NAME", help="a model preset, as for `sparsedm inspect`")
    sub.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    sub.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on a GPU, fp32 on a CPU)")
    sub.add_argument("--seconds-per-layer", type=float, default=2.0, help="time for each shape (default: 2)")
    sub.add_argument("--out", metavar="CSV", help="also write every measurement to this file")
