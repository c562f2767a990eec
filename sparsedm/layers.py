"""Linear and Conv2d with an N:M pattern, and their 2:4-compressed forms; `sparsify` and `compress` for whole models.

Masked layer:      y = act(x (w * m)^T + b) + r, with m = the pattern's choice from w; w is the dense master weight.
Backward:          dL/dw = dL/d(w * m), passed to all entries (straight-through), plus decay * (1 - m) * w (SR-STE,
                   arXiv 2102.04010); `set_masking` sets the decay and multipliers for kept and dropped entries.
Compressed layer:  the same y from values + metadata alone; inference only.

A mask is a function of the weight and the pattern: chosen again when the weight has changed, and otherwise cached.
What counts as a change is torch's version counter. Every in-place operation moves it, with two exceptions: optimizers
with fused=True, for which a hook below moves it, and writes through `weight.data`, which are not supported.
"""

import copy
import re
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsedm.errors import InputError
from sparsedm.kernels.masked_matmul import choose, straight_through
from sparsedm.kernels.pattern import Pattern, group_view, holds, ungroup
from sparsedm.kernels.sparse24_conv import sparse24_conv2d
from sparsedm.kernels.sparse24_dispatch import last_choice
from sparsedm.kernels.sparse24_format import pack, unpack
from sparsedm.kernels.sparse24_matmul import ACTIVATIONS, sparse24_linear


def _count_fused_step_as_a_change(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused_step_as_a_change)


def _check_activation(activation):
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: one of {', '.join(map(str, ACTIVATIONS))}")
    return activation


def _product_dtype(weight):
    device = weight.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


def _epilogue(y, activation, residual):
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


# ---- masked layers ---------------------------------------------------------------------------------------------------


class _Masked:
    """What Linear and Conv2d share: the pattern, the choice of the mask, and the gradient settings.

    pattern: Pattern or None (dense). dense_reason: why the layer is dense, for `inspect`.
    decay, kept, dropped: see `set_masking`. mask: None, or the frozen mask, a buffer that is saved with the weights.
    """

    def _start_masking(self, pattern=None, activation=None):
        self.activation = _check_activation(activation)
        self.dense_reason = "no pattern was set"
        self.decay, self.kept, self.dropped = 0.0, 1.0, 1.0
        self.register_buffer("mask", None)
        self._choice = None
        self.pattern = None
        if pattern is not None:
            self.set_pattern(pattern)

    def set_pattern(self, pattern):
        """Set the pattern, or None for dense. Raises InputError if the input axis is not a multiple of the group."""
        pattern = Pattern.parse(pattern)
        reason = invalid_because(self.weight, pattern)
        if reason:
            raise InputError(f"pattern {pattern} does not fit weight {tuple(self.weight.shape)}: {reason}")
        self.pattern, self.mask, self._choice = pattern, None, None
        self.dense_reason = None if pattern else "no pattern was set"

    def freeze_mask(self, frozen=True):
        """Keep today's mask from now on, whatever the weight does; with frozen=False choose again."""
        self.mask = self.current_mask().clone() if frozen else None
        self._choice = None

    def current_mask(self):
        """bool, shape of the weight: what the layer multiplies its weight with. All true when dense."""
        if self.pattern is None:
            return torch.ones_like(self.weight, dtype=torch.bool)
        return self._masked_and_mask(self.weight.dtype)[1]

    def effective_weight(self):
        """The weight that multiplies x, in the dtype of the product, with the straight-through gradient attached."""
        if self.pattern is None:
            return self.weight
        masked, mask = self._masked_and_mask(_product_dtype(self.weight))
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return masked
        return straight_through(self.weight, masked, mask, decay=self.decay, kept=self.kept, dropped=self.dropped)

    def _masked_and_mask(self, dtype):
        weight = self.weight.detach()
        if torch.compiler.is_compiling():  # inside a graph the choice is a part of it: a cached one would go stale
            return self._choose(weight, dtype)
        key = (weight._version, weight.data_ptr(), weight.device, dtype) if not weight.is_inference() else None
        cached = self._choice
        if cached and key and cached[0]() is self.weight and cached[1] == key:
            return cached[2]
        with torch.no_grad():
            choice = self._choose(weight, dtype)
        self._choice = (weakref.ref(self.weight), key, choice)
        return choice

    def _choose(self, weight, dtype):
        if self.mask is not None:
            return (weight * self.mask).to(dtype), self.mask
        return choose(weight, self.pattern, dtype)

    def __getstate__(self):
        return {**self.__dict__, "_choice": None}  # a weak reference cannot be copied or pickled

    def extra_repr(self):
        pattern = f", pattern={self.pattern}" if self.pattern else ""
        return super().extra_repr() + pattern + (f", activation={self.activation}" if self.activation else "")


class Linear(_Masked, nn.Linear):
    """y = act([x | skip] (w * m)^T + b) + r: `nn.Linear` with a pattern and a fused epilogue; same state_dict keys.

    pattern: "2:4", Pattern or None (dense). activation: None, "gelu" (erf), "gelu_tanh" or "silu".
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, pattern=None, activation=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._start_masking(pattern, activation)

    def forward(self, x, residual=None, skip=None):
        """x (..., K); residual (..., N) or None; skip (..., K2) or None: a second source, K + K2 inputs in all."""
        if skip is not None:
            x = torch.cat((x, skip), -1)
        return _epilogue(F.linear(x, self.effective_weight(), self.bias), self.activation, residual)


class Conv2d(_Masked, nn.Conv2d):
    """`nn.Conv2d` with a pattern along the input channels at each (out, kh, kw), and a fused epilogue."""

    def __init__(self, *args, pattern=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._start_masking(pattern, activation)

    def forward(self, x, residual=None):
        return _epilogue(self._conv_forward(x, self.effective_weight(), self.bias), self.activation, residual)


# ---- compressed layers -----------------------------------------------------------------------------------------------


class _Compressed(nn.Module):
    """What Linear24 and Conv2d24 share: the weight as rows of values and int16 metadata (see `sparse24_format`).

    weight_shape: of the dense weight. Its rows are (out, in), or (out, kh * kw * in) of a convolution.
    """

    def __init__(self, layer, rows):
        """layer: what to replace; rows: its weight. Raises InputError where that is not 2:4 along the rows."""
        super().__init__()
        self.weight_shape, self.activation = tuple(layer.weight.shape), layer.activation
        values, metadata = pack(rows)
        self.register_buffer("values", values)
        self.register_buffer("metadata", metadata)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self._arranged = {}  # the same weight in the order a kernel reads it, made at the first call

    def measured_backend(self, rows=None):
        """The back end the GPU's tables gave the latest new size, or to `rows` rows; None before a call there."""
        choice = last_choice(self._arranged.get("choices", {}), rows)
        return choice and choice.backend

    def __getstate__(self):
        return {**self.__dict__, "_arranged": {}}

    def extra_repr(self):
        return f"weight {self.weight_shape}, pattern=2:4 compressed, activation={self.activation}"


class Linear24(_Compressed):
    """y = act([x | skip] w^T + b) + r from values (N, K/2) and metadata (N, K/16); inference only."""

    def __init__(self, layer):
        super().__init__(layer, layer.effective_weight().detach())

    def forward(self, x, residual=None, skip=None):
        return sparse24_linear(
            x, self.values, self.metadata, self.bias, self.activation, residual, skip=skip, arranged=self._arranged
        )

    def dense_weight(self):
        """The weight (N, K) that values and metadata stand for, bit for bit."""
        return unpack(self.values, self.metadata, self.weight_shape[1])


class Conv2d24(_Compressed):
    """y = act(conv2d(x, w) + b) + r from values and metadata of the rows (out, kh * kw * in); inference only."""

    def __init__(self, layer):
        super().__init__(layer, group_view(layer.effective_weight().detach()).reshape(layer.out_channels, -1))
        self.geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

    def forward(self, x, residual=None):
        return sparse24_conv2d(
            x,
            self.values,
            self.metadata,
            self.weight_shape[2:],
            self.bias,
            self.activation,
            residual,
            arranged=self._arranged,
            **self.geometry,
        )

    def dense_weight(self):
        """The weight (out, in, kh, kw) that values and metadata stand for, bit for bit."""
        out, cin, kh, kw = self.weight_shape
        rows = unpack(self.values, self.metadata, cin * kh * kw)
        return ungroup(rows.reshape(out * kh * kw, cin), self.weight_shape).contiguous()


# ---- whole models ----------------------------------------------------------------------------------------------------


def invalid_because(weight, pattern):
    """None if groups of `pattern` fit the input axis of `weight`, else the reason as a short phrase."""
    axis = weight.shape[1]
    if pattern is None or (axis and axis % pattern.group == 0):
        return None
    return f"the input axis {axis} is not a multiple of {pattern.group}"


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
        if not reason and not isinstance(module, _Masked):
            swapped[module] = module = _adopt(module)
        if isinstance(module, _Masked):
            module.set_pattern(None if reason else pattern)
        if reason:
            module.dense_reason = reason
        else:
            fitting += 1
    for parent in list(model.modules()):
        for (
            key,
            child,
        ) in parent._modules.items():  # named_children() would pass over a module that stands in two places
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
    if not isinstance(module, _Masked) and type(module) not in (nn.Linear, nn.Conv2d):
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
    return [(n, m) for n, m in model.named_modules() if isinstance(m, _Masked) and m.pattern is not None]


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
