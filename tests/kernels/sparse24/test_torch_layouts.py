import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern, select_mask_ref
from sparsedm.kernels.sparse24.torch_layouts import TORCH_TENSORS, to_torch
from tests.tolerance import assert_as_good_as_torch


def sparse_weight(rows, columns, dtype=torch.bfloat16, device="cpu"):
    weight = torch.randn(rows, columns, device=device).to(dtype)
    return weight * select_mask_ref(weight, Pattern(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cutlass_holds_the_weight_bit_for_bit(dtype):
    weight = sparse_weight(64, 128, dtype)
    held = to_torch(weight, "cutlass")
    assert isinstance(held, TORCH_TENSORS["cutlass"])
    assert held.shape == weight.shape
    assert held.packed.shape == (64, 64)
    assert torch.equal(held.to_dense(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("library", TORCH_TENSORS)
def test_both_libraries_hold_the_weight_and_multiply_by_it(library):
    weight, x = sparse_weight(128, 256, device="cuda"), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    held = to_torch(weight, library)
    assert torch.equal(held.to_dense(), weight)
    if library == "cutlass" and torch.cuda.get_device_capability() >= (9, 0):
        pytest.skip("torch's CUTLASS kernels multiply on sm_80 to sm_89 only")
    assert torch.equal(held @ torch.eye(256, device="cuda", dtype=torch.bfloat16), weight)
    assert_as_good_as_torch(torch.nn.functional.linear(x, held), x.double() @ weight.double().t(), x @ weight.t())


@pytest.mark.parametrize(
    ("weight", "library", "message"),
    [
        (sparse_weight(64, 128, torch.float64), "cutlass", "float16 or bfloat16, not torch.float64"),
        (sparse_weight(30, 128), "cutlass", "a multiple of 32 rows and 64 columns, not 30 x 128"),
        (sparse_weight(64, 128, torch.float32), "cusparselt", "float16 or bfloat16, not torch.float32"),
        (sparse_weight(64, 128), "cusparselt", "cuSPARSELt cannot hold the weight here"),
    ],
    ids=["dtype", "shape", "float32", "no GPU"],
)
def test_what_a_library_cannot_hold_is_refused(weight, library, message):
    with pytest.raises(InputError, match=message):
        to_torch(weight, library)
