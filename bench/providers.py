"""The implementations that are compared. One small class each:

    supports(problem) -> None, or the reason why not, for the results file
    prepare(problem)  -> the result of one-time work on a weight (packing), timed separately
    bind(problem, prepared) -> Bound: the call that is timed, and what was chosen for it

`sparse` says which weight a provider multiplies with: dense or 2:4. Only the providers in DENSE are denominators of
speed-ups. The sparse products of other libraries, and the list of all providers, are in `baselines.py`.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bench.problems import TWO_FOUR
from sparsedm.compressed import CompressedConv2d
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.pattern import pack_bits
from sparsedm.kernels.sparse24.dispatch import (
    LINEAR,
    SPLITK_ROWS,
    Choice,
    last_measured,
    launch,
    load,
    request_on,
    row_of,
    rule_of_thumb,
)
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.sparse24.layouts import kernel_tensors, prepack
from sparsedm.kernels.sparse24.linear import ACTIVATIONS, sparse24_linear
from sparsedm.layers import Conv2d, Linear

OURS = "sparsedm 2:4"  # the dispatcher's choice
HALF = (torch.bfloat16, torch.float16)
MOST_SPLITK_ROWS = 4 * SPLITK_ROWS  # largest number of rows for which `splitk` is tried


class Bound(NamedTuple):
    """weight: the weight of `run`, if it is neither the problem's dense nor its masked weight."""

    run: Callable
    detail: str = ""
    weight: torch.Tensor | None = None


class Provider:
    """sweeps: whether it is measured only in sweeps over sizes."""

    name = ""
    sparse = True
    sweeps = False

    @property
    def compiled(self):
        """Whether it uses torch.compile, which takes long."""
        return self.name.endswith("compiled")

    def supports(self, problem):
        if self.sparse and problem.masked is None:
            return f"the input axis {problem.weight.shape[1]} is not a multiple of {TWO_FOUR.group}"
        return None

    def prepare(self, problem):
        return None

    def traffic(self, problem):
        """The least number of bytes to move; 0 if they are not counted."""
        return problem.traffic(self.sparse)


# ---- y = act(x W^T + b) + r


def with_epilogue(problem, product):
    """A call of `product()`, which computes x W^T + b, and of the problem's epilogue in torch operations."""
    activate, residual = ACTIVATIONS[problem.activation], problem.residual

    def run():
        y = activate(product())
        return y if residual is None else y + residual

    return run


def torch_linear(problem, weight):
    """The product and its epilogue in torch operations, for eager code and for torch.compile."""
    return with_epilogue(problem, lambda: F.linear(problem.x, weight, problem.bias))


class Dense(Provider):
    name, sparse = "dense", False

    def bind(self, problem, prepared):
        return Bound(torch_linear(problem, problem.weight), "torch eager")


class DenseFused(Provider):
    """cuBLAS with its own epilogue, bias and tanh GELU: a compiler may choose it; here it needs no compiler."""

    name, sparse = "dense fused", False

    def supports(self, problem):
        if problem.device.type != "cuda":
            return "needs a CUDA device"
        return None if problem.activation == "gelu_tanh" else f"cuBLAS fuses tanh GELU, not {problem.activation}"

    def bind(self, problem, prepared):
        x, weight, bias, residual = problem.x, problem.weight.t(), problem.bias, problem.residual

        def run():
            y = torch._addmm_activation(bias, x, weight, use_gelu=True)
            return y if residual is None else y + residual

        return Bound(run, "torch._addmm_activation")


class DenseCompiled(Provider):
    name, sparse = "dense compiled", False

    def supports(self, problem):
        return None if problem.device.type == "cuda" else "max-autotune compares GPU kernels: there is none on a CPU"

    def bind(self, problem, prepared):
        return Bound(max_autotune(torch_linear(problem, problem.weight)), "torch.compile max-autotune")


def max_autotune(call):
    """`call` compiled for exactly its shapes, for best speed. The clock makes CUDA graphs.

    By default dynamo stops compiling after eight shapes, and compiles for variable sizes from the second shape on. Both
    would weaken the strongest baseline without notice.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    return torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)


class Masked(Provider):
    """Ours without sparse tensor cores: the dense product with the masked weight, which training uses."""

    name = "sparsedm masked"

    def prepare(self, problem):
        return select_mask(problem.weight, TWO_FOUR).masked

    def bind(self, problem, prepared):
        return Bound(torch_linear(problem, prepared), "torch, pre-masked")


class Sparse24(Provider):
    """Our 2:4 product. backend None: the dispatcher's choice; else the back end of this name."""

    def __init__(self, backend=None):
        self.backend, self.sweeps = backend, bool(backend)
        self.name = OURS + (f" {backend}" if backend else "")

    def supports(self, problem):
        if reason := super().supports(problem):
            return reason
        rows = problem.shape.M
        if self.backend == "splitk" and rows > MOST_SPLITK_ROWS:
            return f"{rows} rows: it is made for few, and with more than {MOST_SPLITK_ROWS} would only cost time"
        choice, why = self._choice(problem)
        return None if self.backend in (None, choice.backend) else why

    def prepare(self, problem):
        return pack(problem.masked)

    def bind(self, problem, prepared):
        cache, options = {}, {**problem.epilogue, "backend": self.backend}

        def run():
            return sparse24_linear(problem.x, *prepared, problem.bias, **options, cache=cache)

        choice, why = self._choice(problem)
        run()  # on a GPU this measures the candidates, unless the tuned table has them
        measured = last_measured(cache, problem.shape.M)
        if measured:
            choice, why = measured.choice, f"measured, configuration {measured.choice.config}"
        return Bound(run, f"{choice.backend}: {why}")

    def _choice(self, problem):
        shape = problem.shape
        return rule_of_thumb(request_on(problem.device, LINEAR, problem.dtype, shape.M, shape.N, shape.K, self.backend))


class Configuration(Sparse24):
    """One configuration of one of our kernels, independent of the dispatcher."""

    def __init__(self, choice):
        super().__init__(choice.backend)
        self.config = choice.config
        self.name = f"{choice.backend} {choice.config}"

    def bind(self, problem, prepared):
        choice = Choice(self.backend, self.config)
        run = configured(choice, problem.x, *prepared, problem.bias, problem.activation, problem.residual)
        return Bound(run, described(choice))


def configured(choice, x, values, metadata, bias=None, activation=None, residual=None, scale=None):
    """A call of `sparse24_linear` on rows x by one configuration of one kernel, bypassing the dispatcher."""
    layout = row_of(LINEAR, choice.backend).layout
    tensors = kernel_tensors(values, prepack(values, metadata, layout, 2 * values.shape[1]))
    options = {"bias": bias, "activation": activation, "residual": residual, "skip": None, "scale": scale}

    def run():
        y = x.new_empty(len(x), len(values))
        launch(LINEAR, *choice, True, x, *tensors, y, **options)
        return y

    return run


def described(choice):
    """A configuration in a few words, for the results file."""
    config = load(row_of(LINEAR, choice.backend).module).CONFIGS[choice.config]
    told = {name: value for name, value in asdict(config).items() if value not in (False, "none")}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in told.items())


# ---- what the products of other libraries have in common (they are in `baselines.py`)


class Baseline(Provider):
    """Rules that all baselines share: a CUDA device, 16-bit types, sizes in multiples of `rows`, `columns`,
    `tokens`."""

    rows, columns, tokens = 16, 16, 8
    cusparselt = False  # whether it stands on that library

    def supports(self, problem):
        shape = problem.shape
        if problem.device.type != "cuda":
            return "needs a CUDA device"
        if problem.dtype not in HALF:
            return f"takes bfloat16 and float16, not {str(problem.dtype)[6:]}"
        if self.cusparselt and not torch.backends.cusparselt.is_available():
            return "this torch has no cuSPARSELt"
        if shape.N % self.rows or shape.K % self.columns or shape.M % self.tokens:
            sizes = f"N, K, M = {shape.N}, {shape.K}, {shape.M}"
            return f"{sizes} are not multiples of {self.rows}, {self.columns}, {self.tokens}"
        return super().supports(problem)


# ---- convolutions


class DenseConv(Provider):
    name, sparse = "dense", False

    def bind(self, problem, prepared):
        shape = problem.shape
        return Bound(
            lambda: F.conv2d(problem.x, problem.weight, problem.bias, shape.stride, shape.padding), "torch eager"
        )


class DenseConvCompiled(DenseConv):
    name = "dense compiled"
    supports = DenseCompiled.supports

    def bind(self, problem, prepared):
        return Bound(max_autotune(super().bind(problem, prepared).run), "torch.compile max-autotune")


class SparseConv24(Provider):
    name = OURS

    def prepare(self, problem):
        shape = problem.shape
        geometry = shape.channels, shape.filters, shape.kernel, shape.stride, shape.padding
        layer = Conv2d(*geometry, pattern=TWO_FOUR, device=problem.x.device, dtype=problem.x.dtype)
        with torch.no_grad():
            layer.weight.copy_(problem.masked)
            layer.bias.copy_(problem.bias)
            return CompressedConv2d(layer)

    def bind(self, problem, prepared):
        return Bound(lambda: prepared(problem.x), "CompressedConv2d")


# ---- masks


class Cast(Provider):
    name, sparse = "dense", False

    def bind(self, problem, prepared):
        return Bound(lambda: problem.weight.to(problem.dtype, copy=True), "cast without a mask")


def topk_mask(weight):
    """The usual way to make a 2:4 mask, of 0.0 and 1.0: indices of the two largest of each four, and a scatter."""
    groups = weight.view(len(weight), -1, TWO_FOUR.group)
    keep = groups.abs().topk(TWO_FOUR.keep, dim=-1).indices
    return torch.zeros_like(groups).scatter_(-1, keep, 1.0).view_as(weight)


class TopK(Provider):
    name = "torch topk"

    def bind(self, problem, prepared):
        return Bound(lambda: (problem.weight * topk_mask(problem.weight)).to(problem.dtype), "topk + scatter")


class Choose(Provider):
    name = "sparsedm choose"

    def traffic(self, problem):
        """Its mask is of bool, a byte for each weight instead of a bit."""
        return super().traffic(problem) + problem.weight.numel() * 7 / 8

    def bind(self, problem, prepared):
        return Bound(lambda: select_mask(problem.weight, TWO_FOUR, problem.dtype).masked, "masked weight and mask")


class ChoosePacked(Provider):
    name = "sparsedm choose + pack"

    def traffic(self, problem):
        """Besides masked weight and mask it writes half the values, and their metadata of 2 bits each."""
        return super().traffic(problem) + problem.weight.numel() * (problem.dtype.itemsize / 2 + 1 / 8)

    def bind(self, problem, prepared):
        def run():
            wanted = {"mask": False, "bits": True, "compressed": True}
            return select_mask(problem.weight, TWO_FOUR, problem.dtype, **wanted)

        made, rows = run(), problem.masked.to(problem.dtype)
        for name, expected in zip(("values", "metadata", "bits"), (*pack(rows), pack_bits(rows != 0))):
            if not torch.equal(getattr(made, name), expected):
                raise ValueError(f"its {name} are wrong")  # `measure` itself looks at the masked weight alone
        return Bound(lambda: run().masked, "masked weight, bits, values, metadata")


# ---- one linear layer in training


class TrainingProvider(Provider):
    """A layer with the problem's weight; `layer(N, K)` makes it."""

    def bind(self, problem, prepared):
        layer = self.layer(problem.shape.K, problem.shape.N).to(problem.device)
        with torch.no_grad():
            layer.weight.copy_(problem.weight)
            layer.bias.copy_(problem.bias)
        return Bound(lambda: problem.run(layer), type(layer).__name__)


class TrainDense(TrainingProvider):
    name, sparse, layer = "dense", False, staticmethod(nn.Linear)


class TrainMasked(TrainingProvider):
    name = "sparsedm masked"

    @staticmethod
    def layer(inputs, outputs):
        return Linear(inputs, outputs, pattern=TWO_FOUR)


class TopKLinear(nn.Linear):
    """Straight-through masking in the usual torch operations."""

    def forward(self, x):
        mask = topk_mask(self.weight.detach())
        return F.linear(x, self.weight + (self.weight * mask - self.weight).detach(), self.bias)


class TrainTopK(TrainingProvider):
    name, layer = "torch topk", TopKLinear
