"""Two small Triton kernels for the emulator's own tests, and what they compute when they are launched."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def scaled_sum_kernel(x_ptr, y_ptr, out_ptr, factor, N, BLOCK: tl.constexpr):
    """out = factor x + y, `BLOCK` elements a program."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=offs < N).to(tl.float32)
    tl.store(out_ptr + offs, factor * x + y, mask=offs < N)


@triton.jit
def transposed_kernel(x_map, out_ptr, M, N, BLOCK: tl.constexpr):
    """out (N, M) = x.T, one `BLOCK` x `BLOCK` tile a program, read by TMA."""
    row, column = BLOCK * tl.program_id(0), BLOCK * tl.program_id(1)
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    inside = (columns < N)[:, None] & (rows < M)[None]
    tl.store(out_ptr + columns[:, None] * M + rows[None], tl.trans(x_map.load([row, column])), mask=inside)


def check_scaled_sum():
    x, y = torch.randn(2, 1000, device="cuda")
    out = torch.full((1000,), float("nan"), device="cuda")
    scaled_sum_kernel[(4,)](x, y, out, 3, 1000, BLOCK=256)
    torch.testing.assert_close(out, 3 * x + y)


def check_transposed():
    x = torch.randn(70, 104, device="cuda").half()
    out = torch.zeros(104, 70, dtype=torch.half, device="cuda")
    transposed_kernel[(3, 4)](TensorDescriptor.from_tensor(x, [32, 32]), out, 70, 104, BLOCK=32)
    assert torch.equal(out, x.t())


def check_refusals():
    """What a driver, or a GPU, would refuse reaches the caller."""
    x = torch.randn(64, device="cuda")
    scaled_sum_kernel[(1,)](x, x, x.clone(), 1, 64, BLOCK=64)
    for grid, count, said in (((1,), 65, "out of bounds"), ((1, 1 << 17), 64, "gridDimY must be below")):
        with pytest.raises(RuntimeError, match=said):
            scaled_sum_kernel[grid](x, x, x.clone(), 1, count, BLOCK=128)
