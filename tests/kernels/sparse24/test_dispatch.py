"""Dispatch: the rule of thumb, and what is measured instead; GPUs and times are fakes."""

import functools
import json
import logging
from dataclasses import asdict, replace

import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.kernels import launch
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.conv import conv_request
from sparsedm.kernels.sparse24.dispatch import (
    BACKENDS,
    CONV,
    LINEAR,
    Choice,
    Request,
    candidates,
    load,
    row_of,
    rule_of_thumb,
    serve,
)
from sparsedm.kernels.sparse24.layouts import LAYOUTS
from sparsedm.kernels.sparse24.linear import sparse24_linear
from sparsedm.kernels.tuning import Autotuner
from tests.kernels.sparse24.kernel_case import Problem

BF16 = torch.bfloat16


def linear(capability, M=8192, N=512, K=512, dtype=BF16, **others):
    return Request(LINEAR, capability, dtype, M, N, K, **others)


def conv(capability, channels=64, kernel=3, stride=1, dilation=1, pixels=4096, features=64, dtype=BF16, **others):
    geometry = (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (dilation, dilation)
    return conv_request(capability, dtype, pixels, features, channels, *geometry, **others)


@pytest.fixture(autouse=True)
def _what_does_not_run_is_forgotten():
    yield
    launch.broken.clear()


RULE = [  # request -> back end, words of the reason
    (linear(None, 8192, 8192, 8192), "dense", "not an NVIDIA GPU"),
    (linear((7, 5), 8192, 8192, 8192), "dense", "sm_75 has no sparse tensor cores"),
    (linear((9, 0), 8192, 8192, 8192, torch.float32), "dense", "take bfloat16 and float16"),
    (linear((9, 0), 8192, 8192, 8196), "dense", "K = 8196"),
    (linear((9, 0), out_dtype=torch.float64), "dense", "y of float64: the kernels write bfloat16"),
    (linear((9, 0), pattern="3:4"), "dense", "pattern 3:4: sparse tensor cores take at most 2 of every 4"),
    (linear((9, 0), pattern="1:8"), "wgmma", "sm_90a"),
    (linear(None, instructions="avx2", dtype=torch.float32), "cpu", "C kernel"),
    (linear(None, instructions="avx2", dtype=torch.float32, pattern="31:32"), "dense", "times as long as the dense"),
    (linear(None, instructions="avx2"), "dense", "bfloat16: the CPU kernels take float32"),
    (linear(None, 1, 64, 64, torch.float32, instructions="avx512"), "dense", "would take about 37.07 times"),
    (linear((9, 0), 1, 4096, 4096), "splitk", "few rows"),
    (linear((8, 0), 64, 4096, 4096, torch.float16), "splitk", "few rows"),
    (linear((9, 0), 65, 512, 512), "dense", "to fill the GPU (4)"),
    (linear((8, 0), 16448, 12, 512), "dense", "12 features leave most of a tile of 128 x 128 empty"),
    (linear((9, 0), 16448, 64, 512), "wgmma", "sm_90a"),
    (linear((9, 0), 16448, 512, 512), "wgmma", "sm_90a"),
    (linear((8, 0), 16448), "mma", "mma.sp"),
    (linear((8, 9), 16448), "mma", "mma.sp"),
    (linear((10, 0), 16448), "dense", "mma.sp is a slow legacy path of sm_100"),
    (linear((10, 3), 16448), "dense", "mma.sp is a slow legacy path of sm_103"),
    (linear((12, 0), 16448), "mma", "mma.sp"),
    (linear((12, 1), 16448), "mma", "mma.sp"),
    (linear((12, 0), 64), "splitk", "few rows"),
    (linear((10, 0), 64), "dense", "mma.sp is a slow legacy path of sm_100"),
    (linear((10, 3), 1), "dense", "mma.sp is a slow legacy path of sm_103"),
    (conv(None), "dense", "not an NVIDIA GPU"),
    (conv((9, 0)), "wgmma", "sm_90a"),
    (conv((9, 0), stride=2), "wgmma", "sm_90a"),
    (conv((9, 0), 96), "dense", "96 input channels: the wgmma kernel needs a multiple of 64, and mma.sp is no quicker"),
    (conv((9, 0), pixels=16384, features=68), "dense", "68 output channels"),
    (conv((9, 0), features=3), "dense", "3 features leave most of a tile"),
    (conv((9, 0), pixels=1984, features=256), "wgmma", "sm_90a"),
    (conv((9, 0), pixels=1920, features=256), "dense", "too few tiles of 128 x 128 to fill the GPU (30)"),
    (conv((9, 0), dilation=2), "dense", "no dilation"),
    (conv((9, 0), dtype=torch.float32), "dense", "float32"),
    (conv((9, 0), stride=3), "dense", "strides 1 and 2"),
    (conv((8, 0)), "mma", "mma.sp"),
    (conv((8, 9), stride=2, features=67), "mma", "mma.sp"),
    (conv((8, 9), stride=2, features=3), "dense", "3 features leave most of a tile of 128 x 128 empty"),
    (conv((8, 0), 96), "mma", "mma.sp"),
    (conv((8, 0), 100), "dense", "100 input channels: the mma kernel needs a multiple of 8"),
    (conv((8, 0), pixels=64), "dense", "to fill the GPU (1)"),
    (conv((7, 5)), "dense", "sm_75 has no sparse tensor cores"),
    (conv((10, 0)), "dense", "mma.sp is a slow legacy path of sm_100"),
    (conv((12, 0)), "mma", "mma.sp"),
]


@pytest.mark.parametrize(("request_", "backend", "words"), RULE)
def test_the_rule_says_what_runs_and_why(request_, backend, words):
    choice, reason = rule_of_thumb(request_)
    assert choice.backend == backend
    assert words in reason


@pytest.mark.parametrize(
    ("request_", "backend", "reason"),
    [
        (linear((9, 0), backend="mma"), "mma", "backend=mma"),
        (linear((9, 0), backend="dense"), "dense", "backend=dense"),
        (linear((9, 0), backend="torch"), "torch", "backend=torch"),
        (linear(None, backend="mma"), "dense", "backend=mma cannot run: not an NVIDIA GPU"),
        (conv((9, 0), backend="mma"), "mma", "backend=mma"),
        (conv((9, 0), backend="wgmma", pixels=1), "wgmma", "backend=wgmma"),
        (conv((8, 0), backend="wgmma"), "dense", "backend=wgmma cannot run: sm_80 has no wgmma"),
        (conv((8, 0), backend="splitk"), "mma", "mma.sp"),  # there is none for convolutions
        (conv(None, backend="torch"), "torch", "backend=torch"),
    ],
)
def test_what_is_asked_for_runs_where_it_can(request_, backend, reason):
    choice, why = rule_of_thumb(request_)
    assert choice.backend == backend
    assert reason in why


def test_a_1_x_1_convolution_asks_for_a_product():
    assert conv((9, 0), kernel=1, pixels=100, backend="mma") == linear((9, 0), 100, 64, 64, backend="mma")
    assert conv((9, 0), kernel=1, stride=2).operation == CONV


def test_an_exported_program_does_not_hold_the_weight_twice(monkeypatch):
    monkeypatch.setattr(dispatch, "exporting", lambda: True)
    assert rule_of_thumb(linear(None))[0] == Choice("torch")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("make", [linear, functools.partial(linear, M=64), conv, functools.partial(conv, channels=96)])
def test_the_rule_s_choice_is_among_those_that_are_timed_and_dense_is_the_first(make, capability, directly):
    asked = replace(make(capability), out_dtype=torch.float32 if directly else BF16)
    offered = candidates(asked)
    described = [dispatch._describe(asked.operation, choice) for choice in offered]
    assert offered[0] == Choice("dense")
    assert dispatch._describe(asked.operation, rule_of_thumb(asked)[0]) in described
    assert 1 < len(offered) == len(set(offered)) <= 13
    assert all(row_of(asked.operation, choice.backend).supports(asked) is None for choice in offered)


@pytest.mark.parametrize(
    "asked",
    [linear(None), linear((7, 5)), linear((9, 0), K=4), linear((9, 0), backend="dense")]
    + [linear((8, 0), backend="wgmma"), conv((8, 0), 100)],
)
def test_nothing_is_timed_where_no_kernel_can_run(asked):
    assert candidates(asked) == []


def test_a_kernel_that_is_asked_for_is_timed_alone():
    names = [(c.backend, c.config) for c in candidates(linear((9, 0), backend="mma"))]
    assert names == [("mma", i) for i in range(len(load(row_of(LINEAR, "mma").module).CONFIGS))]
    last = len(load(row_of(LINEAR, "wgmma").module).CONFIGS) - 1
    assert candidates(linear((9, 0), backend="wgmma", out_dtype=torch.float32)) == [Choice("wgmma", last)]
    assert {c.backend for c in candidates(conv((9, 0), backend="wgmma"))} == {"wgmma"}


def test_few_rows_are_also_timed_in_the_smallest_tile():
    *_, last = candidates(linear((8, 0), M=64))
    assert last.backend == "mma"
    tile = load(row_of(LINEAR, "mma").module).CONFIGS[last.config]
    assert (tile.block_n, tile.block_m) == (64, 64)


@pytest.mark.parametrize(
    "row", [row for row in BACKENDS if row.module and row.on == "gpu"], ids=lambda row: f"{row.operation}-{row.name}"
)
def test_every_configuration_is_offered_somewhere_and_no_two_are_the_same(row):
    capability = (9, 0) if row.name == "wgmma" else (8, 0)
    asked = linear(capability, M=64 if row.name == "splitk" else 8192) if row.operation == LINEAR else conv(capability)
    offered = [choice.config for choice in candidates(asked) if choice.backend == row.name]
    configs = load(row.module).CONFIGS
    assert offered == list(range(len(configs)))
    assert len({json.dumps(asdict(config)) for config in configs}) == len(configs)
    if (row.operation, row.name) == (LINEAR, "wgmma"):
        assert {config.cluster for config in configs} == {"none", "x", "w", "xw"}, "multicast is a part of the choice"


def test_rows_name_what_there_is():
    assert {row.name for row in BACKENDS} == set(launch.BACKENDS)
    assert {row.layout for row in BACKENDS if row.on != "cpu"} == set(LAYOUTS)


GPU = torch.device("cuda", 0)
WGMMA = Choice("wgmma")


class Work:
    """Pretends to run choices, at so many microseconds by back end, plus the number of the configuration."""

    def __init__(self, **microseconds):
        self.microseconds, self.runs, self.timed = microseconds, [], 0

    def __call__(self, choice, neutral=False):
        self.runs.append(choice)
        return torch.ones(4)

    def timer(self, run):
        run()
        self.timed += 1
        return self.microseconds.get(self.runs[-1].backend, 100.0) + self.runs[-1].config


@pytest.fixture
def gpu(imaginary_gpu, monkeypatch):
    """-> a function that serves as on an sm_90a GPU with empty tables, timing the given work; gives the choice."""

    def served(work, cache, rows=4096, **others):
        monkeypatch.setattr(dispatch, "Autotuner", functools.partial(Autotuner, timer=work.timer))
        asked = linear((9, 0), rows, **{"device": GPU} | others)

        def run(choice, cache, strict, *neutral):
            return work(choice, *neutral) if strict else choice

        return serve(asked, run, cache)

    dispatch._tuner.cache_clear()
    yield served
    dispatch._tuner.cache_clear()


def table(folder):
    ((_, entries),) = json.loads(next((folder / "tuned").glob("*.json")).read_text()).items()
    return entries


SHAPE = "dtype=torch.bfloat16 N=512 K=512 pattern=2:4 m=4096"


def test_dense_is_chosen_where_it_was_measured_to_be_quicker(gpu, tmp_path):
    work, cache = Work(dense=5.0, wgmma=7.0), {}
    assert gpu(work, cache) == gpu(work, cache) == Choice("dense")
    assert work.timed == 13
    assert gpu(Work(), {}) == Choice("dense"), "another layer of the same shape finds it"
    assert table(tmp_path)[SHAPE]["config"] == {"backend": "dense"}


def test_the_time_of_every_candidate_is_kept_and_told(gpu, tmp_path):
    cache = {}
    gpu(Work(dense=5.0, wgmma=7.0), cache)
    assert len(table(tmp_path)[SHAPE]["times"]) == 13
    dispatch._tuner.cache_clear()
    again = {}
    gpu(Work(), again)
    for kept in (cache, again):
        measured = dispatch.last_measured(kept, 4096)
        assert measured.times == {Choice("dense"): 5.0} | {Choice("wgmma", i): 7.0 + i for i in range(12)}
        assert str(measured) == "measured: dense 5.0 us, wgmma 7.0 us"


def test_the_quickest_configuration_is_chosen_and_described_in_full(gpu, tmp_path):
    best = Choice("wgmma", 3)
    work = Work(dense=50.0)
    work.timer = lambda run: (run(), 1.0 if work.runs[-1] == best else 9.0)[1]
    assert gpu(work, {}) == best
    dispatch._tuner.cache_clear()
    assert gpu(Work(), {}) == best, "another process finds it in the table"
    assert table(tmp_path)[SHAPE]["config"]["cluster"] == "x"


def test_a_kernel_with_another_result_than_dense_is_never_chosen(gpu, caplog):
    work = Work(dense=50.0)
    wrong = lambda choice, *_: work(choice) * (2 if choice.backend == "wgmma" else 1)  # noqa: E731
    wrong.timer = work.timer
    assert gpu(wrong, {}) == Choice("dense")
    assert "gives another result than the default" in caplog.text


def test_a_kernel_is_also_compared_where_no_residual_and_no_scale_hide_its_product(gpu):
    """Gates are zeros in a new adaLN-zero block, and a residual may be many times the product."""
    work = Work(dense=50.0, wgmma=1.0)
    hidden = lambda choice, neutral=False: work(choice) * (2 if neutral and choice.backend == "wgmma" else 1)  # noqa: E731
    hidden.timer = work.timer
    assert gpu(hidden, {}) == Choice("dense")


def test_kernels_that_do_not_compile_are_told_and_tried_again_by_the_next_process(gpu, tmp_path, caplog):
    def broken(choice, *_):
        if choice.backend == "wgmma":
            raise RuntimeError("no such instruction\nat all")
        return torch.ones(4)

    broken.timer, cache = lambda run: 5.0, {}
    assert gpu(broken, cache) == Choice("dense")
    assert "RuntimeError: no such instruction" in caplog.text
    assert str(dispatch.last_measured(cache)).count("wgmma is passed over: RuntimeError: no such instruction") == 1
    assert not list((tmp_path / "tuned").glob("*.json")), "dense is not remembered as the quickest"
    dispatch._tuner.cache_clear()
    assert gpu(Work(wgmma=1.0), {}) == WGMMA


def test_sizes_of_one_power_of_two_are_timed_once_and_others_again(gpu):
    work, cache = Work(dense=5.0), {}
    for rows, timed in ((2049, 13), (4096, 13), (4097, 26), (60, 31)):
        gpu(work, cache, rows=rows)
        assert work.timed == timed


@pytest.mark.parametrize("key", [{"dtype": torch.float16}, {"N": 1024}, {"device": torch.device("cuda", 1)}], ids=str)
def test_what_is_kept_serves_nothing_else(gpu, key):
    work, cache = Work(dense=5.0), {}
    gpu(work, cache)
    gpu(work, cache, **key)
    assert len(cache["choices"]) == 2


def test_what_is_asked_for_by_name_leaves_the_other_verdict_alone(gpu):
    cache = {}
    assert gpu(Work(dense=5.0), cache) == Choice("dense")
    assert torch.equal(gpu(Work(dense=5.0), cache, backend="wgmma"), torch.ones(4)), "strict"
    assert dispatch.last_measured(cache).choice == WGMMA
    assert gpu(Work(wgmma=1.0), {}) == Choice("dense")


def test_a_back_end_of_that_name_does_not_run_if_all_of_it_is_refused(gpu, tmp_path):
    work = Work(dense=5.0)
    gpu(work, {})
    for choice in candidates(linear((9, 0), backend="wgmma")):
        dispatch.refuse(LINEAR, choice, "it hung")
    work.runs.clear()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it hung; to try it again today, delete"):
            gpu(work, {}, backend="wgmma")
    assert not work.runs
    for note in (tmp_path / "tuned").glob("*.wrong"):
        note.unlink()
    assert torch.equal(gpu(work, {}, backend="wgmma"), torch.ones(4))


def test_off_takes_the_rule_and_says_so(gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    work, cache = Work(), {}
    assert gpu(work, cache) == Choice("wgmma")
    assert work.runs == []
    assert len(cache["choices"]) == 1, "the next call is quick"
    assert dispatch.last_measured(cache) is None, "what no clock said is not shown as measured"
    assert f"is not tuned for {SHAPE}; the default {{'backend': 'wgmma'" in caplog.text


def test_nothing_is_timed_while_a_cuda_graph_is_captured(gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    work, cache = Work(dense=5.0), {}
    assert gpu(work, cache) == Choice("wgmma")
    assert work.runs == []
    assert cache["choices"] == {}
    assert "is not tuned" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu(work, cache) == Choice("dense"), "the default of a captured call is not remembered"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_takes_what_eager_calls_measured_and_measures_nothing(gpu, dynamic):
    cache = {}
    assert gpu(Work(dense=5.0), cache, rows=64) == Choice("dense")

    def function(x):
        asked = Request(LINEAR, (9, 0), BF16, x.shape[0], 512, 512, device=GPU)
        return serve(asked, lambda choice, *_: x * (2 if choice.backend == "dense" else 3), cache)

    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)
    assert compiled(torch.ones(40)).sum() == 80
    assert compiled(torch.ones(64)).sum() == 128
    assert compiled(torch.ones(4100)).sum() == 3 * 4100, "never measured: the rule"
    assert compiled(torch.ones(32)).sum() == 3 * 32


def broken_module(monkeypatch):
    def launch(*tensors, config):
        broken.calls += 1
        raise RuntimeError("no such instruction")

    broken = type("Module", (), {"launch": staticmethod(launch), "CONFIGS": (None,), "calls": 0})
    monkeypatch.setattr(dispatch, "load", lambda module: broken)
    return broken


def test_a_rule_that_would_take_a_kernel_that_does_not_compile_falls_back(monkeypatch, caplog):
    broken, x = broken_module(monkeypatch), torch.ones(4)
    for _ in range(2):
        assert not dispatch.launch(LINEAR, "wgmma", 0, False, x)
    assert broken.calls == 1
    assert caplog.text.count("wgmma does not run here: RuntimeError: no such instruction") == 1
    choice, why = rule_of_thumb(linear((9, 0), device=x.device))
    assert choice == Choice("dense")
    assert "wgmma does not run here" in why
    assert rule_of_thumb(linear((9, 0)))[0] == WGMMA, "of other devices nothing is known"


@pytest.mark.parametrize("autotune", ["on", "off"])
def test_where_no_kernel_compiles_the_call_after_the_first_is_dense_and_inspect_tells_the_cause(
    gpu, monkeypatch, autotune, tmp_path
):
    """As where Triton finds no C compiler: nothing can be timed, so the rule's kernel is launched, and fails."""
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", autotune)
    cache, ran = {}, []

    def start():
        raise RuntimeError("Failed to find C compiler")

    def run(choice, cache, strict, *_):
        ran.append(choice)
        if strict or choice.backend == "dense":
            return torch.ones(4)
        return launch.runs(LINEAR, choice.backend, GPU, start)

    run.timer = lambda run: start()
    monkeypatch.setattr(dispatch, "Autotuner", functools.partial(Autotuner, timer=run.timer))
    asked = linear((9, 0), device=GPU)
    assert serve(asked, run, cache) is False, "it is computed in torch"
    assert torch.equal(serve(asked, run, cache), torch.ones(4))
    assert ran[-2:] == [WGMMA, Choice("dense")]
    assert dispatch.last_measured(cache) is None
    assert "wgmma does not run here: RuntimeError: Failed to find C compiler" in rule_of_thumb(asked)[1]
    assert not list((tmp_path / "tuned").glob("*.json"))


def test_a_triton_with_which_a_kernels_file_does_not_load_is_served_by_torch(gpu, monkeypatch, tmp_path, caplog):
    def no_such_name(module):
        raise AttributeError(f"module 'gluon' has no attribute 'barrier', in {module}")

    monkeypatch.setattr(dispatch, "load", no_such_name)
    cache, work = {}, Work()
    for _ in range(2):
        assert gpu(work, cache) == Choice("dense")
    assert caplog.text.count("wgmma does not run here: AttributeError: module 'gluon'") == 1
    assert "has no attribute 'barrier'" in rule_of_thumb(linear((9, 0), device=GPU))[1]
    assert not work.timed
    assert not list((tmp_path / "tuned").glob("*.json")), "what is quickest is not known"
    with pytest.raises(AttributeError, match="barrier"):
        gpu(work, cache, backend="wgmma")


@pytest.mark.parametrize("reason", ["strict", "capturing", "lost"])
def test_a_failure_is_an_error_where_nothing_else_can_compute_it(reason, monkeypatch):
    broken_module(monkeypatch)
    monkeypatch.setattr(launch, "capturing", lambda: reason == "capturing")
    monkeypatch.setattr(launch, "device_is_lost", lambda device: reason == "lost")
    with pytest.raises(RuntimeError, match="no such instruction"):
        dispatch.launch(LINEAR, "wgmma", 0, reason == "strict", torch.ones(4))


def test_convolutions_are_described_by_their_own_configurations():
    described = dispatch._describe(CONV, Choice("wgmma", 1))
    assert described.items() >= {"backend": "wgmma", "block_n": 128, "block_m": 256, "stages": 3}.items()


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
    (entry,) = table(tmp_path).values()
    asked = Request(LINEAR, torch.cuda.get_device_capability(), BF16, 1024, 1024, 512, out_dtype=BF16)
    assert len(entry["times"]) == len(candidates(asked)), caplog.text
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


def test_the_rule_takes_the_tile_that_fits_the_features_and_can_store_them():
    for features, block in ((128, 128), (256, 256)):
        choice, _ = rule_of_thumb(conv((9, 0), pixels=65536, features=features))
        assert load(row_of("sparse24_conv2d", "wgmma").module).CONFIGS[choice.config].block_n == block
    configs = [rule_of_thumb(linear((9, 0), 16448, N))[0].config for N in (512, 520, 516, 513)]
    assert configs == [0, 0, -1, -1], "TMA stores rows that are multiples of 16 bytes"
