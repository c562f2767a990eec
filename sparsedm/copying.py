"""Deep copies of a model, refused where a copy would go on running the network that it was made from.

`copy.deepcopy` copies bound methods, but neither a function's closure nor a weak reference: through these a copied
module still reaches the old ones.
"""

import contextlib
import copy
import gc
import types
import weakref

import torch
from torch import nn

from sparsedm.errors import InputError


def copied(model, memo=None, changed=()):
    """A deep copy with the replacements in `memo`: id of the old object -> the new one.

    changed: modules whose class the caller is going to change.

    Raises: InputError if a replaced method would still run the old network, before or after it is copied: an object may
    say itself how it is copied.
    """
    memo = {} if memo is None else memo
    replaced = {module for module in model.modules() if id(module) in memo} | set(changed)
    _refuse(uncopied(model, replaced))
    for computed, value in detached(model).items():
        memo.setdefault(computed, value)
    copy_of_model = copy.deepcopy(model, memo)
    _refuse(uncopied(copy_of_model, old=model))
    return copy_of_model


def meta_twin(model):
    """A deep copy with meta tensors. What a forward stores in its modules, the model does not see."""
    tensors = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, tensors | {id(b): b.to("meta") for b in model.buffers()})


def detached(model):
    """A memo for `copy.deepcopy`, which refuses tensors with a graph: the id of each that a module keeps -> its values.

    A forward may keep one; torch's older weight_norm, spectral_norm and prune keep the weight that they compute.
    Raises: InputError for a view of a parameter.
    """
    found, seen, rest = {}, {}, [model]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                if isinstance(value._base, nn.Parameter):
                    raise InputError(f"a kept view {tuple(value.shape)} of a parameter would be a constant in a copy")
                found[id(value)] = value.detach().clone()
        elif id(value) not in seen:
            seen[id(value)] = value  # held, so that no other gets its id
            is_module = isinstance(value, nn.Module)
            parts, shared = (vars(value).values(), False) if is_module else _parts(value, shared=False)
            rest += () if shared else parts
    return found


def _refuse(found):
    for what in found:
        raise InputError(f"{what}: a copy of the model would still run the old network")


def uncopied(model, replaced=(), old=None):
    """Phrases that name the functions in attributes and hooks of the model which a deep copy would share with it, and
    which refer to its modules, parameters or buffers.

    replaced: modules that a copy replaces by others, of which it can keep no method. old: `model` is a copy of this
    one, and what refers to this one is named.
    """
    source = model if old is None else old
    own = {id(part) for part in (*source.modules(), *source.parameters(), *source.buffers())}
    found = []
    for name, module in model.named_modules():
        name = name or type(module).__name__
        if type(module).__module__.startswith("torch._dynamo"):
            continue  # the wrapper of torch.compile makes its functions anew
        try:
            state = module.__getstate__()  # without what torch.compile has added
        except RuntimeError:  # a parametrized module has no such state, and is copied by its own means
            state = vars(module)
        for attribute, value in (*state.items(), ("class", type(module))):
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            without = [layer for layer in replaced if layer is not module or attribute != "forward"]
            if not _keeps(value, own, without, old is not None):
                continue
            if attribute.startswith("_") and attribute.endswith(("_hooks", "_hooks_with_kwargs")):
                found.append(f"a hook of {name} is a function")
            else:
                is_function = isinstance(value, types.FunctionType | types.MethodType)
                found.append(f"{name}.{attribute} {'was replaced by' if is_function else 'holds'} a function")
    return found


def _keeps(value, own, replaced, shared):
    """Whether a deep copy of `value` would still refer to one of the parts `own`, given by their ids.

    shared: a copy is `value` itself.
    """
    seen, rest = {}, [(value, shared)]  # id: whether it is shared, and the value, so that no other gets its id
    while rest:
        value, shared = rest.pop()
        if shared and id(value) in own:
            return True
        if isinstance(value, nn.Module):
            if shared and not own.isdisjoint(map(id, value.modules())):
                return True
            if shared or id(value) in own:
                continue  # one that is copied is looked at for itself
        if isinstance(value, types.MethodType) and any(value.__self__ is module for module in replaced):
            return True
        known = seen.get(id(value))
        if known and (known[0] or not shared):
            continue
        seen[id(value)] = shared, value
        parts, becomes_shared = _parts(value, shared)
        rest += [(part, shared or becomes_shared) for part in parts]
    return False


def _parts(value, shared):
    """(what `value` refers to, whether a deep copy of it is `value` itself)."""
    if isinstance(value, weakref.ref):
        return (value(),), True
    if isinstance(value, types.FunctionType):
        empty = types.CellType()
        filled = [cell.cell_contents for cell in value.__closure__ or () if cell != empty]
        used = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        return (*filled, *used, value.__defaults__, value.__kwdefaults__, vars(value)), True
    if isinstance(value, type):
        return (vars(value).values() if "<locals>" in value.__qualname__ else ()), True
    if isinstance(value, torch.Tensor | nn.Module | str | bytes | int | float | None):
        return (), False
    if isinstance(value, types.ModuleType):
        return (vars(value).values() if value.__spec__ is None else ()), True  # one that was made, not imported
    if shared or (
        not isinstance(value, types.MethodType) and type(value).__module__ in ("builtins", "collections", "functools")
    ):
        # as the garbage collector sees it; a thread's own attributes it does not
        return (*gc.get_referents(value), *getattr(value, "__dict__", {}).values()), False
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__), False
    with contextlib.suppress(Exception):  # of a foreign object any
        return (value.__getstate__(),), False
    return (), False


def _names(code):
    """The names that a function's code looks up, with the functions inside of it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)
