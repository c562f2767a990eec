"""A sparse layer in its two states: masked, to train and run anywhere; compressed, to run fast. Models: `sparsity.py`.

Masked layer:      y = act(x (w * m)^T + b) * s + r, with m = the pattern's choice from w; w is the dense master weight.
Backward:          dL/dw = dL/d(w * m), passed to all entries (straight-through), plus decay * (1 - m) * w (SR-STE,
                   arXiv 2102.04010); `sparsity.set_masking` sets the decay, and multipliers for kept and dropped.

A mask is a function of the pattern and of today's weight, whoever wrote it. Every forward selects it again;
`sparsity.hold_masks` is the only place where a selection is used twice.
"""

import torch
import torch.nn.functional as F
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels.launch import autocast_dtype, exporting
from sparsedm.kernels.mask import Selection, select_mask
from sparsedm.kernels.masked_matmul import STE, kernels_serve, masked_linear, straight_through
from sparsedm.kernels.pattern import Pattern, group_view, pack_bits, ungroup
from sparsedm.kernels.sparse24.conv import sparse24_conv2d
from sparsedm.kernels.sparse24.dispatch import last_measured
from sparsedm.kernels.sparse24.format import check_metadata, pack, unpack
from sparsedm.kernels.sparse24.linear import ACTIVATIONS, sparse24_linear


def _check_activation(activation):
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: one of {', '.join(map(str, ACTIVATIONS))}")
    return activation


def product_dtype(weight):
    return autocast_dtype(weight.device) or weight.dtype


def _epilogue(y, activation, residual, scale=None):
    y = ACTIVATIONS[activation](y)
    if scale is not None:
        y = y * (scale if scale.dim() == 1 else scale.view(scale.shape[0], *[1] * (y.dim() - 2), -1))
    return y if residual is None else y + residual


def invalid_because(weight, pattern):
    """None if groups of `pattern` fit the input axis of `weight`, else the reason as a short phrase."""
    axis = weight.shape[1]
    if pattern is None or (axis and axis % pattern.group == 0):
        return None
    return f"the input axis {axis} is not a multiple of {pattern.group}"


# ---- masked layers ---------------------------------------------------------------------------------------------------


class Masked:
    """What Linear and Conv2d share: the pattern, the choice of the mask, and the gradient rule.

    pattern: Pattern or None (dense). dense_reason: why the layer is dense, for `inspect`.
    rule: see `sparsity.set_masking`. mask: None, or the frozen mask, a buffer, saved with the weights.
    """

    def _start_masking(self, pattern=None, activation=None):
        self.activation = _check_activation(activation)
        self.dense_reason = "no pattern was set"
        self.rule = STE
        self.register_buffer("mask", None)
        self._held = None  # (the weight, its Selection), inside of `hold_masks`
        self.pattern = None
        if pattern is not None:
            self.set_pattern(pattern)

    def set_pattern(self, pattern):
        """Set the pattern, or None for dense. Raises InputError if the input axis is not a multiple of the group."""
        pattern = Pattern.parse(pattern)
        reason = invalid_because(self.weight, pattern)
        if reason:
            raise InputError(f"pattern {pattern} does not fit weight {tuple(self.weight.shape)}: {reason}")
        self.pattern, self.mask, self._held = pattern, None, None
        self.dense_reason = None if pattern else "no pattern was set"

    def freeze_mask(self, frozen=True):
        """Keep today's mask from now on, whatever the weight does; with frozen=False select it again."""
        self.mask = self.current_mask().clone() if frozen else None
        self._held = None

    def current_mask(self):
        """bool, shape of the weight: what the layer multiplies its weight with. All true when dense."""
        if self.pattern is None:
            return torch.ones_like(self.weight, dtype=torch.bool)
        return self.selection(self.weight.dtype).mask

    def effective_weight(self):
        """The weight that multiplies x, in the dtype of the product, with the straight-through gradient attached."""
        if self.pattern is None:
            return self.weight
        masked, mask, *_ = self.selection(product_dtype(self.weight))
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return masked
        return straight_through(self.weight, masked, mask, self.rule)

    @torch.no_grad()
    def selection(self, dtype):
        """The Selection of today's weight, the masked weight in `dtype`, with bits where a kernel may want them."""
        weight, mask = self.weight.detach(), self.mask
        if self._held and self._held[0] is self.weight and not exporting():
            if self._held[1].masked.dtype == dtype:
                return self._held[1]
            mask = self._held[1].mask
        bits = isinstance(self, nn.Linear) and kernels_serve(weight)
        if mask is None:
            return select_mask(weight, self.pattern, dtype, bits=bits)
        return Selection((weight * mask).to(dtype), mask, pack_bits(mask) if bits else None)

    def __getstate__(self):
        return {**self.__dict__, "_held": None}  # a copy is another layer

    def extra_repr(self):
        pattern = f", pattern={self.pattern}" if self.pattern else ""
        return super().extra_repr() + pattern + (f", activation={self.activation}" if self.activation else "")


class Linear(Masked, nn.Linear):
    """y = act([x | skip] (w * m)^T + b) * s + r: `nn.Linear` with a pattern and a fused epilogue; same state_dict keys.

    pattern: "2:4", Pattern or None (dense). activation: None, "gelu" (erf), "gelu_tanh" or "silu".
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, pattern=None, activation=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._start_masking(pattern, activation)

    def forward(self, x, residual=None, skip=None, scale=None):
        """x (..., K); skip (..., K2) or None: a second source, K + K2 inputs in all; residual (..., N) or None.

        scale: (N,), or (B, N) with B the first of x's dimensions: the gate of each image; or None.
        """
        if skip is not None:
            x = torch.cat((x, skip), -1)
        if self.pattern is not None and kernels_serve(self.weight):
            product = x, self.weight, self.pattern, self.bias, self.activation
            y = masked_linear(*product, selection=self.selection(product_dtype(self.weight)), rule=self.rule)
            return _epilogue(y, None, residual, scale)
        return _epilogue(F.linear(x, self.effective_weight(), self.bias), self.activation, residual, scale)


class Conv2d(Masked, nn.Conv2d):
    """`nn.Conv2d` with a pattern along the input channels at each (out, kh, kw), and a fused epilogue."""

    def __init__(self, *args, pattern=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._start_masking(pattern, activation)

    def forward(self, x, residual=None):
        return _epilogue(self._conv_forward(x, self.effective_weight(), self.bias), self.activation, residual)


# ---- compressed layers -----------------------------------------------------------------------------------------------


class Compressed(nn.Module):
    """What CompressedLinear and CompressedConv2d share: the weight as rows of values and int16 metadata.

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
        self._prepacked = {}  # the same weight in the order a kernel reads it, made at the first call
        self._cast = None  # under autocast: (what the values were, the values in its dtype)

    def _operands(self, *tensors):
        """(values, *tensors) in the dtype of the product, which under autocast is not that of the values."""
        dtype = product_dtype(self.values)
        if dtype == self.values.dtype:
            return self.values, *tensors
        tensors = [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
        if torch.compiler.is_compiling():
            return self.values.to(dtype), *tensors
        version = None if self.values.is_inference() else self.values._version
        key = (self.values.data_ptr(), self.values.device, version, dtype)
        if self._cast is None or self._cast[0] != key:
            self._cast = key, self.values.to(dtype)
        return self._cast[1], *tensors

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        try:
            check_metadata(state_dict.get(f"{prefix}metadata", self.metadata))
        except InputError as error:
            raise InputError(f"{prefix[:-1]}: {error}") from None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def measured(self, rows=None):
        """What the GPU's tables say of the latest new size, or of `rows` rows (`dispatch.Measured`); None before."""
        return last_measured(self._prepacked, rows)

    @property
    def weight(self):
        """`dense_weight()`, made at every access: for code that asks a layer for its weight, or for its dtype."""
        return self.dense_weight()

    def masked(self):
        """A layer with the dense weight and the pattern 2:4, to be trained on."""
        layer = self._dense_twin(bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype)
        layer.load_state_dict({"weight": self.dense_weight()} | ({} if self.bias is None else {"bias": self.bias}))
        layer.set_pattern("2:4")
        return layer

    def __getstate__(self):
        return {**self.__dict__, "_prepacked": {}, "_cast": None}

    def extra_repr(self):
        return f"weight {self.weight_shape}, pattern=2:4 compressed, activation={self.activation}"


class CompressedLinear(Compressed):
    """y = act([x | skip] w^T + b) * s + r from values (N, K/2) and metadata (N, K/16); inference only."""

    def __init__(self, layer, rows=None):
        super().__init__(layer, layer.effective_weight().detach() if rows is None else rows)
        self.out_features, self.in_features = self.weight_shape

    def _dense_twin(self, **options):
        return Linear(self.in_features, self.out_features, activation=self.activation, **options)

    def forward(self, x, residual=None, skip=None, scale=None):
        values, bias, x, skip, scale = self._operands(self.bias, x, skip, scale)
        dtype = None if residual is None else torch.promote_types(x.dtype, residual.dtype)  # as a sum of tensors has
        rest = {"skip": skip, "scale": scale, "out_dtype": dtype, "cache": self._prepacked}
        return sparse24_linear(x, values, self.metadata, bias, self.activation, residual, **rest)

    def dense_weight(self):
        """The weight (N, K) that values and metadata stand for, bit for bit."""
        return unpack(self.values, self.metadata, self.in_features)


class CompressedConv2d(Compressed):
    """y = act(conv2d(x, w) + b) + r from values and metadata of the rows (out, kh * kw * in); inference only.

    y is in channels_last, whatever x is: the order that the kernels compute in.
    """

    def __init__(self, layer):
        super().__init__(layer, group_view(layer.effective_weight().detach()).reshape(layer.out_channels, -1))
        self.out_channels, self.in_channels, *kernel_size = self.weight_shape
        self.kernel_size, self.groups = tuple(kernel_size), 1
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def _dense_twin(self, **options):
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        sizes = self.in_channels, self.out_channels, self.kernel_size
        return Conv2d(*sizes, **geometry, activation=self.activation, **options)

    def forward(self, x, residual=None):
        values, bias, x = self._operands(self.bias, x)
        apart = residual is not None and residual.dtype != x.dtype  # under autocast: added in the wider dtype
        y = sparse24_conv2d(
            x,
            values,
            self.metadata,
            self.kernel_size,
            bias,
            self.activation,
            None if apart else residual,
            cache=self._prepacked,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        return y + residual if apart else y

    def dense_weight(self):
        """The weight (out, in, kh, kw) that values and metadata stand for, bit for bit."""
        out, cin, kh, kw = self.weight_shape
        rows = unpack(self.values, self.metadata, cin * kh * kw)
        return ungroup(rows.reshape(out * kh * kw, cin), self.weight_shape).contiguous()


Linear24, Conv2d24 = CompressedLinear, CompressedConv2d  # their names while 2:4 is the only pattern they hold
