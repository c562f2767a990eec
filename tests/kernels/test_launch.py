"""Where an operation runs: what is forced, what a device can do, what is known while code is traced."""

import subprocess
import sys

import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.kernels import launch


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("SPARSEDM_BACKEND", raising=False)


def test_backends(monkeypatch):
    assert launch.forced_backend() is None
    monkeypatch.setenv("SPARSEDM_BACKEND", "torch")
    assert launch.forced_backend() == "torch"
    assert not launch.uses_triton(torch.ones(1), None)
    with pytest.raises(InputError, match="one device, not on cpu and meta"):
        launch.uses_triton(torch.ones(1), torch.ones(1, device="meta"))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now fails
import torch, sparsedm, sparsedm.cli
model = sparsedm.sparsify(sparsedm.build_model("uvit-tiny", image_size=8, dim=32, depth=2, heads=2), "2:4")
inputs = model.example_inputs(2)
model(*inputs).sum().backward()
small = sparsedm.compress(model.eval())
with torch.no_grad():
    assert (small(*inputs) - model(*inputs)).abs().max() < 1e-5
assert {row.backend for row in sparsedm.inspect(small).rows if row.pattern == "2:4"} == {"dense"}
"""


def test_the_package_works_where_triton_is_missing():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, timeout=120)


def test_an_amd_gpu_gets_no_kernels_in_nvidias_instructions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert launch.capability(torch.device("cuda")) == (9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.capability(torch.device("cuda")) is None


class Telling(torch.nn.Module):
    def forward(self, x):
        return x * (2 if launch.exporting() else 3) + (launch.autocast_dtype(x.device) == torch.bfloat16)


def test_compiled_and_exported_code_knows_which_it_is_and_of_autocast():
    """In one graph. With torch 2.11, its own functions for it break the graph or are wrong."""
    one, model = torch.ones(1), Telling()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(one) == model(one) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(one) == model(one) == 4
    assert torch.export.export(model, (one,)).module()(one) == 2
    assert launch.autocast_dtype(torch.device("meta")) is None
