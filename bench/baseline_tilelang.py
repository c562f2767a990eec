"""TileLang's 2:4 product, `T.gemm_sp`, where that compiler can be imported (0.1.15 or newer: metadata are row-major).

It computes y^T = W x^T; what is returned is a view of that: the rival is spared the transposition its users pay.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch

from bench.providers import Bound, Rival, with_epilogue
from bench.timing import clock_for, fastest
from sparsedm.kernels.sparse24.format import pack


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


class TileLang(Rival):
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
                kernel = tilelang.compile(product(problem.shape, tile, str(problem.dtype)[6:]), out_idx=[-1])
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


def product(shape, tile, dtype):
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
