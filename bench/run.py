"""The suites, from the command line: `python -m bench.run --suite gemm --shapes square --out results.csv`.

    first         every configuration of our 2:4 product, and the libraries, also over a second without a pause
    mask          selecting masks and packing: bytes moved, against a plain cast
    masked-train  one masked linear layer, forward and forward with backward
    gemm          the 2:4 product against dense and against other libraries: in sweeps over sizes plain and with an
                  epilogue, and with our back ends forced one by one; of the layers of models with their own epilogues
    conv          the same for convolutions
    end-to-end    one sampler step, and whole sampling, of whole networks
    train         one training step of whole networks
    table3        the grid of SparseDM's speed table (arXiv 2404.10445): patch 1, 2, 4 x MLP ratio 1, 2, 4, 8,
                  as it was released and at the real width; steps, and sampling in 50 of them
    ceiling       the limits of the device: copies, dense products, tensor-core instructions
    cpu           on a CPU: five N:M patterns, convolutions, whole networks, a training step; with its own shapes

Rows are written as soon as they are measured. --resume continues the file and skips the rows that it holds. If the GPU
hangs or is lost, the provider has failed; the process restarts and continues with the next one. A provider that was
killed from outside, or had no time left, is measured the next time.
"""

import collections
import faulthandler
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from bench import ceilings, check_used, command_line, cpu, problems, program
from bench.baselines import PROVIDERS, first_providers
from bench.measure import BESIDE, measure, release, to_hold
from bench.networks import (
    STEP_PROVIDERS,
    TRAINING_PROVIDERS,
    ModelShape,
    NetworkProblem,
    TrainingStepProblem,
    sampling_mode,
    sampling_rows,
    table3_shapes,
)
from bench.results import DENSE, ENDED, IDENTITY, Results, stamp, timed
from bench.shapes import BATCHES, MEASURED_MODELS, SWEEPS, ConvShape, LinearShape, listed, select
from bench.suite import deadline, interruptible
from bench.timing import clock_for
from sparsedm.commands import options as types
from sparsedm.errors import InputError
from sparsedm.kernels.tuning import device_is_lost
from sparsedm.models import MODELS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYER_SUITES = {  # suite: (problem, kind of shape, shapes by default, shapes by default with --quick)
    "first": (problems.FirstProblem, LinearShape, "square@8192,square@4096", "square@256"),
    "mask": (problems.MaskProblem, LinearShape, "square", "square"),
    "masked-train": (problems.TrainingProblem, LinearShape, "models", "square,uvit-tiny@4"),
    "gemm": (problems.LinearProblem, LinearShape, "square,m-sweep,grid,models", "square,m-sweep,grid,uvit-tiny@4"),
    "conv": (problems.ConvProblem, ConvShape, "models", "ddpm-tiny@4"),
}
SAMPLED = ("end-to-end", "table3")
NETWORK_SUITES = (*SAMPLED, "train")
# a provider compiles and tunes several kernels, one after another; so does a forced back end, which only sweeps measure
TUNED_FOR_LONG = ("conv", "masked-train", *NETWORK_SUITES)
OPTIONAL = ("shapes", "batch", "modes", "no_sampling", "no_compile")
USED = {  # suite: which of these options it uses
    "first": ("shapes", "batch", "modes"),
    "mask": ("shapes", "batch", "modes"),
    "masked-train": ("shapes", "batch", "modes"),
    "gemm": ("shapes", "batch", "modes", "no_compile"),
    "conv": ("shapes", "batch", "modes", "no_compile"),
    "end-to-end": ("shapes", "batch", "no_sampling", "no_compile"),
    "train": ("shapes", "batch", "no_compile"),
    "table3": ("no_sampling", "no_compile"),
    "ceiling": (),
    "cpu": (),
}
SUITES = tuple(USED)

QUICK = {"rounds": 3, "per_round": 1, "seconds": 1.0}  # of suite cpu
PATIENCE = 2  # a provider that hung or crashed the process so often is left out of the suite
COMPILES, COMPILES_AT_MOST = 60, 480  # seconds that compiling a whole network takes
SAMPLES = 30  # seconds that must be left for whole sampling to begin


@dataclass
class Session:
    """The arguments of every suite. deadline: a value of time.monotonic() after which nothing new is started.
    timeout: seconds for a provider to be ready, a fourth of what one may take that tunes several kernels; on_timeout:
    called if it is not."""

    results: Results
    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    shapes: str | None = None
    providers: tuple | None = None
    compiled: bool = True
    sampling: bool = True
    modes: tuple | None = None
    batches: tuple = BATCHES
    deadline: float = float("inf")
    timeout: float = 75
    on_timeout: Callable | None = None
    cut: int = 0  # problems that were left out for lack of time
    limits: dict = field(default_factory=dict)
    dry_run: bool = False  # say what would be measured

    def __post_init__(self):
        self.clock = clock_for(self.device)
        default = {"rounds": 5, "per_round": 3, "seconds": 0.5} if self.quick else {"rounds": 8, "per_round": 5}
        self.limits = {"seconds": 10.0} | default | self.limits
        self.watch = Watch(self.on_timeout)

    def keep(self, providers):
        """The requested providers."""
        wanted = [p for p in providers if self.providers is None or p.name in self.providers]
        return [p for p in wanted if self.compiled or not p.name.endswith("compiled")]

    def modes_of(self, kind, shape):
        """The modes in which a layer suite measures this shape."""
        modes = kind.modes if shape.model in SWEEPS else kind.of_models or kind.modes
        return [mode for mode in modes if self.modes is None or mode in self.modes]

    def do(self, suite, shape, mode, providers, rows):
        """Add the rows of `rows(missing, starting)` to the results, for providers that they do not hold yet, unless the
        time is up. starting: see `measure`. rows.threads: their number of threads, if it is not the session's."""
        if self.dry_run:
            what = ", ".join(filter(None, (shape.name, mode)))
            print(f"{suite}: {what}: {', '.join(p.name for p in self.keep(providers))}")
            return
        identity = dict(zip(IDENTITY, (suite, shape.name, mode, str(self.dtype).removeprefix("torch."))))
        if self.device.type == "cpu":
            identity["threads"] = str(getattr(rows, "threads", torch.get_num_threads()))
        held = self.results.matching(identity)
        names = {row.get("provider", "") for row in held} - self.not_sampled(suite, identity, held)
        unheld = self.not_held(suite, providers, held)
        names -= unheld
        missing = [p for p in self.keep(providers) if p.name not in names]
        if not missing or "" in names:  # a row without a provider: the process ended here before
            return
        if time.monotonic() >= self.deadline:
            self.cut += 1
            return
        fatal = [row for row in self.results.rows if row["suite"] == suite and row.get("reason") == ENDED]
        ended = collections.Counter(row["provider"] for row in fatal)
        if hopeless := [p for p in missing if ended[p.name] >= PATIENCE]:
            reason = f"it has ended its process {PATIENCE} times in this suite"
            common = identity | {"metric": "time", "status": "failed", "reason": reason}
            self.results.add([common | {"provider": provider.name} for provider in hopeless])
            missing = [p for p in missing if p not in hopeless]
        if any(provider.compiled for provider in missing):  # beside what was measured to be best, and again with it
            beside = beside_compiled(held)
            missing = [p for p in providers if p in missing or p.name in beside]

        forced = {provider.name for provider in providers if provider.sweeps} if suite == "gemm" else ()

        def starting(name, **other):
            compiled = name.endswith("compiled")
            needed = COMPILES if compiled and suite in NETWORK_SUITES else SAMPLES if "mode" in other else 0
            if (name or other) and time.monotonic() + needed >= self.deadline:
                self.cut += 1
                return False
            self.results.begin(identity | {"provider": name} | other)
            if self.on_timeout:  # all of them together have longer to be timed
                long = not name or suite in TUNED_FOR_LONG or name in forced
                self.watch.expect(COMPILES_AT_MOST if compiled else 4 * self.timeout if long else self.timeout)
            return True

        try:
            starting("")
            for found in rows(missing, starting):
                # the others' times are of the first session: a second one would mix with them
                self.results.add([r for r in found if r["provider"] not in unheld or r["metric"] == "held"])
        except KeyboardInterrupt:  # nobody's failure
            self.results.add([])
            raise
        finally:
            self.watch.done()
        release(self.device)

    def not_sampled(self, suite, identity, rows):
        """The names of the networks whose step was timed, in `rows`, and for whose sampling there was no time."""
        if suite not in SAMPLED or not self.sampling:
            return set()
        sampled = self.results.matching(identity | {"mode": sampling_mode(self.steps)})
        names = {row.get("provider", "") for row in sampled}
        return set() if "" in names else {row["provider"] for row in rows if row["status"] == "ok"} - names

    def not_held(self, suite, providers, rows):
        """The names of the providers that were timed, in `rows`, and for whose second without a pause there was no
        time."""
        if suite != "first" or self.device.type != "cuda":
            return set()
        p50 = {row["provider"]: row["p50_us"] for row in timed(rows)}
        able = {p: p50[p.name] for p in providers if p.name in p50}
        return {p.name for p in to_hold(able, able)} - {row["provider"] for row in rows if row["metric"] == "held"}

    @property
    def steps(self):
        return 4 if self.quick else 50


def beside_compiled(rows):
    """The timed providers that a compiled provider must be timed together with."""
    p50 = {row["provider"]: row["p50_us"] for row in timed(rows)}
    dense = [name for name in DENSE if name in p50 and not name.endswith("compiled")]
    return {*BESIDE, min(dense, key=p50.get, default="dense")} & p50.keys()


def run_suites(suites, session, progress=False):
    """Measure the suites named in the comma-separated list `suites` into session.results.

    Raises, before anything is measured: like `plan`; InputError if the session's choice of providers and modes leaves
    nothing of any suite.
    """
    planned = {suite: plan(suite, session) for suite in suites.split(",")}
    if not any(planned.values()):
        raise InputError(f"suite {suites}: --providers, --modes and --no-compile leave nothing to measure")
    for suite, work in planned.items():
        for measurement in tqdm(work, desc=suite, disable=None if progress else True):
            session.do(*measurement)


def plan(suite, session):
    """The arguments of `Session.do` for every measurement of one suite, by the session's providers and modes.

    Raises: InputError for an unknown suite, or shapes that it does not have.
    """
    if suite in LAYER_SUITES:
        work = layer_work(suite, session)
    elif suite in NETWORK_SUITES:
        work = network_work(suite, session)
    elif suite == "ceiling":
        work = ceilings.work(session)
    elif suite == "cpu":
        work = cpu_work(session)
    else:
        raise InputError(f"unknown suite {suite!r}: one of {', '.join(SUITES)}")
    return [(*what, providers, rows) for *what, providers, rows in work if session.keep(providers)]


def layer_work(suite, session):
    kind, shape_kind, full, quick = LAYER_SUITES[suite]
    spec = session.shapes or (quick if session.quick else full)
    every = first_providers(session.device, session.dtype) if suite == "first" else PROVIDERS[kind.kernel]
    for shape in select(spec, shape_kind, session.batches, session.quick):
        providers = [p for p in every if shape.model in SWEEPS or not p.sweeps]
        for mode in session.modes_of(kind, shape):
            yield suite, shape, mode, providers, functools.partial(layer_rows, suite, kind, shape, mode, session)


def network_work(suite, session):
    shapes = table3_shapes(session.quick) if suite == "table3" else network_shapes(session)
    kind, providers = NetworkProblem, STEP_PROVIDERS
    if suite == "train":
        kind, providers = TrainingStepProblem, TRAINING_PROVIDERS
    (mode,) = kind.modes
    for shape in shapes:
        yield suite, shape, mode, providers, functools.partial(network_rows, suite, kind, shape, mode, session)


def cpu_work(session):
    """Of `cpu.PLAN`. Raises: InputError for another device or type."""
    if session.device.type != "cpu" or session.dtype != torch.float32:
        raise InputError("suite cpu measures fp32 products on a CPU: --device cpu --dtype fp32")
    for part in cpu.PLAN:
        for shape in part.shapes()[: part.quick if session.quick else None]:
            rows = functools.partial(cpu_rows, part, shape, session)
            rows.threads = part.threads
            yield part.suite, shape, part.mode, part.providers, rows


def cpu_rows(part, shape, session, providers, starting):
    """Measured with the part's number of threads."""
    limits = part.limits | {"packing": False} | (QUICK if session.quick else {})
    before = torch.get_num_threads()
    torch.set_num_threads(part.threads)
    try:
        problem = part.kind(shape, part.mode, session.dtype, session.device)
        yield from measure(part.suite, problem, providers, clock_for(session.device), starting=starting, **limits)
    finally:
        torch.set_num_threads(before)


def layer_rows(suite, kind, shape, mode, session, providers, starting):
    problem = kind(shape, mode, session.dtype, session.device)
    first = {"packing": False, "held": True} if suite == "first" else {}
    return measure(suite, problem, providers, session.clock, starting=starting, **session.limits, **first)


def network_shapes(session):
    """[ModelShape] of --shapes. Raises: InputError for an unknown model or batch."""
    shapes = []
    for name, batch in listed(session.shapes or ("uvit-tiny@4,ddpm-tiny@4" if session.quick else "models")):
        if name != "models" and name not in MODELS:
            raise InputError(f"--shapes {name!r}: a whole network is model@batch, the model one of {', '.join(MODELS)}")
        chosen = MEASURED_MODELS if name == "models" else [name]
        shapes += [ModelShape(n, b) for n in chosen for b in ([batch] if batch else session.batches)]
    return list(dict.fromkeys(shapes))


def network_rows(suite, kind, shape, mode, session, providers, starting):
    problem, able = kind(shape, mode, session.dtype, session.device), set()
    limits = session.limits | {"packing": False, "starting": starting}
    for rows in measure(suite, problem, providers, session.clock, **limits):
        able |= {r["provider"] for r in rows if r["status"] == "ok" and r["method"] != "cuda events"}
        yield rows
    if suite in SAMPLED and session.sampling:
        rounds = 1 if suite == "table3" else 3  # some of its networks take a third of a second a step
        if starting("", mode=sampling_mode(session.steps)):
            able = [p for p in providers if p.name in able]
            yield sampling_rows(suite, problem, able, session.steps, rounds, session.watch.alive)


class Watch:
    """Calls `on_timeout()` from its own thread if nothing is called in time after `expect(seconds)`."""

    def __init__(self, on_timeout):
        self.on_timeout = on_timeout
        self.timer = None

    def expect(self, seconds):
        self.done()
        self.timer = threading.Timer(seconds, self.on_timeout)
        self.timer.daemon = True
        self.timer.start()

    def alive(self):
        """Begin the seconds that are expected anew."""
        if self.timer:
            self.expect(self.timer.interval)

    def done(self):
        if self.timer:
            self.timer.cancel()
            self.timer = None


def start_again(arguments):
    """Print the stack of every thread, then replace this process by `python -m bench.run arguments`.

    After a kernel that never ends or writes out of bounds, this process cannot time anything. The results file names
    the provider that was running; --resume skips it.
    """
    faulthandler.dump_traceback(sys.__stderr__)
    os.closerange(3, 1 << 16)  # the driver gives a GPU back when its files are closed
    os.execv(sys.executable, [sys.executable, "-m", "bench.run", *arguments])


@program("bench")
def main(arguments=None):
    """Returns the exit code: 0 done; 2 bad input; 3 parts left out, because --seconds were over or it was killed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        with interruptible():
            return run(options, arguments)
    except KeyboardInterrupt:
        print("bench: ended; the same command with --resume goes on", file=sys.stderr)
        return 3


def check_options(options):
    """Raise InputError for an option that none of the named suites uses."""
    used = {option for suite in options.suite.split(",") for option in USED.get(suite, OPTIONAL)}
    check_used(options, OPTIONAL, used, f"suite {options.suite}")


def run(options, arguments):
    """Run the suites that the parsed command line `arguments` asks for. Returns the exit code 0 or 3."""
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.seconds < 0:
        raise InputError(f"--seconds {options.seconds:g}: must be at least 0")
    check_options(options)
    torch.manual_seed(0)
    end = deadline(options.seconds)

    def again():
        left = max(0.0, end - time.monotonic())
        limit = [] if math.isinf(left) else ["--seconds", f"{left:.0f}"]
        start_again([*arguments, "--resume", *limit])

    session = Session(
        Results(options.out, resume=options.resume),
        device,
        DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")],
        quick=options.quick,
        shapes=options.shapes,
        providers=tuple(options.providers.split(",")) if options.providers else None,
        compiled=not options.no_compile,
        sampling=not options.no_sampling,
        modes=tuple(options.modes.split(",")) if options.modes else None,
        batches=tuple(options.batch or BATCHES),
        deadline=end,
        timeout=options.timeout,
        on_timeout=again if device.type == "cuda" else None,
        dry_run=options.dry_run,
    )
    here = stamp(device)["device"]
    if others := {row["device"] for row in session.results.rows} - {here, ""}:
        held = ", ".join(sorted(others))
        raise InputError(f"{options.out} holds rows of {held}, and this is {here}: choose another --out")
    known = {p.name for kernel in PROVIDERS.values() for p in kernel}
    known |= {p.name for part in cpu.PLAN for p in part.providers} | {ceilings.TORCH.name, ceilings.OURS.name}
    known |= {p.name for p in (*STEP_PROVIDERS, *TRAINING_PROVIDERS, *first_providers(device, session.dtype))}
    if unknown := set(session.providers or ()) - known:
        raise InputError(f"unknown providers {', '.join(sorted(unknown))}: they are {', '.join(sorted(known))}")
    modes = {mode for kind, *_ in LAYER_SUITES.values() for mode in kind.modes}
    if unknown := set(session.modes or ()) - modes:
        raise InputError(f"unknown modes {', '.join(sorted(unknown))}: they are {', '.join(sorted(modes))}")
    try:
        run_suites(options.suite, session, progress=True)
    except Exception:
        if not device_is_lost(device):
            raise
        again()
    if options.dry_run:
        return 0
    statuses = [row["status"] for row in session.results.rows]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    print(f"{session.results.path}: {len(statuses)} rows ({counts}); {session.cut} problems left out for time")
    return 3 if session.cut else 0


def parser():
    parsed = command_line("bench.run", __doc__)
    parsed.add_argument("--device", type=types.device, help="(default: cuda if there is one, else cpu)")
    parsed.add_argument("--suite", required=True, help=f"one or several of {', '.join(SUITES)}")
    parsed.add_argument("--shapes", help="square, m-sweep, grid, square@SIZE, models, model@batch; several with commas")
    parsed.add_argument("--providers", help="measure only these, by the names in the results file, with commas")
    parsed.add_argument("--modes", help="only these of the layer suites, with commas, for example epilogue")
    parsed.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long to tune")
    parsed.add_argument("--no-sampling", action="store_true", help="of whole networks only a step")
    parsed.add_argument("--batch", type=types.count, action="append", help="sizes of batches (default: 1, 16 and 64)")
    parsed.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on a GPU, fp32 on a CPU)")
    parsed.add_argument("--quick", action="store_true", help="small shapes and few rounds: minutes on a CPU")
    parsed.add_argument("--seconds", type=types.finite, default=math.inf, help="start nothing new after this long")
    parsed.add_argument(
        "--timeout", type=types.positive, default=75, help="seconds until a provider hangs (default: %(default)s)"
    )
    parsed.add_argument("--out", default="bench-results.csv", help="results file (default: %(default)s)")
    parsed.add_argument("--dry-run", action="store_true", help="list what would be measured, and stop")
    parsed.add_argument("--resume", action="store_true", help="continue the results file, skipping what it holds")
    return parsed


if __name__ == "__main__":
    sys.exit(main())
