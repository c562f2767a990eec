"""Graphs replay what was recorded with what is new; the recorder is a fake that runs the network again."""

import pytest
import torch

from sparsedm import cuda_graph, samplers
from sparsedm.cuda_graph import graphed
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.samplers import SAMPLERS, sample
from sparsedm.sparsity import compress, sparsify


class Recorder:
    """Like the real one: a replay reads the tensors of the recording and writes the recording's output."""

    recorded = 0

    def record(self, run, device):
        Recorder.recorded += 1
        output = run()
        return lambda: output.copy_(run()), output


@pytest.fixture(autouse=True)
def _fake(monkeypatch, request):
    if "gpu" not in request.keywords:
        monkeypatch.setattr(cuda_graph, "_Recorder", Recorder)
        monkeypatch.setattr(Recorder, "recorded", 0)


def test_every_call_computes_with_its_own_inputs_and_leaves_earlier_results_alone():
    network = lambda x, t, y: x * t[:, None] + y[:, None]  # noqa: E731
    (call,) = graphed([network], "cuda")
    inputs = [(torch.randn(3, 4), torch.rand(3), torch.randint(9, (3,))) for _ in range(3)]
    results = [call(*each) for each in inputs]
    assert Recorder.recorded == 1
    for result, each in zip(results, inputs):
        assert torch.equal(result, network(*each))


def test_another_shape_or_network_is_recorded_again_and_the_same_is_not():
    first, second = (lambda x: x + 1), (lambda x: x + 2)
    calls = graphed([first, second, first], "cuda")
    for rows in (2, 5, 2):
        x = torch.randn(rows, 3)
        assert torch.equal(calls[0](x), x + 1)
        assert torch.equal(calls[1](x), x + 2)
        assert torch.equal(calls[2](x), x + 1)
    assert Recorder.recorded == 4


@pytest.mark.parametrize("device", ["cpu", torch.device("meta")], ids=str)
def test_a_device_without_graphs_is_refused(device):
    with pytest.raises(InputError, match=f"a CUDA graph needs a CUDA device, and the network is on {device}"):
        graphed([torch.sin], device)


def small(**overrides):
    torch.manual_seed(0)
    return build_model("uvit-tiny", depth=2, num_classes=3, **overrides).eval()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_of_every_sampler_are_the_same_with_labels_guidance_and_batches(sampler, monkeypatch):
    monkeypatch.setattr(samplers, "graphed", lambda networks, device: graphed(networks, "cuda"))
    model = small()
    arguments = dict(sampler=sampler, steps=3, batch_size=2, y=torch.tensor([0, 1, 2, 1, 0]), guidance=0.5, clip=1.0)
    shape = (model.config.channels, model.config.image_size, model.config.image_size)
    expected = sample(model, schedule_of(model), 5, shape, **arguments)
    assert torch.equal(sample(model, schedule_of(model), 5, shape, cuda_graph=True, **arguments), expected)
    assert Recorder.recorded == 2, "a full batch and the last one"


def test_sampling_on_a_cpu_refuses_it():
    model = small()
    with pytest.raises(InputError, match="a CUDA graph needs a CUDA device, and the network is on cpu"):
        sample(model, schedule_of(model), 1, (3, 8, 8), steps=2, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compressed", [False, True], ids=["masked", "compressed"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_the_gpu(sampler, compressed, monkeypatch):
    """Exactly: a graph runs the same kernels. The last batch is smaller, and no replay may see an earlier one's."""
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    model = sparsify(small().bfloat16().cuda(), "2:4")
    model = compress(model) if compressed else model
    arguments = dict(sampler=sampler, steps=4, batch_size=3, y=torch.arange(8) % 3, guidance=0.5, dtype=torch.bfloat16)
    shape = (model.config.channels, model.config.image_size, model.config.image_size)
    expected = sample(model, schedule_of(model), 8, shape, **arguments)
    assert torch.equal(sample(model, schedule_of(model), 8, shape, cuda_graph=True, **arguments), expected)
