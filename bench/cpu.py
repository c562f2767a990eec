"""What a CPU gains from N:M, measured with fairness: every pattern of ours against two dense products of torch.

    dense            `F.linear`, `F.conv2d` and torch's attention: what torch users run
    dense oneDNN     oneDNN's product on a weight packed once; of whole networks also our attention in C where its rule
                     takes it; of training steps `F.linear` by oneDNN instead of MKL,
                     on CPUs without bf16 instructions
    sparsedm N:M     the compressed weight by the dispatcher; of training steps the masked network

Suite `cpu` of `bench.run` measures PLAN: the most telling first. With one thread a time is the CPU time of that thread,
which a busy neighbour disturbs less than the wall clock; with more it is the wall clock. Every row says which.
"""

import contextlib
import copy
import types
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn

from bench.charts import LAYERS
from bench.networks import (
    DECAY,
    ModelShape,
    NetworkProblem,
    NetworkProvider,
    TrainingProvider,
    TrainingStepProblem,
)
from bench.problems import ConvProblem, LinearProblem, masked
from bench.providers import Bound, Dense, DenseConv, Provider
from bench.results import ONEDNN
from bench.shapes import ConvShape, LinearShape, of_model
from sparsedm.compressed import CompressedConv2d
from sparsedm.compression import compress
from sparsedm.kernels.checksum import checksums
from sparsedm.kernels.cpu import rules
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.sparse24.dispatch import LINEAR, request_on, rule_of_thumb
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.sparse24.linear import ACTIVATIONS, sparse24_linear
from sparsedm.layers import Conv2d, Linear
from sparsedm.sparsity import hold_masks, set_masking, sparsify

POINTWISE = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


def provider_of(pattern):
    return f"sparsedm {pattern}"


# oneDNN adds the terms of a product in one chain. At K = 1024 that rounds three times as much as MKL's short chains.
# A rival must not be refused for it; a wrong product is off by far more.
ROUNDINGS = 32


class Product(LinearProblem):
    roundings = ROUNDINGS


class Convolution(ConvProblem):
    roundings = ROUNDINGS


# ---- one layer -------------------------------------------------------------------------------------------------------


class OneDNN(Provider):
    name, sparse = ONEDNN, False

    def bind(self, problem, prepared):
        weight = torch.ops.mkldnn._reorder_linear_weight(problem.weight, problem.shape.M)
        attribute, algorithm = POINTWISE[problem.activation]

        def run():
            y = torch.ops.mkldnn._linear_pointwise(problem.x, weight, problem.bias, attribute, [], algorithm)
            return y if problem.residual is None else y + problem.residual

        return Bound(run, "oneDNN, weight packed once")


class OneDNNConv(Provider):
    name, sparse = ONEDNN, False

    def bind(self, problem, prepared):
        return Bound(packed_conv(problem.x, problem.weight, problem.bias, problem.shape), "oneDNN, weight packed once")


def packed_conv(x, weight, bias, shape):
    geometry = [shape.padding] * 2, [shape.stride] * 2, [1, 1], 1
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


class Sparse(Provider):
    """The compressed weight of a pattern, as the dispatcher runs it."""

    sparse = True

    def __init__(self, pattern):
        self.pattern, self.name = Pattern.parse(pattern), provider_of(pattern)

    def supports(self, problem):
        channels = problem.weight.shape[1]
        return f"{channels} is not a multiple of {self.pattern.group}" if channels % self.pattern.group else None

    def bind(self, problem, prepared):
        shape, cache, weight = problem.shape, {}, masked(problem.weight, self.pattern)
        values, words = pack(weight, self.pattern)
        cache["held"] = checksums(values, words)  # as inside `hold_masks`
        options = {"activation": problem.activation, "residual": problem.residual, "pattern": str(self.pattern)}
        request = request_on(
            problem.device, LINEAR, problem.dtype, shape.M, shape.N, shape.K, pattern=options["pattern"]
        )
        choice, why = rule_of_thumb(request)

        def run():
            return sparse24_linear(problem.x, values, words, problem.bias, cache=cache, **options)

        return Bound(run, f"{choice.backend}: {why}", weight)

    def traffic(self, problem):
        return 0


class SparseConv(Sparse):
    def bind(self, problem, prepared):
        shape, weight = problem.shape, masked(problem.weight, self.pattern)
        layer = Conv2d(shape.channels, shape.filters, shape.kernel, shape.stride, shape.padding, pattern=self.pattern)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(problem.bias)
            layer = CompressedConv2d(layer)
        return Bound(lambda: layer(problem.x), "CompressedConv2d", weight)


# ---- whole networks --------------------------------------------------------------------------------------------------


class Network(NetworkProblem):
    """One evaluation of a network, whose first and last images are checked: a reference of all takes minutes."""

    roundings = ROUNDINGS

    def check(self, outputs, sparse, weight=None):
        return super().check(tuple(y[[0, -1]] for y in outputs), sparse, weight)

    def answer(self, network, dtype):
        inputs, self.inputs = self.inputs, tuple(x if x is None else x[[0, -1]] for x in self.inputs)
        try:
            with torchs_attention():
                return super().answer(network, dtype)
        finally:
            self.inputs = inputs


def torchs_attention():
    """A context in which networks attend as torch does."""
    return mock.patch.object(rules, "attention_serves", return_value=False)


class Eager(NetworkProvider):
    """The network in torch, with its own attention."""

    def bind(self, problem, prepared):
        network = self.built(problem).network

        def run():
            with torchs_attention():
                return problem.outputs(network, problem.inputs)

        return Bound(run, "torch eager")

    def built(self, problem):
        with torchs_attention():
            return super().built(problem)


class Compressed(NetworkProvider):
    def __init__(self, pattern):
        super().__init__(provider_of(pattern), self.compressed, sparse=True)
        self.pattern = pattern

    def masked(self, problem):
        return sparsify(copy.deepcopy(problem.weight), self.pattern)

    def compressed(self, problem):
        return compress(self.masked(problem))

    def bind(self, problem, prepared):
        return super().bind(problem, prepared)._replace(weight=self.masked(problem))


def packed(problem):
    return packed_network(problem.weight)


def packed_network(dense):
    """A copy of a dense network whose layers are oneDNN's, with weights packed once and fused epilogues."""
    network = copy.deepcopy(dense)
    for layer in network.modules():
        if isinstance(layer, Linear):
            layer.forward = types.MethodType(_packed_linear(layer), layer)
        elif isinstance(layer, Conv2d):
            layer.forward = types.MethodType(_packed_conv(layer), layer)
    return network.to(memory_format=torch.channels_last) if is_convolutional(network) else network


def is_convolutional(network):
    return sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) > 4


def _packed_linear(layer):
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 256), layer.bias
    attribute, algorithm = POINTWISE[layer.activation]

    def forward(self, x, residual=None, skip=None, scale=None):
        x = x if skip is None else torch.cat((x, skip), -1)
        if residual is not None and scale is None and attribute == "none":
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight, bias, "add")
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], algorithm)
        if scale is not None:
            return torch.addcmul(residual, y, scale[:, None])
        return y if residual is None else y + residual

    return forward


def _packed_conv(layer):
    packs, geometry = {}, (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)

    def forward(self, x, residual=None):
        x = x.contiguous(memory_format=torch.channels_last)
        if x.shape not in packs:
            weight = layer.weight.detach()
            packs[x.shape] = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
        y = torch.ops.mkldnn._convolution_pointwise(x, packs[x.shape], layer.bias, *geometry, "none", [], "")
        y = ACTIVATIONS[layer.activation](y)
        return y if residual is None else y + residual

    return forward


# ---- a training step -------------------------------------------------------------------------------------------------


class TrainingStep(TrainingStepProblem):
    """Masks are selected once in each step, as `train.step` does."""

    def outputs(self, network, inputs):
        with hold_masks(network):
            return super().outputs(network, inputs)


class Train(TrainingProvider):
    """around: a context in which every step is made."""

    def __init__(self, name, pattern=None, around=contextlib.nullcontext):
        super().__init__(name, self.trained, sparse=pattern is not None)
        self.around, self.pattern = around, pattern

    def trained(self, problem):
        network = copy.deepcopy(problem.weight).train()
        if self.pattern:
            set_masking(sparsify(network, self.pattern), decay=DECAY)
        return network

    def bind(self, problem, prepared):
        bound = super().bind(problem, prepared)

        def run():
            with self.around():
                return bound.run()

        return bound._replace(run=run, weight=self.trained(problem))


class TrainByOneDNN(Train):
    def supports(self, problem):
        if rules.bf16_instructions():
            return "torch lets oneDNN compute F.linear only in bf16 on this CPU"
        return super().supports(problem)


@contextlib.contextmanager
def onednn_products():
    """`F.linear` by oneDNN: exact where the CPU has no bf16 instructions."""
    before, torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def torchs_product():
    """Masked training whose products are torch's: what choice and decay in C give alone."""
    never = mock.Mock(return_value=False)
    return mock.patch.multiple(rules, training_serves=never, conv_training_serves=never)


# ---- what is measured ------------------------------------------------------------------------------------------------

PATTERNS = ("7:8", "2:4", "1:4", "1:8", "1:16")
FEW = ("2:4", "1:4")
SIZES = (  # M, K, N of layers of U-ViT S/2 at batch 1 and 8, of the quickstart, of U-ViT L/2 and DiT-XL/2
    *((257, 512, 512), (257, 512, 1536), (2056, 512, 512), (2056, 512, 1536), (2056, 512, 2048), (2056, 2048, 512)),
    *((2056, 1024, 512), (576, 128, 384), (576, 128, 512), (576, 512, 128), (2304, 128, 512), (257, 1024, 1024)),
    *((257, 1024, 4096), (257, 4096, 1024), (256, 1152, 3456), (256, 1152, 4608), (256, 4608, 1152)),
)
QUICKSTART = ("image_size", 12), ("patch_size", 3), ("velocity", True), ("num_classes", 6)


def linear_shapes(model, sizes):
    return [LinearShape(model, f"{M}x{K}->{N}", M, N, K) for M, K, N in sizes]


def conv_shapes(batch, widest=0):
    """The 3 x 3 convolutions of the DDPM U-Net on images of at least `widest` pixels, of more than three channels."""
    found = [shape for shape in of_model("ddpm-cifar10", batch) if isinstance(shape, ConvShape)]
    return [s for s in found if s.kernel == 3 and s.stride == 1 and s.width >= widest and s.channels > 3 < s.filters]


def network(preset, batch, label="", options=()):
    return ModelShape(preset, batch, options, label)


LINEAR_PROVIDERS = (Dense(), OneDNN(), *map(Sparse, PATTERNS))
CONV_PROVIDERS = (DenseConv(), OneDNNConv(), *map(SparseConv, FEW))
NETWORK_PROVIDERS = (
    Eager("dense", lambda problem: problem.weight, sparse=False),
    NetworkProvider(ONEDNN, packed, sparse=False),
    *map(Compressed, FEW),
)
TRAIN_PROVIDERS = (
    Train("dense"),
    TrainByOneDNN(ONEDNN, around=onednn_products),
    Train(provider_of("2:4"), "2:4"),
    Train(provider_of("1:4"), "1:4"),
    Train("sparsedm 2:4, dense product", "2:4", around=torchs_product),
)


@dataclass(frozen=True)
class Part:
    """What is measured in one go: shapes, a function because some are traced; limits: of `measure`."""

    suite: str
    kind: type
    shapes: object
    providers: tuple
    mode: str
    threads: int = 1
    limits: dict = field(default_factory=dict)
    quick: int = 2  # so many shapes with --quick


LAYER = {"rounds": 5, "per_round": 2, "seconds": 4.0}
CALL = {"rounds": 4, "per_round": 1, "seconds": 25.0}
PLAN = (  # the cheapest first, of what tells as much
    Part("gemm", Product, lambda: linear_shapes(LAYERS, SIZES), LINEAR_PROVIDERS, "plain", limits=LAYER, quick=9),
    Part("gemm", Product, lambda: linear_shapes("square", [(n,) * 3 for n in (128, 256, 512, 1024, 2048)]),
         LINEAR_PROVIDERS, "plain", limits=LAYER, quick=3),
    Part("train", TrainingStep, lambda: [network("uvit-tiny", 32, "quickstart", QUICKSTART)], TRAIN_PROVIDERS,
         "training step", limits=CALL | {"rounds": 20, "seconds": 12.0}),
    Part("end-to-end", Network, lambda: [network("uvit-tiny", 128, "quickstart", QUICKSTART)], NETWORK_PROVIDERS,
         "step", limits=CALL),
    Part("gemm", Product, lambda: linear_shapes(
        "few rows", [(m, k, n) for k, n in ((512, 2048), (1152, 4608)) for m in (1, 2, 4, 8, 16, 32)]),
        (Dense(), OneDNN(), *map(Sparse, FEW)), "plain", limits=LAYER),
    Part("gemm", Product, lambda: linear_shapes(LAYERS, SIZES[:4]), LINEAR_PROVIDERS, "plain, 2 threads",
         2, LAYER | {"rounds": 40}),
    Part("conv", Convolution, lambda: conv_shapes(8), CONV_PROVIDERS, "plain", limits=LAYER),
    Part("end-to-end", Network, lambda: [
        network("uvit-cifar10-small", 1), network("ddpm-cifar10", 1), network("dit-imagenet256-base", 1),
        network("ddpm-cifar10", 8), network("uvit-cifar10-small", 8)], NETWORK_PROVIDERS, "step", limits=CALL),
    Part("conv", Convolution, lambda: conv_shapes(32, 16)[:4], CONV_PROVIDERS, "plain", limits=LAYER, quick=0),
    Part("end-to-end", Network, lambda: [network("dit-imagenet256-base", 8)], NETWORK_PROVIDERS, "step",
         limits=CALL | {"rounds": 3, "seconds": 110.0}, quick=0),
)  # fmt: skip
