import pytest
import torch
from torch import nn

from sparsedm import layer_times, layers
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.layer_times import time_layers, time_report
from sparsedm.sparsity import sparsify


class Called(nn.Module):
    """Two linear layers of one shape and epilogue, one of another, one that cannot be 2:4, one that is not called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (layers.Linear(8, 8, activation="gelu") for _ in range(2))
        self.c, self.odd, self.idle = layers.Linear(8, 16), layers.Linear(16, 6), layers.Linear(8, 8)
        self.last = layers.Linear(6, 8)

    def example_inputs(self, batch=1):
        return (torch.zeros(batch, 5, 8),)

    def forward(self, x):
        return self.last(self.odd(self.c(self.b(self.a(x), residual=x), residual=None)))


def test_on_a_gpu_the_back_end_is_named_after_the_layer_has_run(monkeypatch):
    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def device(self, device):
            return torch.device("cuda")

    monkeypatch.setattr(layer_times, "torch", Torch())
    monkeypatch.setattr(layer_times, "median_microseconds", lambda run: len(run()))
    times = time_layers(sparsify(Called(), "2:4"), batch=3)
    assert {backend for *_, backend in times.values()} == {"dense"}


def test_layers_are_timed_dense_and_compressed_as_they_are_called(monkeypatch):
    model, timed = sparsify(Called(), "2:4"), []
    before = {name: p.clone() for name, p in model.named_parameters()}

    def microseconds(runs):
        timed.extend(tuple(run().shape) for run in runs)
        return 10.0 * len(timed) - 10, 10.0 * len(timed)

    monkeypatch.setattr(layer_times, "_microseconds", microseconds)
    times = time_layers(model, batch=3)
    assert set(times) == {"a", "b", "c", "odd"}, "not the one that is not called, nor the one without groups of four"
    assert timed == [(3, 5, 8)] * 4 + [(3, 5, 16)] * 2 + [(3, 5, 6)] * 2, "with and without residual"
    assert times["c"] == (50.0, 60.0, "dense"), "so small that the rule keeps it dense"
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert len(time_layers(sparsify(nn.Sequential(Twice()), "2:4")[0])) == 2
    assert len(timed) == 10, "layers of one shape are timed once"
    assert time_layers(compress(model), batch=3).keys() == times.keys()


class Twice(nn.Sequential):
    def __init__(self):
        super().__init__(layers.Linear(8, 8), layers.Linear(8, 8))

    def example_inputs(self, batch=1):
        return (torch.zeros(batch, 8),)


def test_the_report_of_times_admits_the_cpu(monkeypatch):
    monkeypatch.setattr(layer_times, "time_layers", lambda *_: {"a": (100.0, 50.0, "cpu"), "b": (40.0, 80.0, "dense")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = time_report(Twice(), 4)
    assert "2.00x  cpu" in text
    assert "dense: 0.140 ms; sparse where it gains: 0.090 ms" in text
    assert text.endswith("batch 4, float32, CPU: no prediction for a GPU")


def test_without_2_4_layers_there_is_nothing_to_time():
    with pytest.raises(InputError, match="give --pattern 2:4"):
        time_report(Twice())


def test_the_dense_time_is_of_a_layer_without_a_mask(monkeypatch):
    def timed(runs):
        with monkeypatch.context() as patch:
            patch.setattr(layers.Linear, "selection", None)
            assert runs[0]().shape == runs[1]().shape
        return 1.0, 1.0

    monkeypatch.setattr(layer_times, "_microseconds", timed)
    assert time_layers(sparsify(Twice(), "2:4"))
