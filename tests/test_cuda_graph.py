"""Graphs replay what was recorded with what is new. Without a GPU, a tape of torch's operations is the graph."""

import contextlib
import copy
import functools
import subprocess
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsedm import samplers
from sparsedm.compression import compress
from sparsedm.cuda_graph import CudaRecorder, Graphs
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.kernels.cpu import rules
from sparsedm.models import build_model
from sparsedm.samplers import SAMPLERS, sample
from sparsedm.sparsity import sparsify


class Tape(TorchDispatchMode):
    """Records like a CUDA graph: a replay is the operations alone, on the memory they were recorded with.

    No line of Python runs again, and what a capture cannot hold is refused: values that reach the host, shapes that
    depend on them, random numbers, tensors made from the host's.
    """

    REFUSED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __init__(self):
        super().__init__()
        self.recorded = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        refused = function is torch.ops.aten.lift_fresh.default or self.REFUSED.intersection(function.tags)
        assert not refused, f"{function} cannot be captured"
        result = function(*args, **(kwargs or {}))
        self.operations.append((functools.partial(function, *args, **(kwargs or {})), tree_leaves(result)))
        return result

    def __call__(self, run, device):
        self.recorded += 1
        run()  # warms up
        self.operations, random = [], torch.get_rng_state()
        with self:
            outputs = run()
        assert torch.equal(random, torch.get_rng_state()), "random numbers cannot be captured"
        return functools.partial(self.replay, self.operations), outputs

    @staticmethod
    def replay(operations):
        for operation, results in operations:
            for mine, theirs in zip(results, tree_leaves(operation())):
                if isinstance(mine, torch.Tensor) and mine.data_ptr() != theirs.data_ptr():  # else a view, or in place
                    mine.copy_(theirs)


@pytest.fixture
def tape(monkeypatch):
    """What `sample(..., cuda_graph=True)` then records with. Torch alone computes: a tape sees no C."""
    monkeypatch.setattr(rules, "serves", lambda *tensors: False)
    tape = Tape()
    monkeypatch.setattr(samplers, "Graphs", lambda device: Graphs("cuda", tape))
    return tape


def test_every_call_computes_with_its_own_inputs_and_leaves_earlier_results_alone():
    def network(x, t, y, shift):
        doubled = x.mul(2)
        doubled += t[:, None]
        return doubled.T.reshape(4, 3) + y + shift, doubled

    tape = Tape()
    graphs = Graphs("cuda", tape)
    inputs = [(torch.randn(3, 4), torch.rand(3), torch.randint(9, (3,)), 0.5) for _ in range(3)]
    results = [graphs(network, *each) for each in inputs]
    assert tape.recorded == 1
    for result, each in zip(results, inputs):
        assert all(map(torch.equal, result, network(*each)))


def test_only_another_shape_layout_dtype_function_or_number_is_recorded_again():
    tape = Tape()
    graphs = Graphs("cuda", tape)
    shifted, scaled = (lambda x, by: (x + by,)), (lambda x, by: (x * by,))
    x = torch.randn(3, 2)
    calls = [(shifted, x, 1), (shifted, x, 2), (shifted, x, torch.tensor(2.0)), (scaled, x, 1), (scaled, x, 2)]
    calls += [(shifted, other, 1) for other in (torch.randn(5, 2), torch.randn(2, 3).T, x.double())]
    for function, *arguments in 2 * calls:
        assert torch.equal(*graphs(function, *arguments), *function(*arguments))
    assert tape.recorded == len(calls)


@pytest.mark.parametrize("device", ["cpu", torch.device("meta")], ids=str)
def test_a_device_without_graphs_is_refused(device):
    with pytest.raises(InputError, match=f"a CUDA graph needs a CUDA device, and the network is on {device}"):
        Graphs(device)


@pytest.mark.parametrize(
    "waits",
    [torch.Tensor.item, bool, torch.nonzero, lambda x: x + torch.tensor(3.0), torch.bernoulli],
    ids=["item", "bool", "nonzero", "from the host", "random"],
)
def test_the_tape_refuses_what_a_capture_cannot_hold(waits):
    with pytest.raises(AssertionError, match="cannot be captured"):
        Tape()(lambda: (waits(torch.ones(())),), "cuda")


def test_the_tape_runs_no_python_again():
    calls = []
    graphs = Graphs("cuda", Tape())
    assert [graphs(lambda x: (x + len(calls),), torch.zeros(1))[0].item()] == [0]
    counting = lambda x: (calls.append(x), (x + len(calls),))[1]  # noqa: E731
    assert [graphs(counting, torch.zeros(1))[0].item() for _ in range(3)] == [2, 2, 2], "as after one warm-up"


def small(name="uvit-tiny", **overrides):
    torch.manual_seed(0)
    overrides = dict(depth=2, num_classes=3) | overrides if name == "uvit-tiny" else overrides
    return build_model(name, **overrides).eval()


def drawn(model, **options):
    first = model[0] if isinstance(model, list) else model
    shape = (first.config.channels, first.config.image_size, first.config.image_size)
    return sample(model, schedule_of(first), 5, shape, batch_size=2, **options)


@pytest.mark.parametrize("guidance", [None, 0.5])
@pytest.mark.parametrize("sampler", [name for name, s in SAMPLERS.items() if not s.learned])
def test_samples_of_every_sampler_are_the_same_with_labels_guidance_and_batches(sampler, guidance, tape):
    """Bit for bit. The third batch is smaller; the second has labels and noise that the first has not."""
    model = small()
    options = dict(sampler=sampler, y=torch.tensor([0, 1, 2, 1, 0]), guidance=guidance, clip="every")
    for steps in (1, 4):
        assert torch.equal(drawn(model, steps=steps, cuda_graph=True, **options), drawn(model, steps=steps, **options))


@pytest.mark.parametrize("steps", [4, 7])
def test_the_number_of_recordings_does_not_grow_with_steps_or_batches(steps, tape):
    drawn(small(), sampler="dpm++2m", steps=steps, y=torch.zeros(5, dtype=torch.int64), cuda_graph=True)
    assert tape.recorded == 2 * 3, "of a full batch and of the last: the first step, the others, the last"


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
def test_samples_of_other_networks_and_dtypes_are_the_same(sampler, tape):
    dense = small(num_classes=0)
    compressed = compress(sparsify(small(num_classes=0), "2:4"))
    halved = copy.deepcopy(compressed).bfloat16()
    for model, options in (
        (small("ddpm-tiny"), {}),
        (halved, dict(network_dtype=torch.bfloat16)),
        (halved, dict(dtype=torch.bfloat16)),
        ([dense, dense, compressed, compressed], {}),
    ):
        expected = drawn(model, sampler=sampler, steps=4, **options)
        assert torch.equal(drawn(model, sampler=sampler, steps=4, cuda_graph=True, **options), expected)


def test_sampling_on_a_cpu_refuses_it():
    model = small()
    with pytest.raises(InputError, match="a CUDA graph needs a CUDA device, and the network is on cpu"):
        sample(model, schedule_of(model), 1, (3, 8, 8), steps=2, cuda_graph=True)


class Cuda:
    """Stands for torch.cuda, and writes down what is asked of it. A stream belongs to the device that is current."""

    def __init__(self):
        self.device_index, self.streams, self.log = 0, [], []

    @contextlib.contextmanager
    def device(self, index):
        before, self.device_index = self.device_index, index
        yield
        self.device_index = before

    def Stream(self):
        self.streams.append(types.SimpleNamespace(device=self.device_index, wait_stream=lambda other: None))
        return self.streams[-1]

    def current_stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: self.log.append("joined"))

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append("beside")
        yield
        self.log.append("back")

    def CUDAGraph(self):
        return types.SimpleNamespace(pool=lambda: "pool", replay="replay")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.log += ["capturing", pool, stream]
        yield
        self.log.append("captured")


def test_the_recorder_warms_up_beside_and_captures_on_one_stream_of_the_networks_device(monkeypatch):
    cuda = Cuda()
    for name in ("device", "Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    recorder = CudaRecorder()
    for pool in (None, "pool"):  # the second recording shares the memory of the first
        cuda.log.clear()
        assert recorder(lambda: cuda.log.append("run") or ("outputs",), 1) == ("replay", ("outputs",))
        stream = recorder.stream
        warm_up = ["beside", "run", "run", "back", "joined"]
        assert cuda.log == [*warm_up, "capturing", pool, stream, "run", "captured"]
        assert stream is cuda.streams[1], "the first warmed up"
    assert {stream.device for stream in cuda.streams} == {1}


@pytest.mark.gpu
@pytest.mark.parametrize("compressed", [False, True], ids=["masked", "compressed"])
@pytest.mark.parametrize("sampler", [name for name, s in SAMPLERS.items() if not s.learned])
def test_on_the_gpu(sampler, compressed, monkeypatch):
    """Exactly: a graph runs the same kernels. The last batch is smaller, and no replay may see an earlier one's."""
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    model = sparsify(small().bfloat16().cuda(), "2:4")
    model = compress(model) if compressed else model
    options = dict(sampler=sampler, steps=4, y=torch.arange(5) % 3, guidance=0.5, dtype=torch.bfloat16)
    assert torch.equal(drawn(model, cuda_graph=True, **options), drawn(model, **options))


WAITS = """
import torch
from sparsedm.cuda_graph import CudaRecorder
try:
    CudaRecorder()(lambda: (torch.ones((), device="cuda").item(),), "cuda")
except RuntimeError:
    print("refused")
"""


@pytest.mark.gpu
def test_on_the_gpu_a_function_that_waits_is_refused_by_the_capture():
    """In a process of its own: a capture that fails leaves torch's random numbers and current stream unusable."""
    child = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=120)
    assert child.stdout == "refused\n", child.stderr[-3000:]
