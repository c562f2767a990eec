"""Linear24 and Conv2d24: layers that hold a 2:4 weight as values + metadata and multiply by it; inference only.

`sparsity.compress` puts them in the places of masked layers, `sparsity.decompress` takes them out again.
"""

import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import group_view, ungroup
from sparsedm.kernels.sparse24.conv import sparse24_conv2d
from sparsedm.kernels.sparse24.dispatch import last_choice
from sparsedm.kernels.sparse24.format import check_metadata, pack, unpack
from sparsedm.kernels.sparse24.linear import sparse24_linear
from sparsedm.layers import Conv2d, Linear, product_dtype


class Compressed(nn.Module):
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

    def measured_backend(self, rows=None):
        """The back end the GPU's tables gave the latest new size, or to `rows` rows; None before a call there."""
        choice = last_choice(self._arranged.get("choices", {}), rows)
        return choice and choice.backend

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
        return {**self.__dict__, "_arranged": {}, "_cast": None}

    def extra_repr(self):
        return f"weight {self.weight_shape}, pattern=2:4 compressed, activation={self.activation}"


class Linear24(Compressed):
    """y = act([x | skip] w^T + b) * s + r from values (N, K/2) and metadata (N, K/16); inference only."""

    def __init__(self, layer, rows=None):
        super().__init__(layer, layer.effective_weight().detach() if rows is None else rows)
        self.out_features, self.in_features = self.weight_shape

    def _dense_twin(self, **options):
        return Linear(self.in_features, self.out_features, activation=self.activation, **options)

    def forward(self, x, residual=None, skip=None, scale=None):
        values, bias, x, skip, scale = self._operands(self.bias, x, skip, scale)
        dtype = None if residual is None else torch.promote_types(x.dtype, residual.dtype)  # as a sum of tensors has
        rest = {"skip": skip, "scale": scale, "out_dtype": dtype, "arranged": self._arranged}
        return sparse24_linear(x, values, self.metadata, bias, self.activation, residual, **rest)

    def dense_weight(self):
        """The weight (N, K) that values and metadata stand for, bit for bit."""
        return unpack(self.values, self.metadata, self.in_features)


class Conv2d24(Compressed):
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
            arranged=self._arranged,
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
