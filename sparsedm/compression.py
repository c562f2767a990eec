"""Whole models: `compress` makes the fast form, `decompress` goes back, `bake` makes the plain dense form."""

import copy

import torch
from torch import nn

from sparsedm.compressed import Compressed, CompressedConv2d, CompressedLinear, shape_without_form
from sparsedm.copying import copied, detached
from sparsedm.decay_hook import remove_decay_hook
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import group_view, holds
from sparsedm.kernels.sparse24.format import TORCH_TENSORS, to_torch
from sparsedm.layers import Conv2d, Linear, Masked
from sparsedm.sparsity import adopt, module_of

_TORCH_SPARSE = tuple(TORCH_TENSORS.values())  # never require a gradient
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_HOOKS += ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
# what a layer of ours has and torch's has not
_OWN = ("activation", "dense_reason", "rule", "pattern", "_held", "_hooked", "_decayed", "_known", "_plain")


def compress(model: nn.Module) -> nn.Module:
    """Returns a new model whose layers store only the kept weights and their positions, in eval mode.

    A masked layer becomes a CompressedLinear or CompressedConv2d of its pattern, and so does a linear layer whose
    weight is torch's SparseSemiStructuredTensor. Some become dense layers whose pruned weights are zero: convolutions
    with groups, padding="same" or a padding_mode other than "zeros"; layers whose forward was replaced; layers whose
    frozen mask breaks the pattern; on a GPU, layers that keep more than 2 of each group, such as 3:4. `inspect` names
    the reasons. Forward hooks are copied. `model` is not changed.
    Raises: InputError if no layer is masked, a method was replaced by a function that cannot be copied, or torch's
    weight_norm, spectral_norm or prune computes the weight.
    """
    model = _network(model)
    layers = [m for m in model.modules() if (isinstance(m, Masked) and m.pattern) or _is_torch_sparse(m)]
    if not layers:
        raise InputError("the model holds no masked layer: call sparsify(model, '2:4') first")
    _refuse_computed(model, parametrized=False)
    compressed = {layer: _compress_layer(layer) for layer in layers}
    small = _with_layers(model, compressed).eval()
    for layer in small.modules():
        if isinstance(layer, Masked):
            layer.beside_compressed = True
    _note_origins(model, small, compressed)
    return small.requires_grad_(False)


def _note_origins(model, small, compressed):
    """Note in every module of `small` what its parameters were in `model`: name -> {"requires_grad": bool}, `_origins`.

    Tied parameters share one of these. What a part of `model` that was compressed before has noted stays, but a
    parameter that requires a gradient was thawed since.
    """
    parts = dict(small.named_modules(remove_duplicate=False))
    modules = model.named_modules(remove_duplicate=False)
    zeroed = {f"{name}.weight" for name, m in modules if isinstance(compressed.get(m), Masked)}  # of dense layers
    for names in parameter_names(model):
        parameter = model.get_parameter(names[0])
        requires_grad = parameter.requires_grad or isinstance(parameter, _TORCH_SPARSE)
        for tied in ([n for n in names if n in zeroed], [n for n in names if n not in zeroed]):
            places = [(path, last) for path, _, last in (name.rpartition(".") for name in tied)]
            # what is not in parts is torch's parametrization, which is now a value
            notes = [(vars(parts[path]).setdefault("_origins", {}), last) for path, last in places if path in parts]
            origin = next((note[last] for note, last in notes if last in note), {"requires_grad": requires_grad})
            origin["requires_grad"] |= parameter.requires_grad
            for note, last in notes:
                note[last] = origin


def _network(model):
    model = module_of(model)
    while isinstance(model, nn.parallel.DistributedDataParallel):  # which holds nothing without gradients
        model = model.module
    return model


def _refuse_computed(model, parametrized):
    """Raise InputError for a masked layer whose weight torch computes from others. parametrized: also the newer way."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Masked) and m.pattern}
    for name, layer in layers.items():
        if "weight" not in layer._parameters and (parametrized or not hasattr(layer, "parametrizations")):
            how = "remove_weight_norm, prune.remove or remove_parametrizations"
            raise InputError(f"the weight of {name} is computed from others: make it a parameter again ({how})")


def decompress(model: nn.Module, form: str = "masked") -> nn.Module:
    """Returns a new model in which every compressed layer is dense again, with the same values.

    Its train or eval mode is the same as in `model`. Parameters can be trained unless they were frozen when `model` was
    compressed. Tied weights are tied again. A tied layer has a frozen mask, as after a cast, if the shared weight alone
    does not give its mask.

    form: "masked": masked layers, ready for training. "cutlass" or "cusparselt": the linear layers hold torch's
    SparseSemiStructuredTensor for that library and run only on a GPU; the convolutions are dense.
    Raises: InputError if no layer is compressed, the library cannot hold a layer (for example 3:4), or weights that
    shared one tensor before `compress` now differ.
    """
    model = _network(model)
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Compressed)}
    if form not in ("masked", *TORCH_TENSORS):
        raise InputError(f"form={form!r}: one of masked, {', '.join(TORCH_TENSORS)}")
    if not layers:
        raise InputError("the model holds no compressed layer")
    dense = _with_layers(model, {layer: layer.masked() for layer in layers.values()})
    for name, layer in layers.items():
        if "forward" in vars(layer):
            raise InputError(f"{name}.forward was replaced, and the layer with a dense weight has its own")
    dense.train(model.training)
    origins = {}  # id of one: itself, and the names of its parameters
    for path, module in model.named_modules(remove_duplicate=False):
        for last, origin in vars(module).get("_origins", {}).items():
            if last in dense.get_submodule(path)._parameters:
                origins.setdefault(id(origin), (origin, []))[1].append(f"{path}.{last}" if path else last)
    for layer in dense.modules():
        for name in ("beside_compressed", "_origins"):
            vars(layer).pop(name, None)
    for _, names in origins.values():
        _tie(dense, names, layers)
    if form == "masked":
        frozen = {name for origin, names in origins.values() if not origin["requires_grad"] for name in names}
        for names in parameter_names(dense):
            parameter = dense.get_parameter(names[0])
            differentiable = parameter.is_floating_point() or parameter.is_complex()
            parameter.requires_grad_(differentiable and frozen.isdisjoint(names))
        return dense
    for layer, name in {dense.get_submodule(name): name for name in layers}.items():  # once, if it has two names
        weight = layer.masked_weight()  # a tied one has all entries
        layer.set_pattern(None)
        if isinstance(layer, Linear):
            if layers[name].pattern.keep > 2:
                raise InputError(f"{form} holds 2:4 weights, and {name} is {layers[name].pattern}")
            layer.weight = nn.Parameter(to_torch(weight, form), requires_grad=False)
        elif not torch.equal(layer.weight, weight):
            layer.weight = nn.Parameter(weight)
    return dense


def bake(model: nn.Module) -> nn.Module:
    """Returns a new, dense model of the same class whose pruned weights are zeros, for every pattern.

    Layers that `sparsify` made ours are torch's again. A compressed model is decompressed first. The result computes
    the same outputs as a masked `model` in eval mode, bit for bit; as a compressed one, up to rounding. Tied weights
    stay tied. Hooks are copied.
    Raises: InputError if no layer is masked, or a masked weight is also used without the same mask.
    """
    model = _network(model)
    if any(isinstance(m, Compressed) for m in model.modules()):
        model = decompress(model)
    _refuse_computed(model, parametrized=True)
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Masked) and m.pattern}
    if not layers and not any(m._plain or m.beside_compressed for m in model.modules() if isinstance(m, Masked)):
        raise InputError("the model holds no masked layer: call sparsify(model, '2:4') first")
    baked = {}  # id of a weight: its replacements
    for layer in dict.fromkeys(layers.values()):  # once, if it has two names
        zeros = layer.masked_weight()
        baked.setdefault(id(layer.weight), []).append(nn.Parameter(zeros, layer.weight.requires_grad))
    for names in parameter_names(model):
        weight = model.get_parameter(names[0])
        found = baked.get(id(weight), [])
        plain = [weight] if found and any(name.rpartition(".")[0] not in layers for name in names) else []
        if not all(torch.equal(found[0], other) for other in found[1:] + plain):
            raise InputError(f"{' and '.join(names)} share one weight under different masks: it cannot be baked")
    plain = copied(model, changed=[module for module in model.modules() if _becomes_plain(module)])
    for names in parameter_names(model):  # after the copy: what else refers to a weight reads the dense one
        for path, _, last in (name.rpartition(".") for name in names):
            if found := baked.get(id(model.get_parameter(names[0]))):
                setattr(plain.get_submodule(path), last, found[0])
    for module in plain.modules():
        for name in ("beside_compressed", "_origins"):
            vars(module).pop(name, None)
        if isinstance(module, Masked):
            remove_decay_hook(module.weight)
            vars(module).pop("_cast_froze", None)
        if _becomes_plain(module):
            module.__class__ = nn.Linear if isinstance(module, Linear) else nn.Conv2d
            for name in _OWN:
                delattr(module, name)
            del module._buffers["mask"]
        elif isinstance(module, Masked) and module.pattern is not None:
            module.set_pattern(None)
        vars(module).pop("fuse_projections", None)
    return plain


def _becomes_plain(module):
    """Whether a layer of a baked model is torch's own again."""
    return isinstance(module, Masked) and module._plain and "forward" not in vars(module)


def _tie(dense, names, compressed):
    """Make the parameters `names` of `dense` one tensor. Raises InputError if that changes a compressed layer."""
    names = sorted(names, key=lambda name: name.rpartition(".")[0] in compressed)  # first one that has all entries
    shared = dense.get_parameter(names[0])
    for name in names[1:]:
        path, _, last = name.rpartition(".")
        layer = dense.get_submodule(path)
        own = getattr(layer, last)
        if own is shared:
            continue
        setattr(layer, last, shared)
        masked = last == "weight" and path in compressed and own.shape == shared.shape
        if masked and not torch.equal(layer.masked_weight(), own):
            layer.mask = own != 0  # it was frozen, or the values were rounded since
            layer._cast_froze = True
        value = layer.masked_weight() if masked else shared
        if own.shape != shared.shape or not torch.equal(value, own):
            raise InputError(f"{name} was tied to {names[0]}, but their values now differ")


def parameter_names(model):
    """One list of names for each parameter; a tied parameter has several names."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _with_layers(model, replacements):
    memo = {id(old): new for old, new in replacements.items()}
    small = copied(model, memo)
    for old, new in replacements.items():
        for hooks in _HOOKS:  # a bound method among them moves along with its module
            setattr(new, hooks, copy.deepcopy(getattr(old, hooks), memo))
    return small


def _is_torch_sparse(module):
    return isinstance(module, nn.Linear) and isinstance(module.weight, _TORCH_SPARSE)


def _compress_layer(layer):
    with torch.no_grad():
        if _is_torch_sparse(layer):
            twin = layer
            if not isinstance(layer, Linear):
                twin = copy.copy(layer)
                twin._buffers = dict(layer._buffers)
                adopt(twin)
            return CompressedLinear(twin, layer.weight.to_dense())
        reason = uncompressed_because(layer)
        if not reason:
            return CompressedLinear(layer) if isinstance(layer, Linear) else CompressedConv2d(layer)
        dense = copy.deepcopy(layer, detached(layer))
        dense.weight.copy_(layer.masked_weight())
        dense.set_pattern(None)
        dense.dense_reason = reason
        return dense


def uncompressed_because(layer):
    """None if a masked layer can be compressed, else the reason as a short phrase."""
    if "forward" in vars(layer) or type(layer).forward not in (Linear.forward, Conv2d.forward):
        return "its forward is not the one that a compressed layer computes"
    if isinstance(layer, Conv2d) and (reason := shape_without_form(layer)):
        return reason
    if layer.weight.device.type not in ("cpu", "meta") and layer.pattern.keep > 2:
        return f"{layer.pattern} may keep more than 2 of every 4 weights: a GPU runs it dense"
    if layer.mask is None or layer.mask.is_meta or holds(group_view(layer.effective_weight()), layer.pattern):
        return None
    return f"its frozen mask is not {layer.pattern}"
