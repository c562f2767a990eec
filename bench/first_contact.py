"""First contact with a GPU: which configurations of our 2:4 products are right, and how fast are the right ones?

    python -m bench.first_contact --out DIR

Each configuration has its own process; all run in parallel. It compiles the kernels of its check into Triton's cache
and prints `compiled`. Then it has --timeout seconds to check that every weight is in its place, a ragged product with
an epilogue, and a product with many tiles per block, and prints `right`. If it is wrong, hangs or faults, a note keeps
the autotuner from trying it for a day. Until a third of the time is left, the right ones also compile the epilogues of
the models. The suite "first" of `bench.run` times the right ones, with cuBLAS and cuSPARSELt: in single
calls, and the best over a second without a pause, while power and clock are read.

DIR/first.json: {"configurations": {name: "right", or what is wrong}}, from the first verdict on; DIR/results.csv: the
times.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from unittest.mock import patch

import torch

from bench import command_line, program, run
from bench.problems import LinearProblem
from bench.providers import Configuration, configured
from bench.shapes import LinearShape
from bench.suite import deadline, interruptible, reason_of, signal_all
from sparsedm.commands.options import positive
from sparsedm.errors import InputError
from sparsedm.files import write_json
from sparsedm.kernels.launch import capability
from sparsedm.kernels.sparse24.dispatch import (
    LINEAR,
    SPLITK_ROWS,
    Choice,
    Request,
    allow,
    candidates,
    refuse,
    trying,
)
from sparsedm.kernels.sparse24.format import pack

COMPILES = 3  # importing torch and compiling what is checked may take so many times as long as the check
COMPILED, RIGHT = "compiled", "right"  # what a process prints, one line each
COMPILES_FOR = "compiles for more than"  # begins the verdict on what was not compiled in time: nothing is wrong yet
EPILOGUES = (  # of the sweeps, then of the layers of U-ViT and DiT
    {},
    {"bias": True},
    {"bias": True, "residual": True},
    {"bias": True, "activation": "gelu"},
    {"bias": True, "activation": "gelu", "residual": True},
    {"bias": True, "activation": "gelu_tanh"},
    {"bias": True, "activation": "gelu_tanh", "residual": True},
    {"bias": True, "activation": "silu"},
    {"bias": True, "residual": True, "scale": True},
)
PLACES, PRODUCTS = (520, 512), ((136, 520, 320), (5000, 2056, 520))  # N, K; M, N, K
PLACES_SMALL, PRODUCTS_SMALL = (264, 128), ((136, 264, 128),)


def choices(device, rows=(8192, SPLITK_ROWS)):
    """The configurations that the dispatcher would time for many and for few rows."""
    requests = [Request(LINEAR, capability(device), torch.bfloat16, M, 8192, 8192) for M in rows]
    return [choice for request in requests for choice in candidates(request) if choice.backend != "dense"]


@contextlib.contextmanager
def compiling_only():
    """In this context a launch compiles the kernel into Triton's cache and does not run it."""
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    compiles = JITFunction.run

    def compile_it(self, *arguments, grid, warmup, **options):
        return compiles(self, *arguments, grid=grid, warmup=True, **options)

    nothing = lambda kernel, grid: lambda *arguments: None  # noqa: E731
    with patch.object(JITFunction, "run", compile_it), patch.object(CompiledKernel, "__getitem__", nothing):
        yield


def compile_all(choice, device):
    """The kernels of all EPILOGUES."""
    M, N, K, dtype = 64, 64, 128, torch.bfloat16
    x, weight = torch.randn(M, K, device=device, dtype=dtype), torch.zeros(N, K, device=device, dtype=dtype)
    given = {"bias": weight[:, 0].clone(), "residual": x[:, :N].clone(), "scale": weight[:1, :N].clone()}
    with compiling_only():
        for epilogue in EPILOGUES:
            options = {name: given.get(name, value) for name, value in epilogue.items()}
            configured(choice, x, *pack(weight), **options)()


def problems(device, small=False):
    """What a configuration is checked on: the identity, which shows the place of every weight, and products."""
    N, K = PLACES_SMALL if small else PLACES
    identity = LinearProblem(LinearShape("identity", "", K, N, K), "plain", torch.bfloat16, device)
    identity.x, identity.bias = torch.eye(K, device=device, dtype=torch.bfloat16), torch.zeros_like(identity.bias)
    sizes = PRODUCTS_SMALL if small else PRODUCTS
    shapes = [LinearShape(f"{M}x{N}x{K}", "", M, N, K, "gelu", residual=True) for M, N, K in sizes]
    return identity, *(LinearProblem(shape, "epilogue", torch.bfloat16, device) for shape in shapes)


def result(choice, problem):
    provider = Configuration(choice)
    return provider.bind(problem, provider.prepare(problem)).run()


def check(choice, identity, *products):
    """Raises: AssertionError that says what is wrong."""
    y, expected = result(choice, identity), identity.masked.t()
    if (wrong := (y != expected).nonzero()).numel():
        row, feature = wrong[0].tolist()
        came = (expected == y[row, feature]).nonzero()[:3].tolist()
        raise AssertionError(
            f"{len(wrong)} of {y.numel()} weights are not in their place: column {row} of row {feature} holds "
            f"{y[row, feature]:g}, which belongs at {came}, and not {expected[row, feature]:g}"
        )
    for problem in products:
        problem.poison(sparse=True)
        verdict = problem.check(result(choice, problem), sparse=True)
        if not verdict.right:
            name = problem.shape.name
            raise AssertionError(f"{name}: its error is {verdict.error:.3g} and {verdict.allowed:.3g} is allowed")


def contact(choice, device, small=False, again=False):
    """The work of one process; see the head of this file. again: also if a process has died of it."""
    checked = problems(device, small)
    with compiling_only():
        for problem in checked:
            result(choice, problem)
    print(COMPILED, flush=True)
    if not (small or again):  # which look for the fault, and acquit nothing
        allow(LINEAR, choice)  # the last verdict: what was mended need not be in the files that a note's name hashes
    with contextlib.nullcontext() if again else trying(LINEAR, choice):
        try:
            check(choice, *checked)
        except AssertionError as error:
            refuse(LINEAR, choice, f"first contact: {error}")
            raise
        torch.cuda.synchronize()
    print(RIGHT, flush=True)
    if not small:
        compile_all(choice, device)


def verdict_of(command, timeout, processes):
    """ "right", as soon as the process says so, or what is wrong. The process is added to `processes`, and killed if it
    says nothing so long after it has said `compiled`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, process_group=0, **pipes)
    processes.append(process)
    lines, killed = [], threading.Event()

    def kill():
        killed.set()
        signal_all(process, signal.SIGKILL)

    timer = threading.Timer(COMPILES * timeout, kill)
    timer.start()
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] in (COMPILED, RIGHT):
            timer.cancel()
        if lines[-1] == RIGHT:
            return RIGHT
        if lines[-1] == COMPILED:
            timer = threading.Timer(timeout, kill)
            timer.start()
    process.wait()
    timer.cancel()
    if killed.is_set():
        slow = f"hangs: more than {timeout:g} s"
        return slow if COMPILED in lines else f"{COMPILES_FOR} {COMPILES * timeout:g} s"
    return reason_of(process.returncode, "\n".join(lines))


def rest_of(process, until):
    """What it prints after its verdict, if it ends before the time `until`."""
    try:
        return process.communicate(timeout=max(0.0, until - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        return ""


def verdicts_of(commands, timeout, file, until):
    """{name: verdict} of {name: command}, all side by side; `file` holds those that are known. What goes on after its
    verdict is killed at the time `until`. An interruption kills all."""
    found, processes = {}, []
    with ThreadPoolExecutor(max(1, len(commands))) as pool:
        jobs = {pool.submit(verdict_of, command, timeout, processes): name for name, command in commands.items()}
        try:
            for job in as_completed(jobs):
                found[jobs[job]] = job.result()
                known = {name: found[name] for name in commands if name in found}
                write_json(file, {"configurations": known, "of": len(commands)})
            for said in pool.map(lambda process: rest_of(process, until), processes):
                print(said, end="")
        finally:
            for process in processes:
                if process.poll() is None:
                    signal_all(process, signal.SIGKILL)
    return found


@program("first contact")
def main(arguments=None):
    """Returns the exit code: 0 if one configuration is right and all were timed, 1 if none is, else as `bench.run`."""
    options = parser().parse_args(arguments)
    end = deadline(options.seconds)
    device = torch.device("cuda")
    if options.one:
        backend, number = options.one.split(",")
        contact(Choice(backend, int(number)), device, options.small, options.again)
        return 0
    if not torch.cuda.is_available():
        raise InputError("torch sees no GPU")
    found, folder = choices(device), Path(options.out)
    own = (sys.executable, "-m", "bench.first_contact", *(["--small"] if options.small else []), "--one")
    commands = {Configuration(choice).name: (*own, f"{choice.backend},{choice.config}") for choice in found}
    with interruptible():
        named = verdicts_of(commands, options.timeout, folder / "first.json", end - options.seconds / 3)
    print(*(f"{name}: {named[name]}" for name in commands), sep="\n", flush=True)
    right = [name for name in commands if named[name] == RIGHT]
    if not right:
        return 1
    large = [name for name in right if name in {Configuration(choice).name for choice in choices(device, (8192,))}]
    names = ",".join(["dense", *large, "cuSPARSELt", "cuSPARSELt tuned"])
    left = max(0.0, end - time.monotonic())
    timing = ["--suite", "first", "--resume", "--out", str(folder / "results.csv"), "--timeout", f"{options.timeout:g}"]
    quick = ["--quick"] if options.small else []
    return run.main([*timing, "--seconds", f"{left:.0f}", "--providers", names, *quick])


def parser():
    parsed = command_line("bench.first_contact", __doc__)
    parsed.add_argument("--out", default="first-contact", help="folder (default: %(default)s)")
    parsed.add_argument("--timeout", type=positive, default=20, help="seconds until one hangs (default: %(default)s)")
    parsed.add_argument("--seconds", type=positive, default=90, help="for everything together (default: %(default)s)")
    parsed.add_argument("--small", action="store_true", help="small products, for the emulator")
    parsed.add_argument("--one", metavar="BACKEND,NUMBER", help="only this configuration, in this process")
    parsed.add_argument("--again", action="store_true", help="of --one: also if a process has died of it")
    return parsed


if __name__ == "__main__":
    sys.exit(main())
