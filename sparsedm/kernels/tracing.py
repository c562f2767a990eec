"""How torch runs the code just now: under autocast, exported, compiled, traced, counted or differentiated."""

import torch
from torch import _C
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from sparsedm.errors import InputError


def autocast_dtype(device):
    """The dtype of products under autocast on `device`; None if autocast is off or unknown there.

    Without `torch.amp.is_autocast_available`: torch 2.11 breaks compiled graphs at it.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def exporting():
    """Whether torch.export is tracing. This is the flag behind `torch.compiler.is_exporting`, because torch 2.11's
    dynamo reads that function as true in everything that it compiles."""
    return torch.compiler._is_exporting_flag


def refuse_export(traced=False, scripted=False):
    """Raise InputError inside of `torch.onnx.export` and `torch.jit`, which know neither masks nor compressed weights.

    `torch.jit.trace` would record memory that a C kernel fills as memory that nothing fills.
    traced: called from the fake form of an operator. Dynamo takes `is_in_onnx_export` for false, but runs fakes as is.
    """
    tracing = torch.jit.is_tracing()
    if (traced or exporting() or tracing) and torch.onnx.is_in_onnx_export():
        raise InputError("torch.onnx.export takes plain weights: export sparsedm.bake(model), which holds the zeros")
    if scripted or tracing:
        raise InputError("torch.jit takes plain weights: give it sparsedm.bake(model), which holds the zeros")


def transformed():
    """Whether this runs in a graph that is being compiled or exported, under torch.func, or in forward mode."""
    return torch.compiler.is_compiling() or _differentiated()


def _differentiated():
    """Whether torch.func or forward mode is at work."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched():
    """Whether something compiles, traces, counts or transforms torch's operations: it would not see what C computes."""
    if torch.compiler.is_compiling():  # alone, because dynamo cannot trace the others
        return True
    if _C._len_torch_dispatch_stack() or _C._get_tracing_state():
        return True
    modes = _C._len_torch_function_stack()  # a default device is one, too, but watches nothing
    if modes and any(type(_C._get_function_stack_at(i)) is not DeviceContext for i in range(modes)):
        return True
    return _differentiated()


def left_to_torch(*tensors):
    """Whether torch.func, forward mode or a backward needs the derivative of a call with these tensors, or None; or one
    of them has no strides, such as a sparse or oneDNN's own tensor.

    Dynamo traces this function, and guards what it read.
    """
    if _differentiated():
        return True
    given = [t for t in tensors if t is not None]
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return graded or any(t.layout != torch.strided for t in given)


def plain(*tensors):
    """Whether C may read these tensors, or None, where they lie: on a CPU, and nothing traces, counts, transforms or
    differentiates the call."""
    if watched():
        return False
    graded = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (
            type(t) is not torch.Tensor
            or not t.is_cpu
            or t.layout is not torch.strided
            or (graded and t.requires_grad)
            or t.is_neg()
            or t._is_zerotensor()
        ):
            return False
    return True


def direct(operator, *tensors):
    """The function of an operator of `torch.library.custom_op` if `plain` lets it be called, else the operator.

    That saves 0.1 ms on a slow CPU.
    """
    return getattr(operator, "_init_fn", operator) if plain(*tensors) else operator


def operator(name, function, fake):
    """Register `function`, whose annotations give the schema, as a torch operator without autograd; returns it.

    fake: the same signature; returns empty tensors of the right shapes. Like `torch.library.custom_op`, but without its
    checks at every call: they cost as much as selecting a small layer's mask.
    """
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    torch.library.register_fake(name)(fake)
    namespace, _, name = name.partition("::")
    return getattr(getattr(torch.ops, namespace), name).default
