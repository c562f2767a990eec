"""Dispatch: the rule of thumb, and what is measured instead; GPUs and times are fakes."""

import functools
import json
import logging

import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.kernels import launch
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.dispatch import CONV, LINEAR, Choice, choices, choose_backend, configs, pick
from sparsedm.kernels.sparse24.linear import sparse24_linear
from sparsedm.kernels.tuning import Autotuner
from tests.kernels.sparse24.problem import Problem

BF16 = torch.bfloat16


DISPATCH = [
    # capability, M, N, K, dtype -> back end, words of the reason
    (None, 8192, 8192, 8192, BF16, "dense", "not an NVIDIA GPU"),
    ((7, 5), 8192, 8192, 8192, BF16, "dense", "sm_75 has no sparse tensor cores"),
    ((9, 0), 8192, 8192, 8192, torch.float32, "dense", "take bfloat16 and float16"),
    ((9, 0), 8192, 8192, 8196, BF16, "dense", "K = 8196"),
    ((9, 0), 1, 4096, 4096, BF16, "splitk", "1 rows"),
    ((8, 0), 64, 4096, 4096, torch.float16, "splitk", "64 rows"),
    ((9, 0), 65, 512, 512, BF16, "dense", "4 tiles"),
    ((8, 0), 16448, 12, 512, BF16, "dense", "12 features leave most of a tile of 128 x 128 empty"),
    ((9, 0), 16448, 64, 512, BF16, "wgmma", "sm_90a"),
    ((9, 0), 16448, 512, 512, BF16, "wgmma", "sm_90a"),
    ((8, 0), 16448, 512, 512, BF16, "mma", "sm_80"),
    ((8, 9), 16448, 512, 512, BF16, "mma", "sm_89"),
    ((10, 0), 16448, 512, 512, BF16, "dense", "wgmma.sp needs sm_90a"),
]


@pytest.mark.parametrize(("capability", "M", "N", "K", "dtype", "backend", "words"), DISPATCH)
def test_dispatch_says_what_runs_and_why(capability, M, N, K, dtype, backend, words, monkeypatch):
    monkeypatch.delenv("SPARSEDM_BACKEND", raising=False)
    chosen, reason = choose_backend(capability, M, N, K, dtype)
    assert chosen == backend
    assert words in reason


def test_dispatch_can_be_forced(monkeypatch):
    monkeypatch.setenv("SPARSEDM_BACKEND", "mma")
    assert choose_backend((9, 0), 8192, 8192, 8192, BF16) == ("mma", "SPARSEDM_BACKEND=mma")
    name, reason = choose_backend(None, 8192, 8192, 8192, BF16)
    assert name == "torch"
    assert "SPARSEDM_BACKEND=mma cannot run: not an NVIDIA GPU" in reason
    monkeypatch.setenv("SPARSEDM_BACKEND", "cublas")
    with pytest.raises(InputError, match="'cublas' is unknown: it must be one of torch, dense, mma, splitk, wgmma"):
        choose_backend(None, 1, 1, 1, BF16)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("directly", [True, False])
def test_the_rule_s_choice_is_among_those_that_are_timed_and_dense_is_the_first(capability, few, directly):
    offered = choices(capability, few, directly, 512, BF16, None)
    backend, _ = choose_backend(capability, 64 if few else 16384, 512, 512, BF16)
    assert offered[0] == Choice("dense")
    assert dispatch.rule_of_thumb(backend, directly) in offered
    assert len(set(offered)) == len(offered) <= 10
    able, _ = dispatch._able(capability, 512, BF16)
    assert {choice.backend for choice in offered} <= set(able)


@pytest.mark.parametrize(("capability", "K", "dtype"), [(None, 512, BF16), ((7, 5), 512, BF16), ((9, 0), 4, BF16)])
def test_nothing_is_timed_where_no_kernel_can_run(capability, K, dtype):
    assert choices(capability, False, False, K, dtype, None) == ()


def test_a_forced_kernel_is_timed_alone():
    offered = choices((9, 0), True, False, 512, BF16, "mma")
    assert offered == tuple(Choice("mma", i) for i in range(len(configs(LINEAR, "mma"))))
    assert choices((9, 0), True, False, 512, BF16, "dense") == ()
    assert choices((8, 0), False, False, 512, BF16, "wgmma") == ()
    assert choices((9, 0), False, True, 512, BF16, "wgmma") == (Choice("wgmma", -1),)


def test_few_rows_are_also_timed_in_the_smallest_tile():
    last = choices((8, 0), True, False, 512, BF16, None)[-1]
    assert last.backend == "mma"
    tile = configs(LINEAR, "mma")[last.config]
    assert (tile.block_n, tile.block_m) == (64, 64)


def test_every_configuration_is_offered_somewhere():
    for (operation, backend), offered in {
        (LINEAR, "splitk"): choices((8, 0), True, False, 512, BF16, None),
        (LINEAR, "mma"): choices((8, 0), False, False, 512, BF16, None),
        (LINEAR, "wgmma"): choices((9, 0), False, False, 512, BF16, None),
    }.items():
        described = [dispatch._describe(operation, choice) for choice in offered if choice.backend == backend]
        assert len(described) == len(configs(operation, backend))
        assert len({json.dumps(d) for d in described}) == len(described), "two configurations are the same"
    clusters = {configs(LINEAR, "wgmma")[c.config].cluster for c in choices((9, 0), False, False, 64, BF16, None)[1:]}
    assert clusters == {"none", "x", "w"}, "multicast is a part of the choice"


GPU = torch.device("cuda", 0)
WGMMA = Choice("wgmma")


class Work:
    """Pretends to run choices, at so many microseconds by back end, plus the number of the configuration."""

    def __init__(self, **microseconds):
        self.microseconds, self.runs, self.timed = microseconds, [], 0

    def __call__(self, choice):
        self.runs.append(choice)
        return torch.ones(4)

    def timer(self, run):
        run()
        self.timed += 1
        return self.microseconds.get(self.runs[-1].backend, 100.0) + self.runs[-1].config


@pytest.fixture
def gpu(imaginary_gpu, monkeypatch):
    """-> a function that picks as on an sm_90a GPU with empty tables, timing the given work."""

    def picked(work, cache, rows=4096, rule=WGMMA, device=GPU, dtype=BF16, n=512):
        monkeypatch.setattr(dispatch, "Autotuner", functools.partial(Autotuner, timer=work.timer))
        offered = lambda: choices((9, 0), rows <= 64, False, 512, BF16, launch.forced_backend())  # noqa: E731
        return pick(LINEAR, offered, rule, work, device, rows, cache, dtype=dtype, n=n)

    dispatch._tuner.cache_clear()
    yield picked
    dispatch._tuner.cache_clear()


def test_dense_is_chosen_where_it_was_measured_to_be_quicker(gpu, tmp_path):
    work, cache = Work(dense=5.0, wgmma=7.0), {}
    assert gpu(work, cache) == gpu(work, cache) == Choice("dense")
    assert work.timed == 1 + len(configs(LINEAR, "wgmma"))
    assert gpu(Work(), {}) == Choice("dense"), "another layer of the same shape finds it"
    (sections,) = (json.loads(path.read_text()) for path in (tmp_path / "tuned").glob("*.json"))
    ((section, entries),) = sections.items()
    assert section.startswith("sparse24_linear, triton ")
    assert entries["dtype=torch.bfloat16 n=512 m=4096"]["config"] == {"backend": "dense"}


def test_the_quickest_configuration_is_chosen_and_described_in_full(gpu, tmp_path):
    best = Choice("wgmma", 3)
    work = Work(dense=50.0)
    work.timer = lambda run: (run(), 1.0 if work.runs[-1] == best else 9.0)[1]
    assert gpu(work, {}) == best
    dispatch._tuner.cache_clear()
    assert gpu(Work(), {}) == best, "another process finds it in the table"
    assert '"cluster": "x"' in next((tmp_path / "tuned").glob("*.json")).read_text()


def test_a_kernel_with_another_result_than_dense_is_never_chosen(gpu, caplog):
    work = Work(dense=50.0)
    wrong = lambda choice: work(choice) * (2 if choice.backend == "wgmma" else 1)  # noqa: E731
    wrong.timer = work.timer
    assert gpu(wrong, {}) == Choice("dense")
    assert "gives another result than the default" in caplog.text


def test_sizes_of_one_power_of_two_are_timed_once_and_others_again(gpu):
    work, cache = Work(dense=5.0), {}
    for rows, timed in ((2049, 10), (4096, 10), (4097, 20), (60, 25)):
        gpu(work, cache, rows=rows, rule=Choice("wgmma" if rows > 64 else "splitk"))
        assert work.timed == timed


@pytest.mark.parametrize("key", [{"dtype": torch.float16}, {"n": 1024}, {"device": torch.device("cuda", 1)}], ids=str)
def test_what_is_kept_serves_nothing_else(gpu, key):
    work, cache = Work(dense=5.0), {}
    gpu(work, cache)
    gpu(work, cache, **key)
    assert len(cache) == 2


def test_a_forced_back_end_leaves_the_other_verdict_alone(gpu, monkeypatch):
    work, cache = Work(dense=5.0), {}
    assert gpu(work, cache) == Choice("dense")
    monkeypatch.setenv("SPARSEDM_BACKEND", "wgmma")
    assert gpu(work, cache) == WGMMA
    monkeypatch.delenv("SPARSEDM_BACKEND")
    dispatch._tuner.cache_clear()
    assert gpu(Work(wgmma=1.0), {}) == Choice("dense")


def test_off_takes_the_rule_and_says_so(gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    work = Work()
    assert gpu(work, {}) == Choice("wgmma")
    assert work.runs == []
    assert "is not tuned for dtype=torch.bfloat16 n=512 m=4096; the default {'backend': 'wgmma'" in caplog.text


def test_nothing_is_timed_while_a_cuda_graph_is_captured(gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    work, cache = Work(dense=5.0), {}
    assert gpu(work, cache) == Choice("wgmma")
    assert work.runs == []
    assert cache == {}
    assert "is not tuned" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu(work, cache) == Choice("dense"), "the default of a captured call is not remembered"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_takes_what_eager_calls_measured_and_measures_nothing(gpu, dynamic):
    cache = {}
    assert gpu(Work(dense=5.0), cache, rows=64, rule=Choice("splitk")) == Choice("dense")
    work = Work()

    def function(x):
        choice = pick(LINEAR, None, Choice("splitk"), work, GPU, x.shape[0], cache, dtype=BF16, n=512)
        return x * (2 if choice.backend == "dense" else 3)

    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)
    assert compiled(torch.ones(40)).sum() == 80
    assert compiled(torch.ones(64)).sum() == 128
    assert compiled(torch.ones(65)).sum() == 3 * 65, "never measured: the rule"
    assert compiled(torch.ones(32)).sum() == 3 * 32
    assert work.runs == []


def test_convolutions_are_described_by_their_own_configurations():
    assert dispatch._describe(CONV, Choice("wgmma", 1)) == {
        "backend": "wgmma",
        "block_n": 128,
        "block_m": 256,
        "stages": 3,
    }


@pytest.mark.gpu
def test_on_the_gpu_a_first_call_inside_a_capture_is_refused():
    p = Problem(M=64, N=64, K=64)
    x, values, metadata = (t.cuda() for t in (p.x, p.values, p.metadata))
    with (
        pytest.raises(InputError, match="must be called once before a CUDA graph of it is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        sparse24_linear(x, values, metadata, cache={})


@pytest.mark.gpu(seconds=300)  # it compiles every configuration
def test_on_the_gpu_a_size_is_timed_once_and_a_capture_times_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)  # why a candidate was passed over
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    for name in ("SPARSEDM_AUTOTUNE", "SPARSEDM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    dispatch._tuner.cache_clear()
    p, cache = Problem(M=1024, N=1024, K=512, bias=True, activation="gelu", residual=True), {}
    x, values, metadata, bias, residual = (t.cuda() for t in (p.x, p.values, p.metadata, p.bias, p.residual))
    call = lambda rows: sparse24_linear(x[:rows], values, metadata, bias, "gelu", residual[:rows], cache=cache)  # noqa: E731
    p.y = call(1024).cpu()
    p.check()
    ((_, entries),) = json.loads(next((tmp_path / "tuned").glob("*.json")).read_text()).items()
    (entry,) = entries.values()
    offered = choices(torch.cuda.get_device_capability(), False, False, 512, BF16, None)
    assert entry["measured"] == len(offered), caplog.text
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    expected = call(200)  # another size, and the rule's back end for it
    monkeypatch.delenv("SPARSEDM_AUTOTUNE")
    cache["choices"].clear()
    dispatch._tuner.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(200)
    assert cache["choices"] == {}
    graph.replay()
    assert torch.equal(y, expected)
