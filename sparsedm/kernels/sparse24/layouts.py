"""`prepack`: reorder values and metadata for the hardware, once per layer and device.

Source: PTX ISA, figures of the fragments of `mma.sp.m16n8k32`. Those of `wgmma.mma_async.sp` are equal for 16 bits.
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.checksum import checksums, stamp
from sparsedm.kernels.cpu import products
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.sparse24.format import TWO_FOUR, ZERO_WORD, check_metadata, check_shapes, decompress, pack, unpack


def pad(values, metadata, row_multiple, column_multiple):
    """Append rows and columns of zeros, with legal metadata, up to the next multiples."""
    rows, columns = values.shape[0], 2 * values.shape[1]
    down, right = -rows % row_multiple, -columns % column_multiple
    if not (down or right):
        return values, metadata
    return F.pad(values, (0, right // 2, 0, down)), F.pad(metadata, (0, right // 16, 0, down), value=ZERO_WORD)


def fragment_values(values):
    """values (N, K/2), 16-bit, N % 16 == K % 32 == 0 -> int32 (N/16, K/32, 32, 4): the A fragment of `mma.sp.m16n8k32`.

    The four registers of a lane are side by side, so that one 16-byte load is enough for one instruction.
    """
    rows, half = values.shape
    # tile, row half, g, k32 step, k half, t, which of two values; lane = 4 g + t
    tiles = values.reshape(rows // 16, 2, 8, half // 16, 2, 4, 2)
    words = tiles.permute(0, 3, 2, 5, 4, 1, 6).reshape(rows // 16, half // 16, 32, 8)  # register = row half + 2 k half
    return words.view(torch.int32)


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
    """For wgmma.sp: (values, metadata), padded to its largest tiles; only the metadata if the values do not change."""
    padded, metadata = pad(values, metadata, 256, 128)
    return ([] if padded is values and values.is_contiguous() else [padded.contiguous()]) + [tma_metadata(metadata)]


def _dense(values, metadata, columns, pattern=TWO_FOUR):
    """The dense weight; on a CPU also the checksum, for `dense_weight`. It has no sizes, or a compiled graph of a batch
    of that size would serve no other batch."""
    weight = decompress(values, metadata, columns, pattern).contiguous()
    if values.device.type != "cpu":
        return [weight]
    return [weight, torch.tensor(hash(tuple(checksums(values, metadata))), device="cpu")]


LAYOUTS = {  # name -> (values, metadata of 2:4, columns) -> tensors; also what `cpu_layout` names
    "dense": _dense,
    "fragments": _fragments,
    "tma": _tma,
    "torch": lambda values, metadata, columns: [metadata.new_empty(0)],  # AOTInductor passes no empty lists
}


def cpu_layout(order, pattern, taps=1, width=0):
    """The name of a layout of the CPU kernels: the arguments of `products.prepack`."""
    return f"cpu {order} {pattern} {taps} {width}"


def _cpu(values, metadata, columns, layout):
    _, order, pattern, taps, width = layout.split()
    pattern, taps = Pattern.parse(pattern), int(taps)
    if values.device.type != "cpu":
        raise InputError(f"the CPU kernels cannot read a weight on {values.device}")
    weight = decompress(values, metadata, columns, pattern)
    mask = decompress(torch.ones_like(values), metadata, columns, pattern) != 0
    # (N, taps C) -> (N, C, kh, kw), of which `products.prepack` needs no more than the number of taps
    weight, mask = (t.unflatten(1, (taps, -1)).transpose(1, 2).unsqueeze(-1) for t in (weight, mask))
    return list(products.prepack(order, weight, mask, pattern, int(width)))


def _two_four(values, metadata, columns, pattern):
    """Values and metadata of 2:4 for a weight of a sparser pattern."""
    return pack(decompress(values, metadata, columns, pattern))


@torch.library.custom_op("sparsedm::sparse24_prepack", mutates_args=())
def prepack(
    values: torch.Tensor, metadata: torch.Tensor, layout: str, columns: int, pattern: str = "2:4"
) -> list[torch.Tensor]:
    """The tensors that a back end reads in place of values and metadata. layout: a name in LAYOUTS, or `cpu_layout`'s.

    columns: K. It is an operator, because it reads the metadata and refuses illegal pairs: torch.compile cannot trace
    this.
    """
    pattern = Pattern.parse(pattern)
    check_shapes(values, metadata, pattern)
    check_metadata(metadata, pattern, columns)
    if layout.startswith("cpu "):
        return _cpu(values, metadata, columns, layout)
    if layout == "dense":
        return LAYOUTS[layout](values, metadata, columns, pattern)
    if layout == "torch" or pattern == TWO_FOUR:
        return LAYOUTS[layout](values, metadata, columns)
    values, metadata = _two_four(values, metadata, columns, pattern)
    return [values, *LAYOUTS[layout](values, metadata, columns)][-2:]


@prepack.register_fake
def _(values, metadata, layout, columns, pattern="2:4"):
    pattern = Pattern.parse(pattern)
    if layout == "dense":  # `unpack` reads the metadata
        weight = [values.new_empty(values.shape[0], columns)]
        return weight + ([values.new_empty((), dtype=torch.int64)] if values.device.type == "cpu" else [])
    if layout.startswith("cpu "):
        shape, dtype = products.prepacked_shape(layout.split()[1], values.shape[0], columns, pattern)
        return [values.new_empty(shape), values.new_empty(shape, dtype=dtype)]
    if layout != "torch" and pattern != TWO_FOUR:
        padded = -(-columns // 16)
        values, metadata = values.new_empty(len(values), 8 * padded), metadata.new_empty(len(values), padded).short()
        return [values, *LAYOUTS[layout](values, metadata, columns)][-2:]
    return LAYOUTS[layout](values, metadata, columns)


def kernel_tensors(values, prepacked):
    """The arguments of the launchers: `prepack`'s values (else the original ones) and metadata."""
    if len(prepacked) == 2:
        return prepacked
    fits = values.is_contiguous() and values.data_ptr() % 16 == 0
    return [values if fits else aligned(values), *prepacked]


def aligned(tensor):
    """The tensor if TMA can read it, else a copy: contiguous, also in axes of one entry, at a multiple of 16 bytes."""
    flat = tensor.contiguous().view(-1)
    return (flat if flat.data_ptr() % 16 == 0 else flat.clone()).view(tensor.shape)


def prepack_once(values, metadata, layout, columns, cache, pattern="2:4"):
    """`prepack`, or its stored result in `cache` (the caller's dict) if values and metadata are unchanged, see `stamp`.

    While tracing there are no addresses: what the latest eager call stored is taken as it is. The result of "dense" on
    a CPU then takes its checksum along, for `dense_weight`.
    """
    if values.is_meta:  # a compiled graph would take it for the weight
        return prepack(values, metadata, layout, columns, pattern)
    current = None if torch.compiler.is_compiling() else stamp(values, metadata, held=cache.get("held"))
    if layout not in cache or (current is not None and cache[layout][0] != current):
        if current and values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError("a layer with a 2:4 weight must be called once before a CUDA graph of it is captured")
        held = current and (values.detach(), metadata.detach())  # so that no other tensor gets their addresses
        prepacked = prepack(values, metadata, layout, columns, pattern)
        if current and values.is_cuda:  # the next call may come from another stream
            torch.cuda.current_stream(values.device).synchronize()
        cache[layout] = current, prepacked, held
    return cache[layout][1][:1] if current and layout == "dense" else cache[layout][1]


def dense_weight(prepacked, values, metadata, columns, pattern):
    """The weight of the layout "dense"; decompressed again if a compiled graph brings one of other values."""
    if len(prepacked) == 2 and prepacked[1].item() != hash(tuple(checksums(values, metadata))):
        return unpack(values, metadata, columns, pattern)
    return prepacked[0]
