"""The times of the sparse layers of a model on this machine, dense and compressed: `sparsedm inspect --time`."""

import copy
import time

import torch
from torch import nn
from torch.utils._pytree import tree_map

from sparsedm.compressed import Compressed
from sparsedm.compression import compress, decompress, uncompressed_because
from sparsedm.copying import meta_twin
from sparsedm.errors import InputError
from sparsedm.kernels.tuning import median_microseconds
from sparsedm.plots import table
from sparsedm.sparsity import masked_layers
from sparsedm.timing import interleaved_seconds


def time_layers(model, batch=1, device="cpu", dtype=torch.float32):
    """Times one call of each sparse layer. Returns {name: (microseconds dense, microseconds compressed, back end)}.

    A call has the shapes and the epilogue of a forward of `model` at this batch size. Layers with equal shapes and
    epilogue are timed once. Weights and inputs are random; `model` is not changed. Layers that cannot be compressed, or
    are not called, are left out. A compressed model is decompressed first.
    """
    if any(isinstance(module, Compressed) for module in model.modules()):
        model = decompress(model)
    twin, calls, times = meta_twin(model).eval(), {}, {}
    layers = {name: layer for name, layer in masked_layers(twin) if not uncompressed_because(layer)}

    def see(layer, inputs, options, output):
        calls[layer] = inputs, options

    hooks = [layer.register_forward_hook(see, with_kwargs=True) for layer in layers.values()]
    with torch.no_grad():
        twin(*tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, model.example_inputs(batch)))
        for hook in hooks:
            hook.remove()
        for layer, call in calls.items():
            key = f"{layer} {call}"  # meta tensors print their shapes, not values
            if key not in times:
                times[key] = _dense_and_compressed(layer, call, device, dtype)
    return {name: times[f"{layer} {calls[layer]}"] for name, layer in layers.items() if layer in calls}


def time_report(model, batch=1):
    """The table of `sparsedm inspect --time`: `time_layers` on this machine's GPU in bf16, else on its CPU in fp32.

    Raises: InputError if no layer of the model can be compressed.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    times = time_layers(model, batch, device, dtype)
    if not times:
        raise InputError("--time needs a layer with a sparse weight, and the model has none: give --pattern 2:4")
    rows = [(name, f"{a:,.1f}", f"{b:,.1f}", f"{a / b:.2f}x", backend) for name, (a, b, backend) in times.items()]
    lines = [table(("layer", "dense us", "sparse us", "speed-up", "back end"), rows, left=(0, 4))]
    dense, best = sum(a for a, *_ in times.values()), sum(min(a, b) for a, b, _ in times.values())
    what = torch.cuda.get_device_name() if on_gpu else "CPU: no prediction for a GPU"
    lines += ["", f"these layers, dense: {dense / 1e3:,.3f} ms; sparse where it gains: {best / 1e3:,.3f} ms"]
    return "\n".join([*lines, f"batch {batch}, {str(dtype).removeprefix('torch.')}, {what}"])


def _dense_and_compressed(layer, call, device, dtype):
    layer = copy.deepcopy(layer).to_empty(device=device).to(dtype)
    layer.set_pattern(layer.pattern)  # drops a frozen mask, whose memory is uninitialised
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    sized = tree_map(lambda x: torch.randn(x.shape, device=device, dtype=dtype) if torch.is_tensor(x) else x, call)
    (compressed,) = compress(nn.Sequential(layer))
    layer.set_pattern(None)
    runs = [lambda of=of: of(*sized[0], **sized[1]) for of in (layer, compressed)]
    on_gpu = torch.device(device).type == "cuda"
    times = [median_microseconds(run) for run in runs] if on_gpu else _microseconds(runs)
    measured = compressed.measured()
    computed = measured.choice.backend if measured else compressed.backend_used()
    return *times, computed


def _microseconds(runs):
    """Median times on a CPU; with one thread CPU time: other programs matter less. First calls choose kernels, and
    prepack."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return [1e6 * seconds for seconds in interleaved_seconds(runs, "cpu", rounds=7, clock=now)]
