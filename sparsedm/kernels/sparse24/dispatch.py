"""Which kernel serves a sparse product, and with which configuration: a rule of thumb until it has been measured.

One `Request` per call describes the product. `BACKENDS` lists what can compute one. `rule_of_thumb` is
arithmetic alone. On a GPU `serve` asks the autotuner of `tuning.py`, whose tables hold what was quickest for the GPU,
dtype, epilogue and size. A size that no table has is timed once, torch's dense product on the decompressed weight
beside the sparse kernels: where dense is quicker, dense it is. The rule holds where nothing may be timed: on a CPU,
with SPARSEDM_AUTOTUNE=off, while a CUDA graph is captured, while a model is traced.

To add a back end, write one file with `launch` and CONFIGS, and one row of `BACKENDS`. A new order of the weight goes
into `layouts.py`, a new name into `launch.BACKENDS`.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from sparsedm.kernels.cpu import library, rules
from sparsedm.kernels.launch import broken, capability, exporting, forced_backend, runs
from sparsedm.kernels.sparse24.layouts import cpu_layout
from sparsedm.kernels.tuning import FOR_NOW, MEASURED, RULE, Autotuner, bucket

LINEAR, CONV = "sparse24_linear", "sparse24_conv2d"
NO_GPU = "not an NVIDIA GPU, or no Triton"
SPLITK_ROWS = 64
SMALLEST_GRID, SMALLEST_N = 32, 64


@dataclass(frozen=True)
class Request:
    """One product, as far as the choice of its back end depends on it.

    y (M, N) = x (M, K) @ W^T; for a convolution M are the pixels of y and K = kh kw channels.
    """

    operation: str  # LINEAR or CONV
    capability: tuple | None  # of the NVIDIA GPU, as `launch.capability` gives it
    dtype: torch.dtype
    M: int
    N: int
    K: int
    device: torch.device | None = None  # where it may be timed; None: nowhere
    instructions: str | None = None  # of the CPU, as `cpu.library.serving` gives them
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
    backend: str | None = None  # the one that is asked for by name; None: whatever is quickest

    def key(self):
        """Everything but M: sizes along M are known by their power of two."""
        return tuple([getattr(self, name) for name in KEY])

    def described(self):
        """What the tables call it: the key without what the file and section of a table say already."""
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
        """Whether wgmma has to write y from registers, because TMA cannot: see `epilogue` of `wgmma_pipeline.py`."""
        other = self.residual not in (None, self.out_dtype)
        return self.out_dtype == torch.float32 or self.N % 8 != 0 or other


KEY = tuple(field.name for field in fields(Request) if field.name != "M")


class Choice(NamedTuple):
    """A back end, and the number of its configuration in CONFIGS of its module."""

    backend: str
    config: int = 0


class Measured(NamedTuple):
    """What a GPU's measurement says: microseconds of every choice that ran, and why the others did not."""

    choice: Choice
    times: dict
    failed: dict
    basis: str = MEASURED

    def __str__(self):
        times = {}
        for choice, microseconds in self.times.items():
            times[choice.backend] = min(microseconds, times.get(choice.backend, microseconds))
        text = ", ".join(f"{name} {microseconds:.1f} us" for name, microseconds in times.items())
        failed = "".join(f"; {choice.backend} is passed over: {why}" for choice, why in self.failed.items())
        return f"measured: {text or 'see the tuned table of the GPU'}{failed}"


# ---- what can compute a product: arithmetic on a Request


def request_on(where, operation, dtype, M, N, K, backend=None, **others):
    """The `Request` of a product, for a call as for whoever wants to know what a call would do.

    where: the torch.device, or the capability of an NVIDIA GPU that is not here. backend: by default the one that
    SPARSEDM_BACKEND names. others: further fields.
    """
    gpu = capability(where) if isinstance(where, torch.device) else where
    on_cpu = isinstance(where, torch.device) and where.type == "cpu" and not exporting()
    instructions = library.serving()[0] if on_cpu else None
    backend = backend or forced_backend()
    return Request(operation, gpu, dtype, M, N, K, instructions=instructions, backend=backend, **others)


def _no_cpu(request):
    if request.capability is not None:
        return "the CPU kernels do not run on a GPU"
    if torch.compiler.is_compiling():  # where they win depends on the batch, and one graph serves every batch
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
        cost, _ = _cpu_cost(request)
    else:
        pixels = request.image[0] * request.image[1]
        sizes = request.N, request.K, *request.keep_and_group
        cost = rules.conv_cost((request.M // pixels, pixels), *sizes, request.instructions)
    if cost < 1:
        return None
    sizes = f"{request.M} x {request.K} x {request.N}"
    return f"{request.pattern}, {sizes}: about {cost:.2f} of the dense product's time"


def _cpu_cost(request):
    return rules.linear_cost(request.M, request.N, request.K, *request.keep_and_group, request.instructions)


def _cpu_order(request):
    """The order in which a CPU kernel reads the weight."""
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
    """Why so few rows and features are too small for the tiles of the kernels, or None."""
    if request.N < SMALLEST_N:
        return f"{request.N} features leave most of a tile of 128 x 128 empty"
    tiles = -(-request.M // 128) * -(-request.N // 128)
    if tiles < SMALLEST_GRID:
        return f"{tiles} tiles of 128 x 128 leave most of the GPU idle: the launch decides, not the arithmetic"
    return None


def _mma_loses(request):
    if not (reason := _small(request)) and (9, 0) <= request.capability < (12, 0):  # sm_120 has cuBLAS on mma.sync
        return f"{_no_wgmma(request)}, and mma.sp is no quicker than the dense tensor cores of {request.sm}"
    return reason


def _few_rows(request):
    return request.operation == LINEAR and request.M <= SPLITK_ROWS


@dataclass(frozen=True)
class Backend:
    """A way to compute a product. All functions take a Request, need no GPU, and import nothing."""

    name: str
    operation: str
    module: str | None  # with `launch` and CONFIGS, imported when it runs; None: the operator, in plain torch
    layout: str | Callable  # of the weight: a name in `layouts.LAYOUTS`, or the function that tells it
    supports: Callable = lambda request: None  # -> None, or why it cannot run
    meant: Callable = lambda request: True  # whether it is worth timing: not where another kernel is better for sure
    loses: Callable = lambda request: None  # -> None, or why the rule of thumb expects dense to be quicker
    config: Callable = lambda request: (0, False)  # -> configuration that the rule takes, whether to time it alone
    merit: str = ""
    sources: tuple = ()  # the other modules that hold its code
    on: str | None = "gpu"  # None: anywhere

    def layout_for(self, request):
        return self.layout if isinstance(self.layout, str) else self.layout(request)


# fmt: off
BACKENDS = (  # in the order in which the rule of thumb asks them
    Backend("splitk", LINEAR, "sparsedm.kernels.sparse24.mma_splitk", "fragments", _no_mma, _few_rows,
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
    """-> (Choice, why): the back end that is asked for if it can run, else what the rule of thumb takes."""
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
    """The choices that are timed: dense first, because the others are held against its result. A kernel that is asked
    for is timed alone. [] where no kernel can run. [] too where the file of one does not load, as with a Triton that it
    does not know: without it nobody can say what is quickest."""
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
    """The result, computed by the back end that is quickest as far as is known.

    run(choice, cache, strict) computes it, any number of times. strict: a kernel that does not run is an error;
    otherwise the operator computes in torch. cache: a dict that the caller keeps with the weight, for what `run` keeps
    there and for the choices made here; None: nothing is kept.
    """
    cache = {} if cache is None else cache
    return run(_decide(request, run, cache.setdefault("choices", {})), cache, request.backend is not None)


def _decide(request, run, choices):
    rule, _ = rule_of_thumb(request)
    if request.device is None or request.capability is None or not request.M:
        return rule
    if torch.compiler.is_compiling():  # by comparisons, which leave a dynamic M dynamic
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
    throwaway = {}  # what the losers read is not kept
    verdict = _tuner(request.operation).verdict(
        lambda candidate: run(offered[described.index(candidate)], throwaway, True),
        request.device,
        candidates=described,
        default=_describe(request.operation, rule),
        **request.described(),
        m=bucket(request.M),
    )
    times, failed = (
        {offered[described.index(candidate)]: value for candidate, value in pairs if candidate in described}
        for pairs in (verdict.times, verdict.failed)
    )
    return Measured(offered[described.index(verdict.config)], times, failed, verdict.basis)


def last_measured(cache, rows=None):
    """What `serve` measured or looked up for the latest new size, or for the size of `rows` rows: `Measured`, or None
    where it never did. cache: the caller's dict."""
    found = [
        measured
        for known, measured in cache.get("choices", {}).items()
        if measured.basis == MEASURED and (rows is None or known[0] == bucket(rows))
    ]
    return found[-1] if found else None


def launch(operation, backend, config, strict, *tensors, **options):
    """Runs a kernel. Returns whether it ran, as `launch.runs`; if not, the rule of thumb does not take it again."""

    def start():
        with torch.cuda.device_of(tensors[0]):
            module = load(row_of(operation, backend).module)
            module.launch(*tensors, config=module.CONFIGS[config], **options)

    return runs(operation, backend, tensors[0].device, start, strict)


def trying(operation, choice):
    """A context in which a choice runs: if the process ends inside, by a hang say, no tuner tries it again."""
    return _tuner(operation).trying(_describe(operation, choice))


@functools.cache
def load(module):
    """The module of a row, imported when it is needed: there may be no Triton."""
    return importlib.import_module(module)


@functools.cache
def _tuner(operation):
    rows = [row for row in BACKENDS if row.operation == operation and row.module]
    names = {name for row in rows for name in (row.module, *(f"sparsedm.kernels.sparse24.{s}" for s in row.sources))}
    sources = [Path(importlib.util.find_spec(name).origin) for name in sorted(names)]  # without importing them
    return Autotuner(operation, [{"backend": "dense"}], sources)


def _describe(operation, choice):
    """What the tables hold, for example {"backend": "splitk", "programs": 4}."""
    module = row_of(operation, choice.backend).module
    return {"backend": choice.backend} | (asdict(load(module).CONFIGS[choice.config]) if module else {})
