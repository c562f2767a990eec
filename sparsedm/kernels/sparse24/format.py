"""The 2:4 compressed weight: dense (N, K) <-> values (N, K/2) and int16 metadata (N, K/16), and the hardware's orders.

Row-major and the same for every architecture, so this is what checkpoints hold. Of each group of four weights along K
two are kept, in their order; metadata word c of a row describes columns 16c .. 16c+15, four bits for each group, lowest
bits first:

    word[n, c] = sum_g (i0 | i1 << 2) << 4g,    i0 < i1 the kept positions of group 4c + g

`i0 < i1` also where a group has fewer than two non-zeros (the lowest free positions fill up), which `mma.sp` with
`::ordered_metadata` needs: six of the sixteen nibbles are legal. -0.0 counts as zero and comes back as 0.0; NaN counts
as non-zero and comes back bit for bit.

K must be a multiple of 4. If it is not a multiple of 16, zeros are appended up to one, so values and metadata are
(N, 8c) and (N, c) with c = ceil(K / 16), and `unpack` is told the K to return.

Source: PTX ISA, "Warp-level matrix multiply-accumulate with sparse matrix A" (mma.sp.m16n8k32) and
"wgmma.mma_async.sp" (m64nNk32); both use the same fragments for 16-bit types.
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError

ZERO_WORD = 0x4444  # the pair (0, 1) in all four groups: legal metadata for rows and columns of zeros

_PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
LEGAL_NIBBLES = tuple(low | high << 2 for low, high in _PAIRS)  # 4, 8, 9, 12, 13, 14


def _nibble_of_nonzeros(code):
    """The nibble of a group whose non-zeros are the bits of `code` (filled up with the lowest free); 0 if over two."""
    nonzero = [i for i in range(4) if code >> i & 1]
    free = [i for i in range(4) if not code >> i & 1]
    low, high = sorted((nonzero + free)[:2])
    return low | high << 2 if len(nonzero) <= 2 else 0


_NIBBLE_OF_NONZEROS = torch.tensor([_nibble_of_nonzeros(code) for code in range(16)], dtype=torch.uint8)


def pack(weight):
    """weight (N, K), 2:4 along K, any floating dtype -> values (N, 8c) of that dtype, metadata (N, c) int16.

    c = ceil(K / 16).

    Raises: InputError if K is not a multiple of 4 or a group has more than two non-zeros (naming row and group).
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise InputError(f"a weight of shape {tuple(weight.shape)}: 2:4 needs (N, K) with K a multiple of 4")
    rows, columns = weight.shape
    groups = F.pad(weight.detach(), (0, -columns % 16)).view(rows, -1, 4)
    nonzero = groups != 0
    bytes_of_group = nonzero.view(torch.int32)[..., 0]  # four bytes 0 or 1, the first position lowest
    code = (bytes_of_group | bytes_of_group >> 7 | bytes_of_group >> 14 | bytes_of_group >> 21) & 15
    nibble = _NIBBLE_OF_NONZEROS.to(weight.device)[code]
    too_many = nibble == 0
    if too_many.any():
        row, group = too_many.nonzero()[0].tolist()
        raise InputError(
            f"the weight is not 2:4: row {row}, group {group} (columns {4 * group} to {4 * group + 3}) "
            f"holds {int(nonzero[row, group].sum())} non-zeros and at most 2 are allowed"
        )
    positions = torch.stack((nibble & 3, nibble >> 2), -1).long()
    values = groups.gather(-1, positions).masked_fill_(~nonzero.gather(-1, positions), 0).view(rows, -1)
    metadata = (nibble[:, 0::2] | nibble[:, 1::2] << 4).view(torch.int16)
    return values, metadata


def unpack(values, metadata, columns=None):
    """values (N, 8c), metadata (N, c) int16 -> dense weight (N, columns), by default all 16c columns, dtype of values.

    Raises: InputError if the shapes do not belong together or a metadata pair is illegal.
    """
    check_shapes(values, metadata)
    check_metadata(metadata)
    rows, words = metadata.shape
    nibble = _nibbles(metadata).view(rows, 4 * words)
    positions = torch.stack((nibble & 3, nibble >> 2), -1).long()
    groups = values.new_zeros(rows, 4 * words, 4).scatter_(-1, positions, values.view(rows, 4 * words, 2))
    return groups.view(rows, 16 * words)[:, :columns]


def check_shapes(values, metadata):
    """Refuses values and metadata that are not (N, 8c) and (N, c) int16."""
    if metadata.dim() != 2 or metadata.dtype != torch.int16:
        raise InputError(
            f"2:4 metadata must be (N, K/16) int16 and is {tuple(metadata.shape)} {str(metadata.dtype)[6:]}"
        )
    if values.shape != (metadata.shape[0], 8 * metadata.shape[1]):
        raise InputError(
            f"2:4 values of shape {tuple(values.shape)} do not belong to metadata of shape {tuple(metadata.shape)}: "
            f"for (N, c) metadata they must be (N, 8c)"
        )


def check_metadata(metadata):
    """metadata (N, c) int16, for instance just read from a file. Refuses an illegal index pair, saying where it is."""
    if metadata.is_meta:  # nothing to look at: a model is being counted, not run
        return
    legal = torch.zeros(16, dtype=torch.bool)
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


def pad(values, metadata, row_multiple, column_multiple):
    """Appends rows and columns of zeros, with legal metadata, up to the next multiples (or returns its arguments)."""
    rows, columns = values.shape[0], 2 * values.shape[1]
    down, right = -rows % row_multiple, -columns % column_multiple
    if not (down or right):
        return values, metadata
    return F.pad(values, (0, right // 2, 0, down)), F.pad(metadata, (0, right // 16, 0, down), value=ZERO_WORD)


def fragment_values(values):
    """values (N, K/2), 16-bit, N % 16 == K % 32 == 0 -> int32 (N/16, K/32, 32, 4): the A fragment of `mma.sp.m16n8k32`.

    Lane l of a warp holds its four registers side by side, so that one 16-byte load feeds one instruction.
    """
    rows, half = values.shape
    words = values.contiguous().view(torch.int32)  # two values
    tiles = words.view(rows // 16, 2, 8, half // 16, 2, 4)  # tile, row half, g, k32 step, k half, t; lane = 4 g + t
    return tiles.permute(0, 3, 2, 5, 4, 1).reshape(rows // 16, half // 16, 32, 4)  # register = row half + 2 k half


def fragment_metadata(metadata):
    """metadata (N, K/16), N % 16 == K % 64 == 0 -> int32 (N/16, K/64, 32): one register for two k32 steps.

    Lane 4 g + 2 f + c holds chunk c (16 columns) of the step with sparsity selector f: row g in the low half of the
    word, row g + 8 in the high half.
    """
    rows, words = metadata.shape
    tiles = metadata.reshape(rows // 16, 2, 8, words // 4, 4)  # tile, row half, g, k64 step, 2 f + c
    return tiles.permute(0, 3, 2, 4, 1).contiguous().view(torch.int32).view(rows // 16, words // 4, 32)


def tma_metadata(metadata):
    """metadata (N, K/16), N % 64 == K % 64 == 0 -> int32 (K/64, 2 N): for each k64 step the 128 words of every 64 rows.

    The words of 64 rows are in thread order of the warpgroup that multiplies them (warp w owns rows 16w .. 16w+15).
    """
    fragments = fragment_metadata(metadata)
    return fragments.transpose(0, 1).reshape(fragments.shape[1], -1).contiguous()


def _nibbles(metadata):
    """metadata (..., c) -> (..., c, 4) int32: the pair of each group."""
    shifts = torch.tensor([0, 4, 8, 12], device=metadata.device, dtype=torch.int32)
    return metadata.int()[..., None] >> shifts & 15
