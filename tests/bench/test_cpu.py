"""Suite `cpu` at tiny sizes, and its two charts."""

from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from bench import charts, cpu, plot, run
from bench.networks import ModelShape
from bench.problems import LinearProblem
from bench.results import DENSE, ONEDNN, Results, read, write
from bench.shapes import ConvShape
from sparsedm.kernels.cpu import rules

TINY = {"rounds": 1, "per_round": 1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results file of every part of PLAN, each with one tiny shape."""
    networks = [ModelShape("uvit-tiny", 1, cpu.QUICKSTART, "quickstart")]
    conv = [ConvShape("ddpm-cifar10@8", "conv", 1, 16, 8, 8, 8)]
    shapes = {"end-to-end": networks, "train": networks, "conv": conv}
    parts, seen = [], set()
    for part in cpu.PLAN:
        model = part.shapes()[0].model
        if (part.suite, model, part.threads) not in seen:
            seen.add((part.suite, model, part.threads))
            small = shapes.get(part.suite) or cpu.linear_shapes(model, [(40, 32, 32)])
            parts.append(replace(part, shapes=lambda small=small: small, limits=TINY))
    file = tmp_path_factory.mktemp("cpu") / "results.csv"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "PLAN", parts)
        threads = torch.get_num_threads()
        run.run_suites("cpu", run.Session(Results(file), torch.device("cpu"), torch.float32))
        assert torch.get_num_threads() == threads
    return read(file)


def test_every_part_is_measured_by_right_providers(measured):
    in_bf16 = [r for r in measured if r["status"] != "ok"]
    if rules.bf16_instructions():
        assert {(r["suite"], r["provider"], r["status"]) for r in in_bf16} == {("train", ONEDNN, "unsupported")}
        assert "only in bf16 on this CPU" in in_bf16[0]["reason"]
    else:
        assert not in_bf16
    assert {r["suite"] for r in measured} == {"gemm", "conv", "end-to-end", "train"}
    assert {r["model"] for r in measured if r["suite"] == "gemm"} == {charts.LAYERS, "square", "few rows"}
    for suite in ("gemm", "conv", "end-to-end", "train"):
        found = {r["provider"] for r in measured if r["suite"] == suite}
        assert found >= {"dense", ONEDNN, "sparsedm 2:4", "sparsedm 1:4"}, suite
    ways = {(r["threads"], r["method"]) for r in measured if r["status"] == "ok"}
    assert ways == {("1", "thread_time"), ("2", "perf_counter")}


def test_checks_tell_right_from_wrong():
    problem = cpu.Product(cpu.linear_shapes("square", [(40, 32, 32)])[0], "plain", torch.float32, "cpu")
    for provider in cpu.LINEAR_PROVIDERS:
        bound = provider.bind(problem, provider.prepare(problem))
        assert problem.check(bound.run(), provider.sparse, bound.weight).right
        assert not problem.check(bound.run() + 1e-3, provider.sparse, bound.weight).right
        if provider.sparse:
            assert not problem.check(bound.run(), False).right, "a sparse product is not the dense one"


def test_only_fp32_on_a_cpu(tmp_path, capsys):
    assert run.main(["--suite", "cpu", "--dtype", "bf16", "--out", str(tmp_path / "r.csv")]) == 2
    assert "suite cpu measures fp32 products on a CPU" in capsys.readouterr().err


def test_convolutions_of_the_plan_are_those_that_can_be_sparse():
    convolutions = cpu.conv_shapes(8)
    assert convolutions
    assert all((s.kernel, s.stride) == (3, 1) and s.channels % 4 == 0 for s in convolutions)


def test_charts_say_both_denominators(measured, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: saved.append(figure))
    write(tmp_path / "r.csv", measured)
    names = {path.stem for path in plot.draw_all([tmp_path / "r.csv"], tmp_path)}
    assert {"cpu-patterns", "cpu-networks"} <= names
    for figure in saved:
        caption = figure.get_supxlabel()
        if "best dense" in caption:
            assert caption.startswith("CPU: ")
            assert "F.linear" in caption
            assert not figure.texts[2:], "no warning across a chart that is about CPUs"


def test_ratios_of_the_charts(measured):
    row = next(r for r in measured if r["model"] == charts.LAYERS and r["mode"] == "plain")
    times = {"dense": 30.0, ONEDNN: 20.0, "sparsedm 2:4": 10.0}
    rows = [row | {"provider": provider, "p50_us": time} for provider, time in times.items()]
    rows += [r | {"model": "square", "M": 64.0} for r in rows]
    figure = Figure()
    assert charts.patterns(figure, rows)
    left, right = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines["2:4"] == [2.0]
    assert lines["F.linear"] == pytest.approx([20 / 30])
    assert [t.get_text() for t in right.texts] == ["2.00", "3.00"]
    assert not charts.patterns(Figure(), [r for r in rows if r["provider"] != ONEDNN])
    assert set(times) - set(DENSE) == {"sparsedm 2:4"}


def test_networks_are_compared_with_eager_torch_and_the_best_network(measured):
    row = next(r for r in measured if r["suite"] == "end-to-end")
    for onednn, shown in ((20.0, ["1.50", "3.00 (2.00)"]), (60.0, ["1.00", "3.00 (3.00)"])):
        times, figure = {"dense": 30.0, ONEDNN: onednn, "sparsedm 2:4": 10.0}, Figure()
        assert charts.calls(figure, [row | {"provider": provider, "p50_us": time} for provider, time in times.items()])
        assert [t.get_text().strip() for t in figure.axes[0].texts] == shown


def test_a_shape_has_the_sizes_that_its_name_says():
    for shape in cpu.linear_shapes("x", cpu.SIZES):
        assert shape.layer == f"{shape.M}x{shape.K}->{shape.N}"
        problem = LinearProblem(replace(shape, M=1), "plain", torch.float32, "cpu")
        assert (tuple(problem.weight.shape), problem.x.shape[1]) == ((shape.N, shape.K), shape.K)
    assert {(s.N, s.K) for s in cpu.linear_shapes("x", [(257, 512, 1536)])} == {(1536, 512)}


def test_layers_are_timed_as_inside_of_hold_masks(monkeypatch):
    """No checksum of the compressed weight in a timed product; masks are selected once in a training step."""
    problem = cpu.Product(cpu.linear_shapes("x", [(40, 32, 64)])[0], "plain", torch.float32, "cpu")
    held = []
    monkeypatch.setattr(cpu, "sparse24_linear", lambda *a, cache, **k: held.append("held" in cache))
    cpu.Sparse("2:4").bind(problem, None).run()
    assert held == [True]
    monkeypatch.setattr(cpu, "hold_masks", lambda network: held.append(network) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cpu.TrainingStep.outputs(None, "network", ())
    assert held[1:] == ["network"]
