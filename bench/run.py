"""The suites, from the command line: `python -m bench.run --suite gemm --shapes square --out results.csv`.

    mask          choosing masks and packing: bytes moved against a plain cast
    masked-train  one masked linear layer, forward and forward with backward
    gemm          the 2:4 product against dense and against other libraries: in sweeps over sizes plain and with an
                  epilogue, and with our back ends forced one by one; of the layers of models with their own epilogues
    conv          the same for convolutions
    end-to-end    one sampler step, and whole sampling, of whole networks
    train         one training step of whole networks
    table3        the grid of SparseDM's speed table (arXiv 2404.10445): patch 1, 2, 4 x MLP ratio 1, 2, 4, 8
    ceiling       what the device can do at most: copies, dense products, tensor-core instructions

Rows are written as soon as they are measured. --resume goes on with the file, and skips what it already holds. If the
GPU hangs or is lost, the process starts itself again and goes on behind the provider that did it, which has failed;
one that was ended from outside, or had no time left, is measured the next time.
"""

import argparse
import functools
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from bench import ceilings, problems
from bench.baselines import PROVIDERS
from bench.measure import DeviceLost, measure, release
from bench.networks import (
    STEP_PROVIDERS,
    TRAINING_PROVIDERS,
    ModelShape,
    NetworkProblem,
    TrainingStepProblem,
    table3_shapes,
)
from bench.restart import Watch, start_again
from bench.results import IDENTITY, Results
from bench.sampling import sampling_mode, sampling_rows
from bench.shapes import BATCHES, MEASURED_MODELS, SWEEPS, ConvShape, LinearShape, select
from bench.timing import clock_for
from sparsedm.errors import InputError, program
from sparsedm.kernels.tuning import device_is_lost
from sparsedm.models import MODELS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYER_SUITES = {  # suite: (problem, kind of shape, shapes by default, shapes by default with --quick)
    "mask": (problems.MaskProblem, LinearShape, "square", "square"),
    "masked-train": (problems.TrainingProblem, LinearShape, "models", "square,uvit-tiny@4"),
    "gemm": (problems.LinearProblem, LinearShape, "square,m-sweep,grid,models", "square,m-sweep,grid,uvit-tiny@4"),
    "conv": (problems.ConvProblem, ConvShape, "models", "ddpm-tiny@4"),
}
NETWORK_SUITES = ("end-to-end", "train", "table3")
SUITES = (*LAYER_SUITES, *NETWORK_SUITES, "ceiling")


COMPILES = 60  # seconds that compiling a whole network takes at least


@dataclass
class Session:
    """What every suite is given. deadline: time.monotonic() after which nothing new is started. late: called when a
    provider is not ready in time."""

    results: Results
    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    shapes: str | None = None
    providers: tuple | None = None
    compiled: bool = True
    modes: tuple | None = None
    batches: tuple = BATCHES
    deadline: float = float("inf")
    late: Callable | None = None
    cut: int = 0  # problems that were left out for lack of time
    limits: dict = field(default_factory=dict)

    def __post_init__(self):
        self.clock = clock_for(self.device)
        default = {"rounds": 5, "per_round": 3, "seconds": 0.5} if self.quick else {"rounds": 8, "per_round": 5}
        self.limits = {"seconds": 10.0} | default | self.limits
        self.watch = Watch(self.late)

    def keep(self, providers):
        """Those that were asked for."""
        wanted = [p for p in providers if self.providers is None or p.name in self.providers]
        return [p for p in wanted if self.compiled or not p.name.endswith("compiled")]

    def modes_of(self, kind, shape):
        """The modes in which a layer suite measures this shape."""
        modes = kind.modes if shape.model in SWEEPS else kind.of_models or kind.modes
        return [mode for mode in modes if self.modes is None or mode in self.modes]

    def do(self, suite, shape, mode, providers, rows):
        """Add `rows(missing, starting)` to the results, for those providers that they do not hold yet, unless the time
        is up. starting: see `measure`."""
        dtype = str(self.dtype).removeprefix("torch.")
        identity = dict(zip(IDENTITY, (suite, shape.name, mode, dtype)))
        held = {row.get("provider", "") for row in self.results.matching(identity)}
        missing = [p for p in self.keep(providers) if p.name not in held]
        if not missing or "" in held:  # a row without a provider: the process ended here before
            return
        if time.monotonic() >= self.deadline:
            self.cut += 1
            return

        def starting(name, **other):
            compiled = name.endswith("compiled")
            needed = COMPILES if compiled and suite in NETWORK_SUITES else 0
            if name and time.monotonic() + needed >= self.deadline:
                self.cut += 1
                return False
            self.results.begin(identity | {"provider": name} | other)
            if self.late:
                self.watch.expect(patience(name))
            return True

        starting("")
        try:
            self.results.add(rows(missing, starting))
        except DeviceLost as lost:
            self.results.add([lost.row])
            raise
        except KeyboardInterrupt:  # nobody's failure
            self.results.add([])
            raise
        finally:
            self.watch.done()
        release(self.device)


def patience(provider):
    """Seconds that a provider may take to be ready, or if it has no name all of them to be timed, until it hangs."""
    if not provider:
        return 180
    return 480 if provider.endswith("compiled") else 75


def run_suite(suite, session, progress=False):
    """Measure one suite into session.results."""
    if suite in LAYER_SUITES:
        kind, shape_kind, full, quick = LAYER_SUITES[suite]
        spec = session.shapes or (quick if session.quick else full)
        shapes = select(spec, shape_kind, session.batches, session.quick)
        work = [(shape, mode) for shape in shapes for mode in session.modes_of(kind, shape)]
        for shape, mode in tqdm(work, desc=suite, disable=None if progress else True):
            measured = functools.partial(layer_rows, suite, kind, shape, mode, session)
            providers = [p for p in PROVIDERS[kind.kernel] if shape.model in SWEEPS or not p.sweeps]
            session.do(suite, shape, mode, providers, measured)
    elif suite in NETWORK_SUITES:
        shapes = table3_shapes(session.quick) if suite == "table3" else network_shapes(session)
        kind, providers = NetworkProblem, STEP_PROVIDERS
        if suite == "train":
            kind, providers = TrainingStepProblem, TRAINING_PROVIDERS
        for shape in tqdm(shapes, desc=suite, disable=None if progress else True):
            measured = functools.partial(network_rows, suite, kind, shape, kind.modes[0], session)
            session.do(suite, shape, kind.modes[0], providers, measured)
    elif suite == "ceiling":
        ceilings.run(session)
    else:
        raise InputError(f"unknown suite {suite!r}: one of {', '.join(SUITES)}")


def layer_rows(suite, kind, shape, mode, session, providers, starting):
    problem = kind(shape, mode, session.dtype, session.device)
    return measure(suite, problem, providers, session.clock, starting=starting, **session.limits)


def network_shapes(session):
    names = (session.shapes or ("uvit-tiny@4,ddpm-tiny@4" if session.quick else "models")).split(",")
    if names == ["models"]:
        names = list(MEASURED_MODELS)
    shapes = []
    for item in names:
        name, _, batch = item.strip().partition("@")
        if name not in MODELS or (batch and not batch.isdecimal()):
            raise InputError(f"--shapes {item!r}: a whole network is model@batch, the model one of {', '.join(MODELS)}")
        shapes += [ModelShape(name, b) for b in ([int(batch)] if batch else session.batches)]
    return shapes


def network_rows(suite, kind, shape, mode, session, providers, starting):
    problem = kind(shape, mode, session.dtype, session.device)
    rows = measure(suite, problem, providers, session.clock, packing=False, starting=starting, **session.limits)
    if suite == "end-to-end":
        session.results.add(rows)  # they are worth more than the samples, which take longer
        steps = 4 if session.quick else 50
        starting("", mode=sampling_mode(steps))
        able = {row["provider"] for row in rows if row["status"] == "ok" and row["method"] != "cuda events"}
        rows = sampling_rows(suite, problem, [p for p in providers if p.name in able], steps)
    return rows


@program("bench")
def main(arguments=None):
    """Returns the exit code: 0 done, 2 bad input, 3 some of it left out: --seconds were over, or it was ended."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as from the keyboard
    try:
        return run(options, arguments)
    except KeyboardInterrupt:
        print("bench: ended; the same command with --resume goes on", file=sys.stderr)
        return 3
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options, arguments):
    """Run the suites that the parsed command line `arguments` asks for. Returns the exit code 0 or 3."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    deadline = time.monotonic() + options.seconds

    def again():
        left = max(0.0, deadline - time.monotonic())
        start_again("bench.run", [*arguments, "--resume", "--seconds", f"{left:.0f}"])

    session = Session(
        Results(options.out, resume=options.resume),
        device,
        DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")],
        quick=options.quick,
        shapes=options.shapes,
        providers=tuple(options.providers.split(",")) if options.providers else None,
        compiled=not options.no_compile,
        modes=tuple(options.modes.split(",")) if options.modes else None,
        batches=tuple(options.batch or BATCHES),
        deadline=deadline,
        late=again if device.type == "cuda" else None,
    )
    known = {p.name for kernel in PROVIDERS.values() for p in kernel}
    known |= {p.name for p in STEP_PROVIDERS + TRAINING_PROVIDERS}
    if unknown := set(session.providers or ()) - known:
        raise InputError(f"unknown providers {', '.join(sorted(unknown))}: they are {', '.join(sorted(known))}")
    modes = {mode for kind, *_ in LAYER_SUITES.values() for mode in kind.modes}
    if unknown := set(session.modes or ()) - modes:
        raise InputError(f"unknown modes {', '.join(sorted(unknown))}: they are {', '.join(sorted(modes))}")
    try:
        for suite in options.suite.split(","):
            run_suite(suite, session, progress=True)
    except RuntimeError:
        if not device_is_lost(device):
            raise
        again()
    statuses = [row["status"] for row in session.results.rows]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    print(f"{session.results.path}: {len(statuses)} rows ({counts}); {session.cut} problems left out for time")
    return 3 if session.cut else 0


def parser():
    text = argparse.RawDescriptionHelpFormatter
    parsed = argparse.ArgumentParser("python -m bench.run", description=__doc__, formatter_class=text)
    add_arguments(parsed)
    parsed.add_argument("--device", help="(default: cuda if there is one, else cpu)")
    parsed.add_argument("--suite", required=True, help=f"one or several of {', '.join(SUITES)}")
    return parsed


def add_arguments(parsed):
    parsed.add_argument("--shapes", help="square, m-sweep, grid, square@SIZE, models, model@batch; several with commas")
    parsed.add_argument("--providers", help="measure only these, by the names in the results file, with commas")
    parsed.add_argument("--modes", help="only these of the layer suites, with commas, for example epilogue")
    parsed.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long to tune")
    parsed.add_argument("--batch", type=int, action="append", help="batch sizes of models (default: 1, 16 and 64)")
    parsed.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on a GPU, fp32 on a CPU)")
    parsed.add_argument("--quick", action="store_true", help="small shapes and few rounds: minutes on a CPU")
    parsed.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after this long")
    parsed.add_argument("--out", default="bench-results.csv", help="results file (default: %(default)s)")
    parsed.add_argument("--resume", action="store_true", help="continue the results file, skipping what it holds")


if __name__ == "__main__":
    sys.exit(main())
