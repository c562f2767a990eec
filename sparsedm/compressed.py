"""The compressed form of a masked layer: values and positions, for fast inference. Models: `compression.py`."""

import contextlib
import functools
import math

import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels.checksum import checksums, stamp
from sparsedm.kernels.cpu.calls import repeated
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.masked_matmul import kernels_serve
from sparsedm.kernels.pattern import group_view, ungroup
from sparsedm.kernels.sparse24.conv import sparse24_conv2d
from sparsedm.kernels.sparse24.dispatch import Measured, last_measured
from sparsedm.kernels.sparse24.format import TWO_FOUR, check_metadata, pack, unpack
from sparsedm.kernels.sparse24.linear import sparse24_linear
from sparsedm.kernels.tracing import refuse_export
from sparsedm.layers import Conv2d, Linear, product_dtype


class Compressed(nn.Module):
    """What CompressedLinear and CompressedConv2d share: the weight as rows of values and their positions.

    For 2:4 the positions are the buffer `metadata` of int16 words, else the buffer `bits` of int32 words; see
    `sparse24.format`. Both buffers are uint8, because collectives such as a broadcast do not take int16.
    weight_shape: the shape of the dense weight. `values` has one row per output; for a convolution a row holds
    kh * kw * in weights before compression.
    A kernel's form of the weight is kept. On a CPU every call compares a checksum of values and positions, so that any
    write to them counts, whoever makes it. Inside `sparsity.hold_masks` it is compared at the end only: for a few rows
    it takes as long as the product. On a GPU the checksum would cost a launch: there a call sees what
    `load_state_dict`, an operation in place or another tensor changes. It does not see what is written into the same
    memory through `.data` or by a collective. A compiled graph there takes the form that the latest eager call left,
    so call the layer once after a write.
    """

    def __init__(self, layer, values, words, pattern):
        """layer: the layer to replace. values, words: its weight, packed."""
        super().__init__()
        self.weight_shape, self.activation = tuple(layer.weight.shape), layer.activation
        self.pattern, self._positions = pattern, "metadata" if pattern == TWO_FOUR else "bits"
        self.rule = layer.rule  # of the masked layer that it was, and may be again
        self._plain = layer._plain
        self.register_buffer("values", values)
        self.register_buffer(self._positions, words.view(torch.uint8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self._prepacked = {}  # the weight in the order a kernel reads, made at the first call; and `dispatch`'s choices
        self._cast = None  # under autocast: (what identifies the values, the values in autocast's dtype)

    def _operands(self, *tensors):
        """(values, *tensors) in the dtype of the product: under autocast that is autocast's dtype, except for fp64."""
        refuse_export()
        dtype = product_dtype(self.values)
        if dtype == self.values.dtype:
            return self.values, *tensors
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        if torch.compiler.is_compiling():
            return self.values.to(dtype), *tensors
        key = [dtype, stamp(self.values, held=self._prepacked.get("held"))]
        if self._cast is None or self._cast[0] != key:
            self._cast = key, self.values.to(dtype), self.values.detach()  # held: nothing else gets its address
        return self._cast[1], *tensors

    def _repeated(self, options, x, *others):
        """y if a call on a CPU like this one was answered before, else None."""
        buffers = self._buffers  # without a weight or bias that is a parameter, or computed
        if torch.compiler.is_compiling() or buffers.get("values") is None or "bias" not in buffers:
            return None
        known = self._prepacked, buffers["values"], self.words(), (*options, str(self.pattern))
        return repeated(*known, x, buffers["bias"], *others)

    @contextlib.contextmanager
    def held(self, name):
        """A context whose calls on a CPU take the weight for unchanged. Raises: InputError at its end if that is wrong.

        name: what errors call the layer.
        """
        if not self.values.is_cpu or "held" in self._prepacked:
            yield
            return
        self._prepacked["held"] = before = checksums(self.values, self.words())
        try:
            yield
        finally:
            self._prepacked.pop("held", None)
        if not self.values.is_cpu or checksums(self.values, self.words()) != before:
            raise InputError(f"the compressed weight of {name} was changed while it was held: change it outside")

    def words(self, stored=None):
        """The positions as words: int16 metadata for 2:4, else int32 bits. stored: a buffer; default: the layer's."""
        stored = getattr(self, self._positions) if stored is None else stored
        return stored.view(torch.int16 if self.pattern == TWO_FOUR else torch.int32)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        name = f"{prefix}{self._positions}"
        if name in state_dict:
            stored = state_dict[name]
            if stored.dtype in (torch.int16, torch.int32) and stored.dim():  # as older files hold them
                stored = stored.view(torch.uint8)
            state_dict = {**state_dict, name: stored}
            if (stored.shape, stored.dtype) == (
                getattr(self, self._positions).shape,
                torch.uint8,
            ):  # else torch raises its own error
                try:
                    check_metadata(self.words(stored), self.pattern, math.prod(self.weight_shape[1:]))
                except InputError as error:
                    raise InputError(f"{prefix[:-1]}: {error}") from None
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._forget()  # tensors made in inference mode have no version that would tell

    def _forget(self):
        self._cast, self._prepacked = None, {k: v for k, v in self._prepacked.items() if k == "choices"}

    def _apply(self, fn, recurse=True):
        """Every cast and move of every parent comes here."""
        values, positions = self.values, getattr(self, self._positions)
        super()._apply(fn, recurse)
        moved = getattr(self, self._positions)
        if moved.dtype != positions.dtype:  # `module.type(dtype)` casts all tensors
            moved = positions.to(moved.device)
            setattr(self, self._positions, moved)
        if self.values is not values or moved is not positions:  # else a CUDA graph may go on reading it
            self._forget()
        return self

    def _check_width(self, width, name):
        expected = self.weight_shape[1]
        if width != expected:
            raise InputError(f"x has {width} {name}, and the layer's weight {self.weight_shape} takes {expected}")

    def measured(self, rows: int | None = None) -> Measured | None:
        """Timings (`dispatch.Measured`) for inputs of `rows` rows, None if there are none.

        rows: by default the size that this layer met for the first time most recently.
        """
        return last_measured(self._prepacked, rows)

    def backend_used(self) -> str | None:
        """The back end of the latest call of a new size on a CPU, of the latest call on a GPU; None before.

        Compiled graphs do not count.
        """
        return self._prepacked.get("latest")

    def __prepare_scriptable__(self):
        refuse_export(scripted=True)

    @property
    def weight(self) -> torch.Tensor:
        """`dense_weight()`, computed at every access, for code that reads it. Writes into it are lost."""
        return self.dense_weight()

    def register_parameter(self, name, param):
        if name == "weight":
            raise InputError("a compressed weight is not assigned: decompress(model), change it, compress again")
        super().register_parameter(name, param)

    def masked(self) -> Linear | Conv2d:
        """The masked layer of the same weight and pattern, for further training."""
        layer = self._dense_twin(bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype)
        layer.load_state_dict({"weight": self.dense_weight()} | ({} if self.bias is None else {"bias": self.bias}))
        layer.set_pattern(self.pattern)
        layer.rule, layer._plain = self.rule, self._plain
        return layer

    def __getstate__(self):
        return {**super().__getstate__(), "_prepacked": {}, "_cast": None}

    def extra_repr(self):
        return f"weight {self.weight_shape}, pattern={self.pattern} compressed, activation={self.activation}"


def _packed(rows, pattern):
    """`pack`; on the meta device, tensors of the same shapes."""
    if not rows.is_meta:
        return pack(rows, pattern)
    N, K = rows.shape
    if pattern == TWO_FOUR:
        words = -(-K // 16)
        return rows.new_empty(N, 8 * words), rows.new_empty(N, words, dtype=torch.int16)
    values = rows.new_empty(N, K * pattern.keep // pattern.group)
    return values, rows.new_empty(N, -(-K // 32), dtype=torch.int32)


def _check_layer(layer, kind):
    if not isinstance(layer, kind):
        ours = f"sparsedm.{kind.__name__}"
        raise InputError(f"a {type(layer).__module__}.{type(layer).__name__} is no {ours}: sparsify makes it one")


def shape_without_form(layer):
    """None, or why this kind of convolution has no compressed form, as a short phrase."""
    if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return "a convolution with groups, or with padding that is not a number of zeros, has no compressed form"
    return None


class CompressedLinear(Compressed):
    """y = act([x | skip] w^T + b) * s + r from values (N, K * density) and their positions; inference only.

    At 2:4, K is first padded to a multiple of 16.
    """

    def __init__(self, layer: Linear, rows: torch.Tensor | None = None) -> None:
        """layer: the layer to replace. rows (out, in): the weight to pack; default: the layer's.

        Raises InputError if that weight does not fit the layer's pattern (2:4 if the layer has no pattern).
        """
        _check_layer(layer, Linear)
        pattern = layer.pattern or TWO_FOUR
        if rows is None and layer.pattern == TWO_FOUR and layer.mask is None and kernels_serve(layer.weight):
            _, _, _, values, metadata = select_mask(layer.weight, layer.pattern, mask=False, compressed=True)
        else:
            values, metadata = _packed(layer.masked_weight() if rows is None else rows, pattern)
        super().__init__(layer, values, metadata, pattern)
        self.out_features, self.in_features = self.weight_shape

    def _dense_twin(self, **options):
        return Linear(self.in_features, self.out_features, activation=self.activation, **options)

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (y := self._repeated((self.activation,), input, residual, skip, scale)) is not None:
            return y
        width = (input.shape[-1] if input.dim() else 0) + (0 if skip is None else skip.shape[-1])
        self._check_width(width, "features")
        values, bias, x, skip = self._operands(self.bias, input, skip)
        added = [t.dtype for t in (scale, residual) if t is not None]
        dtype = functools.reduce(torch.promote_types, added, x.dtype)  # as torch's product and sum
        rest = {
            "skip": skip,
            "scale": scale if scale is None else scale.to(x.dtype),
            "out_dtype": dtype,
            "cache": self._prepacked,
            "pattern": str(self.pattern),
        }
        return sparse24_linear(x, values, self.words(), bias, self.activation, residual, **rest)

    def dense_weight(self) -> torch.Tensor:
        """The masked weight (N, K), bit for bit."""
        return unpack(self.values, self.words(), self.in_features, self.pattern)


class CompressedConv2d(Compressed):
    """y = act(conv2d(x, w) + b) + r from values and positions of the rows (out, kh * kw * in); inference only.

    x: images (B, C, H, W), or one image (C, H, W). y is in channels_last, the order that the kernels write; exceptions:
    see `sparse24_conv2d`.
    """

    def __init__(self, layer: Conv2d) -> None:
        """layer: the layer to replace. Raises InputError if it has no compressed form."""
        _check_layer(layer, Conv2d)
        if reason := shape_without_form(layer):
            raise InputError(f"{layer}: {reason}")
        rows = group_view(layer.masked_weight()).reshape(layer.out_channels, -1)
        pattern = layer.pattern or TWO_FOUR
        super().__init__(layer, *_packed(rows, pattern), pattern)
        self.out_channels, self.in_channels, *kernel_size = self.weight_shape
        self.kernel_size, self.groups = tuple(kernel_size), 1
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def _dense_twin(self, **options):
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        sizes = self.in_channels, self.out_channels, self.kernel_size
        return Conv2d(*sizes, **geometry, activation=self.activation, **options)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        options = self.activation, self.kernel_size, self.stride, self.padding, self.dilation
        if (y := self._repeated(options, input, residual)) is not None:
            return y
        self._check_width(input.shape[-3] if input.dim() > 2 else 0, "channels")
        if input.dim() == 3:  # one image, as in torch
            batch = input[None], None if residual is None else residual[None]
            return CompressedConv2d.forward(self, *batch)[0]
        values, bias, x = self._operands(self.bias, input)
        apart = residual is not None and residual.dtype != x.dtype  # under autocast: added in the wider dtype
        y = sparse24_conv2d(
            x,
            values,
            self.words(),
            self.kernel_size,
            bias,
            self.activation,
            None if apart else residual,
            cache=self._prepacked,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            pattern=str(self.pattern),
        )
        return y + residual if apart else y

    def dense_weight(self) -> torch.Tensor:
        """The masked weight (out, in, kh, kw), bit for bit."""
        out, cin, kh, kw = self.weight_shape
        rows = unpack(self.values, self.words(), cin * kh * kw, self.pattern)
        return ungroup(rows.reshape(out * kh * kw, cin), self.weight_shape).contiguous()


Linear24, Conv2d24 = CompressedLinear, CompressedConv2d  # names from when 2:4 was the only pattern
