"""How torch runs the code just now, asked in eager, compiled and exported code."""

import torch

from sparsedm.kernels import tracing


class Telling(torch.nn.Module):
    def forward(self, x):
        return x * (2 if tracing.exporting() else 3) + (tracing.autocast_dtype(x.device) == torch.bfloat16)


def test_compiled_and_exported_code_knows_which_it_is_and_of_autocast():
    """In one graph. With torch 2.11, its own functions for it break the graph or are wrong."""
    one, model = torch.ones(1), Telling()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(one) == model(one) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(one) == model(one) == 4
    assert torch.export.export(model, (one,)).module()(one) == 2
    assert tracing.autocast_dtype(torch.device("meta")) is None
