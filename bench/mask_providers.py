"""The implementations that are compared where masks are made: choosing them, and a linear layer in training.

Classes as in `providers.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bench.problems import TWO_FOUR
from bench.providers import Bound, Provider
from sparsedm.kernels.mask import select_mask
from sparsedm.layers import Linear

# ---- masks


class Cast(Provider):
    name, sparse = "dense", False

    def bind(self, problem, prepared):
        return Bound(lambda: problem.weight.to(problem.dtype, copy=True), "cast without a mask")


class TopK(Provider):
    """How masks are usually made: indices of the two largest of each four, and a scatter."""

    name = "torch topk"

    def bind(self, problem, prepared):
        def run():
            groups = problem.weight.view(len(problem.weight), -1, TWO_FOUR.group)
            keep = groups.abs().topk(TWO_FOUR.keep, dim=-1).indices
            mask = torch.zeros_like(groups).scatter_(-1, keep, 1.0)
            return (groups * mask).view_as(problem.weight).to(problem.dtype)

        return Bound(run, "topk + scatter")


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
            return select_mask(problem.weight, TWO_FOUR, problem.dtype, **wanted).masked

        return Bound(run, "masked weight, bits, values, metadata")


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
    """Straight-through masking as it is usually written, in torch operations."""

    def forward(self, x):
        groups = self.weight.detach().view(len(self.weight), -1, TWO_FOUR.group)
        keep = groups.abs().topk(TWO_FOUR.keep, dim=-1).indices
        mask = torch.zeros_like(groups).scatter_(-1, keep, 1.0).view_as(self.weight)
        return F.linear(x, self.weight + (self.weight * mask - self.weight).detach(), self.bias)


class TrainTopK(TrainingProvider):
    name, layer = "torch topk", TopKLinear
