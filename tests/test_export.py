"""Whole networks, masked and compressed, compiled, exported, compiled ahead of time and in CUDA graphs."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from sparsedm import samplers
from sparsedm.compressed import CompressedLinear
from sparsedm.compression import bake, compress, decompress
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.recipes import QUICKSTART
from sparsedm.sparsity import masked_layers, sparsify
from tests.tolerance import assert_as_good_as_torch

NETWORKS = {
    "uvit": {"kind": "uvit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2},
    "dit": {"kind": "dit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2, "num_classes": 0},
    "ddpm": {"kind": "ddpm", "image_size": 8, "width": 32, "multipliers": (1, 2), "attention": (4,), "blocks": 1},
}


EVERY = [f"{network} {form}" for network in NETWORKS for form in ("masked", "compressed")]


def each(*quick):
    """Every network, masked and compressed; by default those that are named here, each network once."""
    return pytest.mark.parametrize(
        "network", [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in EVERY], indirect=True
    )


@pytest.fixture(params=EVERY)
def network(request):
    """A small U-ViT, DiT or DDPM in eval mode, masked or compressed, whose output is not zero."""
    name, form = request.param.split()
    model = build_model(NETWORKS[name]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    sparsify(model, "2:4")
    return compress(model) if form == "compressed" else model


def inputs_of(model, batch):
    x, t, *_ = model.example_inputs(batch)
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(batch), dtype=x.dtype), t


def assert_same(out, network, inputs):
    """Exactly for a masked network; a compressed one may run in another kernel than its eager self."""
    if not any(isinstance(module, CompressedLinear) for module in network.modules()):
        assert torch.equal(out, network(*inputs))
        return
    plain = decompress(network)
    low = plain(*inputs)
    assert_as_good_as_torch(out, plain.double()(*(t.double() for t in inputs)), low)


@each("uvit masked", "dit compressed", "ddpm masked")
@torch.no_grad()
def test_one_graph_serves_every_batch_size(network, monkeypatch):
    torch._dynamo.reset()
    with monkeypatch.context() as context:  # the back end of a graph on a CPU
        context.setenv("SPARSEDM_BACKEND", "dense")
        network(*inputs_of(network, 1))  # a compressed layer prepacks its weight at its first call, which is not traced
    graphs = CompileCounter()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=graphs)
    for batch in (2, 3, 7):
        assert_same(compiled(*inputs_of(network, batch)), network, inputs_of(network, batch))
    assert graphs.frame_count == 1


@each("uvit compressed", "dit masked", "ddpm compressed")
@torch.no_grad()
def test_an_exported_network_takes_every_batch_size(network):
    network(*inputs_of(network, 1))  # which makes a compressed network keep its weights dense, too
    program = exported(network)
    held = sum(t.numel() for t in program.constants.values()) + sum(t.numel() for t in program.state_dict.values())
    assert held <= 1.1 * sum(t.numel() for t in network.state_dict().values()), "the program holds no weight twice"
    for batch in (2, 5):
        assert_same(program.module()(*inputs_of(network, batch)), network, inputs_of(network, batch))


@pytest.mark.slow
@torch.no_grad()
def test_a_network_runs_compiled_ahead_of_time(network, tmp_path):
    package = torch._inductor.aoti_compile_and_package(exported(network), package_path=str(tmp_path / "network.pt2"))
    inputs = inputs_of(network, 5)
    y = torch._inductor.aoti_load_package(package)(*inputs)
    usual = network(*inputs)
    assert_as_good_as_torch(y, network.double()(*doubled(inputs)), usual)


@pytest.mark.gpu(seconds=300)  # it compiles a whole network
@torch.no_grad()
def test_a_network_runs_in_cuda_graphs(network, monkeypatch):
    """A compressed one by a sparse kernel; which is the quickest is not the question here."""
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    monkeypatch.setenv("SPARSEDM_BACKEND", "wgmma" if torch.cuda.get_device_capability() == (9, 0) else "mma")
    torch._dynamo.reset()
    network = network.cuda().bfloat16()
    x, t = (value.cuda() for value in inputs_of(network, 4))
    usual = network(x, t).clone()  # kernels are compiled, and weights arranged, before a graph is captured
    compiled = torch.compile(network, mode="reduce-overhead", fullgraph=True)
    exact = copy.deepcopy(network).double()(x.double(), t.double())
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_as_good_as_torch(compiled(x, t).clone(), exact, usual)


def exported(network):
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(network, inputs_of(network, 2), dynamic_shapes=({0: batch}, {0: batch}))


def doubled(inputs):
    return tuple(value.double() for value in inputs)


# ---- ONNX


def exported_to_onnx(network, inputs):
    pytest.importorskip("onnxscript")
    dimensions = tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in inputs)
    return torch.onnx.export(network, inputs, dynamo=True, dynamic_shapes=dimensions, verbose=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_the_quickstarts_student_draws_the_same_images_in_onnxruntime(tmp_path):
    """Its file holds the zeros, and it takes every batch."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    recipe = QUICKSTART["synthetic"]
    model = build_model(recipe.model, **recipe.overrides, num_classes=6).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    plain = bake(sparsify(model, "2:4"))
    file = tmp_path / "student.onnx"
    exported_to_onnx(plain, (torch.randn(2, 3, 12, 12), torch.tensor([3.0, 700.0]), torch.tensor([1, 2]))).save(file)
    weights = [onnx.numpy_helper.to_array(w) for w in onnx.load(file).graph.initializer]
    zeros = sum(int((layer.effective_weight() == 0).sum()) for _, layer in masked_layers(model))
    assert sum(int((w == 0).sum()) for w in weights if w.ndim > 1 and w.dtype == "float32") == zeros > 0

    session = runtime.InferenceSession(file)
    names = [argument.name for argument in session.get_inputs()]

    def network(*inputs):
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs)})[0])

    options = {"steps": 4, "y": torch.tensor([0, 1, 2]), "clip": "every"}
    ours, theirs = (samplers.sample(m, schedule_of(model), 3, (3, 12, 12), **options) for m in (model, network))
    assert (ours - theirs).abs().max() < 1e-3
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("form", [sparsify, lambda model, pattern: compress(sparsify(model, pattern))])
def test_in_an_onnx_export_masks_are_refused(form, monkeypatch):
    model = build_model(NETWORKS["uvit"]).eval()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    network, inputs = form(model, "2:4"), inputs_of(model, 2)
    network(*inputs)  # outside of a tracer the flag is not looked at
    with pytest.raises(InputError, match=r"export sparsedm\.bake\(model\)"):
        torch.export.export(network, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [sparsify, lambda model, pattern: compress(sparsify(model, pattern))])
@pytest.mark.parametrize("make", [torch.jit.trace, torch.jit.script])
def test_torch_jit_says_what_it_takes(form, make):
    """A trace of a mask would record the memory that a C kernel fills as memory that nothing fills."""
    network = form(nn.Sequential(nn.Linear(64, 64)), "2:4").eval()
    x = torch.randn(2, 64)
    with pytest.raises(InputError, match=r"give it sparsedm\.bake\(model\)"), torch.no_grad():
        make(network, x)
    assert torch.equal(make(bake(network), x)(x), bake(network)(x))


@pytest.mark.slow
@pytest.mark.parametrize("form", [sparsify, lambda model, pattern: compress(sparsify(model, pattern))])
@pytest.mark.parametrize("name", ["uvit", "ddpm"])
def test_torch_onnx_export_says_what_to_export(form, name):
    model = build_model(NETWORKS[name]).eval()
    inputs = inputs_of(model, 2)
    with pytest.raises(Exception, match=r"export sparsedm\.bake\(model\)"):
        exported_to_onnx(form(model, "2:4"), inputs)
