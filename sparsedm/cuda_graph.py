"""Networks as CUDA graphs: recorded at the first call for each shape, replayed with new inputs afterwards.

A small network is bound by the host, which launches hundreds of kernels of a few microseconds each; a graph launches
them all at once. Nothing is tuned while a graph is recorded, so the calls that warm up tune first.
"""

import torch

from sparsedm.errors import InputError

WARM_UP = 2  # calls before a recording: the first tunes, compiles kernels and arranges weights


def graphed(networks, device):
    """A list of callables that compute what `networks` (x, t[, y]) do, for inference on a CUDA device.

    A network that is in the list several times is recorded once per shape. All graphs share their memory, so they must
    be called one after the other, on one stream; the results are new tensors. The weights must not change meanwhile.
    Raises: InputError if the device is not a CUDA device.
    """
    if torch.device(device).type != "cuda":
        raise InputError(f"a CUDA graph needs a CUDA device, and the network is on {device}")
    recorder = _Recorder()
    replayed = {id(network): _Graphed(network, recorder) for network in networks}
    return [replayed[id(network)] for network in networks]


class _Graphed:
    def __init__(self, network, recorder):
        self.network, self.recorder = network, recorder
        self.config = getattr(network, "config", None)  # guidance looks up the null label
        self.recordings = {}

    def __call__(self, *inputs):
        shapes = tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)
        if shapes not in self.recordings:
            held = [x.clone() for x in inputs]
            self.recordings[shapes] = held, *self.recorder.record(lambda: self.network(*held), inputs[0].device)
        held, replay, output = self.recordings[shapes]
        for mine, theirs in zip(held, inputs):
            mine.copy_(theirs)
        replay()
        return output.clone()


class _Recorder:
    """Records graphs into one pool of memory."""

    def __init__(self):
        self.pool = None

    def record(self, run, device):
        """-> (replay: () -> None, the tensor that every replay writes)."""
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                output = run()
        self.pool = self.pool or graph.pool()
        return graph.replay, output
