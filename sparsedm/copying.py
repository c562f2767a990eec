"""Deep copies of a model, refused where a copy would go on running the network that it was made from.

`copy.deepcopy` copies bound methods, but neither a function's closure nor a weak reference: through these a copied
module still reaches the old ones.
"""

import contextlib
import copy
import functools
import types
import weakref

import torch
from torch import nn

from sparsedm.errors import InputError


def copied(model, memo=None):
    """A deep copy with the replacements in `memo`: id of the old object -> the new one.

    Raises: InputError if a replaced method would still run the old network.
    """
    for what in uncopied(model):
        raise InputError(f"{what}: a copy of the model would still run the old network")
    return copy.deepcopy(model, {} if memo is None else memo)


def uncopied(model):
    """Phrases that name the functions in attributes and hooks of the model which a deep copy would share with it, and
    which refer to its modules."""
    modules, found = set(model.modules()), []
    for name, module in model.named_modules():
        name = name or type(module).__name__
        if type(module).__module__.startswith("torch._dynamo"):
            continue  # the wrapper of torch.compile makes its functions anew
        try:
            state = module.__getstate__()  # without what torch.compile has added
        except RuntimeError:  # a parametrized module has no such state, and is copied by its own means
            state = vars(module)
        for attribute, value in state.items():
            if attribute in ("_modules", "_parameters", "_buffers") or not _keeps(value, modules):
                continue
            if attribute.startswith("_") and attribute.endswith(("_hooks", "_hooks_with_kwargs")):
                found.append(f"a hook of {name} is a function")
            else:
                replaced = isinstance(value, types.FunctionType | types.MethodType)
                found.append(f"{name}.{attribute} {'was replaced by' if replaced else 'holds'} a function")
    return found


def _keeps(value, modules):
    """Whether a deep copy of `value` would still refer to one of the modules."""
    seen, rest = {}, [(value, False)]  # id: whether it is shared, and the value, so that no other gets its id
    while rest:
        value, shared = rest.pop()
        if isinstance(value, nn.Module):
            if shared and not modules.isdisjoint(value.modules()):
                return True
            if shared or value in modules:
                continue  # one that is copied is looked at for itself
        known = seen.get(id(value))
        if known and (known[0] or not shared):
            continue
        seen[id(value)] = shared, value
        parts, becomes_shared = _parts(value)
        rest += [(part, shared or becomes_shared) for part in parts]
    return False


def _parts(value):
    """(what `value` refers to, whether a deep copy of it is `value` itself)."""
    if isinstance(value, weakref.ref):
        return (value(),), True
    if isinstance(value, types.FunctionType):
        empty = types.CellType()
        filled = [cell.cell_contents for cell in value.__closure__ or () if cell != empty]
        used = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        return (*filled, *used, value.__defaults__, value.__kwdefaults__), True
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__), False
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords, vars(value)), False
    if isinstance(value, dict):
        return value.values(), False
    if isinstance(value, list | tuple | set | frozenset):
        return value, False
    if isinstance(value, type) and "<locals>" in value.__qualname__:
        return vars(value).values(), True
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | torch.Tensor):
        return (), False
    with contextlib.suppress(Exception):  # of a foreign object any
        return (value.__getstate__(),), False
    return (), False


def _names(code):
    """The names that a function's code looks up, with the functions inside of it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)
