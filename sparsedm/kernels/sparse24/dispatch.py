"""Choose the kernel of a sparse product and its configuration: by a rule of thumb until it has been measured.

One `Request` per call describes the product. `BACKENDS` lists the ways to compute it. `rule_of_thumb` is arithmetic
without measurement. On a GPU `serve` asks the autotuner of `tuning.py`: its tables hold the fastest choice for a GPU,
dtype, epilogue and size. A size that is in no table is timed once: every sparse kernel, and torch's dense product. The
fastest is used, even if it is the dense product. The rule decides if nothing may be timed: on a CPU, with
SPARSEDM_AUTOTUNE=off, while a CUDA graph is captured, while a model is traced.

To add a back end, write one file with `launch` and CONFIGS, and a row of `BACKENDS`. A new order of the weight goes
into `layouts.py`, a new name into `launch.BACKENDS`.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import library, rules
from sparsedm.kernels.launch import BACKENDS as NAMES
from sparsedm.kernels.launch import NO_TRITON, broken, capability, forced_backend, runs
from sparsedm.kernels.sparse24.layouts import cpu_layout
from sparsedm.kernels.tracing import exporting
from sparsedm.kernels.tuning import ALL_REFUSED, FOR_NOW, MEASURED, RULE, Autotuner, bucket

LINEAR, CONV = "sparse24_linear", "sparse24_conv2d"
NO_GPU = f"not an NVIDIA GPU, or {NO_TRITON}"
SPLITK_ROWS = 64
SMALLEST_GRID, SMALLEST_N = 32, 64


@dataclass(frozen=True)
class Request:
    """The properties of a product that the choice of its back end depends on.

    y (M, N) = x (M, K) @ W^T; for a convolution M are the pixels of y and K = kh kw channels.
    """

    operation: str  # LINEAR or CONV
    capability: tuple | None  # of the NVIDIA GPU, see `launch.capability`
    dtype: torch.dtype
    M: int
    N: int
    K: int
    device: torch.device | None = None  # the device to time it on; None: do not time
    instructions: str | None = None  # of the CPU, see `cpu.library.serving`
    pattern: str = "2:4"  # as `str(Pattern)`: torch.compile cannot wrap the object
    out_dtype: torch.dtype | None = None
    activation: str | None = None
    bias: bool = False
    scale: bool = False
    residual: torch.dtype | None = None
    skip: int = 0  # columns of the second source
    channels: int | None = None
    kernel_size: tuple | None = None
    stride: tuple | None = None
    padding: tuple | None = None
    dilation: tuple | None = None
    image: tuple | None = None  # (H', W') of y
    backend: str | None = None  # the one that the caller names; None: the fastest

    def key(self):
        """All fields except M: the tables hold M as a power of two."""
        return tuple([getattr(self, name) for name in KEY])

    def described(self):
        """The request's entry in the tuning table: its key, without operation and GPU, which file and section name."""
        names = [name for name in KEY if name not in ("operation", "capability", "device")]
        return {name: value for name in names if (value := getattr(self, name)) not in (None, False, 0)}

    @property
    def keep_and_group(self):
        keep, group = self.pattern.split(":")
        return int(keep), int(group)

    @property
    def sm(self):
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def stores_directly(self):
        """Whether wgmma must write y from registers because TMA cannot: see `epilogue` of `wgmma_pipeline.py`."""
        other = self.residual not in (None, self.out_dtype)
        return self.out_dtype == torch.float32 or self.N % 8 != 0 or other


KEY = tuple(field.name for field in fields(Request) if field.name != "M")


class Choice(NamedTuple):
    """A back end, and the index of its configuration in its module's CONFIGS."""

    backend: str
    config: int = 0


class Measured(NamedTuple):
    """Measurements on a GPU: microseconds of every choice that ran, and why the others did not run."""

    choice: Choice
    times: dict
    failed: dict
    basis: str = MEASURED

    def __str__(self):
        times = {}
        for choice, microseconds in self.times.items():
            times[choice.backend] = min(microseconds, times.get(choice.backend, microseconds))
        text = ", ".join(f"{name} {microseconds:.1f} us" for name, microseconds in times.items())
        reasons = dict.fromkeys((choice.backend, why) for choice, why in self.failed.items())  # many fail alike
        failed = "".join(f"; {name} is passed over: {why}" for name, why in reasons)
        return f"measured: {text or 'see the tuned table of the GPU'}{failed}"


# ---- what can compute a product: arithmetic on a Request


def request_on(where, operation, dtype, M, N, K, backend=None, **others):
    """The `Request` of a product, for a call or to ask what a call would do.

    where: the torch.device, or the capability of an absent NVIDIA GPU. backend: default: the one that SPARSEDM_BACKEND
    names. others: more fields. Raises: InputError if `backend` is not in `launch.BACKENDS`.
    """
    if backend not in (None, *NAMES):
        raise InputError(f"unknown backend {backend!r}: one of {', '.join(NAMES)}")
    gpu = capability(where) if isinstance(where, torch.device) else where
    on_cpu = isinstance(where, torch.device) and where.type == "cpu" and not exporting()
    instructions = library.serving()[0] if on_cpu else None
    backend = backend or forced_backend()
    return Request(operation, gpu, dtype, M, N, K, instructions=instructions, backend=backend, **others)


def _no_cpu(request):
    if request.capability is not None:
        return "the CPU kernels do not run on a GPU"
    if torch.compiler.is_compiling():  # whether they win depends on the batch, and one graph runs every batch
        return "a compiled graph does not call the CPU kernels"
    if request.instructions is None:
        if exporting():
            return f"{NO_GPU}; an exported program does not call the CPU kernels"
        reason = library.serving()[1]
        return f"{NO_GPU}; no CPU kernels: {reason}" if reason else NO_GPU
    if request.dtype != torch.float32 or request.out_dtype not in (None, torch.float32):
        return f"{str(request.dtype)[6:]}: the CPU kernels take float32"
    if request.residual not in (None, torch.float32):
        return f"a residual of {str(request.residual)[6:]}: the CPU kernels take float32"
    if request.operation == CONV and (request.stride[0] != request.stride[1] or request.dilation != (1, 1)):
        return f"stride {request.stride}, dilation {request.dilation}: one stride for both axes and no dilation"
    return None


def _cpu_loses(request):
    if request.operation == LINEAR:
        cost = _cpu_cost(request)[0] / rules.dense_cost(request.M, request.N, request.K, request.instructions)
    else:
        pixels = request.image[0] * request.image[1]
        sizes = request.N, request.K, *request.keep_and_group
        cost = rules.conv_cost((request.M // pixels, pixels), *sizes, request.instructions)
    if cost < 1:
        return None
    sizes = f"{request.M} x {request.K} x {request.N}"
    return f"{request.pattern}, {sizes}: the C kernel would take about {cost:.2f} times as long as the dense product"


def _cpu_cost(request):
    return rules.linear_cost(request.M, request.N, request.K, *request.keep_and_group, request.instructions)


def _cpu_order(request):
    """The order of the weight that the CPU kernel reads."""
    if request.operation == LINEAR:
        return _cpu_cost(request)[1]
    geometry = request.kernel_size, request.stride, request.padding, request.image[1]
    return "halo" if rules.halo_serves(*geometry, request.keep_and_group[1], request.instructions) else "conv"


def _cpu_layout(request):
    taps = 1 if request.operation == LINEAR else request.kernel_size[0] * request.kernel_size[1]
    order = _cpu_order(request)
    return cpu_layout(order, request.pattern, taps, request.image[1] if order == "halo" else 0)


def _no_sparse_cores(request):
    if request.capability is None:
        return NO_GPU
    if request.capability < (8, 0):
        return f"{request.sm} has no sparse tensor cores (sm_80 and later have)"
    if request.keep_and_group[0] > 2:
        return f"pattern {request.pattern}: sparse tensor cores take at most 2 of every 4"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(request.dtype)[6:]}: the sparse tensor-core kernels take bfloat16 and float16"
    if request.out_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        return f"y of {str(request.out_dtype)[6:]}: the kernels write bfloat16, float16 and float32"
    return None


def _no_mma(request, name="mma", channels=8):
    if reason := _no_sparse_cores(request):
        return reason
    if request.operation == LINEAR:
        return f"K = {request.K}: rows must be multiples of 16 bytes, K a multiple of 8" if request.K % 8 else None
    if request.channels % channels:
        return f"{request.channels} input channels: the {name} kernel needs a multiple of {channels}"
    if request.stride[0] != request.stride[1] or request.dilation != (1, 1):
        return f"stride {request.stride}, dilation {request.dilation}: one stride for both axes and no dilation"
    return None


def _no_wgmma(request):
    reason = _no_sparse_cores(request)
    if reason is None and request.capability != (9, 0):
        return f"{request.sm} has no wgmma (sm_90a has)"
    reason = reason or _no_mma(request, "wgmma", 64)  # a TMA box has 64 channels at one kernel position
    if reason or request.operation == LINEAR:
        return reason
    if request.N % 8:
        return f"{request.N} output channels: the wgmma kernel needs a multiple of 8"
    if request.stride[0] > 2:
        return f"stride {request.stride[0]}: the wgmma kernel has strides 1 and 2"
    return None


def _small(request):
    """Why there are too few rows or features for the kernels' tiles, or None."""
    if request.N < SMALLEST_N:
        return f"{request.N} features leave most of a tile of 128 x 128 empty"
    tiles = -(-request.M // 128) * -(-request.N // 128)
    if tiles < SMALLEST_GRID:
        return f"too few tiles of 128 x 128 to fill the GPU ({tiles}): the launch decides, not the arithmetic"
    return None


def _mma_loses(request):
    if not (reason := _legacy(request) or _small(request)) and request.capability == (9, 0):
        return f"{_no_wgmma(request)}, and mma.sp is no quicker than the dense tensor cores of {request.sm}"
    return reason


def _legacy(request):
    """On B200 and B300 only a measurement chooses mma.sp. (sm_120 has no faster instruction.)"""
    return f"mma.sp is a slow legacy path of {request.sm}" if (10, 0) <= request.capability < (12, 0) else None


def _few_rows(request):
    return request.operation == LINEAR and request.M <= SPLITK_ROWS


@dataclass(frozen=True)
class Backend:
    """A way to compute a product. All functions take a Request, need no GPU, and import nothing."""

    name: str
    operation: str
    module: str | None  # with `launch` and CONFIGS, imported when it runs; None: the operator, in plain torch
    layout: str | Callable  # of the weight: a name in `layouts.LAYOUTS`, or a function that returns one
    supports: Callable = lambda request: None  # -> None, or why it cannot run
    meant: Callable = lambda request: True  # whether it is worth timing: False if another kernel is surely better
    loses: Callable = lambda request: None  # -> None, or why the rule of thumb expects dense to be faster
    config: Callable = lambda request: (0, False)  # -> configuration of the rule, whether to time only this one
    merit: str = ""
    sources: tuple = ()  # the other modules that hold its code
    on: str | None = "gpu"  # None: anywhere

    def layout_for(self, request):
        return self.layout if isinstance(self.layout, str) else self.layout(request)


# fmt: off
BACKENDS = (  # the rule of thumb asks them in this order
    Backend("splitk", LINEAR, "sparsedm.kernels.sparse24.mma_splitk", "fragments", _no_mma, _few_rows, _legacy,
            merit="few rows: bound by reading the weight, 1.125 bytes instead of 2", sources=("mma", "ptx")),
    Backend("wgmma", LINEAR, "sparsedm.kernels.sparse24.wgmma", "tma", _no_wgmma, lambda r: not _few_rows(r), _small,
            lambda r: (-1, True) if r.stores_directly else (0, False),  # the others spill there
            merit="wgmma.sp (sm_90a)", sources=("wgmma_kernels", "wgmma_pipeline", "ptx")),
    Backend("mma", LINEAR, "sparsedm.kernels.sparse24.mma", "fragments", _no_mma,
            lambda r: _few_rows(r) or _no_wgmma(r), _mma_loses,
            lambda r: (-1, True) if _few_rows(r) else (0, False),  # the smallest tile
            merit="mma.sp", sources=("ptx",)),
    Backend("wgmma", CONV, "sparsedm.kernels.sparse24.wgmma_conv", "tma", _no_wgmma, loses=_small,
            config=lambda r: (int(r.N <= 128), False),
            merit="wgmma.sp (sm_90a), implicit product", sources=("wgmma", "wgmma_pipeline", "ptx")),
    Backend("mma", CONV, "sparsedm.kernels.sparse24.mma_conv", "fragments", _no_mma, _no_wgmma, _mma_loses,
            merit="mma.sp, implicit product", sources=("mma", "ptx")),
    Backend("cpu", LINEAR, "sparsedm.kernels.cpu.linear", _cpu_layout, _no_cpu, loses=_cpu_loses,
            config=lambda r: (("linear", "few").index(_cpu_order(r)), True), merit="C kernel", on="cpu"),
    Backend("cpu", CONV, "sparsedm.kernels.cpu.conv", _cpu_layout, _no_cpu, loses=_cpu_loses,
            config=lambda r: (("conv", "halo").index(_cpu_order(r)), True), merit="C kernel, no im2col", on="cpu"),
    # the weight decompressed once; not in an exported program, which would then hold it twice
    Backend("dense", LINEAR, None, "dense", meant=lambda r: not exporting(), on=None),
    Backend("dense", CONV, None, "dense", meant=lambda r: not exporting(), on=None),
    # decompressed at every call
    *(Backend("torch", operation, None, "torch", on=None) for operation in (LINEAR, CONV)),
)
# fmt: on
_ROWS = {(row.operation, row.name): row for row in BACKENDS}


def row_of(operation, backend):
    """The row of `BACKENDS`."""
    return _ROWS[operation, backend]


def rule_of_thumb(request):
    """-> (Choice, why): the back end that the request names; "dense" (exported: "torch") if it cannot run.

    The rule of thumb chooses if the request names none, or one that has no row for the operation.
    """
    rows = [row for row in BACKENDS if row.operation == request.operation]
    why = ""
    for row in rows:
        if row.name == request.backend:
            if not (why := row.supports(request)):
                return Choice(row.name, row.config(request)[0]), f"backend={row.name}"
            why, rows = f"backend={row.name} cannot run: {why}", [row for row in rows if not row.module]
    for row in rows:
        if row.on not in (None, "cpu" if request.capability is None else "gpu"):
            continue
        reason = row.supports(request) or broken.get((row.operation, row.name, request.device))
        if not reason and row.meant(request):
            reason = row.loses(request)
            if not reason:
                return Choice(row.name, row.config(request)[0]), row.merit or why
        why = reason or why
    raise AssertionError("the last row, torch, serves everything")


def candidates(request):
    """The choices to time. Dense comes first; the others' results are compared with it.

    If the request names a back end, only that one is listed. [] if no kernel can run. Also [] if the file of one does
    not load, as with an unknown Triton: without it the fastest is unknown.
    """
    rows = [row for row in BACKENDS if row.operation == request.operation]
    named = [row for row in rows if row.name == request.backend]
    kernels = []
    for row in named or rows:
        if row.module and not row.supports(request) and (named or row.meant(request)):
            if not runs(row.operation, row.name, request.device, functools.partial(load, row.module), bool(named)):
                return []
            numbers = range(len(load(row.module).CONFIGS))
            number, alone = row.config(request)
            kernels += [Choice(row.name, i) for i in ([numbers[number]] if alone else numbers)]
    return ([] if named or not kernels else [Choice("dense")]) + kernels


# ---- what was measured


def serve(request, run, cache):
    """The result, computed by the fastest known back end.

    run(choice, cache, strict, neutral=False) computes it, any number of times. strict: a kernel that does not run is an
    error; otherwise the operator computes in torch. neutral: with a residual of zeros and a scale of ones, which cannot
    hide a wrong product. cache: a dict stored with the layer. It holds the prepacked weight (put there by `run`), the
    choices made so far, and the back end of the latest. None: nothing is stored.
    """
    cache = {} if cache is None else cache
    choice = _decide(request, run, cache.setdefault("choices", {}))
    if not torch.compiler.is_compiling():
        cache["latest"] = choice.backend
    return run(choice, cache, request.backend is not None)


def _decide(request, run, choices):
    rule, _ = rule_of_thumb(request)
    if request.device is None or request.capability is None or not request.M:
        return rule
    if torch.compiler.is_compiling():  # by comparisons, so that a dynamic M stays dynamic
        key, rows = request.key(), request.M
        for (size, *others), measured in choices.items():
            if tuple(others) == key and rows <= size and (rows > size // 2 or size == 16):
                return rule if _is_broken(request, measured.choice) else measured.choice
        return rule
    known = (bucket(request.M), *request.key())
    if (measured := choices.get(known)) is None:
        if not (offered := candidates(request)):
            return rule_of_thumb(request)[0]
        measured = _measure(request, run, offered, rule)
    if _is_broken(request, measured.choice):
        measured = measured._replace(choice=rule, basis=RULE)
    if measured.basis != FOR_NOW:
        choices[known] = measured
    return measured.choice


def _is_broken(request, choice):
    return (request.operation, choice.backend, request.device) in broken


def _measure(request, run, offered, rule):
    described = [_describe(request.operation, choice) for choice in offered]
    throwaway = {}  # the losers' prepacked weights are dropped

    def call(candidate, neutral=False):
        return run(offered[described.index(candidate)], throwaway, True, neutral)

    verdict = _tuner(request.operation).verdict(
        call,
        request.device,
        check=lambda candidate: (call(candidate), call(candidate, neutral=True)),
        candidates=described,
        default=_describe(request.operation, rule),
        **request.described(),
        m=bucket(request.M),
    )
    if verdict.basis == ALL_REFUSED and request.backend:  # there is no dense product to take instead
        with trying(request.operation, rule):  # raises: it says which note to delete
            pass
    times, failed = (
        {offered[described.index(candidate)]: value for candidate, value in pairs if candidate in described}
        for pairs in (verdict.times, verdict.failed)
    )
    return Measured(offered[described.index(verdict.config)], times, failed, verdict.basis)


def last_measured(cache, rows=None):
    """Timings (`Measured`) that `serve` made or looked up, or None. cache: the caller's dict.

    rows: the number of rows; default: the newest size of this cache.
    """
    found = [
        measured
        for known, measured in cache.get("choices", {}).items()
        if measured.basis == MEASURED and (rows is None or known[0] == bucket(rows))
    ]
    return found[-1] if found else None


def launch(operation, backend, config, strict, *tensors, **options):
    """Runs a kernel. Returns whether it ran, see `launch.runs`. If not, the rule of thumb does not choose it again."""

    def start():
        with torch.cuda.device_of(tensors[0]):
            module = load(row_of(operation, backend).module)
            module.launch(*tensors, config=module.CONFIGS[config], **options)

    return runs(operation, backend, tensors[0].device, start, strict)


def trying(operation, choice):
    """A context to run a choice in. If the process dies inside, for example in a hang, no tuner tries it for a day."""
    return _tuner(operation).trying(_describe(operation, choice))


def refuse(operation, choice, why):
    """No tuner on this computer tries the choice for a day. why: one line."""
    _tuner(operation).refuse(_describe(operation, choice), why)


def allow(operation, choice):
    """Take `refuse` back. A choice that ended a process stays refused."""
    _tuner(operation).allow(_describe(operation, choice))


@functools.cache
def load(module):
    """The module of a row, imported only when needed: there may be no Triton."""
    return importlib.import_module(module)


@functools.cache
def _tuner(operation):
    rows = [row for row in BACKENDS if row.operation == operation and row.module]
    names = {name for row in rows for name in (row.module, *(f"sparsedm.kernels.sparse24.{s}" for s in row.sources))}
    sources = [Path(importlib.util.find_spec(name).origin) for name in sorted(names)]  # without importing them
    return Autotuner(operation, [{"backend": "dense"}], sources)


def _describe(operation, choice):
    """The entry of a choice in the tables, for example {"backend": "splitk", "programs": 4}."""
    module = row_of(operation, choice.backend).module
    return {"backend": choice.backend} | (asdict(load(module).CONFIGS[choice.config]) if module else {})
