"""The problem of a measurement: random data of a shape, the right answer, torch's own error, operations and bytes.

A problem has two right answers: with the dense weight, and with the same weight under its 2:4 magnitude mask, for
sparse providers. A result is right if it is as good as torch:
    max |out - reference| <= 2 max |torch - reference| + eps max |reference|
where `reference` is computed in higher precision and `torch` in the precision of the problem, both by plain torch.
All data are random and without zeros: with zeros a device draws less power and runs faster than with real weights.
"""

import weakref
from typing import NamedTuple

import torch
import torch._functorch.config  # which `import torch` leaves out
import torch.nn.functional as F

from sparsedm.kernels.pattern import Pattern, group_view, select_mask_ref, ungroup
from sparsedm.kernels.sparse24.linear import ACTIVATIONS

TWO_FOUR = Pattern(2, 4)
CHUNK = 8192  # rows of the reference that are computed at a time


class Verdict(NamedTuple):
    right: bool
    error: float
    allowed: float


class Problem:
    """One shape with its data. A subclass has `answer(weight, dtype)`, `weight`, `masked`, `operations` and `traffic`.

    kernel, mode: what is computed, for the results file. dtype: of the product. operations: of the dense product.
    modes: the modes for sweeps; of_models: the modes for layers of a model, if these are fewer.
    roundings: of the largest result, which are allowed beside twice torch's own error.
    """

    kernel = ""
    roundings = 1
    modes = of_models = ()

    def __init__(self, shape, mode, dtype, device, seed=0):
        self.shape, self.mode, self.dtype, self.device = shape, mode, dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._known = {}

    def check(self, outputs, sparse, weight=None):
        """Whether `outputs`, a tensor or a tuple of tensors, are as good as torch's.

        weight: the weight of the outputs, if it is not the problem's (sparse: masked, else dense) weight.
        """
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        expected = self._expected(sparse) if weight is None else self._expected_of(weight)
        worst = Verdict(True, 0.0, 0.0)
        for out, (reference, allowed) in zip(outputs, expected, strict=True):
            if out.shape != reference.shape:
                return Verdict(False, float("inf"), allowed)
            difference = (out.detach().to(reference.dtype) - reference).abs().max().item() if out.numel() else 0.0
            verdict = Verdict(difference <= allowed, difference, allowed)  # NaN is not <=
            if not verdict.right:
                return verdict
            worst = max(worst, verdict, key=lambda v: v.error / (v.allowed or 1))
        return worst

    def _expected(self, sparse):
        """[(reference, allowed error)] of each output, computed once."""
        if sparse not in self._known:
            self._known[sparse] = list(self._references(self.masked if sparse else self.weight))
        return self._known[sparse]

    def _expected_of(self, weight):
        """The same of a provider's own weight, which is checked before and after it is timed."""
        if id(weight) not in self._known:
            self._known[id(weight)] = weight, list(self._references(weight))
        return self._known[id(weight)][1]

    def _references(self, weight):
        for reference, low in zip(self.answer(weight, higher(self.dtype)), self.answer(weight, self.dtype)):
            # of the problem's type also where the output is of a wider one: the error of a single number, such as a
            # loss, may be small by luck
            eps = self.roundings * torch.finfo(self.dtype).eps * reference.abs().max().item()
            yield reference, 2 * (low.to(reference.dtype) - reference).abs().max().item() + eps

    def poison(self, sparse):
        """Fill the memory that the next output will probably get with NaN.

        Otherwise a kernel that writes nothing might return the right answer of the provider before it.
        """
        for reference, _ in self._expected(sparse):
            torch.full(reference.shape, float("nan"), dtype=self.dtype, device=self.device)

    def columns(self):
        return {
            "kernel": self.kernel,
            "mode": self.mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": self.shape.model,
            "shape": self.shape.name,
            "layers": self.shape.layers,
            **{size: getattr(self.shape, size) for size in "MNK"},
        }

    def _normal(self, *size, dtype=None):
        dtype = dtype or self.dtype
        return torch.randn(size, generator=self.generator, device=self.device, dtype=torch.float32).to(dtype)

    def _weight(self, *size, dtype=None):
        """Normal, with log-normal scales of the rows, like trained weights."""
        fan_in = torch.Size(size[1:]).numel()
        scale = (0.5 * self._normal(size[0], dtype=torch.float32)).exp() / fan_in**0.5
        weight = self._normal(*size, dtype=torch.float32) * scale.view(-1, *[1] * (len(size) - 1))
        return weight.to(dtype or self.dtype)


def higher(dtype):
    """The precision of the reference. On a GPU torch computes fp32 products exactly in fp32 unless told otherwise."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def masked(weight, pattern=TWO_FOUR):
    """weight under its magnitude mask along the input axis. No zero is -0.0: some compressors would keep it."""
    mask = ungroup(select_mask_ref(group_view(weight), pattern), weight.shape)
    return torch.where(mask, weight, 0.0).contiguous()


def can_be_masked(weight):
    return weight.shape[1] % TWO_FOUR.group == 0


class LinearProblem(Problem):
    """y = act(x W^T + b) + r. mode "plain": only the bias; "epilogue": also the shape's activation and residual."""

    kernel = "linear"
    modes, of_models = ("plain", "epilogue"), ("epilogue",)

    def __init__(self, shape, mode, dtype, device, seed=0):
        super().__init__(shape, mode, dtype, device, seed)
        self.x = self._normal(shape.M, shape.K)
        self.weight = self._weight(shape.N, shape.K)
        self.bias = self._normal(shape.N)
        self.activation = shape.activation if mode == "epilogue" else None
        self.residual = self._normal(shape.M, shape.N) if mode == "epilogue" and shape.residual else None
        self.masked = masked(self.weight) if can_be_masked(self.weight) else None
        self.operations = 2 * shape.M * shape.N * shape.K

    @property
    def epilogue(self):
        return {"activation": self.activation, "residual": self.residual}

    def answer(self, weight, dtype):
        weight, bias = weight.to(dtype), self.bias.to(dtype)
        y = torch.empty(len(self.x), len(weight), dtype=dtype, device=self.device)
        for rows in torch.arange(len(self.x)).split(CHUNK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            y[part] = ACTIVATIONS[self.activation](F.linear(self.x[part].to(dtype), weight, bias))
            if self.residual is not None:
                y[part] += self.residual[part].to(dtype)
        return (y,)

    def traffic(self, sparse):
        """The least number of bytes to move: x, weight (2:4: half the values and 2 bits for each), y, residual."""
        shape, size = self.shape, self.dtype.itemsize
        weight = shape.N * shape.K * (size / 2 + 1 / 8 if sparse else size)
        outputs = shape.M * shape.N * (1 if self.residual is None else 2)
        return weight + size * (shape.M * shape.K + outputs)


class FirstProblem(LinearProblem):
    """The plain product, to compare the configurations of our kernels."""

    modes = of_models = ("plain",)


class ConvProblem(Problem):
    """y = conv(x W) + b, everything channels-last."""

    kernel = "conv"
    modes = ("plain",)

    def __init__(self, shape, mode, dtype, device, seed=0):
        super().__init__(shape, mode, dtype, device, seed)
        self.x = self._normal(shape.batch, shape.channels, shape.height, shape.width)
        self.weight = self._weight(shape.filters, shape.channels, shape.kernel, shape.kernel)
        self.x, self.weight = (t.contiguous(memory_format=torch.channels_last) for t in (self.x, self.weight))
        self.bias = self._normal(shape.filters)
        self.masked = None
        if can_be_masked(self.weight):
            self.masked = masked(self.weight).contiguous(memory_format=torch.channels_last)
        self.operations = 2 * shape.M * shape.N * shape.K

    def answer(self, weight, dtype):
        x, bias = self.x.to(dtype), self.bias.to(dtype)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return (F.conv2d(x, weight.to(dtype), bias, self.shape.stride, self.shape.padding),)

    def traffic(self, sparse):
        size = self.dtype.itemsize
        weight = self.weight.numel() * (size / 2 + 1 / 8 if sparse else size)
        return weight + size * (self.x.numel() + self.shape.M * self.shape.N)


class MaskProblem(Problem):
    """masked = (w * mask(w)).to(dtype) of a fp32 weight (N, K): a pass in every training step.

    The answer must be exact. "dense" is the same pass without a mask, the cast.
    """

    kernel = "mask"
    modes = ("choose",)

    def __init__(self, shape, mode, dtype, device, seed=0):
        super().__init__(shape, mode, dtype, device, seed)
        self.weight = self._weight(shape.N, shape.K, dtype=torch.float32)
        self.masked = masked(self.weight) if can_be_masked(self.weight) else None
        self.operations = 0

    def _references(self, weight):
        yield weight.to(self.dtype), 0.0

    def traffic(self, sparse):
        """Read the master weight, write the product's; a mask adds one bit of each weight."""
        return self.weight.numel() * (4 + self.dtype.itemsize + (1 / 8 if sparse else 0))


class TrainingProblem(Problem):
    """One linear layer in training: forward (y), backward (dx, dw, db) and both, from fp32 master weights.

    Every forward selects the mask anew. The backward alone is timed repeatedly on one forward, whose saved tensors
    stay. In 16 bits the product is autocast. dw is the straight-through gradient, not masked.
    """

    kernel = "masked-train"
    modes = ("forward", "backward", "forward+backward")
    products = {"forward": 1, "backward": 2, "forward+backward": 3}

    def __init__(self, shape, mode, dtype, device, seed=0):
        super().__init__(shape, mode, dtype, device, seed)
        self.x = self._normal(shape.M, shape.K).requires_grad_()
        self.weight = self._weight(shape.N, shape.K, dtype=torch.float32)
        self.bias = self._normal(shape.N, dtype=torch.float32)
        self.dy = self._normal(shape.M, shape.N)
        self.masked = masked(self.weight) if can_be_masked(self.weight) else None
        self.operations = 2 * shape.M * shape.N * shape.K * self.products[mode]
        self._forwards = weakref.WeakKeyDictionary()  # layer -> its y, for the backward alone

    def answer(self, weight, dtype):
        x, weight, bias, dy = (t.detach().to(dtype) for t in (self.x, weight, self.bias, self.dy))
        y = () if self.mode == "backward" else (F.linear(x, weight, bias),)
        return y if self.mode == "forward" else (*y, dy @ weight, dy.T @ x, dy.sum(0))

    def traffic(self, sparse):
        shape, size = self.shape, self.dtype.itemsize
        once = size * (shape.M * shape.K + shape.M * shape.N) + shape.N * shape.K * (4 + size)
        return once * self.products[self.mode]

    def run(self, layer):
        """One call of `layer`, a module with fp32 parameters `weight` and `bias`: what is timed."""
        leaves = self.x, layer.weight, layer.bias
        if self.mode == "backward":
            if layer not in self._forwards:
                # or a compiled layer would give its saved tensors away in the first backward
                with torch._functorch.config.patch(donated_buffer=False):
                    self._forwards[layer] = self._forward(layer)
            return torch.autograd.grad(self._forwards[layer], leaves, self.dy, retain_graph=True)
        y = self._forward(layer)
        return y if self.mode == "forward" else (y, *torch.autograd.grad(y, leaves, self.dy))

    def _forward(self, layer):
        torch.autograd.graph.increment_version(layer.weight)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return layer(self.x)
