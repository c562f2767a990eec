"""The orders of the kernels hold the same weight, and are kept until it changes."""

import pytest
import torch
import torch.nn.functional as F

from sparsedm.kernels.launch import BACKENDS
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.sparse24.layouts import arrange, kernel_tensors
from tests.kernels.sparse24.problem import pruned

BF16 = torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrange_keeps_the_weight(backend):
    """Whatever the order, it is the same weight: the arranged values hold the same numbers, padded with zeros."""
    weight = pruned(24, 72)
    values, metadata = pack(weight)
    tensors = arrange(values, metadata, backend, 72)
    assert len(tensors) == {"torch": 1, "dense": 1}.get(backend, 2)
    assert backend != "torch" or not tensors[0].numel(), "nothing is kept, and yet the list is not empty"
    if backend == "dense":
        assert torch.equal(tensors[0], weight)
    elif backend != "torch":
        numbers = tensors[0].view(BF16).flatten().float().sort().values
        expected = F.pad(weight[weight != 0].float(), (0, numbers.numel() - int((weight != 0).sum()))).sort().values
        assert torch.equal(numbers, expected)
    if backend == "wgmma":
        assert tensors[0].shape == (256, 64)
        assert tensors[1].shape == (2, 512)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(24, 72), (256, 128)], ids=["padded", "as-it-is"])
def test_arrange_is_registered_correctly(backend, shape):
    values, metadata = pack(pruned(*shape))
    torch.library.opcheck(torch.ops.sparsedm.sparse24_arrange, (values, metadata, backend, shape[1]))


def test_values_that_need_no_padding_are_not_copied():
    values, metadata = pack(pruned(256, 128))
    arranged = arrange(values, metadata, "wgmma", 128)
    assert len(arranged) == 1
    assert kernel_tensors(values, arranged) == [values, *arranged]
