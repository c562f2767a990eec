"""Whole models: `sparsify` gives layers a pattern, `compress` makes the fast form, `decompress` goes back."""

import contextlib
import copy
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import nn

from sparsedm.compressed import Compressed, CompressedConv2d, CompressedLinear
from sparsedm.copying import copied
from sparsedm.errors import InputError
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.masked_matmul import GradientRule
from sparsedm.kernels.pattern import Pattern, group_view, holds
from sparsedm.kernels.sparse24.format import TORCH_TENSORS, to_torch
from sparsedm.layers import PAST_MASKS, Conv2d, Linear, Masked, invalid_because, is_sharded, product_dtype
from sparsedm.optim import MaskedAdamW, check, choose

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_HOOKS += ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
# what a layer of ours has and torch's has not
_OWN = ("activation", "dense_reason", "rule", "pattern", "_held", "_hooked", "_decayed", "_known", "_plain")

# ---- which layers ----------------------------------------------------------------------------------------------------

_TRANSFORMER = (
    r"blocks\.\d+\.(attn\d?\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj)"
    r"|ff(_context)?\.net\.(0\.proj|2)|proj_(mlp|out))$"
)
_SMALL = "an embedding, a modulation or an end layer: few MACs, and every token depends on it"
FAMILIES = {  # class of the model: (the layers that are sparse by default, why the others stay dense)
    "UNet2DModel": (r"^(?!conv_in$)", "the first convolution, of few channels"),  # the same layers as in our DDPM
    "UNet2DConditionModel": (r"(down|mid|up)_blocks?\.(?!.*time_emb_proj$)", _SMALL),
    "DiTTransformer2DModel": (_TRANSFORMER, _SMALL),
    "PixArtTransformer2DModel": (_TRANSFORMER, _SMALL),
    "SD3Transformer2DModel": (_TRANSFORMER, _SMALL),
    "FluxTransformer2DModel": (_TRANSFORMER, _SMALL),
    "VisionTransformer": (r"\.(attn\.(qkv|proj)|mlp\.(fc[12]|[03]))$", _SMALL),  # timm's and torchvision's
}


def _selection(model, where):
    """Returns two functions: (name, module) -> is it selected; name -> why an unselected layer stays dense."""
    if where is not None:
        return _selector(model, where), lambda name: "not selected"
    known = {}  # prefix of its names -> (selector, reason): the model itself, or models in a wrapper such as DDP, PEFT
    for name, module in model.named_modules():
        where, reason = _known_layers(module)
        if where and not any(name.startswith(prefix) for prefix in known):
            known[f"{name}." if name else ""] = _selector(module, where), reason
    if not known:
        return _selector(model, "all"), lambda name: "not selected"

    def inside(name):
        return next((prefix for prefix in known if name.startswith(prefix)), None)

    def selected(name, module):
        prefix = inside(name)
        return prefix is not None and known[prefix][0](name.removeprefix(prefix), module)

    def reason(name):
        prefix = inside(name)
        return "outside the model that this package knows: name it in where=" if prefix is None else known[prefix][1]

    return selected, reason


def _known_layers(module):
    """(where, why the others stay dense) for one of our models or of FAMILIES, (None, None) for any other."""
    if getattr(module, "sparse_layers", None):
        return module.sparse_layers, "not selected"
    for kind in type(module).__mro__:
        where, reason = FAMILIES.get(kind.__name__, (None, None))
        if where and any(re.search(where, name) for name, _ in module.named_modules()):  # not just a class of that name
            return where, reason
    return None, None


def _selector(model, where):
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
    try:
        names = list(where)
    except TypeError:
        raise InputError(f"where={where!r}: an expression, a list of names, or a predicate (name, module)") from None
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear | nn.Conv2d)}
    unknown = [str(name) for name in names if name not in layers]
    if unknown:
        raise InputError(f"where names layers the model does not have: {', '.join(unknown)}")
    chosen = {layers[name] for name in names}
    return lambda name, module: module in chosen


def _dense_reason(name, module, parent, pattern):
    """None if `module` can take `pattern`, else why it stays dense."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors (parametrize, weight_norm and the like)"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if getattr(parent, "lora_magnitude_vector", None):
        return "DoRA reads its weight without calling it"
    if type(parent).__module__.startswith("peft.") and PAST_MASKS & set(type(parent).__module__.split(".")):
        return f"peft's {type(parent).__name__} reads its weight without calling it"
    if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention):
        return f"{type(parent).__name__} reads its weight without calling it"
    if not isinstance(module, Masked) and type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} is a special kind of {type(module).__mro__[1].__name__}"
    if "lora_" in name:
        return "a LoRA factor: merge it into its layer first"
    if "forward" in vars(module):
        return "its forward was replaced (by a hook of accelerate or diffusers): sparsify before that"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if pattern is None:
        return "no pattern was set"
    return invalid_because(module.weight, pattern)


# ---- masked models ---------------------------------------------------------------------------------------------------


def sparsify(
    model: nn.Module,
    pattern: str | Pattern | None,
    where: str | Collection[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    calibrate: Iterable | None = None,
) -> nn.Module:
    """Give the layers of `model` a pattern, in place, and return the model.

    Plain `nn.Linear` and `nn.Conv2d` modules of any model become ours; the model itself may be one. Parameters, hooks
    and optimizer state stay as they are. Layers that are not selected, or cannot hold the pattern, become dense. A
    pattern from an earlier call is removed. `inspect` gives the reason.

    pattern: "2:4", Pattern, or None / "dense" to remove patterns.
    where: None (the model's own `sparse_layers` if it has one, else the row of FAMILIES for its class, else all),
        "all", a regular expression to search for in the dotted names, a list of names, or a predicate
        (name, module) -> bool.
    calibrate: batches of inputs to run the model with, each a tensor, a tuple of arguments or a dict of keyword
        arguments. The masks then keep the largest |w| * ||x|| (Wanda, arXiv 2306.11695), where x is every input of the
        weight, and are frozen. `set_masking(frozen=False)` selects by magnitude again. A noise predictor needs noisy
        images of all levels: (diffuse(x0, t, noise, schedule), schedule.model_time(t)) for t from
        schedule.training_time(u), see `diffusion`.
    Raises: InputError if nothing is selected or no selected layer can hold the pattern, or if `calibrate` is empty,
    does not reach a layer, or gives NaN.
    """
    model, pattern = module_of(model), Pattern.parse(pattern)
    selected, unselected = _selection(model, where)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    parents = {child: parent for parent in model.modules() for child in parent._modules.values()}
    reasons = {n: _dense_reason(n, m, parents.get(m), pattern) if selected(n, m) else unselected(n) for n, m in found}
    chosen = [n for n, m in found if selected(n, m)]
    if not chosen:
        if any(isinstance(m, Compressed) for m in model.modules()):
            raise InputError("the model is compressed and has no weights to mask: decompress(model) gives them back")
        raise InputError(f"where={where!r} selects none of the {len(found)} linear and convolution layers")
    if calibrate is not None and pattern is None:
        raise InputError("calibrate chooses masks, and without a pattern there are none")
    if pattern and all(reasons.values()):
        raise InputError(f"no selected layer can hold {pattern}: {reasons[chosen[0]]}")
    norms = {} if calibrate is None else _input_norms(model, {m: n for n, m in found if not reasons[n]}, calibrate)
    for name, module in found:
        if not reasons[name] and not isinstance(module, Masked):
            _adopt(module)
        if isinstance(module, Masked):
            module.set_pattern(None if reasons[name] else pattern)
        if reasons[name]:
            module.dense_reason = reasons[name]
        elif calibrate is not None:
            module.mask = select_mask(module.weight.detach() * norms[module], pattern).mask
    for module in model.modules():
        if hasattr(type(module), "fuse_projections"):  # diffusers: copies the weights of q, k and v into a plain layer
            vars(module).pop("fuse_projections", None)
            if masked_layers(module):
                module.fuse_projections = _refuse_to_fuse
    return model


@torch.no_grad()
def _input_norms(model, layers, batches):
    """{layer: the norm of each input channel over all `batches`, in the shape of the weight or one that expands to it}.

    layers: {layer: its name}. The model runs in eval mode, as it is before `sparsify` changes it.
    """
    if isinstance(batches, torch.Tensor | dict):
        raise InputError(f"calibrate is a {type(batches).__name__}: a list of batches is needed")
    sums = {}

    def add(layer, arguments, options):
        x = arguments[0] if arguments else options["input"]
        skip = options.get("skip", arguments[2] if len(arguments) > 2 else None)
        x = x if skip is None else torch.cat((x, skip), -1)
        if not x.numel():
            raise InputError(f"calibrate holds an empty batch: the input of {layers[layer]} is {tuple(x.shape)}")
        x = x if isinstance(layer, nn.Linear) else x.movedim(-3, -1)
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().reshape(-1, x.shape[-1]).sum(0)
        sums[layer] = squares + sums.get(layer, 0)

    was = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        for batch in batches:
            arguments = batch if isinstance(batch, list | tuple) else () if isinstance(batch, dict) else (batch,)
            model(*arguments, **(batch if isinstance(batch, dict) else {}))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was.items():
            module.training = training
    for layer, name in layers.items():
        if layer not in sums:
            raise InputError(f"no batch of calibrate reaches {name}: give inputs that use it, or leave it out by where")
        if not sums[layer].isfinite().all():
            raise InputError(f"the inputs of {name} in calibrate hold NaN or infinity")
    return {layer: _as_weight(layer, squares.sqrt()) for layer, squares in sums.items()}


def _as_weight(layer, norms):
    """One number for each input channel of a layer, in a shape that expands to its weight."""
    # among inputs that were always 0 the magnitudes decide
    norms = torch.where(norms.max() > 0, norms.clamp(min=1e-6 * norms.max()), 1)
    if isinstance(layer, nn.Linear):
        return norms
    groups = norms.view(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
    return groups.flatten(0, 1)[:, :, None, None]


def _adopt(module):
    """Make a plain layer ours, in place, so that every reference to it sees our layer."""
    module.__class__ = Linear if type(module) is nn.Linear else Conv2d
    module._start_masking()
    module._plain = True
    return module


def _refuse_to_fuse(*arguments, **options):
    raise InputError("fuse_qkv_projections() would drop the masks of to_q, to_k and to_v: fuse before sparsify")


def masked_layers(model):
    """[(name, layer)] of the layers that have a pattern."""
    return [(n, m) for n, m in module_of(model).named_modules() if isinstance(m, Masked) and m.pattern is not None]


def module_of(model):
    """`model`, or the module behind a function: torch.compile makes one of a compiled module. Raises InputError."""
    found = model if isinstance(model, nn.Module) else inspect.unwrap(model)
    found = getattr(found, "__self__", found)
    if not isinstance(found, nn.Module):
        raise InputError(f"a {type(model).__name__} is no model: an nn.Module is needed")
    return found


def set_masking(
    model: nn.Module, *, decay: float = 0.0, kept: float = 1.0, dropped: float = 1.0, frozen: bool = False
) -> None:
    """Gradient settings of every layer that has a pattern.

    dL/dw = (kept * m + dropped * (1 - m)) * dL/d(w * m) + decay * (1 - m) * w. decay=2e-4 is SR-STE, dropped=0 with
    frozen=True is ASP. frozen=True keeps the current masks from now on; they are then saved with the weights.

    Each backward adds decay * (1 - m) * w to the weight's gradient exactly once; a reentrant `checkpoint` is a backward
    of its own. The term is not scaled by the loss. To accumulate gradients over n parts of a batch, divide the
    gradients by n, not the losses. Under a GradScaler multiply the decay by its scale. A `MaskedAdamW` adds the decay
    at its step instead, which needs no such correction. `save_model` keeps the settings. Raises: InputError if no layer
    has a pattern: call `sparsify` first; for a negative or infinite number.
    """
    layers = masked_layers(model)
    if not layers:
        raise InputError("the model has no masked layer whose gradients could be set: call sparsify first")
    for name, value in (("decay", decay), ("kept", kept), ("dropped", dropped)):
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"{name}={value!r}: must be a number of at least 0, and finite")
    for _, layer in layers:
        layer.rule = GradientRule(float(decay), float(kept), float(dropped))
        layer.hook_decay()
        if frozen != (layer.mask is not None):
            layer.freeze_mask(frozen)


def masks(model):
    """{layer name: bool mask with the weight's shape} of the layers that have a pattern."""
    return {name: layer.current_mask() for name, layer in masked_layers(model)}


@contextlib.contextmanager
def hold_masks(*models: nn.Module, optimizer: MaskedAdamW | None = None) -> Iterator[None]:
    """Select the masks once, now, and use them in every forward of the block.

    Use it around work that does not change the weights: the forwards and backwards of one optimizer step, or sampling.
    Enter it under the autocast that the forwards run in. A weight that changes inside the block keeps its old mask.
    On a GPU one launch selects the masks of all layers of one kind. On a CPU compressed layers compare their weights
    with what their kernels hold only once for the block, instead of in every call.
    optimizer: its last step has selected masks already; the block uses them.
    A block inside another one may use the outer masks; the outer block then reports what changed. If a generator
    yields inside a block, code outside reads the held masks, too, until the generator ends or is closed.

    Raises InputError, naming the layer, in two cases. (1) A weight, masked or compressed, changed inside the block, or,
    with an optimizer, since its last step. On a CPU this is reported when the block ends, on a GPU when a later block
    ends or at the optimizer's next step, so that nothing waits for the GPU. The next block selects again. (2) A weight
    is sharded (a DTensor): reported on entry.
    """
    if not isinstance(optimizer, MaskedAdamW | None):
        raise InputError(f"optimizer={type(optimizer).__name__}: only a MaskedAdamW selects masks; give none instead")
    modules = {module: name for model in models for name, module in module_of(model).named_modules()}
    names = {m: name for m, name in modules.items() if isinstance(m, Masked) and m.pattern is not None}
    names = {m: name for m, name in names.items() if "weight" in m._parameters}  # a computed weight is new at each use
    for layer, name in names.items():
        if is_sharded(layer.weight):
            raise InputError(f"the weight of {name} is sharded: its mask can be selected only inside a forward")
    compressed = {m: name for m, name in modules.items() if isinstance(m, Compressed)}
    dtypes = {layer: product_dtype(layer.weight) for layer in names}
    outer = {layer: layer._held for layer in names}
    with torch.inference_mode(False):  # a backward may need the masks, too
        choices = choose(dtypes, names) if optimizer is None else optimizer.choices(dtypes, names)
    held = {layer: (choice.weight, choice.selection) for layer, choice in choices.items()}
    for layer, mine in held.items():
        layer._held = mine
    closed = None
    try:
        with contextlib.ExitStack() as stack:
            for layer, name in compressed.items():
                stack.enter_context(layer.held(name))
            try:
                yield
            except GeneratorExit as error:  # the block is in a generator, which ends early and not by an error
                closed = error
    finally:
        for layer, mine in held.items():
            layer._held = outer[layer] if layer._held is mine else None  # else a new pattern made outer stale
    if optimizer is None:
        check(choices, names)
    else:
        optimizer.settle(choices, names)
    if closed:
        raise closed


# ---- compressed models -----------------------------------------------------------------------------------------------


def compress(model: nn.Module) -> nn.Module:
    """Returns a new model whose layers store only the kept weights and their positions, in eval mode.

    Every masked layer becomes a CompressedLinear or CompressedConv2d of its pattern, and so does a linear layer whose
    weight is torch's SparseSemiStructuredTensor. GPUs can multiply at most 2 of every 4 weights: on a GPU a denser
    layer, such as 3:4, becomes a dense layer whose pruned weights are zero. Forward hooks are copied. `model` is not
    changed.
    Raises: InputError if no layer is masked, a method was replaced by a function that cannot be copied, or torch's
    weight_norm, spectral_norm or prune computes the weight.
    """
    model = module_of(model)
    layers = [m for m in model.modules() if (isinstance(m, Masked) and m.pattern) or _is_torch_sparse(m)]
    if not layers:
        raise InputError("the model holds no masked layer: call sparsify(model, '2:4') first")
    _refuse_computed(model, parametrized=False)
    compressed = {layer: _compress_layer(layer) for layer in layers}
    small = _with_layers(model, compressed).eval()
    for layer in small.modules():
        if isinstance(layer, Masked):
            layer.beside_compressed = True
    small._frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    small._tied = [names for names in parameter_names(model) if len(names) > 1]
    return small.requires_grad_(False)


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
    compressed. Tied weights are tied again.

    form: "masked": masked layers, ready for training. "cutlass" or "cusparselt": the linear layers hold torch's
    SparseSemiStructuredTensor for that library and run only on a GPU; the convolutions are dense.
    Raises: InputError if no layer is compressed, the library cannot hold a layer (for example 3:4), or weights that
    shared one tensor before `compress` now differ.
    """
    model = module_of(model)
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
    for layer in dense.modules():
        vars(layer).pop("beside_compressed", None)
    for names in getattr(model, "_tied", ()):
        _tie(dense, names, layers)
    if form == "masked":
        for name, parameter in dense.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and name not in getattr(model, "_frozen", ()))
        return dense
    for name in layers:
        layer = dense.get_submodule(name)
        layer.set_pattern(None)
        if isinstance(layer, Linear):
            if layers[name].pattern.keep > 2:
                raise InputError(f"{form} holds 2:4 weights, and {name} is {layers[name].pattern}")
            layer.weight = nn.Parameter(to_torch(layer.weight.detach(), form), requires_grad=False)
    return dense


def bake(model: nn.Module) -> nn.Module:
    """Returns a new, dense model of the same class whose pruned weights are zeros, for any N:M.

    Layers that `sparsify` made ours are torch's again. A compressed model is decompressed first. The result computes
    the same outputs as `model`, bit for bit. Tied weights stay tied. Hooks are copied.
    Raises: InputError if no layer is masked, or a masked weight is also used without the same mask.
    """
    model = module_of(model)
    if any(isinstance(m, Compressed) for m in model.modules()):
        model = decompress(model)
    _refuse_computed(model, parametrized=True)
    layers = dict(masked_layers(model))
    if not layers and not any(m._plain or m.beside_compressed for m in model.modules() if isinstance(m, Masked)):
        raise InputError("the model holds no masked layer: call sparsify(model, '2:4') first")
    baked = {}  # id of a weight: its replacements
    for layer in layers.values():
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
        vars(module).pop("beside_compressed", None)
        if isinstance(module, Masked):
            module.unhook_decay()
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
        value = layer.masked_weight() if last == "weight" and path in compressed else shared
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
    return isinstance(module, nn.Linear) and isinstance(module.weight, tuple(TORCH_TENSORS.values()))


def _compress_layer(layer):
    with torch.no_grad():
        if _is_torch_sparse(layer):
            twin = copy.copy(layer)
            twin._buffers = dict(layer._buffers)
            return CompressedLinear(_adopt(twin), layer.weight.to_dense())
        reason = uncompressed_because(layer)
        if not reason:
            return CompressedLinear(layer) if isinstance(layer, Linear) else CompressedConv2d(layer)
        dense = copy.deepcopy(layer)
        dense.weight.copy_(layer.masked_weight())
        dense.set_pattern(None)
        dense.dense_reason = reason
        return dense


def uncompressed_because(layer):
    """None if a masked layer can be compressed, else the reason as a short phrase."""
    if "forward" in vars(layer) or type(layer).forward not in (Linear.forward, Conv2d.forward):
        return "its forward is not the one that a compressed layer computes"
    if isinstance(layer, Conv2d) and (
        layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return "a convolution with groups, or with padding that is not a number of zeros, has no compressed form"
    if layer.weight.device.type not in ("cpu", "meta") and layer.pattern.keep > 2:
        return f"{layer.pattern} may keep more than 2 of every 4 weights: a GPU runs it dense"
    if layer.mask is None or layer.mask.is_meta or holds(group_view(layer.effective_weight()), layer.pattern):
        return None
    return f"its frozen mask is not {layer.pattern}"
