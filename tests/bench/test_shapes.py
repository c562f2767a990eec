import pytest
import torch
from torch import nn

from bench.shapes import ConvShape, LinearShape, of_model, select, sweep, trace
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.models import build_model


@pytest.mark.parametrize("name", ["uvit-tiny", "uvit-cifar10-small", "ddpm-tiny"])
def test_shapes_hold_every_multiplication_that_inspect_counts(name):
    shapes, table = of_model(name, 3), inspect(build_model(name, device="meta"))
    assert sum(s.layers for s in shapes) == len(table.rows)
    assert sum(s.layers * s.M * s.N * s.K for s in shapes) == 3 * table.totals()["macs"]


def test_epilogues_are_those_of_the_layers():
    shapes = {s.layer: s for s in of_model("uvit-cifar10-small", 64) if isinstance(s, LinearShape)}
    fc1, fc2 = shapes["in_blocks.0.mlp.fc1"], shapes["in_blocks.0.mlp.fc2"]
    assert (fc1.M, fc1.N, fc1.K, fc1.activation, fc1.residual, fc1.layers) == (16448, 2048, 512, "gelu", False, 13)
    assert (fc2.M, fc2.N, fc2.K, fc2.activation, fc2.residual, fc2.layers) == (16448, 512, 2048, None, True, 13)


def test_a_strided_convolution_counts_its_output_pixels():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    shape = ConvShape("m", "l", 2, 4, 9, 7, 6, kernel=3, stride=2, padding=1)
    out = layer(torch.zeros(2, 4, 9, 7))
    assert (out.numel() // 6, 6, 36) == (shape.M, shape.N, shape.K)


def test_trace_computes_nothing_and_leaves_no_hook():
    model = build_model("uvit-tiny")
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = [name for name, _ in trace(model, "m", 2)]
    assert sorted(names) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_sweep_can_be_cut_down_to_one_number_of_rows():
    assert [(s.M, s.N, s.K) for s in select("square@8192", LinearShape)] == [(8192, 8192, 8192)]
    assert {s.M for s in select("grid@1024", LinearShape)} == {1024}
    assert len(select("grid@1024", LinearShape)) == 5
    with pytest.raises(InputError, match="hold no linear layer"):
        select("square@8191", LinearShape)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        # DiT, table 4: 118.64 Gflops (their flops are MACs) at 256x256, of which the attention products, the patch
        # embedding, the conditioning and the last layer are not in these shapes: 2 * 256 * 256 * 1152 * 28 = 4.2 G
        ("dit-imagenet256-xlarge", 114.4e9),
    ],
)
def test_published_networks_have_the_published_cost(name, macs):
    assert sum(s.layers * s.M * s.N * s.K for s in of_model(name, 1)) == pytest.approx(macs, rel=0.005)


def test_sizes_of_published_networks():
    every = select("dit-imagenet256-xlarge@2,sd3-medium@2,sd-1.5@2", LinearShape)
    assert {(s.M, s.N, s.K) for s in every} >= {
        (512, 4608, 1152),
        (8192, 6144, 1536),
        (666, 1536, 6144),
        (8192, 2560, 320),
    }
    convolutions = select("sd-1.5@1", ConvShape)
    assert sum(s.layers for s in convolutions) == 44, "22 residual blocks of two 3x3 convolutions"


def test_sweeps():
    squares = [(s.M, s.N, s.K) for s in sweep("square")]
    assert (min(squares), max(squares), len(squares)) == ((256, 256, 256), (16384, 16384, 16384), 11)
    assert squares[0] == (8192, 8192, 8192), "what is asked for first"
    assert {(s.N, s.K) for s in sweep("m-sweep")} == {(4096, 4096)}
    assert len({(s.M, s.N) for s in sweep("grid")}) == 25
    assert max(s.M * s.N * s.K for name in ("square", "m-sweep", "grid") for s in sweep(name, quick=True)) <= 1 << 30


def test_select_reads_lists_batches_and_drops_doubles():
    two = select("uvit-tiny@2, uvit-tiny@2,uvit-tiny@4", LinearShape)
    assert {s.model for s in two} == {"uvit-tiny@2", "uvit-tiny@4"}
    assert len(two) == len(set(two))
    assert {s.model for s in select("uvit-tiny", LinearShape, batches=(5,))} == {"uvit-tiny@5"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sqare", "unknown shapes 'sqare': one of uvit-tiny"),
        ("uvit-tiny@many", "write model@batch"),
        ("uvit-tiny@", "write model@batch"),
        ("uvit-tiny@0", "'0' is not a whole number from 1"),
        ("square@99999999999999999999", "'99999999999999999999' is not a whole number from 1"),
        ("", "hold no linear layer"),
    ],
)
def test_unknown_shapes_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        select(spec, LinearShape)
