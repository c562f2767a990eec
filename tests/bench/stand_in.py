"""The benchmark without a GPU: the emulator's driver, and what else torch.cuda would have to give to it.

A process in which `sitecustomize` calls `start()` takes this machine for one with an H200. Kernels run in the emulator,
unless `execute` is False, where they are compiled and launched, and leave their output as it was. Times mean nothing.
"""

import contextlib
import os
import time
from pathlib import Path

import torch

from sparsedm.files import cache_folder
from sparsedm.kernels.cpu import library
from tests import emulated_gpu

ROOT = Path(__file__).parents[2]


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Clock:
    """One call for each sample, however long it takes."""

    def __new__(cls, device):
        from bench.timing import CpuClock

        clock = CpuClock()
        clock.ready = lambda run: timed(run)
        clock.held = lambda call, microseconds: (timed(call).times, {"power_w": "1", "sm_mhz": "2"})
        return clock


def timed(run):
    from bench.timing import Timed, percentiles

    run()
    found = Timed(lambda count: [7.0] * count, "stand-in", run)
    return type("TimedHere", (Timed,), {"times": percentiles([7.0])})(*found)


def start(planted=None):
    """Take this machine for one with an H200. planted: None, or {number of a wgmma configuration: "hangs" or "wrong"}.
    Then no kernel is executed: each is compiled and launched, and torch computes what it would have computed; and there
    are no more configurations than these and one. The autotuner finds a wrong one fastest, and its check is too loose
    to see what is wrong; the benchmark's check sees it."""
    device = emulated_gpu.start(execute=planted is None)
    torch.Generator = Generator
    torch.cuda.get_device_name = lambda device=None: "Stand-in"
    torch.cuda.empty_cache = lambda: None
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda device=None: 0
    torch.cuda.reset_peak_memory_stats = lambda device=None: None
    torch.cuda.get_device_properties(0).uuid = "0"
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    adamw = torch.optim.AdamW.__init__
    torch.optim.AdamW.__init__ = lambda self, *a, capturable=False, **options: adamw(self, *a, **options)
    if planted is not None:
        plant(planted)
    from bench import networks, providers, timing

    providers.max_autotune = networks.max_autotune = lambda call: call
    timing.CudaClock = Clock
    networks.Graphs = lambda device: lambda step, *inputs: step(*inputs)
    return device


def plant(planted):
    from triton.runtime.jit import JITFunction

    from sparsedm.kernels import launch, mask, masked_matmul, tuning
    from sparsedm.kernels.sparse24 import dispatch

    every = dispatch.candidates  # before others import it by name
    kept = ["dense", "splitk 0", *(f"wgmma {number}" for number in range(len(planted) + 1))]
    dispatch.candidates = lambda request: [
        c for c in every(request) if {c.backend, f"{c.backend} {c.config}"} & {*kept}
    ]
    from bench import providers
    from sparsedm.kernels.sparse24 import linear

    for module in (launch, mask, masked_matmul):
        module.uses_triton = lambda *tensors: False
    launches, configured, in_torch = dispatch.launch, providers.configured, linear._linear_dense
    latest, spoils = {}, []  # what the autotuner times; what the next product in torch stands for

    def not_executed(operation, backend, config, strict, x, values, *tensors, **options):
        launches(operation, backend, config, strict, x, values, *tensors, **options)
        is_planted = (operation, backend) == (dispatch.LINEAR, "wgmma") and len(values) > 64
        state = planted.get(config) if is_planted else None
        if state == "hangs":
            time.sleep(3600)
        latest.update(backend=backend, state=state)
        spoils[:] = [state] * (state == "wrong")
        return False  # the operator computes in torch what did not run

    def in_its_place(*arguments):
        y = in_torch(*arguments)
        if spoils and spoils.pop():
            largest = y.view(-1)[y.abs().argmax().item()]
            largest += 0.09 * y.float().square().mean().sqrt() + 0.015 * largest.abs()
        return y

    def do_bench(run, **options):
        latest.clear()
        run()
        return 1e-3 * (1 if latest.get("state") == "wrong" else 2 if latest.get("backend") == "wgmma" else 3)

    def computed(choice, x, values, metadata, *epilogue, **options):
        launched, state = configured(choice, x, values, metadata, *epilogue, **options), planted.get(choice.config)
        state = state if choice.backend == "wgmma" else None

        def run():
            launched()
            compiled_only = JITFunction.run.__name__ == "compile_it"  # of first_contact.compiling_only
            if state == "hangs" and not compiled_only:
                time.sleep(3600)
            y = linear.sparse24_linear_ref(x, values, metadata, *epilogue, **options)
            y[0, 0] += state == "wrong"
            return y

        return run

    dispatch.launch, providers.configured, linear._linear_dense = not_executed, computed, in_its_place
    tuning.triton.testing.do_bench = do_bench
    verdict, gpu = tuning.Autotuner.verdict, torch.device("cuda", 0)
    # the tensors are on the CPU, for which nothing is tuned
    tuning.Autotuner.verdict = lambda self, run, device, **options: verdict(self, run, gpu, **options)


def own_cache(folder):
    """A cache folder below `folder`, in which only the compiled C kernels are those of this machine: they take seconds.

    Returns its path.
    """
    cache = folder / "cache"
    cache.mkdir()
    if library.library() is not None:
        (cache / "cpu").symlink_to(cache_folder() / "cpu")
    return cache


def environment(folder, planted=None):
    """The environment variables of processes that take this machine so; see `start`."""
    site = folder / "site"
    site.mkdir()
    code = "import sys\nif any(a.startswith('bench.') for a in sys.orig_argv):\n"
    code += f"    from tests.bench import stand_in\n    stand_in.start({planted!r})\n"
    (site / "sitecustomize.py").write_text(code)
    places = {"PYTHONPATH": f"{site}:{ROOT}", "SPARSEDM_CACHE": str(own_cache(folder))}
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | places
