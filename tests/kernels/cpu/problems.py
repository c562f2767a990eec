"""What the tests of the C kernels share."""

import pytest
import torch

from sparsedm.kernels.cpu import library
from sparsedm.kernels.pattern import group_view, select_mask_ref, ungroup
from sparsedm.kernels.sparse24.format import pack

TOLERANCE = 5e-6  # largest error over largest result; up to 2,500 products are summed in one register

needs_library = pytest.mark.skipif(library.library() is None, reason=f"no C kernels: {library.unavailable_because()}")


def mask_of(weight, pattern):
    return ungroup(select_mask_ref(group_view(weight).contiguous(), pattern), weight.shape).contiguous()


def compressed(pattern, N=128, K=96):
    weight = torch.randn(N, K)
    weight = weight * mask_of(weight, pattern)
    return weight, *pack(weight, pattern)


def close(y, exact, *what):
    assert y.shape == exact.shape, what
    error = (y.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)
    assert error < TOLERANCE, (float(error), *map(str, what))  # NaN is not
