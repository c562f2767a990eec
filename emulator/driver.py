"""Launch Triton kernels as on an H200, in a process without a GPU: `start()`.

Triton compiles for sm_90a. Its own launcher loads driver.c as libcuda. The kernels run in the emulator, on CPU tensors
that torch calls CUDA tensors. So tensor maps, clusters, shared memory and the order of parameters are the same as in a
real launch. There are no streams, graphs or timing.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from emulator.machine import execute
from emulator.memory import GlobalMemory, TensorMap
from emulator.parse import Program

H200 = (9, 0)
MULTIPROCESSORS = 132
SHARED_BYTES = {(8, 0): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}  # the most a block may have
LEAST_SHARED_BYTES = 101376  # of (8, 6), (8, 9) and (12, 0)
MAGIC = 0x70616D54
BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)  # of an element, in the order of CUtensorMapDataType
SCALARS = {
    **dict.fromkeys(("u64", "b64", "s64"), ctypes.c_uint64),
    **dict.fromkeys(("u32", "b32", "s32"), ctypes.c_int32),
    "f32": ctypes.c_float,
}


class Map(ctypes.Structure):
    """The fields that driver.c writes into a CUtensorMap; innermost dimension first."""

    _fields_ = (
        *(("magic", ctypes.c_uint32), ("type", ctypes.c_uint32), ("address", ctypes.c_uint64)),
        *(("size", ctypes.c_uint64 * 5), ("stride", ctypes.c_uint64 * 4), ("box", ctypes.c_uint32 * 5)),
        *(("rank", ctypes.c_uint32), ("swizzle", ctypes.c_uint32)),
    )


def start(capability=H200, execute=True):
    """Make Triton and torch find a GPU in this process, permanently. Call it before Triton is imported.

    execute=False: kernels are compiled and launched, but do nothing. Only an H200's kernels can be executed.
    Returns the Device.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    device = Device(capability, execute)
    use(device)
    pretend(capability)
    return device


class Device:
    """Runs launched kernels. launches: the kernels' names, in order. kernels: Triton's compiled kernels by handle."""

    def __init__(self, capability, execute):
        self.capability, self.execute = capability, execute
        self.kernels, self.tensors, self.launches, self.error = {}, [], [], None

    def run(self, kernel, launch, arguments):
        """Triton's launch of a compiled kernel with these arguments."""
        bases = [getattr(a, "base", a) for a in arguments]
        self.tensors = [tensor for tensor in bases if isinstance(tensor, torch.Tensor) and tensor.numel()]
        self.kernels[kernel.function], self.error = kernel, None
        try:
            return launch(*arguments)
        except RuntimeError as refused:
            raise self.error or refused from None

    def launch(self, function, x, y, z, threads, cluster, parameters):
        """The driver's launch. An exception cannot pass through C: it is stored in `error`."""
        try:
            kernel = self.kernels[function]
            self.launches.append(kernel.name)
            if not self.execute:
                return 0
            program = Program(kernel.asm["ptx"])
            assert program.threads == threads, f"{threads} threads were launched, of {program.threads}"
            values = [self._parameter(kind, parameters[i]) for i, (_, kind) in enumerate(program.parameters)]
            execute(program, values, self._memory(), (x, y, z), cluster=cluster)
            return 0
        except BaseException as error:
            self.error = error
            return 1

    def _parameter(self, kind, address):
        if kind != "map":
            return SCALARS[kind].from_address(address).value
        found = Map.from_address(address)
        assert found.magic == MAGIC, "a kernel takes a tensor map here, and was given something else"
        element, rank = BYTES[found.type], found.rank
        sizes, box = list(found.size)[:rank][::-1], list(found.box)[:rank][::-1]
        strides = [*list(found.stride)[: rank - 1][::-1], element]
        data = self._bytes(found.address, element + sum((n - 1) * stride for n, stride in zip(sizes, strides)))
        array = np.lib.stride_tricks.as_strided(data.view({2: np.int16, 4: np.int32}[element]), sizes, strides)
        return TensorMap(array, box, found.swizzle)

    def _bytes(self, address, count):
        for tensor in self.tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= address and address + count <= storage.data_ptr() + storage.nbytes():
                return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))
        raise AssertionError("a tensor map leads out of the tensors that were launched with it")

    def _memory(self):
        """Every tensor from its first to its last element; everything else is out of bounds."""
        memory, spans = GlobalMemory(), {}
        for tensor in self.tensors:
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            spans[tensor.data_ptr()] = max(spans.get(tensor.data_ptr(), 0), span * tensor.element_size())
        memory.buffers = [(address, self._bytes(address, count)) for address, count in spans.items()]
        return memory


def build_driver():
    """Compile driver.c and load it as this process's libcuda.so.1."""
    import triton

    folder = Path(tempfile.mkdtemp())
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    source, library = Path(__file__).with_name("driver.c"), folder / "libcuda.so.1"
    flags = ("-shared", "-fPIC", "-O1", f"-I{headers}", "-Wl,-soname,libcuda.so.1")
    subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def use(device):
    """Make Triton launch on `device`."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    library = build_driver()
    signature = (ctypes.c_int, ctypes.c_void_p, *5 * (ctypes.c_uint,), ctypes.POINTER(ctypes.c_void_p))
    device.callback = ctypes.CFUNCTYPE(*signature)(device.launch)
    library.set_device(device.callback, SHARED_BYTES.get(device.capability, LEAST_SHARED_BYTES))
    cuda = CudaDriver()
    cuda.get_current_stream = lambda index=0: 0
    cuda.get_current_device = lambda: 0
    cuda.get_device_capability = lambda index=0: device.capability
    cuda.get_active_torch_device = lambda: torch.device("cpu")
    driver.set_active(cuda)
    loaded = CompiledKernel._init_handles

    def load(kernel):
        known = getattr(kernel, "function", None) in device.kernels
        loaded(kernel)
        if not known:
            launch = kernel._run
            kernel._run = lambda *arguments: device.run(kernel, launch, arguments)

    CompiledKernel._init_handles = load


class OnTheCpu(TorchFunctionMode):
    """Runs torch operations for "cuda" on the CPU."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if "device" in options:
            options["device"] = cpu(options["device"])
        if function is torch.Tensor.to:
            arguments = tuple(cpu(a) if isinstance(a, str | torch.device) else a for a in arguments)
        return function(*arguments, **options)


def cpu(device):
    return torch.device("cpu") if device is not None and torch.device(device).type == "cuda" else device


def pretend(capability):
    """Make torch find a GPU of this capability."""
    major, minor = capability
    properties = type("Properties", (), {"multi_processor_count": MULTIPROCESSORS, "major": major, "minor": minor})
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.current_device = lambda: 0
    torch.cuda.device = torch.cuda.device_of = lambda device: contextlib.nullcontext()
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.cuda = lambda tensor: tensor.clone() if tensor.is_contiguous() else tensor
    OnTheCpu().__enter__()
