"""Select the mask, cast and pack in one pass: the weight is read once, and all requested forms are written.

    w (rows, K) -> masked = (w*m).to(dtype),  m as bool or as bits,  2:4 values and metadata

rows are a Linear's outputs, or a Conv2d's (out, tap) pairs, read through their strides; m is the mask of `pattern.py`.
bits (rows, ceil(K / 32)) int32: bit k % 32 of word k // 32 is m[row, k], bits beyond K are 0. values and metadata are
the result of `sparse24.format.pack`.

2:4 uses the six comparisons within a group of four. Other patterns give each weight a key, (|w| as an integer) * group
+ (group - 1 - its place in the group): keys order like magnitudes, ties go to the lower index, and no two are equal. A
network in registers (`tl.sort`) sorts the keys of a group. A weight is kept if its key is at least the keep-th largest.
The kernel is bound by memory: fp32 to bf16 with bits moves 6.1 bytes per weight.

Hardware: any GPU that Triton supports. Weights of fp32, bf16, fp16. A NaN is reported through `nan_ptr`, without
waiting.
"""

import math
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import products, rules
from sparsedm.kernels.launch import FUSED, SELECT_MASK, capturing, forced_backend, jit, runs, tl, triton, uses_triton
from sparsedm.kernels.pattern import (
    Pattern,
    check_weight,
    group_view,
    memory_format,
    pack_bits,
    select_mask_ref,
    select_of_fours,
    select_untied,
    ungroup,
)
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.tracing import operator, refuse_export, watched
from sparsedm.kernels.tuning import Autotuner, bucket

# Not tuned on a GPU yet (no run so far). BLOCK = weights of one program.
CONFIGS = [{"BLOCK": block, "num_warps": warps} for block, warps in [(2048, 4), (1024, 4), (4096, 4), (4096, 8)]]


@jit
def _select_mask_kernel(
    w_ptr, masked_ptr, mask_ptr, bits_ptr, values_ptr, metadata_ptr, nan_ptr,
    ROWS, TAPS, K, stride_wo, stride_wt, stride_wk, stride_mo, stride_mt, stride_mk,
    KEEP: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # one program owns BLOCK_R rows x BLOCK_K columns
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    out, tap = row // TAPS, row % TAPS
    inside = (row < ROWS)[:, None] & (k < K)[None, :]

    w_offs = (out * stride_wo + tap * stride_wt)[:, None] + (k * stride_wk)[None, :]
    w = tl.load(w_ptr + w_offs, mask=inside, other=0.0)
    INFINITY: tl.constexpr = 0x7F800000 if w.dtype == tl.float32 else 0x7F80 if w.dtype == tl.bfloat16 else 0x7C00
    nan = tl.max(magnitude(w).reshape(w.numel // GROUP, GROUP), 1) > INFINITY
    tl.store(nan_ptr + tl.zeros([w.numel // GROUP], tl.int32), 1, mask=nan)

    kept = keep_largest(w, KEEP, GROUP)
    mask = kept.reshape(BLOCK_R, BLOCK_K) & inside

    m_offs = (out * stride_mo + tap * stride_mt)[:, None] + (k * stride_mk)[None, :]
    tl.store(masked_ptr + m_offs, tl.where(mask, w, 0.0).to(masked_ptr.dtype.element_ty), mask=inside)
    if mask_ptr is not None:
        tl.store(mask_ptr + m_offs, mask.to(tl.int8), mask=inside)
    if bits_ptr is not None:  # by bytes: a thread holds eight weights in a row
        bits = tl.sum(mask.reshape(BLOCK_R, BLOCK_K // 8, 8).to(tl.int32) << tl.arange(0, 8)[None, None, :], 2)
        byte = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        width = tl.cdiv(K, 32) * 4
        b_offs = (row * width)[:, None] + byte[None, :]
        tl.store(bits_ptr + b_offs, bits.to(tl.int8), mask=(row < ROWS)[:, None] & (byte < width)[None, :])
    if values_ptr is not None:
        ka, kb, kc, kd = fours(kept)
        a, b, c, d = fours(w)
        values = tl.join(tl.where(ka, a, tl.where(kb, b, c)), tl.where(kd, d, tl.where(kc, c, b)))
        column = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        width = tl.cdiv(K, 16) * 8
        v_offs = (row * width)[:, None] + column[None, :]
        v_inside = (row < ROWS)[:, None] & (column < width)[None, :]
        values = values.reshape(BLOCK_R, BLOCK_K // 2).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + v_offs, values, mask=v_inside)
        nibbles = tl.where(ka, 0, tl.where(kb, 1, 2)) | tl.where(kd, 12, tl.where(kc, 8, 4))
        low, high = tl.split(nibbles.reshape(BLOCK_R, BLOCK_K // 8, 2))
        byte = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        width = tl.cdiv(K, 16) * 2
        e_offs = (row * width)[:, None] + byte[None, :]
        e_inside = (row < ROWS)[:, None] & (byte < width)[None, :]
        tl.store(metadata_ptr + e_offs, (low | high << 4).to(tl.int8), mask=e_inside)


@jit
def keep_largest(w, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """w: a tile whose last axis is whole groups -> (groups, GROUP) of bool."""
    if KEEP == 2 and GROUP == 4:
        return two_of_four(w)
    else:
        return keep_largest_by_sorting(w, KEEP, GROUP)


@jit
def two_of_four(w):
    """Kept is who loses at most one of its three meetings, and of two equals the second loses.

    Every outcome is the sign of a difference, so that a majority of three is one instruction, and no predicates, of
    which a thread has seven, are needed before the end.
    """
    a, b, c, d = fours(magnitude(w))
    ab, ac, ad, bc, bd, cd = a - b, a - c, a - d, b - c, b - d, c - d  # negative: the first loses
    ka = majority(~ab, ~ac, ~ad) < 0
    kb = majority(ab, ~bc, ~bd) < 0
    kc = majority(ac, bc, ~cd) < 0
    kd = majority(ad, bd, cd) < 0
    return tl.join(tl.join(ka, kc), tl.join(kb, kd)).reshape(w.numel // 4, 4)


@jit
def keep_largest_by_sorting(w, KEEP: tl.constexpr, GROUP: tl.constexpr):
    size = magnitude(w)
    if w.dtype == tl.float32:
        size = size.to(tl.int64)
    place = tl.arange(0, GROUP)[None, :]
    key = size.reshape(w.numel // GROUP, GROUP) * GROUP + (GROUP - 1 - place)
    last_kept = tl.sum(tl.where(place == GROUP - KEEP, tl.sort(key), 0), 1)
    return key >= last_kept[:, None]


@jit
def magnitude(w):
    """|w| as an int32: in the order of |w|, NaN after infinity."""
    if w.dtype == tl.float32:
        return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return w.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@jit
def fours(x):
    """A tile whose last axis is whole groups of four -> four (groups,): the first of each group, the second, ..."""
    even, odd = tl.split(x.reshape(x.numel // 4, 2, 2))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@jit
def majority(x, y, z):
    return (x & y) | (z & (x | y))


_SELECTION = [keep_largest, two_of_four, keep_largest_by_sorting, magnitude, fours, majority]
_tuner = Autotuner("select mask", CONFIGS, [_select_mask_kernel, *_SELECTION])
_nan_flags = {}  # (reference to the weight's memory, name, device): flag


def _launch(weight, pattern, outputs, name):
    """Fill `outputs` (see `_outputs`), except the empty ones; weight of fp32, bf16 or fp16."""
    masked, mask, bits, values, metadata = (t if t.numel() else None for t in outputs)
    if masked is None:
        return
    # (out, taps, in); the weight is copied where its kh and kw cannot be one axis
    w, m = (t.reshape(*t.shape[:2], -1).transpose(1, 2) for t in (weight, masked))
    rows, taps, K = w.shape[0] * w.shape[1], w.shape[1], w.shape[2]
    nan = _nan_flag(weight, name)
    block_k = min(128, max(32, triton.next_power_of_2(K)))
    as_bytes = lambda tensor: None if tensor is None else tensor.view(torch.int8)  # noqa: E731

    def run(config):
        block_r = max(1, config["BLOCK"] // block_k)
        _select_mask_kernel[(triton.cdiv(rows, block_r), triton.cdiv(K, block_k))](
            w, m, as_bytes(mask), as_bytes(bits), values, as_bytes(metadata), nan,
            rows, taps, K, *w.stride(), *m.stride(),
            KEEP=pattern.keep, GROUP=pattern.group, BLOCK_R=block_r, BLOCK_K=block_k,
            num_warps=config["num_warps"], **FUSED,
        )  # fmt: skip
        return outputs

    wanted = "+".join(name for name, t in zip(Selection._fields, outputs) if t.numel())
    dtypes = f"{weight.dtype}->{masked.dtype}"
    run(_tuner.best(run, weight.device, dtypes=dtypes, pattern=pattern, wanted=wanted, rows=bucket(rows), k=K))
    if values is not None:  # a compressed weight is selected once: no later call would tell
        _wait(weight.device)
    if nan.item():
        _wait(weight.device)  # else the kernels in flight would set it again
        _report(nan, name)


def _nan_flag(weight, name):
    """One int32 per weight and name, in host memory that the GPU writes to: reading it does not wait for the GPU.

    A flag whose weight is gone serves the next weight, once no kernel writes to it any more. Raises: InputError if it
    says that the weight which is gone was NaN.
    """
    key = StorageWeakRef(weight.untyped_storage()), name, weight.device
    if key not in _nan_flags:
        gone = next((other for other in list(_nan_flags) if other[0].expired()), None)
        if gone:
            _wait(gone[2])
            flag = _nan_flags.pop(gone)
            if flag.item():
                _report(flag, gone[1])
        else:
            flag = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=weight.is_cuda)
        _nan_flags[key] = flag
    return _nan_flags[key]


def _report(flag, name):
    flag.zero_()
    raise InputError(f"{name}: some of its weights are NaN, which has no magnitude order")


def _wait(device):
    if device.type == "cuda" and not capturing():
        torch.cuda.synchronize(device)


def _select_in_torch(weight, pattern, dtype, name):
    """-> (masked, mask)"""
    if weight.dtype == torch.float32 and forced_backend() not in ("torch", "dense") and rules.serves(weight):
        masked, mask, nan = products.select_mask(weight, pattern)
        if not nan:  # the number of NaN is counted below
            return masked.to(dtype, memory_format=memory_format(weight)), mask
    finite = math.isfinite(weight.sum().item())  # or its sum overflows: then the slower ways below are right, too
    if not finite and (nans := int(weight.isnan().sum())):
        raise InputError(f"{name}: {nans} of its weights are NaN, which has no magnitude order")
    rows = group_view(weight)
    if pattern.group == 4:
        kept = select_of_fours(rows, pattern.keep)
    else:
        kept = select_untied(rows, pattern)
        kept = select_mask_ref(rows, pattern) if kept is None else kept
    mask = ungroup(kept, weight.shape).contiguous(memory_format=memory_format(weight))
    # a product is cheaper than a choice, and from bytes cheaper than from bool, but a pruned infinity would be NaN
    masked = mask.view(torch.uint8).to(weight.dtype).mul_(weight) if finite else torch.where(mask, weight, 0)
    return masked.to(dtype, memory_format=memory_format(weight)), mask


class Selection(NamedTuple):
    """The result of `select_mask`. A field that was not requested is None. rows: as in `group_view`."""

    masked: torch.Tensor  # the weight's shape
    mask: torch.Tensor | None = None  # bool, the weight's shape
    bits: torch.Tensor | None = None  # (rows, ceil(K / 32)) int32: the mask as `pack_bits` packs it
    values: torch.Tensor | None = None  # (N, 8 ceil(K / 16)), the 2:4 form of `sparse24.format`
    metadata: torch.Tensor | None = None  # (N, ceil(K / 16)) int16


def _in_torch(weight, pattern, dtype, want_mask, want_bits, want_compressed, name):
    masked, mask = _select_in_torch(weight, pattern, dtype, name)
    bits = pack_bits(group_view(mask)) if want_bits else None
    return Selection(masked, mask if want_mask else None, bits, *(pack(masked) if want_compressed else ()))


def _outputs(weight, dtype, want_mask, want_bits, want_compressed):
    """New tensors for the fields of Selection, empty where not wanted."""
    rows, columns = weight.numel() // weight.shape[1], weight.shape[1]
    words = -(-columns // 16)
    masked = torch.empty_like(weight, dtype=dtype, memory_format=memory_format(weight))
    return (
        masked,
        torch.empty_like(masked, dtype=torch.bool) if want_mask else weight.new_empty(0, dtype=torch.bool),
        weight.new_empty((rows, -(-columns // 32)) if want_bits else 0, dtype=torch.int32),
        weight.new_empty((rows, 8 * words) if want_compressed else 0, dtype=dtype),
        weight.new_empty((rows, words) if want_compressed else 0, dtype=torch.int16),
    )


def _select_mask(
    weight: torch.Tensor,
    keep: int,
    group: int,
    dtype: torch.dtype,
    want_mask: bool,
    want_bits: bool,
    want_compressed: bool,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pattern = Pattern(keep, group)
    if uses_triton(weight) and {weight.dtype, dtype} <= {torch.float32, torch.bfloat16, torch.float16}:
        outputs = _outputs(weight, dtype, want_mask, want_bits, want_compressed)

        def start():
            with torch.cuda.device_of(weight):  # Triton launches on the current device
                _launch(weight, pattern, outputs, name)

        if runs(SELECT_MASK, "triton", weight.device, start):
            return outputs
    found = _in_torch(weight, pattern, dtype, want_mask, want_bits, want_compressed, name)
    absent = _outputs(weight[:0], dtype, False, False, False)
    return tuple(empty if tensor is None else tensor for tensor, empty in zip(found, absent))


def _select_mask_fake(weight, keep, group, dtype, want_mask, want_bits, want_compressed, name):
    refuse_export(traced=True)
    return _outputs(weight, dtype, want_mask, want_bits, want_compressed)


_operator = operator("sparsedm::select_mask", _select_mask, _select_mask_fake)


def select_mask(weight, pattern, dtype=None, name="weight", *, mask=True, bits=False, compressed=False):
    """A `Selection`: the mask of a weight, the masked weight, and other requested forms, in one pass over the weight.

    weight: (out, in) or (out, in, kh, kw), floating point. dtype: of the masked weight; default: the weight's.
    mask, bits: return the mask as bool, as bits. compressed: return values and metadata (only for a 2:4 Linear).
    All tensors are detached. The masked weight and the mask have the weight's shape and `memory_format`.
    Raises: InputError, beginning with `name`, if the pattern does not divide the input axis, if a weight is NaN, or if
    `compressed` does not fit. On a GPU NaN is told at one of the next calls with this weight (or, if it is gone,
    with a new one), so that nothing waits for the GPU; with `compressed` at once.
    """
    check_weight(weight, pattern, name)
    if compressed and (pattern != Pattern(2, 4) or weight.dim() != 2):
        raise InputError(f"{name}: only a 2:4 Linear has values and metadata, not {pattern} of {tuple(weight.shape)}")
    weight, dtype = weight.detach(), dtype or weight.dtype
    if not dtype.is_floating_point:
        raise InputError(f"{name}: a masked weight is floating point, not {dtype}")
    if type(weight) is torch.Tensor and weight.device.type == "cpu" and not watched():
        # where nothing traces, the operator would only cost time
        return _in_torch(weight, pattern, dtype, mask, bits, compressed, name)
    found = _operator(weight, pattern.keep, pattern.group, dtype, mask, bits, compressed, name)
    return Selection(*(t if wanted else None for t, wanted in zip(found, (True, mask, bits, compressed, compressed))))
