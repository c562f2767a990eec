"""One launch over all weights of a model: select their masks, make the step of AdamW, sum up their bits, or all of it.

    g' = g + decay * (1 - m) * w                           m = mask of w: SR-STE (arXiv 2102.04010, eq. 6)
    w' = (1 - lr * weight_decay) * w - lr * m1 / (sqrt(m2) + eps)   m1, m2: corrected moments of g' (arXiv 1711.05101)
    masked = (w' * m').to(dtype), bits of m'               m' = mask of w'

The tensors of a layer have one shape, (N, K) or (N, C, kh, kw), and one memory order. A program owns BLOCK // 32 words
of 32 weights along the input axis: a word of `bits` each. Which layer it works on, it finds in a table of the layers'
first programs. Addresses, sizes and rates of the layers stand in tables that each launch brings along.

A step reads w, g, and both moments and writes w, both moments, the masked weight in 16 bits and the bits: computed
from the loads and stores, 30.1 bytes per weight. A selection alone takes 6.1, a checksum 4. Dense training with fused
AdamW takes 28, and 6 more for autocast's copy of the weight.

Hardware: any GPU that Triton serves. A step takes weights and moments of fp32, a selection also weights of 16 bits.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.optim.adam import adam

from sparsedm.errors import InputError
from sparsedm.kernels.checksum import checksum_ref
from sparsedm.kernels.launch import Launch, broken, jit, runs, tl, triton, uses_triton
from sparsedm.kernels.mask import Selection, keep_largest
from sparsedm.kernels.pattern import Pattern, group_view, memory_format, pack_bits, select_mask_ref, ungroup
from sparsedm.kernels.straight_through import GradientRule, apply_rule

BLOCK, WARPS = 1024, 4  # weights of a program; not tuned: no run on a GPU so far
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAME = "masks and step of all layers", "triton"  # in `launch.broken`


class Rates(NamedTuple):
    """The numbers of one step for one weight. decay: of SR-STE; step: 1 for the first one."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay: float
    step: int

    def row(self):
        """What the kernel multiplies by, rounded to fp32 once, as torch does it."""
        (beta1, beta2), size = self.betas, self.lr / (1 - self.betas[0] ** self.step)
        root = (1 - beta2**self.step) ** 0.5
        return (1 - self.lr * self.weight_decay, self.decay, 1 - beta1, beta2, 1 - beta2, root, self.eps, size)


class Work(NamedTuple):
    """What a launch does to one weight: fills the tensors of `selection`, steps with `moments` and `rates`, or neither.

    moments: (gradient, first, second), of the weight's shape, fp32.
    """

    weight: torch.Tensor
    pattern: Pattern
    selection: Selection | None = None
    moments: tuple | None = None
    rates: Rates | None = None


def masked_adamw_ref(work, dtype):
    """The specification: torch's AdamW, in place, on the gradient with the decay; then the Selection of the result."""
    w, pattern, _, moments, rates = work
    if moments is not None:
        g, first, second = moments
        mask = ungroup(select_mask_ref(group_view(w), pattern), w.shape)
        g = apply_rule(g, w, mask, GradientRule(rates.decay))
        options = dict(zip(("beta1", "beta2"), rates.betas)) | {"lr": rates.lr, "weight_decay": rates.weight_decay}
        step = torch.tensor(rates.step - 1.0, device="cpu")
        options |= {"eps": rates.eps, "amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
        adam([w], [g], [first], [second], [], [step], **options)
    rows = select_mask_ref(group_view(w), pattern)
    mask = ungroup(rows, w.shape)
    return Selection(torch.where(mask, w, 0).to(dtype), mask, pack_bits(rows))


def in_torch(work):
    """Does the work where the kernel does not run; the same three numbers, so that one may check what the other did."""
    before = checksum_ref(work.weight)
    if work.selection or work.moments:
        found = masked_adamw_ref(work, work.selection.masked.dtype if work.selection else work.weight.dtype)
        for mine, value in zip(work.selection or (), found):
            if mine is not None:
                mine.copy_(value)
    nan = work.weight.isnan().sum() if work.selection else torch.zeros_like(before)
    return torch.stack([before, checksum_ref(work.weight), nan])


# ---- the kernel ------------------------------------------------------------------------------------------------------

# The rows of the tables, which hold a column for each layer:
# pointers  weight, gradient, first and second moment, masked weight, bits, mask
# sizes     first program, words, words of a row, taps, K, strides of (out, tap, in), the program after the last
# rates     `Rates.row`


@jit
def _layers_kernel(
    pointers_ptr, sizes_ptr, rates_ptr, partials_ptr, LAYERS, PROGRAMS,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, STEP: tl.constexpr, DECAY: tl.constexpr, SELECT: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    # the layer is the last one whose first program is not after this one
    program = tl.program_id(0)
    place = tl.arange(0, COUNT)
    starts = tl.load(sizes_ptr + place, mask=place < LAYERS, other=2147483647)
    layer = tl.sum((starts <= program).to(tl.int32), 0) - 1
    sizes, rates, pointers = sizes_ptr + layer, rates_ptr + layer, pointers_ptr + layer
    words = tl.load(sizes + LAYERS)
    word = (program - tl.load(sizes)) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    lane = tl.arange(0, 32)[None, :]
    inside = tl.broadcast_to((word < words)[:, None], [BLOCK // 32, 32])
    if FLAT:  # the words lie one behind the other
        offs = word[:, None] * 32 + lane
    else:
        per_row, taps, K = tl.load(sizes + 2 * LAYERS), tl.load(sizes + 3 * LAYERS), tl.load(sizes + 4 * LAYERS)
        row, k = word // per_row, (word % per_row)[:, None] * 32 + lane
        start = row // taps * tl.load(sizes + 5 * LAYERS) + row % taps * tl.load(sizes + 6 * LAYERS)
        offs = start[:, None] + k * tl.load(sizes + 7 * LAYERS)
        inside = inside & (k < K)

    w_ptr = _address(pointers, SOURCE, FLAT)
    w = tl.load(w_ptr + offs, mask=inside, other=0.0)
    tl.store(partials_ptr + program, _checksum(w, offs, inside))

    if STEP:
        first_ptr = _address(pointers + 2 * LAYERS, tl.float32, FLAT)
        second_ptr = _address(pointers + 3 * LAYERS, tl.float32, FLAT)
        g = tl.load(_address(pointers + LAYERS, tl.float32, FLAT) + offs, mask=inside, other=0.0)
        first = tl.load(first_ptr + offs, mask=inside, other=0.0)
        second = tl.load(second_ptr + offs, mask=inside, other=0.0)
        if DECAY:
            kept = keep_largest(w, KEEP, GROUP).reshape(BLOCK // 32, 32)
            g += tl.where(kept, 0.0, tl.load(rates + LAYERS) * w)
        rest1, beta2 = tl.load(rates + 2 * LAYERS), tl.load(rates + 3 * LAYERS)
        # torch's lerp: from the end that is nearer
        first = tl.where(rest1 < 0.5, first + rest1 * (g - first), g - (g - first) * (1 - rest1))
        second = second * beta2 + tl.load(rates + 4 * LAYERS) * g * g
        root = tl.sqrt(second) / tl.load(rates + 5 * LAYERS) + tl.load(rates + 6 * LAYERS)
        w = tl.load(rates) * w - tl.load(rates + 7 * LAYERS) * first / root
        tl.store(first_ptr + offs, first, mask=inside)
        tl.store(second_ptr + offs, second, mask=inside)
        tl.store(w_ptr + offs, w, mask=inside)
        tl.store(partials_ptr + PROGRAMS + program, _checksum(w, offs, inside))

    if SELECT:
        nan = tl.sum(tl.sum(((w != w) & inside).to(tl.int32), 1), 0)
        tl.store(partials_ptr + 2 * PROGRAMS + program, nan.to(tl.int64))
        kept = keep_largest(w, KEEP, GROUP).reshape(BLOCK // 32, 32) & inside
        masked_ptr = _address(pointers + 4 * LAYERS, TARGET, FLAT)
        tl.store(masked_ptr + offs, tl.where(kept, w, 0.0).to(TARGET), mask=inside)
        bits_ptr = _address(pointers + 5 * LAYERS, tl.int32, FLAT)
        tl.store(bits_ptr + word, tl.sum(kept.to(tl.int32) << lane, 1), mask=word < words)
        if MASK:
            tl.store(_address(pointers + 6 * LAYERS, tl.int8, FLAT) + offs, kept.to(tl.int8), mask=inside)


@jit
def _address(pointer_ptr, DTYPE: tl.constexpr, FLAT: tl.constexpr):
    address = tl.load(pointer_ptr).to(tl.pointer_type(DTYPE))
    if FLAT:  # a thread owns four weights in a row: wider accesses of narrow types would exchange layouts
        address = tl.multiple_of(address, DTYPE.primitive_bitwidth // 2)
    return address


@jit
def _checksum(w, offs, inside):
    if w.dtype == tl.float32:
        bits = w.to(tl.int32, bitcast=True)
    else:
        bits = w.to(tl.int16, bitcast=True).to(tl.int32)
    code = bits + offs * -1640531535
    code = (code ^ (code >> 15)) * -2048144777
    code = tl.where(inside, code ^ (code >> 13), 0)
    return tl.sum(tl.sum(code, 1).to(tl.int64), 0)


# ---- launches --------------------------------------------------------------------------------------------------------


def serves(weight):
    """Whether the kernel takes this weight: on a GPU where it runs, in its usual memory order, of DTYPES."""
    if type(weight.data) is not torch.Tensor or weight.dtype not in DTYPES or not 0 < weight.numel() < 2**31:
        return False
    if (*NAME, weight.device) in broken:
        return False
    return uses_triton(weight) and weight.is_contiguous(memory_format=memory_format(weight))


def new_selection(weight, dtype, mask):
    """An empty Selection for `launch` to fill, with the mask as bool if `mask` is true."""
    masked = torch.empty_like(weight, dtype=dtype, memory_format=memory_format(weight))
    words = weight.numel() // weight.shape[1], -(-weight.shape[1] // 32)
    bits = torch.empty(words, dtype=torch.int32, device=weight.device)
    return Selection(masked, torch.empty_like(masked, dtype=torch.bool) if mask else None, bits)


def launch(works):
    """Do what the list of Work says, in as few launches as there are kinds: pattern, dtypes, order of memory. If the
    kernel does not run here, torch does it.

    Returns int64 (3, len(works)), on the weights' device: the checksum before, after a step, and how many are NaN
    (after a selection).
    """
    (device,) = {work.weight.device for work in works}
    totals = torch.empty(3, len(works), dtype=torch.int64, device=device)
    with torch.no_grad(), torch.cuda.device_of(works[0].weight):  # Triton launches on the current device
        for kind, members in kinds(works).items():
            step = plan(kind, [works[i] for i in members])
            given = {name: _upload(value, device) for name, value in step.arguments.items()}
            if runs(*NAME, device, step._replace(arguments=given).start):
                sums = F.pad(given["partials_ptr"].cumsum(1), (1, 0))
                first, last = given["sizes_ptr"][0], given["sizes_ptr"][-1]
                of_kind = sums.index_select(1, last) - sums.index_select(1, first)
            else:
                of_kind = torch.stack([in_torch(works[i]) for i in members], 1)
            totals.index_copy_(1, _upload(torch.tensor(members, device="cpu"), device), of_kind)
    return totals


def _upload(value, device):
    """A table of tensors as their addresses, a tensor as it is, on the device; nothing waits for the copy."""
    if isinstance(value, list):
        addresses = [[0 if t is None else t.data_ptr() for t in row] for row in value]
        value = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    if isinstance(value, torch.Tensor) and value.device != device:
        return value.pin_memory().to(device, non_blocking=True)
    return value


def kinds(works):
    """{what a kernel is compiled for: the places in `works` that one launch serves}."""
    found = {}
    for i, work in enumerate(works):
        weight, pattern, selection, moments, rates = work
        given = [t for t in (weight, *(selection or ()), *(moments or ())) if t is not None]
        unit = weight.shape[1] % 32 == 0 and _strides(weight)[2] == 1
        flat = unit and all(t.data_ptr() % 16 == 0 for t in given)
        target = None if selection is None else selection.masked.dtype
        mask = selection is not None and selection.mask is not None
        kind = (pattern, weight.dtype, target, mask, moments is not None, bool(rates and rates.decay), flat)
        found.setdefault(kind, []).append(i)
    return found


def _strides(weight):
    """Of (out, tap, in)."""
    taps, K = weight[0, 0].numel(), weight.shape[1]
    if taps > 1 and memory_format(weight) == torch.contiguous_format:
        return taps * K, 1, taps
    return taps * K, K, 1


def plan(kind, works):
    """The Launch for works of one kind. Its tables are on the CPU, `pointers_ptr` as rows of tensors."""
    pattern, source, target, mask, step, decay, flat = kind
    for weight, _, _, moments, _ in works:
        for tensor in moments or ():
            served = tensor.dtype == torch.float32 and tensor.device == weight.device and tensor.shape == weight.shape
            if not (served and tensor.is_contiguous(memory_format=memory_format(weight))):
                found = f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]} on {tensor.device}, strides {tensor.stride()}"
                raise InputError(f"gradient and moments must be float32, in place and order as the weight, not {found}")
    sizes, rows = _sizes(works), [[work.weight for work in works]]
    rows += [[work.moments[i] if step else None for work in works] for i in range(3)]
    chosen = [work.selection or Selection(None) for work in works]
    rows += [[s.masked for s in chosen], [s.bits for s in chosen], [s.mask for s in chosen]]
    rates = [work.rates.row() if step else 8 * (0.0,) for work in works]
    programs = int(sizes[-1, -1])
    return Launch(
        _layers_kernel,
        (programs,),
        {
            "pointers_ptr": rows,
            "sizes_ptr": sizes,
            "rates_ptr": torch.tensor(rates, device="cpu").t().contiguous(),
            "partials_ptr": torch.zeros(3, programs, dtype=torch.int64, device=works[0].weight.device),
            "LAYERS": len(works),
            "PROGRAMS": programs,
        },
        {
            "SOURCE": _type(source),
            "TARGET": _type(target),
            "KEEP": pattern.keep,
            "GROUP": pattern.group,
            "COUNT": triton.next_power_of_2(len(works)),
            "BLOCK": BLOCK,
            "FLAT": flat,
            "STEP": step,
            "DECAY": decay,
            "SELECT": target is not None,
            "MASK": mask,
        },
        WARPS,
    )


def _type(dtype):
    return dtype and getattr(tl, str(dtype).removeprefix("torch."))


def _sizes(works):
    return _sizes_of(tuple((tuple(work.weight.shape), _strides(work.weight)) for work in works))


@functools.lru_cache(16)
def _sizes_of(shapes):
    columns, programs = [], 0
    for (out, K, *taps), strides in shapes:
        taps, per_row = taps[0] * taps[1] if taps else 1, -(-K // 32)
        words, first = out * taps * per_row, programs
        programs += -(-words // (BLOCK // 32))
        columns.append((first, words, per_row, taps, K, *strides, programs))
    return torch.tensor(columns, dtype=torch.int32, device="cpu").t().contiguous()
