"""What was selected from weights, for a while: of `sparsity.hold_masks` and `optim.MaskedAdamW`.

It is stored with a checksum of what the weight was. Whoever uses it compares the checksum afterwards, so that a weight
written by anybody else, unseen by torch, is an InputError and not a stale mask.
"""

import itertools
from typing import NamedTuple

import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels import masked_adamw as kernel
from sparsedm.kernels.checksum import checksum_on_gpu, checksums
from sparsedm.kernels.cpu import products, rules
from sparsedm.kernels.launch import forced_backend
from sparsedm.kernels.mask import Selection
from sparsedm.kernels.masked_adamw import Work
from sparsedm.kernels.pattern import Pattern, check_weight

CHANGED = "the weight of {} was changed while its mask was held, or since it was selected: step after the block"
NAN = "{}: some of its weights are NaN, which has no magnitude order"


class Selected(NamedTuple):
    weight: nn.Parameter
    pattern: Pattern
    selection: Selection
    checksum: torch.Tensor | int  # int64: () by the kernel of `masked_adamw`, (1,) by `_checksum`; an int of a CPU's
    version: int | None  # of the weight: what torch has seen of writes

    @classmethod
    def of(cls, layer, selection, checksum):
        return cls(layer.weight, layer.pattern, selection, checksum, version_of(layer.weight))


def version_of(weight):
    return None if weight.is_inference() else weight._version


def select_all(dtypes, names):
    """{layer: Selected} of the current weights; on a GPU one launch for a kind of layers, see `kernels.masked_adamw`.

    dtypes: {layer: dtype of its product}. names: {layer: what errors call it}. Raises: InputError for NaN, on a GPU at
    one of the next calls.
    """
    found = {}
    for layers in by_device(layer for layer in dtypes if kernel.serves(layer.weight)):
        works = [work_of(layer, dtypes[layer] if layer.mask is None else None) for layer in layers]
        totals = kernel.launch(works)
        for layer, work, checksum in zip(layers, works, totals[0]):
            selection = work.selection or layer.selection(dtypes[layer])  # a frozen mask is not selected
            found[layer] = Selected.of(layer, selection, checksum)
        raise_flagged(totals[2] != 0, [names[layer] for layer in layers], NAN)
    on_cpu = [la for la, dtype in dtypes.items() if la not in found and _served_on_cpu(la, dtype)]
    found |= _selected_on_cpu(on_cpu, names)
    for layer, dtype in dtypes.items():
        if layer not in found:
            selection = layer.selection(dtype, names[layer])
            found[layer] = Selected.of(layer, selection, _checksum(layer.weight))
    return found


def _served_on_cpu(layer, dtype):
    weight = layer.weight
    plain = layer.mask is None and layer._held is None and type(weight) in (torch.Tensor, nn.Parameter)
    return plain and dtype == torch.float32 and forced_backend() not in ("torch", "dense") and rules.serves(weight)


def _selected_on_cpu(layers, names):
    """{layer: Selected} by one call of the C library; without the layers whose weights are NaN somewhere."""
    for layer in layers:
        check_weight(layer.weight, layer.pattern, names[layer])
    if not layers:  # there may be no library
        return {}
    selected = products.select_masks([layer.weight for layer in layers], [layer.pattern for layer in layers])
    return {
        layer: Selected.of(layer, Selection(masked, mask), checksum)
        for layer, (masked, mask, nan, checksum) in zip(layers, selected)
        if not nan
    }


def by_device(layers):
    devices = {}
    for layer in layers:
        devices.setdefault(layer.weight.device, []).append(layer)
    return devices.values()


def work_of(layer, dtype):
    """What selects the layer's mask; with dtype None, what sums its weight up."""
    weight = layer.weight.detach()
    selection = dtype and kernel.new_selection(weight, dtype, layer.needs_mask())
    return Work(weight, layer.pattern or Pattern(2, 4), selection)


def check_unchanged(selected, names):
    """Raise InputError, naming the layer, for a weight that is not what it was when its mask was selected.

    selected: {layer: Selected}. On a GPU nothing waits: the error is raised by one of the next calls.
    """
    summed = {}
    for layer, one in selected.items():
        weight = layer.weight
        if isinstance(one.checksum, int):
            if weight is not one.weight or not weight.is_cpu or _checksum(weight) != one.checksum:
                raise InputError(CHANGED.format(names[layer]))
            continue
        by_kernel = not one.checksum.dim()
        moved = weight.device != one.checksum.device or (by_kernel and weight.dtype not in kernel.DTYPES)
        if moved or weight is not one.weight:
            raise InputError(CHANGED.format(names[layer]))
        if by_kernel:
            summed.setdefault(weight.device, []).append(layer)
            continue
        raise_flagged(_checksum(weight) != one.checksum, [names[layer]], CHANGED)
    for layers in summed.values():
        now = kernel.launch([work_of(layer, None) for layer in layers])[0]
        before = torch.stack([selected[layer].checksum for layer in layers])
        raise_flagged(now != before, [names[layer] for layer in layers], CHANGED)


def _checksum(weight):
    """int64 (1,), one more dimension than by the kernel; of a weight on the CPU an int."""
    return checksums(weight)[0] if weight.is_cpu else checksum_on_gpu(weight)[None]


_unseen = []  # (event, flags in host memory, names, message) of the reports from a GPU that have not been looked at


def raise_flagged(flags, names, message):
    """Raise InputError for the first name whose flag is set; on a GPU, once the flags have arrived."""
    arrived = []
    if flags.is_cuda:
        event, here = torch.cuda.Event(), torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        here.copy_(flags, non_blocking=True)
        event.record(torch.cuda.current_stream(flags.device))  # by default of the current device
        _unseen.append((event, here, names, message))
        while _unseen and _unseen[0][0].query():
            arrived.append(_unseen.pop(0)[1:])
    elif not flags.is_meta:
        arrived.append((flags.bool(), names, message))
    for flags, names, message in arrived:
        for name in itertools.compress(names, flags.tolist()):
            raise InputError(message.format(name))
