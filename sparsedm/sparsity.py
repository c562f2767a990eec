"""Whole models: `sparsify` gives layers a pattern, `compress` makes the form that runs, `decompress` goes back."""

import copy
import re

import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern, group_view, holds
from sparsedm.layers import Conv2d, Conv2d24, Linear, Linear24, Masked, invalid_because


def sparsify(model, pattern, where=None):
    """Give the layers of `model` a pattern, in place, and return the model.

    Plain `nn.Linear` and `nn.Conv2d` modules of any model are swapped for ours; parameters, hooks and optimizer state
    stay as they are. Layers that cannot hold the pattern, or are not selected, stay dense, and `inspect` says why.

    pattern: "2:4", Pattern, or None / "dense" to take patterns away.
    where: None (the model's own `sparse_layers` if it has one, else all), "all", a regular expression searched for in
        the dotted names, a list of names, or a predicate (name, module) -> bool.
    Raises: InputError if nothing was selected or no selected layer can hold the pattern.
    """
    pattern = Pattern.parse(pattern)
    selected = _selector(model, where)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    chosen = {n for n, m in found if selected(n, m)}
    if not chosen:
        raise InputError(f"where={where!r} selects none of the {len(found)} linear and convolution layers")
    fitting = 0
    swapped = {}
    for name, module in found:
        reason = _dense_reason(module, pattern) if name in chosen else "not selected"
        if not reason and not isinstance(module, Masked):
            swapped[module] = module = _adopt(module)
        if isinstance(module, Masked):
            module.set_pattern(None if reason else pattern)
        if reason:
            module.dense_reason = reason
        else:
            fitting += 1
    for parent in list(model.modules()):
        for key, child in parent._modules.items():  # named_children() passes over a module that stands in two places
            if child in swapped:
                setattr(parent, key, swapped[child])
    if pattern and not fitting:
        first = next(module for name, module in found if name in chosen)
        raise InputError(f"no selected layer can hold {pattern}: {_dense_reason(first, pattern)}")
    return swapped.get(model, model)


def _selector(model, where):
    if where is None:
        where = getattr(model, "sparse_layers", "all")
    if where == "all":
        return lambda name, module: True
    if callable(where):
        return where
    if isinstance(where, str):
        try:
            expression = re.compile(where)
        except re.error as error:
            raise InputError(f"where={where!r} is not a regular expression: {error}") from None
        return lambda name, module: expression.search(name)
    names = set(where)
    unknown = names - {name for name, _ in model.named_modules()}
    if unknown:
        raise InputError(f"where names layers the model does not have: {', '.join(sorted(unknown))}")
    return lambda name, module: name in names


def _dense_reason(module, pattern):
    if not isinstance(module, Masked) and type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} is a special kind of {type(module).__mro__[1].__name__}"
    if pattern is None:
        return "no pattern was set"
    return invalid_because(module.weight, pattern)


def _adopt(module):
    """Our layer in place of a plain one, sharing everything the plain one holds."""
    kind = Linear if type(module) is nn.Linear else Conv2d
    layer = kind.__new__(kind)
    layer.__dict__.update(module.__dict__)
    layer._start_masking()
    return layer


def masked_layers(model):
    """[(name, layer)] of the layers that hold a pattern."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, Masked) and m.pattern is not None]


def set_masking(model, *, decay=0.0, kept=1.0, dropped=1.0, frozen=False):
    """Gradient settings of every layer that has a pattern.

    dL/dw = (kept * m + dropped * (1 - m)) * dL/d(w * m) + decay * (1 - m) * w. decay=2e-4 is SR-STE, dropped=0 with
    frozen=True is ASP. frozen=True keeps today's masks for good (they are then saved with the weights). Every backward
    adds the decay: to accumulate gradients over n parts of a batch, divide the gradients by n, not the losses.
    """
    for _, layer in masked_layers(model):
        layer.decay, layer.kept, layer.dropped = float(decay), float(kept), float(dropped)
        if frozen != (layer.mask is not None):
            layer.freeze_mask(frozen)


def masks(model):
    """{layer name: bool mask with the weight's shape} of the layers that have a pattern."""
    return {name: layer.current_mask() for name, layer in masked_layers(model)}


def compress(model):
    """A new model whose layers hold only what they multiply with: 2:4 weights as values + metadata, others as they are.

    Every masked layer whose weight is 2:4 (patterns 2:4, 1:2, 1:4, ... and sparser) becomes Linear24 / Conv2d24; one
    that is denser, such as 3:4, becomes a dense layer with its mask applied. The input model is not touched.
    """
    if not masked_layers(model):
        raise InputError("the model holds no masked layer: call sparsify(model, '2:4') first")
    compressed = {layer: _compress_layer(layer) for _, layer in masked_layers(model)}
    memo = {id(layer): new for layer, new in compressed.items()}  # deepcopy puts these in the layers' places
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _compress_layer(layer):
    with torch.no_grad():
        reason = uncompressed_because(layer)
        if not reason:
            return Linear24(layer) if isinstance(layer, Linear) else Conv2d24(layer)
        dense = copy.deepcopy(layer)
        dense.weight.copy_(layer.effective_weight())
        dense.set_pattern(None)
        dense.dense_reason = reason
        return dense


def uncompressed_because(layer):
    """None if a masked layer can be held as 2:4 values + metadata, else the reason as a short phrase."""
    if isinstance(layer, Conv2d) and (
        layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return "convolutions with groups, or padded other than by a number of zeros, have no compressed form"
    reason = invalid_because(layer.weight, Pattern(2, 4))
    if not reason and not holds(group_view(layer.effective_weight()), Pattern(2, 4)):
        reason = f"{layer.pattern} keeps more than 2 of every 4 somewhere"
    return reason
