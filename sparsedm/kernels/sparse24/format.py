"""The compressed weight of every N:M pattern: dense <-> values and positions. Also torch's own 2:4 tensors.

2:4: dense (N, K) <-> values (N, K/2) and int16 metadata (N, K/16). The format is row-major and the same for every
architecture; checkpoints hold it. The values are two weights of each group of four along K, in order. Metadata word c
of a row describes columns 16c .. 16c+15, four bits for each group, lowest bits first:

    word[n, c] = sum_g (i0 | i1 << 2) << 4g,    i0 < i1 the kept positions of group 4c + g

If a group has fewer than two non-zeros, the lowest free positions are added, so that `i0 < i1` always: `mma.sp` with
`::ordered_metadata` needs it. Six of the sixteen nibbles are legal. -0.0 counts as zero and is restored as 0.0. NaN
counts as non-zero and is restored bit for bit.

K must be a multiple of 4. If it is not a multiple of 16, zeros are appended. Values and metadata are then (N, 8c) and
(N, c) with c = ceil(K / 16), and `unpack` needs the K to return.

Other patterns N:M (K a multiple of M): values (rows, K N/M), the kept weights in order; instead of metadata the mask's
bits (rows, ceil(K / 32)) int32 as in `pattern.pack_bits`, N of every M set. No padding.

A GPU packs 2:4 weights in the mask kernel (`mask.py`). `layouts.py` reorders this format for the hardware.

Source: PTX ISA, "Warp-level matrix multiply-accumulate with sparse matrix A", figures of the sparsity metadata.
"""

import torch
import torch.nn.functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern, pack_bits, unpack_bits
from sparsedm.kernels.tracing import watched

TORCH_TENSORS = {"cutlass": SparseSemiStructuredTensorCUTLASS, "cusparselt": SparseSemiStructuredTensorCUSPARSELT}
TWO_FOUR = Pattern(2, 4)
ZERO_WORD = 0x4444  # the pair (0, 1) in all four groups: legal metadata for rows and columns of zeros

_PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
LEGAL_NIBBLES = tuple(low | high << 2 for low, high in _PAIRS)  # 4, 8, 9, 12, 13, 14


def _nibble_of_nonzeros(code):
    """The nibble of a group whose non-zeros are the bits of `code` (filled up with the lowest free); 0 if over two."""
    nonzero = [i for i in range(4) if code >> i & 1]
    free = [i for i in range(4) if not code >> i & 1]
    low, high = sorted((nonzero + free)[:2])
    return low | high << 2 if len(nonzero) <= 2 else 0


_NIBBLE_OF_NONZEROS = torch.tensor([_nibble_of_nonzeros(code) for code in range(16)], dtype=torch.uint8, device="cpu")


def pack(weight, pattern=TWO_FOUR):
    """weight (N, K), 2:4 along K, any floating dtype -> values (N, 8c) of that dtype, metadata (N, c) int16.

    c = ceil(K / 16). With another pattern: values (N, K * density) and bits (N, ceil(K / 32)) int32.

    Raises: InputError if K is not a multiple of 4 or a group has more than two non-zeros (naming row and group).
    """
    if weight.dim() != 2 or weight.shape[1] % pattern.group:
        rule = f"{pattern} needs (N, K) with K a multiple of {pattern.group}"
        raise InputError(f"a weight of shape {tuple(weight.shape)}: {rule}")
    if pattern != TWO_FOUR:
        return _pack_with_bits(weight.detach(), pattern)
    rows, columns = weight.shape
    groups = F.pad(weight.detach(), (0, -columns % 16)).contiguous().view(rows, -1, 4)
    nonzero = groups != 0
    bytes_of_group = nonzero.view(torch.int32)[..., 0]  # four bytes 0 or 1, the first position lowest
    code = (bytes_of_group | bytes_of_group >> 7 | bytes_of_group >> 14 | bytes_of_group >> 21) & 15
    nibble = _NIBBLE_OF_NONZEROS.to(weight.device)[code]
    too_many = nibble == 0
    if too_many.any():
        _refuse(nonzero, too_many, TWO_FOUR)
    positions = torch.stack((nibble & 3, nibble >> 2), -1).long()
    values = groups.gather(-1, positions).masked_fill_(~nonzero.gather(-1, positions), 0).view(rows, -1)
    metadata = (nibble[:, 0::2] | nibble[:, 1::2] << 4).view(torch.int16)
    return values, metadata


def _refuse(nonzero, too_many, pattern):
    row, group = too_many.nonzero()[0].tolist()
    first = pattern.group * group
    raise InputError(
        f"the weight is not {pattern}: row {row}, group {group} (columns {first} to {first + pattern.group - 1}) "
        f"holds {int(nonzero[row, group].sum())} non-zeros and at most {pattern.keep} are allowed"
    )


def _pack_with_bits(weight, pattern):
    """If a group has fewer non-zeros, its lowest free positions are added, as in 2:4."""
    groups = weight.unflatten(1, (-1, pattern.group))
    nonzero = groups != 0
    if (too_many := nonzero.sum(-1) > pattern.keep).any():
        _refuse(nonzero, too_many, pattern)
    free = ~nonzero
    mask = nonzero | free & (free.cumsum(-1) <= pattern.keep - nonzero.sum(-1, keepdim=True))
    values = torch.where(nonzero, groups, 0)[mask].view(len(weight), -1)  # -0.0 counts as zero
    return values, pack_bits(mask.flatten(1))


def unpack(values, metadata, columns=None, pattern=TWO_FOUR):
    """values (N, 8c), metadata (N, c) int16 -> dense weight (N, columns), by default all 16c columns, dtype of values.

    pattern: if it is not 2:4, metadata are the bits, and columns is K. Raises: InputError if the shapes do not fit
    together, a metadata pair is illegal, or the bits do not have the pattern.
    """
    check_shapes(values, metadata, pattern)
    check_metadata(metadata, pattern, columns_of(values, pattern))
    return decompress(values, metadata, columns, pattern)


def decompress(values, metadata, columns=None, pattern=TWO_FOUR):
    """`unpack` of what was checked before: it does not wait for the GPU, and a CUDA graph can hold it."""
    if pattern != TWO_FOUR:
        mask = unpack_bits(metadata, columns_of(values, pattern))
        return values.new_zeros(mask.shape).masked_scatter(mask, values)  # in place, torch.func refuses it
    rows, words = metadata.shape
    nibble = _nibbles(metadata).view(rows, 4 * words)
    positions = torch.stack((nibble & 3, nibble >> 2), -1).long()
    groups = values.new_zeros(rows, 4 * words, 4).scatter(-1, positions, values.view(rows, 4 * words, 2))
    return groups.view(rows, 16 * words)[:, :columns]


def columns_of(values, pattern):
    """The number of columns of the dense weight: K; for 2:4 rounded up to a multiple of 16."""
    return values.shape[1] * pattern.group // pattern.keep


def check_shapes(values, metadata, pattern=TWO_FOUR):
    """Raise InputError unless values and metadata are (N, 8c) and (N, c) int16; for other patterns, values and bits of
    one K."""
    if pattern != TWO_FOUR:
        columns = columns_of(values, pattern)
        expected = (values.shape[0], -(-columns // 32))
        if metadata.shape != expected or metadata.dtype != torch.int32 or columns % pattern.group:
            found = f"{tuple(metadata.shape)} {str(metadata.dtype)[6:]}"
            raise InputError(f"bits of {pattern} values {tuple(values.shape)} must be {expected} int32, not {found}")
        return
    if metadata.dim() != 2 or metadata.dtype != torch.int16:
        raise InputError(
            f"2:4 metadata must be (N, K/16) int16 and is {tuple(metadata.shape)} {str(metadata.dtype)[6:]}"
        )
    if values.shape != (metadata.shape[0], 8 * metadata.shape[1]):
        raise InputError(
            f"2:4 values of shape {tuple(values.shape)} do not belong to metadata of shape {tuple(metadata.shape)}: "
            f"for (N, c) metadata they must be (N, 8c)"
        )


def check_metadata(metadata, pattern=TWO_FOUR, columns=None):
    """Raise InputError if metadata (N, c) int16, for instance from a file, hold an illegal index pair, saying where.

    If the pattern is not 2:4: bits of `columns` columns; every group must keep the pattern's number of weights.
    """
    if metadata.is_meta or watched():  # no data: the model is inspected, or a graph is made
        return
    if metadata.is_cuda and torch.cuda.is_current_stream_capturing():  # in which nobody may read
        return
    if pattern != TWO_FOUR:
        counts = unpack_bits(metadata, columns).unflatten(1, (-1, pattern.group)).sum(-1)
        if (wrong := counts != pattern.keep).any():
            row, group = wrong.nonzero()[0].tolist()
            raise InputError(
                f"illegal {pattern} bits: row {row}, group {group} keeps {int(counts[row, group])} weights"
            )
        return
    legal = torch.zeros(16, dtype=torch.bool, device="cpu")
    legal[list(LEGAL_NIBBLES)] = True
    halves = legal[:, None] & legal  # a byte is legal if both its nibbles are
    wrong = ~halves.flatten().to(metadata.device)[metadata.contiguous().view(torch.uint8).int()]
    if wrong.any():
        row, byte = wrong.nonzero()[0].tolist()
        pairs = _nibbles(metadata[row]).flatten().tolist()
        group = next(g for g in range(2 * byte, 2 * byte + 2) if pairs[g] not in LEGAL_NIBBLES)
        raise InputError(
            f"illegal 2:4 metadata: row {row}, group {group} keeps positions {pairs[group] & 3} and "
            f"{pairs[group] >> 2}, which must be two different positions in increasing order"
        )


def to_torch(weight, library):
    """weight (N, K), 2:4 along K -> torch's SparseSemiStructuredTensor of the same shape, dtype and device.

    The libraries do not document their layouts, so torch's own functions convert the dense weight. CUTLASS's is plain
    torch and runs anywhere; cuSPARSELt's needs the library and a GPU.

    library: a name in TORCH_TENSORS. The tensor's `to_dense()` gives the weight back, bit for bit.
    Raises: InputError if the library is missing, or does not take the dtype or shape.
    """
    kind = TORCH_TENSORS[library]
    if weight.dtype not in (torch.float16, torch.bfloat16):  # for float32 the hardware has only 1:2
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


def _nibbles(metadata):
    """metadata (..., c) -> (..., c, 4) int32: the pair of each group."""
    shifts = torch.arange(0, 16, 4, device=metadata.device, dtype=torch.int32)
    return metadata.int()[..., None] >> shifts & 15
