"""Linear and Conv2d with a mask, to train and to run anywhere. Models: `sparsity.py`. For speed: `compressed.py`.

Masked layer:      y = act(x (w * m)^T + b) * s + r; w is the dense weight that trains, m its mask.
Backward:          dL/dw = dL/d(w * m) for all entries (straight-through), plus decay * (1 - m) * w (SR-STE,
                   arXiv 2102.04010). `sparsity.set_masking` sets the decay, and factors for kept and dropped weights.

The mask depends only on the pattern and the current values of the weight. It does not matter whether the optimizer, a
checkpoint or your own code set those values. Every forward selects the mask anew; inside `sparsity.hold_masks` one mask
serves all forwards. Rounding may change which weights are the largest: `model.half()` and its like freeze the mask
first; a weight that is replaced by a rounded one (`p.data = p.data.half()`, FSDP2 in mixed precision, a cast of another
module that shares it) has its own mask.
"""

import functools
import sys
import warnings
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from sparsedm.decay_hook import DecayHook, decay_hook_of, is_computed_from
from sparsedm.errors import InputError
from sparsedm.kernels.cpu import dense, rules
from sparsedm.kernels.cpu.training import training_conv2d, training_product
from sparsedm.kernels.mask import Selection, select_mask
from sparsedm.kernels.masked_matmul import kernels_serve, masked_linear
from sparsedm.kernels.pattern import Pattern, pack_bits, ungroup, unpack_bits
from sparsedm.kernels.sparse24.linear import ACTIVATIONS
from sparsedm.kernels.straight_through import STE, check_masked, straight_through
from sparsedm.kernels.tracing import autocast_dtype, exporting, refuse_export, transformed


def _check_activation(activation):
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: one of {', '.join(map(str, ACTIVATIONS))}")
    return activation


def product_dtype(weight):
    """The dtype of a product with this weight. Autocast leaves fp64 alone, as torch's does."""
    return weight.dtype if weight.dtype == torch.float64 else autocast_dtype(weight.device) or weight.dtype


def _epilogue(y, activation, residual, scale=None):
    y = ACTIVATIONS[activation](y)
    if scale is not None:
        y = y * (scale if scale.dim() == 1 else scale.view(scale.shape[0], *[1] * (y.dim() - 2), scale.shape[1]))
    return y if residual is None else y + residual


def is_sharded(tensor):
    """Whether a tensor is a DTensor: this process holds only a part of it."""
    return hasattr(tensor, "placements")


def invalid_because(weight, pattern):
    """None if groups of `pattern` fit the input axis of `weight`, else the reason as a short phrase."""
    axis = weight.shape[1]
    if pattern is None or (axis and axis % pattern.group == 0):
        return None
    return f"the input axis {axis} is not a multiple of {pattern.group}"


FROZEN = "froze the masks: freeze_mask(False) lets them change again"
# methods of peft, and functions in it that start an adapter, which read the weight without calling its layer
PAST_MASKS = {"hra", "shira", "frod", "deft", "supertuning", "glora", "boft"}
INITS_PAST_MASKS = {"pissa_init", "olora_init", "corda_init", "loftq_init"}


class Masked:
    """What Linear and Conv2d share: the pattern, the mask, and the gradient rule.

    pattern: Pattern or None (dense). dense_reason: why the layer is dense, for `inspect`.
    rule: see `sparsity.set_masking`. mask: None, or the frozen mask, a buffer, saved with the weights.
    beside_compressed: whether it is a dense layer of a compressed model, which takes the best dense product of a CPU.
    _plain: whether it was torch's layer; `bake` makes it that again. _cast_froze: whether a cast froze the mask.
    """

    beside_compressed = _plain = _cast_froze = False

    def _start_masking(self, pattern=None, activation=None):
        self.activation = _check_activation(activation)
        self.dense_reason = "no pattern was set"
        self.rule = STE
        self.register_buffer("mask", None)
        self._held = None  # (the weight, its Selection, the block) inside `hold_masks`
        self._hooked = None  # (the weight whose hook adds the decay,)
        self._decayed = None  # (the weight whose decay a MaskedAdamW adds, a token of this optimizer)
        self._known = id(self.weight), self.weight.dtype  # when it was set, got a pattern, or its last cast ended
        self.pattern = None
        if pattern is not None:
            self.set_pattern(pattern)

    def register_parameter(self, name, param):
        """Called for every parameter that is set."""
        super().register_parameter(name, param)
        if name == "weight" and param is not None:
            self._known = id(param), param.dtype
            if "rule" in self.__dict__ and self.rule.decay:  # compiled code cannot hook it later
                self.hook_decay()

    def set_pattern(self, pattern: str | Pattern | None) -> None:
        """Set the pattern, or None for dense. Raises InputError if the input axis is not a multiple of the group."""
        pattern = Pattern.parse(pattern)
        reason = invalid_because(self.weight, pattern)
        if reason:
            raise InputError(f"pattern {pattern} does not fit weight {tuple(self.weight.shape)}: {reason}")
        self.pattern, self.mask, self._held, self._cast_froze = pattern, None, None, False
        self._known = id(self.weight), self.weight.dtype
        self.dense_reason = None if pattern else "no pattern was set"

    def __prepare_scriptable__(self):
        """Called by `torch.jit.script`."""
        refuse_export(scripted=self.pattern is not None)
        return self

    def freeze_mask(self, frozen: bool = True) -> None:
        """frozen=True: keep the current mask, even if the weight changes. frozen=False: each forward selects it anew.

        A cast to fewer bits, such as `model.half()`, first freezes the mask; so does loading a weight of more bits than
        the layer's. A weight that is replaced by a rounded one, as by `p.data = p.data.half()` or by FSDP2 in mixed
        precision, has the mask of the rounded weight.
        A frozen mask is a buffer. An average of buffers (`AveragedModel(use_buffers=True)` with an EMA function) unites
        masks that differ and keeps too many weights: copy the buffers instead (`use_buffers=False`).
        """
        with torch.inference_mode(False):  # a backward may need it
            self.mask = self.current_mask().clone() if frozen else None
        self._held, self._cast_froze = None, False

    def current_mask(self) -> torch.Tensor:
        """The mask: bool, with the weight's shape. All true if the layer is dense."""
        if self.pattern is None:
            return torch.ones_like(self.weight, dtype=torch.bool)
        if self._held and self._held[0] is self.weight:
            return self._mask_of(self._held[1])
        if self.mask is None:
            return self.selection(self.weight.dtype).mask
        check_masked(self.weight, None, self.mask)  # it may have been set by hand
        return self.mask

    def masked_weight(self) -> torch.Tensor:
        """The weight with +0.0 where it is pruned, detached. (A masked weight in a product may hold -0.0 there.)"""
        return torch.where(self.current_mask(), self.weight.detach(), 0)

    def effective_weight(self) -> torch.Tensor:
        """The weight that multiplies x: masked, in the dtype of the product; of a dense layer the parameter itself.

        The gradient of a masked weight is straight-through.
        """
        return self._weight_and_mask()[0]

    def _weight_and_mask(self):
        """`effective_weight()`, and its mask if it gets a gradient through one and is not held as bits, else None."""
        if self.pattern is None:
            return self.weight, None
        selection = self.selection(product_dtype(self.weight))
        if not (torch.is_grad_enabled() and self.weight.requires_grad) and forward_ad._current_level < 0:
            return selection.masked, None
        rule, used = self.rule_of_forward()
        mask = selection.mask if rule == STE else self._mask_of(selection)
        return straight_through(self.weight, selection.masked, mask, rule, used), mask

    def _mask_of(self, selection):
        """The mask of a Selection that may hold its bits alone."""
        if selection.mask is not None:
            return selection.mask
        return ungroup(unpack_bits(selection.bits, self.weight.shape[1]), self.weight.shape)

    def needs_mask(self):
        """Whether a backward reads the mask itself, and not only the masked weight."""
        return self.rule._replace(decay=0.0 if self._is_decayed() else self.rule.decay) != STE

    def _is_decayed(self):
        """Whether a MaskedAdamW adds the decay of the current weight."""
        return self._decayed is not None and (self._decayed[0] is self.weight or getattr(self, "_is_replica", False))

    def rule_of_forward(self):
        """(rule, used). The gradient rule: its decay is 0 if a hook on the weight adds the decay.

        The hook runs once per backward, even if the layer is called several times. used: None, or a function that the
        backward of this forward calls. A lent weight which is computed from the layer's own adds the decay in its
        place; in compiled graphs, under torch.func and in a reentrant `checkpoint` both may add it.
        """
        if not (self.rule.decay and torch.is_grad_enabled() and self.weight.requires_grad):
            return self.rule, None
        if self._is_decayed():
            return self.rule._replace(decay=0.0), None
        own = (self._decayed or self._hooked or (None,))[0]
        stands_in = own is not None and "weight" in self._parameters and is_computed_from(self.weight, own)
        if stands_in and self._decayed:
            return self.rule._replace(decay=0.0), None
        hook = None if transformed() else self.hook_decay()
        used = hook and functools.partial(hook.note, self, self.weight)
        hooked = hook or (self._hooked and (self._hooked[0] is self.weight or getattr(self, "_is_replica", False)))
        if stands_in and not hooked and (decay := decay_hook_of(own)):
            used = decay.leave
        return (self.rule._replace(decay=0.0) if hooked else self.rule), used

    def hook_decay(self):
        """The hook on the weight that adds the decay, made if need be; None if the weight is computed from others."""
        weight = self.weight
        if not (weight.requires_grad and weight.is_leaf):
            return None
        hook = DecayHook.on(weight)
        hook.take(self)
        if self._known[0] == id(weight):  # else `functional_call` lends it: a compiled graph adds its decay itself
            self._hooked = (weight,)
        return hook

    def selection(self, dtype, name="weight"):
        """The Selection of the current weight: mask, masked weight in `dtype`, and bits if a kernel may read them.

        name: what errors call the layer.
        """
        refuse_export()
        if self._held and self._held[0] is self.weight and self._held[1].masked.dtype == dtype and not exporting():
            return self._held[1]
        return self._select(dtype, name)

    @torch.no_grad()
    def _select(self, dtype, name):
        weight, mask = self.weight.detach(), self.mask
        if type(weight) is not torch.Tensor and is_sharded(weight):
            raise InputError(f"a sharded weight {tuple(weight.shape)} has no mask here: gather it first")
        if self._held and self._held[0] is self.weight and not exporting():
            mask = self._mask_of(self._held[1])
        check_masked(weight, None, mask)
        bits = isinstance(self, nn.Linear) and kernels_serve(weight)
        if mask is None:
            return select_mask(weight, self.pattern, dtype, name, bits=bits)
        return Selection(torch.where(mask, weight, 0).to(dtype), mask, pack_bits(mask) if bits else None)

    def _apply(self, fn, recurse=True):
        """Every cast and move of every parent comes here."""
        if self.pattern is not None and self.mask is None and not self.weight.is_meta:
            before, after = self.weight.dtype, fn(self.weight.detach().new_empty(0)).dtype
            if self._was_cast_to(before, fn):
                self._take_mask()
            elif _narrows(before, after):
                self.freeze_mask()
                _frozen_by_cast[id(self.weight)] = self
            self._cast_froze = self.mask is not None
            if self.mask is not None and self.training:
                warnings.warn(f"the cast to {after} {FROZEN} (or sparsify after the cast)", stacklevel=3)
        super()._apply(fn, recurse)
        self._held, self._known = None, (id(self.weight), self.weight.dtype)
        if self.rule.decay:  # a new weight, or one whose hooks were swapped away
            self.hook_decay()
        if self.mask is not None:
            self.mask = self.mask.bool()  # `module.type(dtype)` also casts masks
        return self

    def _was_cast_to(self, dtype, fn):
        """Whether `fn`, the cast in progress, may have brought this very weight to fewer bits already."""
        weight, known = self._known
        if weight != id(self.weight) or not _narrows(known, dtype):
            return False
        return fn(self.weight.detach().new_empty(0, dtype=known)).dtype == dtype  # else its .data was replaced before

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self._cast_froze and f"{prefix}weight" in state_dict:  # that mask was of the weight which is replaced
            self.mask = self.mask if f"{prefix}mask" in state_dict else None
            self._cast_froze = False
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.rule.decay:
            self.hook_decay()
        given, weight = state_dict.get(f"{prefix}weight"), self.weight
        moves = self.pattern is not None and self.mask is None and isinstance(given, torch.Tensor)
        if not moves or weight.is_meta or given.is_meta or is_sharded(given) or given.shape != weight.shape:
            return
        rounded = given.is_floating_point() and _narrows(given.dtype, weight.dtype)  # a cast, but of the loaded weight
        if rounded and not given.isnan().any():
            self.mask = select_mask(given.detach(), self.pattern, name=f"{prefix}weight").mask.to(weight.device)
            self._held, self._cast_froze = None, True
            if self.training:
                warnings.warn(f"loading {given.dtype} into {weight.dtype} {FROZEN}", stacklevel=5)

    def train(self, mode: bool = True):
        """As every module's. Warns where a cast has frozen the mask that is to train."""
        if mode and not self.training and self._cast_froze and self.mask is not None:
            warnings.warn(f"a cast in eval mode {FROZEN}", stacklevel=2)
        return super().train(mode)

    def _take_mask(self):
        """Take the mask of the layer whose part of a cast has reached the shared weight first."""
        other = _frozen_by_cast.get(id(self.weight))
        if other is None or other.weight is not self.weight or other.pattern != self.pattern or other.mask is None:
            text = "another module that shares a weight cast it first, or its .data was: the unrounded mask is lost"
            mend = f"call set_masking(model, frozen=True) before; if it is {self.weight.dtype} already, name no dtype"
            raise InputError(f"{text}; {mend} ({self})")
        self.mask = other.mask.clone()

    def __getstate__(self):
        return {**super().__getstate__(), "_held": None, "_hooked": None, "_decayed": None}  # a copy is another layer

    def __setstate__(self, state):
        super().__setstate__(state)
        self._known = id(self.weight), self.weight.dtype
        if self.rule.decay:
            self.hook_decay()

    @property
    def W_q(self):
        """peft calls `dequantize` to read the weight of a layer that has this attribute."""
        return self.weight

    def dequantize(self):
        """The weight for peft's DoRA and the like, which do not call the layer. Raises InputError if it is masked."""
        if self.pattern is None:
            return self.weight
        raise InputError("this method (DoRA, PiSSA ...) reads a layer's weight past its mask: use plain LoRA instead")

    @property
    def base_layer(self):
        """peft looks for this attribute before it reads a layer's weight. Raises AttributeError, as of every layer.

        Raises InputError if the layer is masked and the method multiplies by the weight itself, or starts from it.
        """
        asks = sys._getframe().f_back  # None if C asks
        if self.pattern is not None and asks and asks.f_back and asks.f_code.co_name == "get_base_layer":
            tuner, init = asks.f_locals["self"], asks.f_back.f_code.co_name
            method = type(tuner).__module__.split(".")
            past = PAST_MASKS & set(method) or init in INITS_PAST_MASKS or getattr(tuner, "miss_fn", None) == "bat"
            if method[0] == "peft" and past:
                self.dequantize()
        raise AttributeError(f"{type(self).__name__} has no attribute base_layer")

    def extra_repr(self):
        pattern = f", pattern={self.pattern}" if self.pattern else ""
        return super().extra_repr() + pattern + (f", activation={self.activation}" if self.activation else "")


_frozen_by_cast = weakref.WeakValueDictionary()  # id of a weight: the layer that froze its mask before a cast


def _narrows(before, after):
    return after != before and after.itemsize <= before.itemsize


class Linear(Masked, nn.Linear):
    """y = act([x | skip] (w * m)^T + b) * s + r: `nn.Linear` with a pattern and a fused epilogue; same state_dict keys.

    pattern: "2:4", Pattern or None (dense). activation: None, "gelu" (erf), "gelu_tanh" or "silu".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: str | Pattern | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._start_masking(pattern, activation)

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input: x (..., K). skip (..., K2) or None: more inputs, K + K2 in all. residual (..., N) or None.

        scale: None, (N,), or (B, N) with B the first dimension of x: the gate of each image.
        """
        x = input if skip is None else torch.cat((input, skip), -1)
        if self.pattern is not None and kernels_serve(self.weight):
            product = x, self.weight, self.pattern, self.bias, self.activation
            selection = self.selection(product_dtype(self.weight))
            rule, used = self.rule_of_forward()
            if rule != STE:
                selection = selection._replace(mask=self._mask_of(selection))
            y = masked_linear(*product, selection=selection, rule=rule, used=used)
            return _epilogue(y, None, residual, scale)
        y = self._trained(x) if self.training and torch.is_grad_enabled() else None
        if y is None:
            product = dense.linear if self.beside_compressed else F.linear
            y = product(x, self._weight_and_mask()[0], self.bias)
        return _epilogue(y, self.activation, residual, scale)

    def _trained(self, x):
        """The product by the C kernel, in training; None where it does not serve. Not in eval mode: there the bits are
        those of the baked network."""
        weight, pattern = self.weight, self.pattern
        if pattern is None or not weight.requires_grad or not rules.training_serves(x, weight, self.bias, pattern):
            return None
        rule, used = self.rule_of_forward()
        return training_product(x, weight, self.selection(weight.dtype), pattern, self.bias, rule, used)


class Conv2d(Masked, nn.Conv2d):
    """y = act(conv2d(x, w * m) + b) + r: `nn.Conv2d` with a pattern along the input channels at each (out, kh, kw)."""

    def __init__(self, *args, pattern: str | Pattern | None = None, activation: str | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._start_masking(pattern, activation)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight, mask = self._weight_and_mask()
        if mask is not None and self.training and self.groups == 1 and self.padding_mode == "zeros":
            geometry = self.stride, self.padding, self.dilation
            y = training_conv2d(input, weight, mask, self.pattern, self.bias, *geometry)
        else:
            y = self._conv_forward(input, weight, self.bias)
        return _epilogue(y, self.activation, residual)
