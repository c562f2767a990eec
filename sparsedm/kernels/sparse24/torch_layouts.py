"""A 2:4 weight as torch's own SparseSemiStructuredTensor, so that layers can move between the two.

Neither layout is documented for others to write, so both ways lead through the dense weight and torch's own
conversions: CUTLASS's is plain torch and runs anywhere, cuSPARSELt's needs the library and a GPU.
"""

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsedm.errors import InputError

TORCH_TENSORS = {"cutlass": SparseSemiStructuredTensorCUTLASS, "cusparselt": SparseSemiStructuredTensorCUSPARSELT}


def to_torch(weight, library):
    """weight (N, K), 2:4 along K -> SparseSemiStructuredTensor of the same shape, dtype and device.

    library: a name in TORCH_TENSORS. The way back is the tensor's `to_dense()`, which gives the weight bit for bit.
    Raises: InputError for a dtype or shape that the library does not take, or where it is missing.
    """
    kind = TORCH_TENSORS[library]
    if weight.dtype not in (torch.float16, torch.bfloat16):  # of float32 the hardware takes 1:2
        raise InputError(f"{library} holds a 2:4 weight of float16 or bfloat16, not {weight.dtype}")
    rules = kind._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, columns = weight.shape
    if rows % rules.sparse_min_rows or columns % rules.sparse_min_cols:
        raise InputError(
            f"{library} takes a {weight.dtype} weight of a multiple of {rules.sparse_min_rows} rows and "
            f"{rules.sparse_min_cols} columns, not {rows} x {columns}"
        )
    if library == "cutlass":
        values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
        return kind(weight.shape, values, metadata, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
    try:
        return kind.from_dense(weight.contiguous())
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"cuSPARSELt cannot hold the weight here: {str(error).splitlines()[0]}") from error
