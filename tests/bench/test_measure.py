"""Correctness before speed: what is wrong is caught, said, and never timed."""

import pytest
import torch
import torch.nn.functional as F

from bench.measure import measure
from bench.problems import LinearProblem
from bench.providers import Bound, Configuration, Dense, Masked, Provider, Sparse24
from bench.results import COLUMNS
from bench.shapes import LinearShape
from bench.timing import Times
from tests.bench.test_timing import HandClock

SHAPE = LinearShape("square", "32", 32, 48, 64, "gelu", residual=True, layers=3)


class Product(Provider):
    """The right product, changed by `spoil(y, call number)`; counts its calls."""

    sparse = True

    def __init__(self, name, spoil=lambda y, call: y, clock=None, microseconds=10):
        self.name, self.spoil, self.calls = name, spoil, 0
        self.clock, self.microseconds = clock, microseconds

    def bind(self, problem, prepared):
        def run():
            self.calls += 1
            if self.clock:
                self.clock.microseconds += self.microseconds
            y = F.gelu(F.linear(problem.x, problem.masked, problem.bias)) + problem.residual
            return self.spoil(y, self.calls)

        return Bound(run, "as asked")


class DensePace(Product):
    """Pretends to be the dense denominator, at a speed that the test chooses."""

    sparse = False

    def bind(self, problem, prepared):
        def run():
            self.clock.microseconds += self.microseconds
            return F.gelu(F.linear(problem.x, problem.weight, problem.bias)) + problem.residual

        return Bound(run)


def rows_of(*providers, clock=None, **options):
    problem = LinearProblem(SHAPE, "epilogue", torch.float32, "cpu")
    found = measure("gemm", problem, providers, clock or HandClock(tick=1), rounds=2, per_round=3, **options)
    rows = [row for rows in found for row in rows]
    assert not {column for row in rows for column in row} - set(COLUMNS)
    return rows


def one_wrong(y, call):
    y = y.clone()
    y[-1, -1] += 1e-3
    return y


def one_nan(y, call):
    y = y.clone()
    y[0, 0] = float("nan")
    return y


def wrong_later(y, call):
    return y if call == 1 else y + 1e-3


@pytest.mark.parametrize(
    "spoil",
    [one_wrong, one_nan, lambda y, call: y.zero_(), lambda y, call: y[:-1], lambda y, call: y.T.contiguous()],
    ids=["one-entry", "nan", "zeros", "row-missing", "transposed"],
)
def test_a_wrong_provider_is_caught_and_not_timed(spoil):
    wrong = Product("wrong", spoil)
    (row,) = rows_of(wrong)
    assert row["status"] == "wrong"
    assert row["reason"].startswith("its error is ")
    assert not {"p50_us", "dense_equivalent_tflops", "gbps"} & set(row)
    assert wrong.calls == 1, "it ran once, to be checked, and never again"


def test_a_provider_that_becomes_wrong_loses_its_times():
    (row,) = rows_of(Product("wrong later", wrong_later))
    assert row["status"] == "wrong"
    assert row["reason"].startswith("right before it was timed, then its error is ")
    assert "p50_us" not in row


def test_the_sparse_weight_is_not_the_dense_one():
    class Confused(Dense):
        name, sparse = "dense product sold as 2:4", True

    (row,) = rows_of(Confused())
    assert row["status"] == "wrong"


def test_one_that_raises_does_not_stop_the_others():
    def out_of_memory(y, call):
        raise RuntimeError("no room\nfor it")

    failed, right = rows_of(Product("failing", out_of_memory), Product("right"))
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no room for it")
    assert right["status"] == "ok"


def test_one_that_cannot_run_says_why():
    rows = rows_of(Sparse24("wgmma"))
    assert [(r["status"], r["reason"]) for r in rows] == [
        ("unsupported", "backend=wgmma cannot run: not an NVIDIA GPU, or no Triton")
    ]


def test_a_right_row_has_everything():
    clock = HandClock()
    (row,) = rows_of(Product("right", clock=clock, microseconds=20), clock=clock)
    assert (row["p20_us"], row["p50_us"], row["p80_us"], row["samples"]) == (20, 20, 20, 6)
    assert row["method"] == "by hand"
    assert row["dense_equivalent_tflops"] == pytest.approx(2 * 32 * 48 * 64 / 20e-6 / 1e12)
    bytes_moved = 4 * (32 * 64 + 2 * 32 * 48) + 48 * 64 * (2 + 1 / 8)
    assert row["gbps"] == pytest.approx(bytes_moved / 20e-6 / 1e9)
    assert 0 < row["error"] <= row["allowed"] < 1e-4
    identity = {"suite": "gemm", "kernel": "linear", "shape": "square 32", "mode": "epilogue", "dtype": "float32"}
    assert row.items() >= (identity | {"M": 32, "N": 48, "K": 64, "layers": 3, "detail": "as asked"}).items()
    assert row["device"].startswith("CPU")
    assert row["torch"] == torch.__version__


def test_packing_is_timed_apart_with_its_break_even():
    clock = HandClock()

    class Packed(Product):
        def prepare(self, problem):
            clock.microseconds += 1000
            return ()

    dense = DensePace("dense", clock=clock, microseconds=50)
    rows = rows_of(dense, Packed("quick", clock=clock, microseconds=20), clock=clock)
    quick = {r["metric"]: r for r in rows if r["provider"] == "quick"}
    assert quick["packing"]["p50_us"] == 1000
    assert quick["break-even"]["value"] == 34, "1000 / (50 - 20), rounded up"
    slow = rows_of(dense, Packed("slow", clock=clock, microseconds=60), clock=clock)
    (never,) = [r for r in slow if r["metric"] == "break-even"]
    assert "value" not in never
    assert never["reason"] == "never: it is not faster than dense"


def test_rows_keep_the_order_of_the_providers():
    names = [r["provider"] for r in rows_of(Sparse24("mma"), Product("right"), Product("bad", one_wrong), Masked())]
    assert list(dict.fromkeys(names)) == ["sparsedm 2:4 mma", "right", "bad", "sparsedm masked"]


def test_a_compiled_provider_is_timed_in_rounds_with_the_best_of_the_others():
    """Of the eager ones the fastest dense, and ours; not the slower dense, nor those of others."""
    clock, problem = HandClock(), LinearProblem(SHAPE, "epilogue", torch.float32, "cpu")
    dense = [DensePace(name, clock=clock, microseconds=time) for name, time in (("dense", 50), ("dense fused", 60))]
    ours = [Product(name, clock=clock, microseconds=20) for name in ("sparsedm 2:4", "sparsedm 2:4 compiled")]
    others = [Product("cuSPARSELt", clock=clock, microseconds=30), DensePace("dense compiled", clock=clock)]
    groups = list(measure("gemm", problem, [*dense, *ours, *others], clock, rounds=1, per_round=1))
    assert [[r["provider"] for r in rows] for rows in groups] == [
        ["dense", "dense fused", "sparsedm 2:4", "cuSPARSELt"],
        ["dense", "sparsedm 2:4", "sparsedm 2:4 compiled"],
        ["dense", "sparsedm 2:4", "sparsedm 2:4 compiled", "dense compiled"],
    ]


def test_times_are_there_before_a_second_is_held_for_the_best_and_there_is_time_for_it(monkeypatch):
    class One(Product, Configuration):
        supports, prepare, traffic = Provider.supports, Provider.prepare, Provider.traffic

    clock, problem, asked = HandClock(), LinearProblem(SHAPE, "epilogue", torch.float32, "cpu"), []
    ours = [One(f"wgmma {n}", clock=clock, microseconds=10 + n) for n in (3, 1, 0, 2)]
    wrong = One("wgmma 9", wrong_later, clock=clock, microseconds=1)
    others = [DensePace("dense", clock=clock, microseconds=12.5), Product("cuSPARSELt", clock=clock, microseconds=50)]
    monkeypatch.setattr("bench.measure.HELD", 2)
    monkeypatch.setattr(clock, "held", lambda call, p50: (Times(p50, p50, p50, 1), {"power_w": "700"}))

    def starting(name, **columns):
        asked.append((name, *columns.values()))
        return asked[-1] != ("dense", "held")

    every = [*others, wrong, *ours]
    first, *alone = measure("first", problem, every, clock, rounds=1, per_round=1, held=True, starting=starting)
    assert [(r["provider"], r["metric"]) for r in first] == [(p.name, "time") for p in every]
    assert [[(r["provider"], r["metric"], r["p50_us"], r["power_w"]) for r in rows] for rows in alone] == [
        [("wgmma 0", "held", 10, "700")], [("wgmma 1", "held", 11, "700")], [("cuSPARSELt", "held", 50, "700")],
    ]  # fmt: skip
    assert [name for name, *metric in asked if metric] == ["wgmma 0", "wgmma 1", "dense", "cuSPARSELt"]


def test_an_error_that_the_gpu_does_not_survive_is_raised_after_its_row(monkeypatch):
    def fault(y, call):
        raise RuntimeError("an illegal memory access was encountered")

    problem, found = LinearProblem(SHAPE, "epilogue", torch.float32, "cpu"), []
    monkeypatch.setattr("bench.measure.device_is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        found.extend(measure("gemm", problem, [Product("lost", fault), Product("right")], HandClock(tick=1)))
    assert [[(r["provider"], r["status"]) for r in rows] for rows in found] == [[("lost", "failed")]]
