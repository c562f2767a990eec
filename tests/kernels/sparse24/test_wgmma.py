"""wgmma.sp without a GPU: the compiled PTX is executed in the emulator, the SASS inspected, planted faults noticed."""

import functools
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from emulator.memory import SHARED_BYTES
from emulator.sass import compile_offline
from sparsedm.kernels.sparse24 import wgmma
from sparsedm.kernels.sparse24.wgmma_pipeline import Config, cluster_size, stage_bytes
from tests.kernels.sparse24.kernel_case import (
    Cases,
    KernelCase,
    KernelTests,
    Problem,
    check_places,
    hand_made,
    launch_on_the_gpu,
)

EPILOGUE = {"bias": True, "activation": "gelu", "residual": True}


def case(config, clusters=1, slow=False, **sizes):
    """clusters: so many walk all tiles."""
    return KernelCase(wgmma, config, sizes, plan=blocks(config, clusters), slow=slow)


def blocks(config, clusters):
    return {"blocks": clusters * cluster_size(config)}


slow_case = functools.partial(case, slow=True)

# The sizes are ragged in M and N, odd in tiles of each kind, and more than one tile long for each block, so that the
# ring and its phases wrap.
CASES = Cases(
    {
        # three tiles along N: the pair's second is computed twice; one cluster walks all of them
        "specialized-x": case(Config(256, 128, 64, 4, "x"), M=136, N=520, K=320, **EPILOGUE),
        # two sources, gates of two images whose border lies inside a tile
        "flat-w": case(
            Config(256, 128, 64, 4, "w", specialized=False),
            M=200, N=264, K=128, skip=136, groups=2, strided=True, **EPILOGUE,
        ),
        # 3 x 3 tiles: two clusters of four, in each of which tiles are computed twice
        "resident-xw": case(
            Config(128, 128, 64, 3, "xw", specialized=False, resident=2), clusters=1, M=260, N=264, K=128, **EPILOGUE
        ),
        # N that TMA cannot store, fp32 result, fp16 input
        "specialized-direct": case(
            wgmma.CONFIGS[-1], M=70, N=130, K=72, dtype=torch.float16, out=torch.float32, **EPILOGUE
        ),
    }
    | {
        f"{i}-{activation}": slow_case(config, M=264, N=392, K=264, bias=True, activation=activation)
        for (i, config), activation in itertools.product(enumerate(wgmma.CONFIGS), (None, "gelu_tanh"))
    }
    | {
        f"{i}-widest": slow_case(config, M=264, N=264, K=128, skip=128, groups=2, **EPILOGUE)
        for i, config in enumerate(wgmma.CONFIGS)
    }
    | {
        "direct-widest": slow_case(
            wgmma.CONFIGS[-1],
            M=140, N=130, K=128, skip=128, groups=2, out=torch.float32, **EPILOGUE | {"activation": "gelu_tanh"},
        ),
        "fp16-silu": slow_case(
            wgmma.CONFIGS[0], M=40, N=256, K=64, dtype=torch.float16, activation="silu", residual=True
        ),
        "rows-of-scale": slow_case(wgmma.CONFIGS[1], M=130, N=256, K=128, groups=13, activation="gelu"),
        "skip-long-ring": slow_case(Config(128, 128, 64, 2, "w"), M=300, N=128, K=320, skip=448),
        "flat-direct": slow_case(
            Config(256, 128, 64, 4, "x", specialized=False),
            M=136, N=300, K=200, groups=4, out=torch.float32, **EPILOGUE,
        ),
        "straddling-skip": slow_case(wgmma.CONFIGS[0], M=20, N=256, K=72, skip=56),
        "wide-steps": slow_case(Config(128, 128, 128, 3), M=140, N=136, K=264, **EPILOGUE),
    }
)  # fmt: skip


def replaced(pattern, by):
    return lambda ptx: re.sub(pattern, by, ptx)


SWIZZLE_128 = 1 << 62 | 64 << 32 | 1 << 16  # the constant half of x's descriptor
SWIZZLE_64 = SWIZZLE_128 + (1 << 62) - (1 << 64)


FAULTS = {
    "wait-for-nothing": ("flat-w", replaced(r"(wgmma\.wait_group\.sync\.aligned) [01]", r"\1 2")),
    "selector": ("specialized-x", replaced(r"(%r\d+), 1, 1, 1, 1, 0, 0;", r"\1, 0, 1, 1, 1, 0, 0;")),
    "short-expectation": ("specialized-x", replaced(r"34816", "33792")),
    "half-the-arrivals": (
        "specialized-x",
        replaced(r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], |mov\.b32 \t%r\d+, )16;", r"\g<1>8;"),
    ),
    "no-cluster-barrier": ("specialized-x", replaced(r"barrier\.cluster\.\w+\.\w+\.aligned;", "")),
    "one-block-multicast": ("specialized-x", replaced(r"cvt\.u16\.u32 m, %r\d+;", "mov.b16 m, 1;")),
    "arrive-only-here": ("specialized-x", replaced(r"mapa\.shared::cluster\.u32 a, (%r\d+), r;", r"mov.u32 a, \1;")),
    "residual-over-a-store": ("specialized-x", replaced(r"cp\.async\.bulk\.wait_group\.read \t?0;", "")),
    "two-of-three-arrivals": (
        "resident-xw",
        replaced(r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], |mov\.b32 \t%r\d+, )12;", r"\g<1>8;"),
    ),
    "arrive-at-others": ("resident-xw", replaced(r"xor\.b32 r, r, l;", "mov.u32 r, l;")),
    "multicast-to-others": ("resident-xw", replaced(r"cvt\.u16\.u32 m, %r\d+;", "mov.b16 m, 3;")),
    "residual-not-awaited": (
        "specialized-x",
        replaced(r"mbarrier\.try_wait\.parity\.shared(::cta)?\.b64 complete, [^;]*;", "setp.eq.u32 complete, 0, 0;"),
    ),
    "no-proxy-fence": ("flat-w", replaced(r"fence\.proxy\.async\.shared::cta;", "")),
    "wrong-swizzle": ("specialized-x", replaced(str(SWIZZLE_128), str(SWIZZLE_64))),
    "other-source": ("flat-w", replaced(r"setp\.ne\.u32 q", "setp.eq.u32 q")),
}  # fmt: skip


class TestWgmma(KernelTests):
    def spills(self, case):
        """Some are allowed in a configuration that the dispatcher does not offer where y is stored directly."""
        (step,) = case.launches(case.problem())
        return 160 if step.constants["EPILOGUE"].direct and case.config != wgmma.CONFIGS[-1] else 0

    def check_sass(self, case, compiled):
        main = main_loops(compiled[0][1])
        assert compiled[0][1].warnings == (), "C75xx means that ptxas serialises every wgmma"
        assert main, "no loop multiplies"
        (step,) = case.launches(case.problem())
        finish = step.constants["EPILOGUE"]
        barriers = 3 if finish.residual and not finish.direct else 0  # where the residual is ordered, once per tile
        for histogram in main:
            products = sum(n for op, n in histogram.items() if op.startswith("HGMMA.SP"))
            assert products == sum(n for op, n in histogram.items() if op.startswith("HGMMA"))
            most = (30 if case.config.specialized else 60) * case.config.block_m / 128  # for 64 x 128 x 32
            assert sum(histogram.values()) <= max(most * products, 33)  # a loop around two small products
            assert sum(n for op, n in histogram.items() if op.startswith("BAR")) <= barriers
            # with Triton 3.6 a fence, too, where the residual is loaded
            assert histogram["MEMBAR.ALL.CTA"] <= (barriers > 0 and triton.__version__.startswith("3.6."))
            refused = ("LDL", "STL", "MEMBAR", "ERRBAR", "MOV32I")
            assert not any(op.startswith(refused) and op != "MEMBAR.ALL.CTA" for op in histogram)


def main_loops(built):
    """Histograms of the loops around wgmma: for each of these instructions the smallest. (A wait that spins out of line
    makes loops that overlap and do not nest.)"""
    products = [address for address, op, _ in built.instructions() if op.startswith("HGMMA")]
    around = [[(e - s, s, e) for s, e in built.loops() if s <= address <= e] for address in products]
    return [built.histogram(start, end) for _, start, end in {min(loops) for loops in around}]


QUICK = [name for name in CASES if not CASES[name].slow]


@pytest.mark.parametrize("quick", QUICK)
def test_results_do_not_depend_on_when_copies_and_products_complete(quick):
    assert torch.equal(CASES.emulated(quick, early=True), CASES.emulated(quick, early=False))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("quick", ["specialized-x", "flat-w"])
def test_neither_the_schedule_nor_the_number_of_blocks_changes_a_bit(quick, seed):
    y = CASES.emulated(quick, early=False, seed=seed, **blocks(CASES[quick].config, 1 + seed % 2))
    assert torch.equal(y, CASES.emulated(quick, early=True))


@pytest.mark.parametrize("config", wgmma.CONFIGS, ids=str)
def test_every_configuration_fits_and_keeps_its_ring_the_largest(config):
    x, w, e, slot = stage_bytes(config)
    ring, panels = config.stages * slot, config.block_n * config.block_m * 2
    assert all(size % 1024 == 0 for size in (x, w, e))
    assert ring >= panels
    assert config.resident * (ring + 1024 + panels + 256 + 1024) <= SHARED_BYTES + 1024


def test_a_ring_that_is_not_the_largest_allocation_does_not_compile():
    with pytest.raises(RuntimeError, match="the ring must be the largest allocation"):
        compile_offline(case(Config(128, 256, 64, 1), M=8, N=128, K=64).builds())


def test_a_descriptor_is_triton_s_own_and_remembers_no_address():
    x, box = torch.zeros(256, 128, dtype=torch.bfloat16), (64, 64)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    for tensor in (x, x.clone(), x[:, 64:], x[:, 64:].clone()):
        made = wgmma.descriptor(tensor, box, 128)
        assert made.base is tensor
        del made.base
        expected = vars(TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout))
        assert vars(made) == {name: value for name, value in expected.items() if name != "base"}
    with pytest.raises(AssertionError, match="16-byte aligned"):
        wgmma.descriptor(torch.zeros(64, 68, dtype=torch.bfloat16)[:, :64], box, 128)


@pytest.mark.parametrize("cluster", ["none", "x", "w", "xw"])
def test_count_of_tiles(cluster):
    config = Config(256, 128, 64, 4, cluster)
    assert wgmma.count_tiles(M=300, N=520, config=config) == {"none": 9, "x": 6, "w": 6, "xw": 4}[cluster]


SIMPLEST = [replace(c, cluster=cluster) for cluster in ("none", "x", "w", "xw") for c in wgmma.CONFIGS[:2]]


@pytest.mark.gpu
@pytest.mark.parametrize("config", dict.fromkeys([*SIMPLEST, *wgmma.CONFIGS]), ids=str)
@pytest.mark.parametrize("matrix", ["identity", "one-hot"])
def test_on_the_gpu_every_weight_comes_out_in_its_place(config, matrix):
    problem = hand_made(matrix, N=520, K=512)
    launch_on_the_gpu(wgmma, problem, config=config)
    check_places(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("config", wgmma.CONFIGS, ids=str)
def test_on_the_gpu_many_tiles_for_each_block(config):
    """Several tiles for each block of the persistent grid, so that rings and phases wrap from one to the next."""
    problem = Problem(M=5000, N=2056, K=520, **EPILOGUE)
    launch_on_the_gpu(wgmma, problem, config=config)
    problem.check()


@pytest.mark.parametrize("answer", [33, 0, RuntimeError("Triton Error [CUDA]: invalid argument")])
def test_a_driver_that_does_not_count_clusters_leaves_the_grid_as_it_is(answer, monkeypatch):
    def counts(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    utils = SimpleNamespace(cuOccupancyMaxActiveClusters=counts)
    monkeypatch.setattr(wgmma, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    compiled = SimpleNamespace(_init_handles=lambda: None, function=0)
    expected = wgmma.ENDLESS if isinstance(answer, Exception) else max(answer, 1)
    assert wgmma._most_clusters(compiled, 0, 4) == expected
    assert wgmma._most_clusters(compiled, 0, 2) == wgmma.ENDLESS
