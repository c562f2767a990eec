from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import baselines, networks
from bench.networks import (
    STEP_PROVIDERS,
    TRAINING_PROVIDERS,
    ModelShape,
    NetworkProblem,
    NetworkProvider,
    TrainingStepProblem,
    baked,
    draw,
    replayed,
    sampling_rows,
    table3_shapes,
    with_cusparselt,
)
from bench.results import Results, read
from bench.run import Session, run_suites
from sparsedm import diffusion, samplers
from sparsedm.compressed import CompressedLinear
from sparsedm.cuda_graph import Graphs
from sparsedm.inspection import inspect
from sparsedm.models import build_model
from sparsedm.sparsity import masked_layers, set_masking

SHAPE = ModelShape("uvit-tiny", 2, (("depth", 2), ("dim", 32), ("heads", 2)), "small")


@pytest.fixture(scope="module")
def step():
    return NetworkProblem(SHAPE, "step", torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_way_to_compute_a_step_is_right(dtype):
    problem = NetworkProblem(SHAPE, "step", dtype, "cpu")
    names = set()
    for provider in STEP_PROVIDERS:
        if provider.supports(problem) is None:
            out = provider.bind(problem, None).run()
            assert problem.check(out, provider.sparse).right
            assert not problem.check(out, not provider.sparse).right
            names.add(provider.name)
    assert names == {"dense", "sparsedm masked", "sparsedm 2:4"}


def test_the_sparse_network_holds_the_masked_dense_weights(step):
    plain = baked(step.masked)
    assert not masked_layers(plain)
    for name, layer in masked_layers(step.masked):
        dense = step.weight.get_submodule(name).weight
        assert torch.equal(plain.get_submodule(name).weight, dense * layer.current_mask())
        assert torch.equal(layer.weight, dense)


def test_where_selects_the_sparse_layers():
    problem = NetworkProblem(SHAPE, "step", torch.float32, "cpu", where=r"mlp\.fc1$")
    assert {name.rpartition(".")[2] for name, _ in masked_layers(problem.masked)} == {"fc1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_steps_are_right_and_start_from_the_same_weights(dtype):
    problem = TrainingStepProblem(SHAPE, "training step", dtype, "cpu")
    for provider in TRAINING_PROVIDERS:
        if provider.supports(problem) is None:
            run = provider.bind(problem, None).run
            for _ in range(2):
                assert problem.check(run(), provider.sparse).right, provider.name


def test_a_training_step_without_the_decay_of_sr_ste_is_wrong():
    problem = TrainingStepProblem(SHAPE, "training step", torch.float32, "cpu")
    (masked,) = [p for p in TRAINING_PROVIDERS if p.name == "sparsedm masked"]
    assert problem.check(masked.bind(problem, None).run(), sparse=True).right
    set_masking(problem.masked, decay=0.0)
    assert not problem.check(masked.bind(problem, None).run(), sparse=True).right


@pytest.mark.parametrize("seed", [0, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_lucky_loss_of_the_reference_condemns_nobody(seed):
    """With seed 3 torch's loss in bf16 is off by less than a third of what autocast is, with others by more."""
    problem = TrainingStepProblem(ModelShape("uvit-tiny", 4), "training step", torch.bfloat16, "cpu", seed)
    for provider in TRAINING_PROVIDERS:
        if provider.supports(problem) is None:
            assert problem.check(provider.bind(problem, None).run(), provider.sparse).right, provider.name


@pytest.mark.parametrize("shape", [SHAPE, ModelShape("dit-tiny", 2)], ids=["uvit", "dit"])
def test_cusparselt_takes_the_place_of_our_linear_layers(shape, monkeypatch):
    """The library is played by torch; what it would be given is the masked weight and the columns of x."""
    step = NetworkProblem(shape, "step", torch.float32, "cpu")
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda w, x, bias, **how: (w @ x).t() + (0 if bias is None else bias))
    monkeypatch.setattr(baselines, "tuned_algorithm", lambda *shape: baselines.Algorithm(0))
    network = with_cusparselt(step)
    assert step.check(step.outputs(network, step.inputs), sparse=True).right
    left = {n for n, m in network.named_modules() if isinstance(m, nn.Linear | CompressedLinear)}
    assert not left & {name for name, _ in masked_layers(step.masked)}


def test_sampling_compares_images_and_counts_bytes(step):
    able = [p for p in STEP_PROVIDERS if p.name in ("dense", "sparsedm 2:4", "cuSPARSELt")]
    rows = sampling_rows("end-to-end", step, able, steps=2, rounds=1)
    values = {(r["provider"], r["metric"]): r for r in rows}
    assert {name for name, _ in values} == {"dense", "sparsedm 2:4"}, "cuSPARSELt does not run here"
    assert values["sparsedm 2:4", "image difference"]["value"] < 1e-3
    assert ("dense", "image difference") not in values
    bytes_of = {name: values[name, "weights"]["value"] for name in ("dense", "sparsedm 2:4")}
    parameters = sum(p.numel() for p in build_model("uvit-tiny", **dict(SHAPE.options)).parameters())
    sparse = sum(layer.weight.numel() for _, layer in masked_layers(step.masked))
    assert bytes_of == {"dense": 4 * parameters, "sparsedm 2:4": 4 * parameters - sparse * (4 - 2 - 1 / 8)}
    time = values["dense", "time"]["p50_us"]
    assert values["dense", "images per second"]["value"] == pytest.approx(2 / time * 1e6)


def test_images_of_a_wrong_network_differ(step):
    confused = NetworkProvider("the dense network, sold as sparse", lambda problem: problem.weight, sparse=True)
    (row,) = [r for r in sampling_rows("x", step, [confused], 2, rounds=1) if r["metric"] == "image difference"]
    difference = (draw(step.weight, step, 2) - draw(baked(step.masked), step, 2)).abs().max().item()
    assert row["value"] == difference > 0.01


def test_a_network_is_made_once_for_its_step_and_its_samples(step):
    made = []
    provider = NetworkProvider("counted", lambda problem: made.append(1) or problem.weight, sparse=False)
    provider.bind(step, None).run()
    sampling_rows("end-to-end", step, [provider], steps=2, rounds=1)
    assert made == [1]


def test_compiled_code_gets_what_eager_calls_were_tuned_to(monkeypatch):
    """The compiler only looks; on a GPU it would bake in whatever the layers know by then."""
    problem, known = NetworkProblem(SHAPE, "step", torch.float32, "cpu"), []

    def compiler(network):
        known.extend(bool(m._prepacked) for m in network.modules() if isinstance(m, CompressedLinear))
        return network

    monkeypatch.setattr(networks, "max_autotune", compiler)
    (provider,) = [p for p in STEP_PROVIDERS if p.name == "sparsedm 2:4 compiled"]
    provider.bind(problem, None)
    assert known
    assert all(known), "every layer has prepacked its weight for a call"


def test_samples_by_replayed_graphs_are_the_same(step):
    """A graph that is replayed is played by running the same call again into the same memory."""
    recorded = []

    def record(run, device):
        recorded.append(outputs := run())
        return lambda: [old.copy_(new) for old, new in zip(outputs, run())], outputs

    call = replayed(step.weight, Graphs("cuda", record))
    assert torch.equal(draw(call, step, 3), draw(step.weight, step, 3))
    assert len(recorded) == 1


def test_a_provider_that_cannot_sample_does_not_cost_the_others_their_samples(step):
    def broken(problem):
        network = build_model("uvit-tiny", **dict(SHAPE.options))
        network.forward = lambda *inputs: (_ for _ in ()).throw(RuntimeError("no graph"))
        return network

    bad = NetworkProvider("bad", broken, sparse=True)
    rows = sampling_rows("end-to-end", step, [bad, STEP_PROVIDERS[0]], steps=2, rounds=1)
    assert [(r["provider"], r["status"]) for r in rows][:2] == [("bad", "failed"), ("dense", "ok")]
    assert rows[0]["reason"] == "RuntimeError: no graph"


def test_peak_memory_counts_all_forms_of_the_weights_and_the_activations(step, monkeypatch):
    memory = {"held": 1000, "peak": 0}

    def network(*inputs):
        memory["held"] += 300 if memory["held"] == 1050 else 0  # the first call arranges the weights
        memory["peak"] = memory["held"] + 77
        return inputs[0]

    def made(problem):
        memory["held"] += 50
        return network

    monkeypatch.setattr(networks, "allocated", lambda device: memory["held"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    assert networks.peak_memory(NetworkProvider("n", made, sparse=False), step) == 50 + 300 + 77


def test_table3_is_the_published_grid_and_the_same_at_the_real_width():
    shapes = table3_shapes()
    configs = [build_model(s.preset, device="meta", **dict(s.options)).config for s in shapes]
    assert len(set(configs)) == 24
    assert {(c.patch_size, c.mlp_ratio) for c in configs} == {(p, r) for p in (1, 2, 4) for r in (1, 2, 4, 8)}
    assert {(c.dim, c.depth, c.heads) for c in configs} == {(8192, 0, 8), (512, 12, 8)}
    assert {(s.batch, s.sampler, s.attention_in_fp32) for s in shapes} == {(64, "euler-maruyama-uvit", True)}


def test_attention_in_fp32_is_only_that():
    problems = []
    for in_fp32 in (False, True):
        torch.manual_seed(0)  # biases
        problems.append(NetworkProblem(replace(SHAPE, attention_in_fp32=in_fp32), "step", torch.bfloat16, "cpu"))
    plain, wide = problems
    with torch.no_grad():
        exact = plain.answer(plain.weight, torch.float64)[0]
        assert torch.equal(wide.answer(wide.weight, torch.float64)[0], exact)
        error_of = {p: (p.outputs(p.weight, p.inputs)[0] - exact).abs().mean() for p in (plain, wide)}
    assert error_of[wide] != error_of[plain]
    for provider in STEP_PROVIDERS:
        if provider.supports(wide) is None:
            assert wide.check(provider.bind(wide, None).run(), provider.sparse).right


def test_sampling_with_noise_in_every_step_is_that_of_the_package():
    problem = NetworkProblem(replace(SHAPE, sampler="euler-maruyama-uvit"), "step", torch.float32, "cpu")
    ours = samplers.sample(
        *(problem.weight, diffusion.schedule_of(problem.weight), 2, (3, 32, 32)),
        **{"sampler": "euler-maruyama-uvit", "steps": 3},
    )

    def network(x, t, *labels):
        return problem.weight(x, torch.full_like(t, t[0]))

    assert torch.equal(draw(network, problem, 3), ours)
    assert torch.equal(draw(network, problem, 3), ours), "the same noise every time"


def test_network_suites_write_their_rows_and_resume(tmp_path):
    def session(resume):
        results = Results(tmp_path / "r.csv", resume)
        limits = {"rounds": 1, "per_round": 1}
        return Session(results, torch.device("cpu"), torch.float32, True, "uvit-tiny@1", limits=limits)

    first = session(False)
    for suite in ("end-to-end", "train"):
        run_suites(suite, first)
    rows = read(tmp_path / "r.csv")
    assert {(r["suite"], r["mode"]) for r in rows} == {
        ("end-to-end", "step"),
        ("end-to-end", "sampling, 4 steps"),
        ("train", "training step"),
    }
    again = session(True)
    for suite in ("end-to-end", "train"):
        run_suites(suite, again)
    assert len(read(tmp_path / "r.csv")) == len(rows), "what is there is not measured again"


def test_operations_are_two_for_each_mac_and_a_backward_is_two_passes():
    shape = ModelShape("uvit-tiny", 3, (("image_size", 8), ("dim", 16), ("depth", 2), ("heads", 2)))
    step = NetworkProblem(shape, "step", torch.float32, "cpu")
    assert step.operations == 2 * 3 * inspect(step.weight).totals()["macs_with_attention"]
    assert TrainingStepProblem(shape, "training step", torch.float32, "cpu").operations == 3 * step.operations
