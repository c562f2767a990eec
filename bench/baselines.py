"""The 2:4 products of other libraries, with the interface of `providers.py`, and the list of all providers.

    cuSPARSELt   through torch, with its default algorithm and with its best algorithm
    CUTLASS      through torch; it refuses all compute capabilities except 8.x, which is recorded like any other result
    TileLang     its `T.gemm_sp`, if it can be imported
    2:4 tile     torch's training with masks that are 2:4 along rows and columns, so that dx is sparse, too

Epilogues: if a library cannot fuse an operation, torch computes it afterwards, as its users must. xFormers and torchao
call these libraries for 2:4 products: they are not measured separately.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bench.problems import LinearProblem
from bench.providers import (
    Baseline,
    Bound,
    Cast,
    Choose,
    ChoosePacked,
    Configuration,
    Dense,
    DenseCompiled,
    DenseConv,
    DenseConvCompiled,
    DenseFused,
    Masked,
    Sparse24,
    SparseConv24,
    TopK,
    TrainDense,
    TrainingProvider,
    TrainMasked,
    TrainTopK,
    with_epilogue,
)
from bench.shapes import LinearShape
from bench.timing import clock_for, fastest
from sparsedm.kernels.launch import capability
from sparsedm.kernels.sparse24.dispatch import LINEAR, Request, candidates
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.sparse24.linear import ACTIVATIONS

SEGMENTS = -1  # "parts" of K by which the kernels for sm_90 are told to balance it over the GPU themselves
SPLITS = [(parts, mode) for mode in (1, 2) for parts in (2, 4, 8)]  # for older GPUs; summed in one kernel, or in two


class CuSparseLt(Baseline):
    name, cusparselt = "cuSPARSELt", True

    def prepare(self, problem):
        return torch._cslt_compress(problem.masked)

    def bind(self, problem, prepared):
        run = functools.partial(cusparselt_product, prepared, problem.x, problem.bias, Algorithm(0))
        return Bound(with_epilogue(problem, run), "algorithm 0")


class Algorithm(NamedTuple):
    """An algorithm of cuSPARSELt: its number, the number of parts of K; mode: see SPLITS."""

    number: int
    split_k: int = 1
    mode: int = -1

    def __str__(self):
        return f"{self.number}" if self.split_k == 1 else f"{self.number} split {self.split_k} mode {self.mode}"


def cusparselt_product(packed, x, bias, algorithm):
    # the result is (tokens, features), row-major, because the library is told to write it transposed
    how = dict(alg_id=algorithm.number, split_k=algorithm.split_k, split_k_mode=algorithm.mode)
    return torch._cslt_sparse_mm(packed, x.t(), bias=bias, transpose_result=True, **how)


class CuSparseLtTuned(CuSparseLt):
    """The fastest algorithm with a right result: some algorithms are known to be wrong at some shapes."""

    name = "cuSPARSELt tuned"

    def bind(self, problem, prepared):
        best, right, wrong = self.search(problem, prepared)
        detail = f"algorithm {best} of {len(right) + len(wrong)}"
        return Bound(right[best], detail + (f"; wrong results: {', '.join(map(str, wrong))}" if wrong else ""))

    def search(self, problem, prepared):
        """(the fastest Algorithm, {Algorithm: call} with right results, [Algorithm] with wrong ones).

        It tries every number with K whole and in segments, the choice of the library's own search, and splits of the
        fastest.
        """
        clock = clock_for(problem.device)
        *theirs, last = torch._C._cusparselt.mm_search(prepared, problem.x.t(), problem.bias, None, None, True)
        every = [Algorithm(number, parts) for number in range(last + 1) for parts in (1, SEGMENTS)]
        right, wrong = self.tried(problem, prepared, dict.fromkeys([*every, Algorithm(*theirs)]))
        if not right:
            raise RuntimeError(f"none of its {len(wrong)} algorithms gives a right result")
        best = fastest(right, clock)
        split = self.tried(problem, prepared, [Algorithm(best.number, *parts) for parts in SPLITS])
        best = fastest({best: right[best]} | split[0], clock)
        return best, right | split[0], wrong + split[1]

    def tried(self, problem, prepared, algorithms):
        """({Algorithm: call} with right results, [Algorithm] with wrong ones), without algorithms that it refuses."""
        right, wrong = {}, []
        for algorithm in algorithms:
            product = functools.partial(cusparselt_product, prepared, problem.x, problem.bias, algorithm)
            run = with_epilogue(problem, product)
            problem.poison(sparse=True)
            try:
                out = run()
            except RuntimeError:  # it does not take this device or size
                continue
            if problem.check(out, sparse=True).right:
                right[algorithm] = run
            else:
                wrong.append(algorithm)
        return right, wrong


class CuSparseLtLinear(nn.Module):
    """A layer of a whole network: `layer` with its masks, on the fastest algorithm for its first input."""

    def __init__(self, layer):
        super().__init__()
        weight = layer.effective_weight().detach() + 0.0  # without -0.0
        self.register_buffer("packed", torch._cslt_compress(weight))
        self.bias, self.activation, self.features = layer.bias, layer.activation, layer.out_features

    def forward(self, x, residual=None, scale=None):
        """As in `layers.Linear`, without a second source."""
        rows = x.reshape(-1, x.shape[-1])
        algorithm = tuned_algorithm(*rows.shape[:1], self.features, rows.shape[1], rows.dtype, rows.device)
        y = ACTIVATIONS[self.activation](cusparselt_product(self.packed, rows, self.bias, algorithm))
        y = y.view(*x.shape[:-1], self.features)
        if scale is not None:
            y = y * (scale if scale.dim() == 1 else scale.unflatten(0, (-1, *[1] * (y.dim() - 2))))
        return y if residual is None else y + residual


@functools.cache
def tuned_algorithm(M, N, K, dtype, device):
    problem, provider = LinearProblem(LinearShape("", "", M, N, K), "plain", dtype, device), CuSparseLtTuned()
    return provider.search(problem, provider.prepare(problem))[0]


class Cutlass(Baseline):
    name = "CUTLASS"
    rows, columns = 32, 64

    def prepare(self, problem):
        return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(problem.masked)

    def bind(self, problem, prepared):
        def product():
            return torch._sparse_semi_structured_linear(problem.x, prepared.packed, prepared.meta, bias=problem.bias)

        return Bound(with_epilogue(problem, product), "mma.sp of compute capability 8.x")


class TrainTile(Baseline, TrainingProvider):
    """Masks from 4x4 tiles: 2:4 along both axes, so that y and dx are sparse products. Checked with its own masks."""

    name, cusparselt = "torch 2:4 tile", True
    rows, columns = 128, 128  # of cuSPARSELt's layout as torch writes it

    def bind(self, problem, prepared):
        weight = self.pruned(problem.weight.to(problem.dtype))
        identity = torch.eye(problem.shape.K, dtype=problem.dtype, device=problem.device)
        return super().bind(problem, prepared)._replace(weight=(weight @ identity).to(problem.weight.dtype))

    def layer(self, inputs, outputs):
        return TileLinear(inputs, outputs, self.pruned)

    @staticmethod
    def pruned(weight):
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(weight)


class TileLinear(nn.Linear):
    def __init__(self, inputs, outputs, pruned):
        super().__init__(inputs, outputs)
        self.pruned = pruned

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # which does not know the sparse tensor
            weight = _StraightThroughTile.apply(self.weight.to(x.dtype), self.pruned)
            return F.linear(x, weight, self.bias.to(x.dtype))


class _StraightThroughTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, pruned):
        return pruned(weight)

    @staticmethod
    def backward(ctx, g):
        return g, None


# ---- TileLang, 0.1.15 or newer (row-major metadata). It computes y^T = W x^T; what is returned is a view of that: the
# baseline is spared the transposition its users pay.


class Tile(NamedTuple):
    """Features, tokens and K of a block; stages of its pipeline; threads."""

    N: int
    M: int
    K: int
    stages: int
    threads: int


TILES = [
    *(Tile(128, 128, 64, 3, 128), Tile(128, 128, 128, 2, 256), Tile(128, 128, 64, 4, 256)),
    *(Tile(128, 256, 64, 3, 256), Tile(256, 128, 64, 3, 256), Tile(64, 64, 128, 2, 128)),
]


class TileLang(Baseline):
    name = "TileLang"
    rows, columns, tokens = 64, 64, 64

    def supports(self, problem):
        return super().supports(problem) if importlib.util.find_spec("tilelang") else "TileLang is not installed"

    def prepare(self, problem):
        values, metadata = pack(problem.masked)
        return values, metadata.view(torch.uint8)

    def bind(self, problem, prepared):
        import tilelang

        calls = {}
        for tile in TILES:
            try:
                kernel = tilelang.compile(tilelang_product(problem.shape, tile, str(problem.dtype)[6:]), out_idx=[-1])
                run = with_epilogue(problem, functools.partial(self.transposed, kernel, problem, prepared))
                problem.poison(sparse=True)
                right = problem.check(run(), sparse=True).right
            except Exception:  # a block may not fit this GPU; there are others
                continue
            if right:
                calls[tile] = run
        if not calls:
            raise RuntimeError(f"none of its {len(TILES)} blocks gives a right result")
        best = fastest(calls, clock_for(problem.device))
        return Bound(calls[best], f"{best}, {len(calls)} of {len(TILES)} blocks right")

    @staticmethod
    def transposed(kernel, problem, prepared):
        return kernel(*prepared, problem.x).t() + problem.bias


def tilelang_product(shape, tile, dtype):
    """The TileLang program: values (N, K/2), metadata (N, K/8) bytes, x (M, K) -> y^T (N, M)."""
    import tilelang.language as T

    M, N, K = shape.M, shape.N, shape.K

    @T.prim_func
    def program(
        values: T.Tensor((N, K // 2), dtype),
        metadata: T.Tensor((N, K // 8), "uint8"),
        x: T.Tensor((M, K), dtype),
        y: T.Tensor((N, M), dtype),
    ):
        with T.Kernel(T.ceildiv(M, tile.M), T.ceildiv(N, tile.N), threads=tile.threads) as (column, row):
            values_block = T.alloc_shared((tile.N, tile.K // 2), dtype)
            metadata_block = T.alloc_shared((tile.N, tile.K // 8), "uint8")
            x_block = T.alloc_shared((tile.M, tile.K), dtype)
            sums = T.alloc_fragment((tile.N, tile.M), "float")
            T.clear(sums)
            for k in T.Pipelined(T.ceildiv(K, tile.K), num_stages=tile.stages):
                T.copy(values[row * tile.N, k * tile.K // 2], values_block)
                T.copy(metadata[row * tile.N, k * tile.K // 8], metadata_block)
                T.copy(x[column * tile.M, k * tile.K], x_block)
                T.gemm_sp(values_block, metadata_block, x_block, sums, transpose_B=True)
            T.copy(sums, y[row * tile.N, column * tile.M])

    return program


OURS_AND_DENSE = {  # kernel: implementations, the denominators first
    "linear": (
        *(Dense(), DenseFused(), DenseCompiled(), Masked()),
        *(Sparse24(), Sparse24("dense"), Sparse24("mma"), Sparse24("wgmma"), Sparse24("splitk")),
    ),
    "conv": (DenseConv(), DenseConvCompiled(), SparseConv24()),
    "mask": (Cast(), TopK(), Choose(), ChoosePacked()),
    "masked-train": (TrainDense(), TrainTopK(), TrainMasked()),
}

PROVIDERS = OURS_AND_DENSE | {
    "linear": (*OURS_AND_DENSE["linear"], CuSparseLt(), CuSparseLtTuned(), Cutlass(), TileLang()),
    "masked-train": (*OURS_AND_DENSE["masked-train"], TrainTile()),
}


def first_providers(device, dtype):
    """Every configuration that the dispatcher would time for a large product, and the libraries."""
    request = Request(LINEAR, capability(device), dtype, 8192, 8192, 8192)
    ours = [Configuration(choice) for choice in candidates(request) if choice.backend != "dense"]
    return [Dense(), *ours, CuSparseLt(), CuSparseLtTuned()]
