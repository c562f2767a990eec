"""Other people's 2:4 products, behind the interface of `providers.py`, and the list of everybody.

    cuSPARSELt   through torch, with its default algorithm and with the best of its algorithms
    CUTLASS      through torch; it refuses what is not compute capability 8.x, which is recorded like any other result
    torchao      where it can be imported: its tensor subclass on top of the above, up to release 0.18

Epilogues: what a library cannot fuse is computed by torch after it, as its users have to do it.
"""

import functools
import importlib.util

import torch
from torch import nn

from sparsedm.bench.providers import OURS_AND_DENSE, Bound, Provider
from sparsedm.bench.timing import clock_for, fastest
from sparsedm.kernels.sparse24_matmul import ACTIVATIONS

HALF = (torch.bfloat16, torch.float16)
MOST_ALGORITHMS = 64


class Rival(Provider):
    """Rules that all of them share: a CUDA device, 16-bit types, sizes in multiples of `rows`, `columns`, `tokens`."""

    rows, columns, tokens = 16, 16, 8

    def supports(self, problem):
        shape = problem.shape
        if problem.device.type != "cuda":
            return "needs a CUDA device"
        if problem.dtype not in HALF:
            return f"takes bfloat16 and float16, not {str(problem.dtype)[6:]}"
        if shape.N % self.rows or shape.K % self.columns or shape.M % self.tokens:
            sizes = f"N, K, M = {shape.N}, {shape.K}, {shape.M}"
            return f"{sizes} are not multiples of {self.rows}, {self.columns}, {self.tokens}"
        return super().supports(problem)


def with_epilogue(problem, product):
    activate, residual = ACTIVATIONS[problem.activation], problem.residual

    def run():
        y = activate(product())
        return y if residual is None else y + residual

    return run


class CuSparseLt(Rival):
    name = "cuSPARSELt"

    def supports(self, problem):
        if problem.device.type == "cuda" and not torch.backends.cusparselt.is_available():
            return "this torch has no cuSPARSELt"
        return super().supports(problem)

    def prepare(self, problem):
        return torch._cslt_compress(problem.masked)

    def bind(self, problem, prepared):
        return Bound(with_epilogue(problem, self.product(problem, prepared, 0)), "algorithm 0")

    @staticmethod
    def product(problem, prepared, algorithm):
        # the result is (tokens, features), row-major, because the library is told to write it transposed
        multiply = functools.partial(torch._cslt_sparse_mm, prepared, problem.x.t(), bias=problem.bias)
        return functools.partial(multiply, transpose_result=True, alg_id=algorithm)


class CuSparseLtTuned(CuSparseLt):
    """The fastest algorithm among those whose result is right: some of them are known to be wrong at some shapes."""

    name = "cuSPARSELt tuned"

    def bind(self, problem, prepared):
        right, wrong = self.algorithms(problem, prepared)
        if not right:
            raise RuntimeError(f"none of its {len(wrong)} algorithms gives a right result")
        best = fastest(right, clock_for(problem.device))
        detail = f"algorithm {best} of {len(right) + len(wrong)}"
        return Bound(right[best], detail + (f"; wrong results: {', '.join(map(str, wrong))}" if wrong else ""))

    def algorithms(self, problem, prepared):
        """({number: call} with right results, [number] with wrong ones); the numbers end where the library says so."""
        right, wrong = {}, []
        for algorithm in range(MOST_ALGORITHMS):
            run = with_epilogue(problem, self.product(problem, prepared, algorithm))
            problem.poison(sparse=True)
            try:
                out = run()
            except RuntimeError:
                break
            if problem.check(out, sparse=True).right:
                right[algorithm] = run
            else:
                wrong.append(algorithm)
        return right, wrong


class Cutlass(Rival):
    name = "CUTLASS"
    rows, columns = 32, 64

    def prepare(self, problem):
        return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(problem.masked)

    def bind(self, problem, prepared):
        def product():
            return torch._sparse_semi_structured_linear(problem.x, prepared.packed, prepared.meta, bias=problem.bias)

        return Bound(with_epilogue(problem, product), "mma.sp of compute capability 8.x")


class TorchAo(Rival):
    name = "torchao"

    def supports(self, problem):
        if not importlib.util.find_spec("torchao"):
            return "torchao is not installed"
        return super().supports(problem)

    def prepare(self, problem):
        from torchao.sparsity import semi_sparse_weight, sparsify_

        layer = nn.Linear(problem.shape.K, problem.shape.N, device=problem.device, dtype=problem.dtype)
        layer.weight, layer.bias = nn.Parameter(problem.masked), nn.Parameter(problem.bias)
        sparsify_(nn.Sequential(layer), semi_sparse_weight())
        return layer.requires_grad_(False)

    def bind(self, problem, prepared):
        return Bound(with_epilogue(problem, lambda: prepared(problem.x)), "sparsify_(semi_sparse_weight())")


PROVIDERS = OURS_AND_DENSE | {
    "linear": (*OURS_AND_DENSE["linear"], CuSparseLt(), CuSparseLtTuned(), Cutlass(), TorchAo())
}
