"""The orders in which the hardware reads a 2:4 weight, made from values and metadata once per layer and device.

Source: PTX ISA, figures of the fragments of `mma.sp.m16n8k32`; `wgmma.mma_async.sp` has the same for 16-bit types.
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.sparse24.format import ZERO_WORD, check_metadata, check_shapes, unpack


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


def _fragments(values, metadata, columns):
    """For mma.sp: (values, metadata) in fragment order, padded to its largest tiles."""
    values, metadata = pad(values, metadata, 128, 64)
    return [fragment_values(values), fragment_metadata(metadata)]


def _tma(values, metadata, columns):
    """For wgmma.sp: (values, metadata) padded to its largest tiles; the metadata alone, where that changes no value."""
    padded, metadata = pad(values, metadata, 256, 128)
    return ([] if padded is values and values.is_contiguous() else [padded.contiguous()]) + [tma_metadata(metadata)]


LAYOUTS = {  # name -> (values, metadata, columns) -> tensors
    "fragments": _fragments,
    "tma": _tma,
    "dense": lambda values, metadata, columns: [unpack(values, metadata, columns).contiguous()],
    "torch": lambda values, metadata, columns: [metadata.new_empty(0)],  # AOTInductor passes no empty lists
}


@torch.library.custom_op("sparsedm::sparse24_prepack", mutates_args=())
def prepack(values: torch.Tensor, metadata: torch.Tensor, layout: str, columns: int) -> list[torch.Tensor]:
    """The tensors that a back end reads instead of values and metadata, by a name in LAYOUTS. columns: K.

    An operator, because it looks at the metadata and refuses illegal pairs, which torch.compile could not follow.
    """
    check_shapes(values, metadata)
    check_metadata(metadata)
    return LAYOUTS[layout](values, metadata, columns)


@prepack.register_fake
def _(values, metadata, layout, columns):
    if layout == "dense":  # `unpack` looks at the metadata
        return [values.new_empty(values.shape[0], columns)]
    return LAYOUTS[layout](values, metadata, columns)


def kernel_tensors(values, prepacked):
    """What the launchers take: the values, those of `prepack` if it made any, and the metadata."""
    return prepacked if len(prepacked) == 2 else [values, *prepacked]


def prepack_once(values, metadata, layout, columns, cache):
    """`prepack`, unless `cache`, the caller's dict, still holds what it gave for these very values."""
    # while tracing there are no addresses, and then the weight cannot change either
    stamp = None if torch.compiler.is_compiling() else [_stamp(values), _stamp(metadata)]
    if layout not in cache or (stamp is not None and cache[layout][0] != stamp):
        if stamp and values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError("a layer with a 2:4 weight must be called once before a CUDA graph of it is captured")
        cache[layout] = stamp, prepack(values, metadata, layout, columns)
    return cache[layout][1]


def _stamp(tensor):
    """Changes when the tensor is moved, replaced or written to."""
    return tensor.device, tensor.data_ptr(), None if tensor.is_inference() else tensor._version
