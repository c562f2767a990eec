"""Functions of tensors as CUDA graphs: recorded at the first call for each shape, then replayed with new inputs.

The host limits a small network: it launches hundreds of kernels of a few microseconds each. A graph launches them all
at once. Recording cannot tune kernels, so warm-up calls tune first.
"""

import torch

from sparsedm.errors import InputError

WARM_UP = 2  # calls before a recording: the first tunes, compiles kernels and prepacks weights


class Graphs:
    """`graphs(function, *arguments)` is function(*arguments), a tuple of new tensors, for inference on a CUDA device.

    Tensor arguments are the inputs of the graph. Everything else (networks, numbers, None) is a part of it. Another
    function, another non-tensor argument, or a tensor of another shape, strides or dtype makes a new recording. The
    function must not wait for the device or draw random numbers. The weights of a network must not change between
    calls. All graphs share their memory: call them one after the other, on one stream.

    record: (run, device) -> (replay, outputs); `CudaRecorder` does this for CUDA graphs.
    Raises: InputError if the device is not a CUDA device.
    """

    def __init__(self, device, record=None):
        if torch.device(device).type != "cuda":
            raise InputError(f"a CUDA graph needs a CUDA device, and the network is on {device}")
        self.device = device
        self.record = record or CudaRecorder()
        self.recordings = {}

    def __call__(self, function, *arguments):
        inputs = [value for value in arguments if isinstance(value, torch.Tensor)]
        key = function, *map(_kind, arguments)
        if key not in self.recordings:
            held = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
            buffers = [value for value in held if isinstance(value, torch.Tensor)]
            self.recordings[key] = buffers, *self.record(lambda: function(*held), self.device)
        buffers, replay, outputs = self.recordings[key]
        for mine, theirs in zip(buffers, inputs):
            mine.copy_(theirs)
        replay()
        return tuple(output.clone() for output in outputs)


def _kind(value):
    """The properties of an argument that a recording depends on. Strides are one: they decide which kernels run."""
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, torch.Tensor) else value


class CudaRecorder:
    """Records graphs of one device into one pool of memory."""

    def __init__(self):
        self.pool = self.stream = None

    def __call__(self, run, device):
        """-> (replay: () -> None, the tensors that every replay writes)."""
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # torch's own capture stream belongs to the device of the process's first capture
            self.stream = self.stream or torch.cuda.Stream()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                outputs = run()
        self.pool = self.pool or graph.pool()
        return graph.replay, outputs
