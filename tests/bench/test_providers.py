import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.sparse._semi_structured_conversions import _sparse_semi_structured_tile

from bench import baselines, providers
from bench.baselines import (
    PROVIDERS,
    TILES,
    Algorithm,
    CuSparseLt,
    CuSparseLtTuned,
    Cutlass,
    TileLang,
    TrainTile,
)
from bench.problems import TWO_FOUR, ConvProblem, LinearProblem, MaskProblem, TrainingProblem
from bench.providers import MOST_SPLITK_ROWS, Baseline, DenseCompiled, DenseFused, Sparse24
from bench.results import DENSE
from bench.shapes import ConvShape, LinearShape
from sparsedm.kernels.pattern import holds
from sparsedm.kernels.sparse24.dispatch import Choice, Measured
from sparsedm.kernels.sparse24.format import unpack

SHAPE = LinearShape("square", "64", 64, 64, 64, "gelu")


def test_everything_that_needs_a_gpu_says_so_on_a_cpu():
    problem = LinearProblem(SHAPE, "plain", torch.float32, "cpu")
    reasons = {p.name: p.supports(problem) for p in PROVIDERS["linear"]}
    able = {name for name, reason in reasons.items() if reason is None}
    assert able == {"dense", "sparsedm masked", "sparsedm 2:4", "sparsedm 2:4 dense"}
    assert reasons["cuSPARSELt"] == reasons["cuSPARSELt tuned"] == reasons["CUTLASS"] == "needs a CUDA device"
    assert reasons["dense compiled"] == "max-autotune compares GPU kernels: there is none on a CPU"
    assert reasons["sparsedm 2:4 mma"] == "backend=mma cannot run: not an NVIDIA GPU, or no Triton"


def test_names_are_unique_and_the_denominators_are_there():
    for kernel, every in PROVIDERS.items():
        names = [p.name for p in every]
        assert len(names) == len(set(names)), kernel
        assert names[0] == "dense"
        assert all(not p.sparse for p in every if p.name in DENSE)


def test_a_back_end_that_is_asked_for_runs_whatever_the_environment_says(monkeypatch):
    problem = LinearProblem(SHAPE, "epilogue", torch.float32, "cpu")
    monkeypatch.setenv("SPARSEDM_BACKEND", "torch")
    provider = Sparse24("dense")
    assert provider.supports(problem) is None
    bound = provider.bind(problem, provider.prepare(problem))
    assert bound.detail == "dense: backend=dense"
    assert problem.check(bound.run(), sparse=True).right


def test_compilation_is_for_each_shape_and_never_gives_up(monkeypatch):
    """The compiler is replaced by one that only counts, because the real one needs a GPU to choose for."""
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        graphs.append([tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, mode, **options: real(call, backend=backend, **options))
    for rows in range(1, 13):
        problem = LinearProblem(LinearShape("m", "l", rows, 8, 8), "plain", torch.float32, "cpu")
        out = DenseCompiled().bind(problem, None).run()
        assert problem.check(out, sparse=False).right
    assert len(graphs) == 12, "one for each shape"


def test_the_epilogue_of_cublas_is_the_strongest_dense_without_a_compiler():
    """torch has it on a CPU, too, where it is the erf GELU: only the sum of its parts is looked at."""
    problem = LinearProblem(LinearShape("m", "l", 8, 16, 8, "gelu_tanh", True), "epilogue", torch.float64, "cpu")
    expected = F.gelu(F.linear(problem.x, problem.weight, problem.bias)) + problem.residual
    assert torch.equal(DenseFused().bind(problem, None).run(), expected)
    assert DenseFused().supports(OnPaper()) == "cuBLAS fuses tanh GELU, not None"


def test_what_ran_is_what_was_measured_not_what_the_rule_says(monkeypatch):
    problem, provider = LinearProblem(SHAPE, "plain", torch.float32, "cpu"), Sparse24()
    assert provider.bind(problem, provider.prepare(problem)).detail.startswith("dense: ")
    measured = Measured(Choice("mma", 2), {}, {})
    monkeypatch.setattr(providers, "last_measured", lambda cache, rows: measured if rows == problem.shape.M else None)
    assert provider.bind(problem, provider.prepare(problem)).detail == "mma: measured, configuration 2"


class OnPaper:
    """A problem on a GPU that is not there: only what `supports` looks at."""

    def __init__(self, dtype=torch.bfloat16, M=64, N=64, K=64):
        self.shape, self.dtype, self.device = LinearShape("m", "l", M, N, K), dtype, torch.device("cuda")
        self.weight = self.masked = torch.zeros(N, K)
        self.activation = None


@pytest.mark.parametrize(
    ("provider", "problem", "reason"),
    [
        (Baseline(), OnPaper(), None),
        (Baseline(), OnPaper(dtype=torch.float32), "takes bfloat16 and float16, not float32"),
        (Baseline(), OnPaper(M=60), "N, K, M = 64, 64, 60 are not multiples of 16, 16, 8"),
        (Baseline(), OnPaper(N=72), "N, K, M = 72, 64, 64 are not multiples of 16, 16, 8"),
        (Cutlass(), OnPaper(K=96), "N, K, M = 64, 96, 64 are not multiples of 32, 64, 8"),
    ],
)
def test_rules_of_the_baselines(provider, problem, reason):
    assert provider.supports(problem) == reason


def test_the_kernel_for_few_rows_is_not_tried_with_many():
    problem = LinearProblem(LinearShape("m", "l", MOST_SPLITK_ROWS + 8, 16, 16), "plain", torch.float32, "cpu")
    reason = "264 rows: it is made for few, and with more than 256 would only cost time"
    assert Sparse24("splitk").supports(problem) == reason


def test_a_torch_without_cusparselt_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert CuSparseLt().supports(OnPaper()) == "this torch has no cuSPARSELt"


class Library:
    """Plays cuSPARSELt with torch, on an sm_90 or an older GPU: numbers 0 to 4, of which 1 is wrong and 3 unable."""

    def __init__(self, monkeypatch, sm_90=True, found=(2, 1, 0)):
        self.sm_90, self.found = sm_90, found
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.product)
        bindings = types.SimpleNamespace(mm_search=self.search)
        monkeypatch.setattr(torch._C, "_cusparselt", bindings, raising=False)

    def search(self, compressed, columns, bias, alpha, out_dtype, transpose_result):
        """-> (number, parts of K, mode, the largest number)."""
        return *self.found, 4

    def product(self, compressed, columns, bias, transpose_result, alg_id, split_k, split_k_mode):
        assert transpose_result
        if alg_id == 3 or alg_id > 4 or split_k not in ((1, -1) if self.sm_90 else (1, 2, 4)):
            raise RuntimeError("cuSPARSELt: not supported")
        assert split_k < 2 or split_k_mode in (1, 2), "what torch hands on as the mode of a split"
        wrong = alg_id == 1 or (split_k, split_k_mode) == (4, 2)
        return (columns.t() @ compressed.t() + bias) * (1.01 if wrong else 1)


def test_an_algorithm_that_is_wrong_or_unable_is_left_out_of_the_tuning(monkeypatch):
    problem, tuned = LinearProblem(SHAPE, "epilogue", torch.float32, "cpu"), CuSparseLtTuned()
    Library(monkeypatch, found=(4, -1, 3))
    best, right, wrong = tuned.search(problem, problem.masked)
    assert set(right) == {Algorithm(number, parts) for number in (0, 2, 4) for parts in (1, -1)} | {Algorithm(4, -1, 3)}
    assert best in right
    assert wrong == [Algorithm(1), Algorithm(1, -1)]
    bound = tuned.bind(problem, problem.masked)
    assert bound.detail.endswith("of 9; wrong results: 1, 1 split -1 mode -1")
    assert problem.check(bound.run(), sparse=True).right


def test_on_an_older_gpu_the_fastest_algorithm_is_split_in_each_way(monkeypatch):
    problem = LinearProblem(SHAPE, "plain", torch.float32, "cpu")
    Library(monkeypatch, sm_90=False)
    _, right, wrong = CuSparseLtTuned().search(problem, problem.masked)
    assert {(a.split_k, a.mode) for a in right} == {(1, -1), (1, 0), (2, 1), (4, 1), (2, 2)}
    assert {(a.split_k, a.mode) for a in wrong} == {(1, -1), (4, 2)}


def test_without_a_right_algorithm_there_is_no_time(monkeypatch):
    problem = LinearProblem(SHAPE, "plain", torch.float32, "cpu")
    library = Library(monkeypatch)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *a, **k: library.product(*a, **k) + 1)
    with pytest.raises(RuntimeError, match="none of its 9 algorithms gives a right result"):
        CuSparseLtTuned().search(problem, problem.masked)


def test_a_baseline_with_masks_of_its_own_is_checked_against_them(monkeypatch):
    """torch's reference of its tile kernel plays the kernel, and dense tensors its sparse ones."""
    monkeypatch.setattr(TrainTile, "pruned", staticmethod(lambda w: _sparse_semi_structured_tile(w.clone())))
    problem = TrainingProblem(LinearShape("m", "l", 16, 24, 32), "forward+backward", torch.float32, "cpu")
    bound = TrainTile().bind(problem, None)
    assert problem.check(bound.run(), True, bound.weight).right
    assert not problem.check(bound.run(), True).right
    assert holds(bound.weight, TWO_FOUR)
    assert holds(bound.weight.t(), TWO_FOUR)


@pytest.mark.parametrize("name", ["values", "metadata", "bits"])
def test_all_that_a_mask_writes_is_checked(monkeypatch, name):
    problem, right = MaskProblem(SHAPE, "choose", torch.float32, "cpu"), providers.select_mask
    provider = providers.ChoosePacked()
    provider.bind(problem, None)

    def wrong(*arguments, **wanted):
        made = right(*arguments, **wanted)
        return made._replace(**{name: getattr(made, name).roll(1, 1)})

    monkeypatch.setattr(providers, "select_mask", wrong)
    with pytest.raises(ValueError, match=f"its {name} are wrong"):
        provider.bind(problem, None)


def test_a_baseline_that_is_not_installed_says_so():
    assert TileLang().supports(OnPaper()) == "TileLang is not installed"


def test_tilelang_gets_the_weight_and_the_wrong_blocks_are_left_out(monkeypatch):
    """The compiler is played by torch, from values and metadata; the first block is wrong, the second does not fit."""
    problem = LinearProblem(LinearShape("m", "l", 64, 64, 128, "gelu"), "epilogue", torch.float32, "cpu")

    def compiled(tile, out_idx):
        if tile == TILES[1]:
            raise ValueError("does not fit")
        wrong = 1.01 if tile == TILES[0] else 1
        return lambda values, metadata, x: (unpack(values, metadata.view(torch.int16), 128) @ x.t()) * wrong

    monkeypatch.setitem(sys.modules, "tilelang", types.SimpleNamespace(compile=compiled))
    monkeypatch.setattr(baselines, "tilelang_product", lambda shape, tile, dtype: tile)
    bound = TileLang().bind(problem, TileLang().prepare(problem))
    assert problem.check(bound.run(), sparse=True).right
    assert bound.detail.endswith(f"{len(TILES) - 2} of {len(TILES)} blocks right")


@pytest.mark.gpu
@pytest.mark.parametrize("provider", PROVIDERS["masked-train"], ids=lambda p: p.name)
def test_on_a_gpu_training_providers_are_right(provider):
    shape = LinearShape("m", "l", 512, 768, 512)
    problem = TrainingProblem(shape, "forward+backward", torch.bfloat16, "cuda")
    if reason := provider.supports(problem):
        pytest.skip(reason)
    bound = provider.bind(problem, provider.prepare(problem))
    assert problem.check(bound.run(), provider.sparse, bound.weight).right, bound.detail


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["plain", "epilogue"])
@pytest.mark.parametrize(
    "name",
    ["dense fused", "dense compiled", "sparsedm 2:4", "sparsedm 2:4 mma", "cuSPARSELt", "cuSPARSELt tuned", "TileLang"],
)
def test_on_a_gpu_linear_providers_are_right(name, mode):
    provider = next(p for p in PROVIDERS["linear"] if p.name == name)
    problem = LinearProblem(LinearShape("m", "l", 512, 768, 512, "gelu_tanh", True), mode, torch.bfloat16, "cuda")
    if reason := provider.supports(problem):
        pytest.skip(reason)
    bound = provider.bind(problem, provider.prepare(problem))
    assert problem.check(bound.run(), provider.sparse).right, bound.detail


@pytest.mark.gpu
def test_on_a_gpu_every_conv_provider_is_right():
    problem = ConvProblem(ConvShape("m", "l", 4, 64, 16, 16, 128), "plain", torch.bfloat16, "cuda")
    for provider in PROVIDERS["conv"]:
        assert problem.check(provider.bind(problem, provider.prepare(problem)).run(), provider.sparse).right
