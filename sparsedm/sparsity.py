"""Whole models: `sparsify` gives layers a pattern, `hold_masks` selects the masks of all layers at once.

For inference: `compression.py`.
"""

import contextlib
import inspect
import math
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from numbers import Number, Real

import numpy as np
import torch
from torch import nn

from sparsedm.compressed import Compressed
from sparsedm.errors import InputError
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.straight_through import GradientRule
from sparsedm.layers import PAST_MASKS, Conv2d, Linear, Masked, invalid_because, is_sharded, product_dtype
from sparsedm.optim import MaskedAdamW
from sparsedm.selections import check_unchanged, select_all

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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
    if isinstance(where, str) and where == "all":
        return lambda name, module: True
    if callable(where):
        return where
    if isinstance(where, str):
        if not where:
            raise InputError("where='' names nothing: None, 'all', or an expression to search for")
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
    calibrate: batches of inputs to run the model with, each a tuple of arguments, a dict of keyword arguments or the
        only argument, such as a tensor. The masks then keep the largest |w| * ||x|| (Wanda, arXiv 2306.11695), where x
        is every input of the weight, and are frozen. `set_masking(frozen=False)` selects by magnitude again. A noise
        predictor needs noisy images of all levels: (diffuse(x0, t, noise, schedule), schedule.model_time(t)) for t from
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
    calibrated = {}
    if calibrate is not None:
        layers = {m: n for n, m in found if not reasons[n]}
        for layer, norms in _input_norms(model, layers, calibrate).items():
            calibrated[layer] = select_mask(layer.weight.detach() * norms, pattern, name=layers[layer]).mask
    for name, module in found:
        if not reasons[name] and not isinstance(module, Masked):
            adopt(module)
        if isinstance(module, Masked):
            module.set_pattern(None if reasons[name] else pattern)
        if reasons[name]:
            module.dense_reason = reasons[name]
        elif calibrate is not None:
            with torch.inference_mode(False):  # a backward may need it
                module.mask = calibrated[module].clone()
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
    iterable = isinstance(batches, Iterable) or hasattr(type(batches), "__getitem__")
    if not iterable or isinstance(batches, torch.Tensor | dict | str):
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
            if batch is None or isinstance(batch, np.ndarray | Number | str):  # parts of a batch, for instance
                rule = "a batch is a tensor, a tuple of arguments, a dict of keyword arguments or what the model takes"
                raise InputError(f"calibrate holds a {type(batch).__name__}: {rule}")
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


def adopt(module):
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
    model: nn.Module, *, decay: float = 0.0, kept: float = 1.0, dropped: float = 1.0, frozen: bool | None = None
) -> None:
    """Gradient settings of every layer that has a pattern.

    dL/dw = (kept * m + dropped * (1 - m)) * dL/d(w * m) + decay * (1 - m) * w. decay=2e-4 is SR-STE, dropped=0 with
    frozen=True is ASP. frozen=True keeps the current masks from now on; they are then saved with the weights. False
    selects masks by today's weights again. None leaves frozen masks as they are, calibrated and loaded ones, too, and
    selects again only where a cast froze the mask.

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
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise InputError(f"{name}={value!r}: must be a number of at least 0, and finite")
    if not (frozen is None or isinstance(frozen, bool)):
        raise InputError(f"frozen={frozen!r}: must be True, False, or None")
    for _, layer in layers:
        layer.rule = GradientRule(float(decay), float(kept), float(dropped))
        layer.hook_decay()
        is_frozen = layer.mask is not None
        wanted = is_frozen and not layer._cast_froze if frozen is None else frozen
        if wanted != is_frozen:
            layer.freeze_mask(wanted)
        layer._cast_froze = False  # from now on the mask is the caller's choice


def masks(model):
    """{layer name: bool mask with the weight's shape} of the layers that have a pattern."""
    return {name: layer.current_mask() for name, layer in masked_layers(model)}


class _Block:
    """A block of `hold_masks`. Blocks of several threads may close in any order."""

    open = True


_HOLDING = threading.RLock()  # the garbage collector may end another block inside


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

    Raises InputError, naming the layer, in three cases. (1) A weight, masked or compressed, changed inside the block,
    or, with an optimizer, since its last step. On a CPU this is reported when the block ends, on a GPU when a later
    block ends or at the optimizer's next step, so that nothing waits for the GPU. The next block selects again. (2) A
    weight is NaN: reported on entry, on a GPU later, as above. (3) A weight is sharded (a DTensor): reported on entry.
    """
    if not isinstance(optimizer, MaskedAdamW | None):
        raise InputError(f"optimizer={type(optimizer).__name__}: only a MaskedAdamW selects masks; give none instead")
    found = [pair for model in models for pair in module_of(model).named_modules()]
    modules = {module: name or type(module).__name__ for name, module in found}
    names = {m: name for m, name in modules.items() if isinstance(m, Masked) and m.pattern is not None}
    names = {m: name for m, name in names.items() if "weight" in m._parameters}  # a computed weight is new at each use
    for layer, name in names.items():
        if is_sharded(layer.weight):
            raise InputError(f"the weight of {name} is sharded: its mask can be selected only inside a forward")
    compressed = {m: name for m, name in modules.items() if isinstance(m, Compressed)}
    dtypes = {layer: product_dtype(layer.weight) for layer in names}
    with torch.inference_mode(False):  # a backward may need the masks, too
        selected = select_all(dtypes, names) if optimizer is None else optimizer.selected(dtypes, names)
    block = _Block()
    held = {layer: (one.weight, one.selection, block) for layer, one in selected.items()}
    with _HOLDING:
        outer = {layer: layer._held for layer in held}
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
        with _HOLDING:
            block.open = False
            for layer, mine in held.items():
                left = outer[layer] if layer._held is mine else layer._held  # None: a new pattern made outer stale
                layer._held = left if left and left[2].open else None
    if optimizer is None:
        check_unchanged(selected, names)
    else:
        optimizer.settle(selected, names)
    if closed:
        raise closed
