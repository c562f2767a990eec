"""Runs a kernel that `emulator.sass` compiled, on torch tensors, in the emulator."""

import re

import numpy as np
import torch

from emulator.machine import execute
from emulator.memory import GlobalMemory, TensorMap

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32, "i64": torch.int64}


def run(build, ptx, arguments, grid, *, early=True, cluster=1, seed=0):
    """arguments: {name: tensor | int}; tensors are written in place. Returns the number of warp instructions.

    A pointer argument that is None gets an address at which any access is an error. Rows of tensors, given as a list of
    lists, become a table of their addresses.
    """
    memory, parameters = GlobalMemory(), []
    for name, kind in build.signature.items():
        value = arguments[name]
        if kind.startswith("tensordesc"):
            parameters += [tensor_map(kind, value), *value.shape, *value.stride()]
        elif value is None:
            parameters.append(16)
        elif isinstance(value, list):
            flat = {id(t): t for row in value for t in row if t is not None}
            places = {key: memory.add(numpy_view(_whole(t))) for key, t in flat.items()}
            table = [[places.get(id(t), 16) for t in row] for row in value]
            parameters.append(memory.add(np.array(table, np.int64)))
        elif isinstance(value, torch.Tensor):
            assert value.dtype == TORCH[kind[1:]], (name, kind, value.dtype)
            parameters.append(memory.add(numpy_view(_whole(value))))
        else:
            parameters.append(value)
    parameters += [0, 0]  # Triton's scratch pointers
    return execute(ptx, parameters, memory, grid, early=early, cluster=cluster, seed=seed)


def tensor_map(kind, tensor):
    """'tensordesc<bf16[128, 64],NVMMASharedLayout(swizzle_byte_width=128, ...)>' and a tensor -> TensorMap.

    A box wider than the swizzle becomes several messages of the swizzle's width, as in Triton.
    """
    dtype, shape, span = re.match(r"tensordesc<(\w+)\[([\d, ]+)\],.*swizzle_byte_width=(\d+)", kind).groups()
    assert tensor.dtype == TORCH[dtype], (kind, tensor.dtype)
    box, span = [int(size) for size in shape.split(",")], int(span)
    if span:
        box[-1] = min(box[-1], span // tensor.element_size())
    return TensorMap(numpy_view(tensor), box, span)


def numpy_view(tensor):
    """A numpy array that shares memory with the tensor; 16-bit types as int16."""
    if tensor.element_size() == 2:
        tensor = tensor.view(torch.int16)
    return tensor.numpy()


def _whole(tensor):
    """The memory of a strided tensor: everything from its first to its last element."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((span,), (1,))
