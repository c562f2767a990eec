import subprocess
import sys

import pytest
import torch

from bench.baselines import OURS_AND_DENSE, PROVIDERS
from bench.problems import ConvProblem, LinearProblem, MaskProblem, TrainingProblem, masked
from bench.providers import TrainMasked
from bench.shapes import ConvShape, LinearShape
from sparsedm import layers
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.pattern import Pattern, group_view, holds

LINEAR = LinearShape("m@1", "l", 40, 24, 36, "silu", residual=True)  # K is no multiple of 16
CONV = ConvShape("m@1", "l", 2, 8, 6, 5, 12, kernel=3, stride=2, padding=1)
CASES = {
    "linear-plain": (LinearProblem, LINEAR, "plain"),
    "linear-epilogue": (LinearProblem, LINEAR, "epilogue"),
    "conv": (ConvProblem, CONV, "plain"),
    "mask": (MaskProblem, LINEAR, "choose"),
    "forward": (TrainingProblem, LINEAR, "forward"),
    "backward": (TrainingProblem, LINEAR, "backward"),
    "forward+backward": (TrainingProblem, LINEAR, "forward+backward"),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_every_provider_that_runs_here_is_right(case, dtype):
    kind, shape, mode = CASES[case]
    problem = kind(shape, mode, dtype, "cpu")
    ran = 0
    for provider in OURS_AND_DENSE[problem.kernel]:
        if provider.supports(problem) is None:
            verdict = problem.check(provider.bind(problem, provider.prepare(problem)).run(), provider.sparse)
            assert verdict.right, (provider.name, verdict)
            ran += 1
    assert ran >= 2


@pytest.mark.parametrize("case", CASES)
def test_sparse_and_dense_answers_are_not_taken_for_each_other(case):
    kind, shape, mode = CASES[case]
    problem = kind(shape, mode, torch.float32, "cpu")
    provider = OURS_AND_DENSE[problem.kernel][0]
    assert not problem.check(provider.bind(problem, provider.prepare(problem)).run(), not provider.sparse).right


def test_each_gradient_is_checked():
    problem = TrainingProblem(LINEAR, "forward+backward", torch.float32, "cpu")
    provider = TrainMasked()
    right = provider.bind(problem, None).run()
    for i in range(4):
        wrong = tuple(out * 1.001 if j == i else out for j, out in enumerate(right))
        assert not problem.check(wrong, sparse=True).right, i
    with pytest.raises(ValueError, match="is longer than argument 1"):
        problem.check(right[:3], sparse=True)


def test_a_training_call_chooses_its_masks_anew(monkeypatch):
    chosen = []
    monkeypatch.setattr(layers, "select_mask", lambda *a, **k: chosen.append(a) or select_mask(*a, **k))
    run = TrainMasked().bind(TrainingProblem(LINEAR, "forward", torch.float32, "cpu"), None).run
    before = len(chosen)
    for _ in range(3):
        run()
    assert len(chosen) == before + 3


@pytest.mark.parametrize("case", ["linear-plain", "conv"])
def test_data_are_random_without_zeros_and_the_mask_is_2_4(case):
    kind, shape, mode = CASES[case]
    problem = kind(shape, mode, torch.float32, "cpu", seed=1)
    assert (problem.x != 0).all()
    assert (problem.weight != 0).all()
    assert torch.equal(problem.masked, masked(problem.weight))
    assert holds(group_view(problem.masked), Pattern(2, 4))
    assert (problem.masked != 0).float().mean() == 0.5
    assert not torch.signbit(problem.masked[problem.masked == 0]).any(), "-0.0 is not zero to every compressor"
    again = kind(shape, mode, torch.float32, "cpu", seed=1)
    assert torch.equal(problem.weight, again.weight)
    assert not torch.equal(problem.weight, kind(shape, mode, torch.float32, "cpu", seed=2).weight)


def test_an_input_axis_without_groups_leaves_only_the_dense():
    problem = ConvProblem(ConvShape("m@1", "l", 1, 3, 6, 6, 8), "plain", torch.float32, "cpu")
    reasons = {p.name: p.supports(problem) for p in PROVIDERS["conv"]}
    assert reasons["dense"] is None
    assert reasons["sparsedm 2:4"] == "the input axis 3 is not a multiple of 4"


def test_the_backward_alone_needs_nothing_that_somebody_else_imported():
    """torch leaves the module out whose setting the backward alone needs."""
    code = "from bench.problems import torch; assert torch._functorch.config.donated_buffer in (True, False)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_backward_alone_is_repeated_on_one_forward():
    problem, calls = TrainingProblem(LINEAR, "backward", torch.float32, "cpu"), []
    layer = torch.nn.Linear(LINEAR.K, LINEAR.N)
    layer.register_forward_hook(lambda *_: calls.append(1))
    first, second = problem.run(layer), problem.run(layer)
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert len(calls) == 1


def test_a_pass_over_masks_is_charged_with_all_that_it_writes():
    problem = MaskProblem(LINEAR, "choose", torch.bfloat16, "cpu")
    bytes_of = {p.name: p.traffic(problem) / (24 * 36) for p in PROVIDERS["mask"]}
    assert bytes_of["dense"] == 4 + 2
    assert bytes_of["sparsedm choose"] == 4 + 2 + 1, "its mask is of bool"
    assert bytes_of["sparsedm choose + pack"] == 4 + 2 + 1 / 8 + (1 + 1 / 8), "bits; half the values, 2 bits of each"


def test_operations_and_bytes():
    problem = LinearProblem(LINEAR, "plain", torch.bfloat16, "cpu")
    assert problem.operations == 2 * 40 * 24 * 36
    assert problem.traffic(False) == 2 * (40 * 36 + 24 * 36 + 40 * 24)
    assert problem.traffic(True) == 2 * (40 * 36 + 40 * 24) + 24 * 36 * 1.125, "1.125 bytes for each weight"
    both, back = (TrainingProblem(LINEAR, mode, torch.float32, "cpu") for mode in ("forward+backward", "backward"))
    assert (back.operations, both.operations) == (2 * problem.operations, 3 * problem.operations)


def test_bytes_of_a_residual_a_convolution_and_a_training_step():
    shape = LinearShape("m", "l", 40, 24, 36, residual=True)
    problem = LinearProblem(shape, "epilogue", torch.bfloat16, "cpu")
    assert problem.traffic(False) == 2 * (40 * 36 + 24 * 36 + 2 * 40 * 24)
    shape, pixels = ConvShape("m", "l", 2, 8, 6, 6, 16), 2 * 6 * 6
    weight = 16 * 8 * 9
    problem = ConvProblem(shape, "plain", torch.bfloat16, "cpu")
    assert problem.traffic(False) == 2 * (pixels * 8 + weight + pixels * 16)
    assert problem.traffic(True) == 2 * (pixels * 8 + pixels * 16) + weight * 1.125
    problem = TrainingProblem(LinearShape("m", "l", 40, 24, 36), "forward", torch.bfloat16, "cpu")
    assert problem.traffic(False) == 2 * 40 * (36 + 24) + 24 * 36 * (4 + 2), "the master weight, and its copy"
