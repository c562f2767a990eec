"""wgmma.sp without a GPU: the compiled PTX is executed in the emulator, the SASS inspected, planted faults noticed."""

import functools
import itertools
import re
from dataclasses import replace

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from emulator.errors import EmulatorError
from emulator.launch import run
from emulator.memory import SHARED_BYTES
from emulator.sass import Build, compile_offline
from sparsedm.kernels.sparse24 import wgmma
from sparsedm.kernels.sparse24 import wgmma_pipeline as pipeline
from sparsedm.kernels.sparse24.wgmma import Config
from tests.kernels.sparse24.problem import Problem, check_places, hand_made, kinds, launch_on_the_gpu, prepacked

EPILOGUE = {"bias": True, "activation": "gelu", "residual": True}

# name -> (configuration, problem). The sizes are ragged in M and N, odd in tiles of each kind, and more than one tile
# long for each block, so that the ring and its phases wrap.
QUICK = {
    # three tiles along N: the pair's second is computed twice; one cluster walks all of them
    "specialized-x": (Config(256, 128, 64, 4, "x"), dict(M=136, N=520, K=320, **EPILOGUE)),
    # two sources, gates of two images whose border lies inside a tile
    "flat-w": (
        Config(256, 128, 64, 4, "w", specialized=False),
        dict(M=200, N=264, K=128, skip=136, groups=2, strided=True, **EPILOGUE),
    ),
    # N that TMA cannot store, fp32 result, fp16 input
    "specialized-direct": (
        wgmma.CONFIGS[-1],
        dict(M=70, N=130, K=72, dtype=torch.float16, out=torch.float32, **EPILOGUE),
    ),
}  # fmt: skip
SLOW = {
    f"{i}-{activation}": (config, dict(M=264, N=392, K=264, bias=True, activation=activation))
    for (i, config), activation in itertools.product(enumerate(wgmma.CONFIGS), (None, "gelu_tanh"))
} | {
    f"{i}-widest": (config, dict(M=264, N=264, K=128, skip=128, groups=2, **EPILOGUE))
    for i, config in enumerate(wgmma.CONFIGS)
} | {
    "direct-widest": (
        wgmma.CONFIGS[-1],
        dict(M=140, N=130, K=128, skip=128, groups=2, out=torch.float32, **EPILOGUE | {"activation": "gelu_tanh"}),
    ),
    "fp16-silu": (wgmma.CONFIGS[0], dict(M=40, N=256, K=64, dtype=torch.float16, activation="silu", residual=True)),
    "rows-of-scale": (wgmma.CONFIGS[1], dict(M=130, N=256, K=128, groups=13, activation="gelu")),
    "skip-long-ring": (Config(128, 128, 64, 2, "w"), dict(M=300, N=128, K=320, skip=448)),
    "flat-direct": (
        Config(256, 128, 64, 4, "x", specialized=False),
        dict(M=136, N=300, K=200, groups=4, out=torch.float32, **EPILOGUE),
    ),
    "straddling-skip": (wgmma.CONFIGS[0], dict(M=20, N=256, K=72, skip=56)),
    "wide-steps": (Config(128, 128, 128, 3), dict(M=140, N=136, K=264, **EPILOGUE)),
}  # fmt: skip
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def arguments(config, problem):
    values, metadata = prepacked(problem, "wgmma")
    p = problem
    return wgmma.operands(config, p.x, values, metadata, p.y, p.bias, p.activation, p.residual, p.skip, p.scale)


def build(config, problem):
    kernel, tensors, scalars, constants = arguments(config, problem)
    names = {torch.bfloat16: ("bf16", 16), torch.float16: ("fp16", 16), torch.int32: ("i32", 32)}
    signature = {}
    for name, (box, swizzle) in wgmma.maps(config).items():
        dtype, bits = names[tensors[name].dtype]
        layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank=2)"
        signature[name] = f"tensordesc<{dtype}{list(box)},{layout}>"
    types = kinds(scalars)
    order = ("y_ptr", "r_ptr", "stride_r", "bias_ptr", "scale_ptr", "rows_per_scale", "split", "M", "N", "K")
    return Build(
        f"{kernel.fn.__module__}:{kernel.fn.__name__}",
        signature | {name: types[name] for name in order},
        constants,
        {"num_warps": wgmma.warps(config)},
    )


@functools.cache
def compiled(names):
    cases = [(QUICK | SLOW)[name] for name in names]
    builds = [build(config, Problem(**problem)) for config, problem in cases]
    return dict(zip(names, zip(builds, compile_offline(builds))))


def kernel(name):
    """The quick ones in one go: starting the compiler costs more than most kernels."""
    return compiled(tuple(QUICK) if name in QUICK else (name,))[name]


def emulate(config, problem, offline, ptx, *, early, seed=0, clusters=1):
    _, tensors, scalars, _ = arguments(config, problem)
    size = 1 if config.cluster == "none" else 2
    run(offline, ptx, tensors | scalars, (clusters * size,), early=early, cluster=size, seed=seed)


@functools.cache
def emulated(name, **schedule):
    """The y of a case, once it is known to be right."""
    config, sizes = (QUICK | SLOW)[name]
    problem = Problem(**sizes)
    offline, built = kernel(name)
    emulate(config, problem, offline, built.ptx, **schedule)
    y = problem.y.clone()
    problem.check()
    return y


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel_is_right_in_the_emulator(name, early):
    emulated(name, early=early)


@pytest.mark.parametrize("name", QUICK)
def test_results_do_not_depend_on_when_copies_and_products_complete(name):
    assert torch.equal(emulated(name, early=True), emulated(name, early=False))


@pytest.mark.parametrize("name", CASES)
def test_sass(name):
    config, sizes = (QUICK | SLOW)[name]
    _, built = kernel(name)
    assert built.warnings == (), "C75xx means that ptxas serialises every wgmma"
    assert built.shared <= SHARED_BYTES
    if arguments(config, Problem(**sizes))[-1]["DIRECT"] and config != wgmma.CONFIGS[-1]:
        assert built.spills <= 160, "a configuration that the dispatcher does not offer for this epilogue"
    else:
        assert built.spills == 0
    main = main_loops(built)
    assert main, "no loop multiplies"
    for histogram in main:
        products = sum(n for op, n in histogram.items() if op.startswith("HGMMA.SP"))
        assert products == sum(n for op, n in histogram.items() if op.startswith("HGMMA"))
        assert sum(histogram.values()) <= (24 if config.specialized else 60) * products
        assert not any(op.startswith(("LDL", "STL", "BAR", "MEMBAR", "ERRBAR", "MOV32I")) for op in histogram)


def main_loops(built):
    """Histograms of the loops around wgmma: for each of these instructions the smallest. (A wait that spins out of line
    makes loops that overlap and do not nest.)"""
    products = [address for address, op, _ in built.instructions() if op.startswith("HGMMA")]
    around = [[(e - s, s, e) for s, e in built.loops() if s <= address <= e] for address in products]
    return [built.histogram(start, end) for _, start, end in {min(loops) for loops in around}]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["specialized-x", "flat-w"])
def test_neither_the_schedule_nor_the_number_of_blocks_changes_a_bit(name, seed):
    y = emulated(name, early=False, seed=seed, clusters=1 + seed % 2)
    assert torch.equal(y, emulated(name, early=True))


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
    "one-block-multicast": ("specialized-x", replaced(r"mov\.b16 m, 3;", "mov.b16 m, 1;")),
    "arrive-only-here": ("specialized-x", replaced(r"mapa\.shared::cluster\.u32 a, (%r\d+), r;", r"mov.u32 a, \1;")),
    "no-proxy-fence": ("flat-w", replaced(r"fence\.proxy\.async\.shared::cta;", "")),
    "wrong-swizzle": ("specialized-x", replaced(str(SWIZZLE_128), str(SWIZZLE_64))),
    "other-source": ("flat-w", replaced(r"setp\.ne\.u32 q", "setp.eq.u32 q")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault):
    name, plant = FAULTS[fault]
    config, sizes = QUICK[name]
    offline, built = kernel(name)
    broken = plant(built.ptx)
    assert broken != built.ptx, "the fault was not planted"
    problem = Problem(**sizes)
    noticed = []
    for early in (False, True):
        try:
            emulate(config, problem, offline, broken, early=early)
            problem.check()
        except (EmulatorError, AssertionError) as error:
            noticed.append(str(error))
            break
    assert noticed


@pytest.mark.parametrize("config", wgmma.CONFIGS, ids=str)
def test_every_configuration_fits_and_keeps_its_ring_the_largest(config):
    x, w, e, slot = pipeline.stage_bytes(config.block_n, config.block_m, config.block_k)
    ring, panels = config.stages * slot, config.block_n * config.block_m * 2
    assert all(size % 1024 == 0 for size in (x, w, e))
    assert ring >= panels
    assert ring + 1024 + panels + 256 <= SHARED_BYTES


def test_a_ring_that_is_not_the_largest_allocation_does_not_compile():
    with pytest.raises(RuntimeError, match="the ring must be the largest allocation"):
        compile_offline([build(Config(128, 256, 64, 1), Problem(M=8, N=128, K=64))])


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


@pytest.mark.parametrize("cluster", ["none", "x", "w"])
def test_count_of_tiles(cluster):
    config = Config(256, 128, 64, 4, cluster)
    assert wgmma.count_tiles(M=300, N=520, config=config) == {"none": 9, "x": 6, "w": 6}[cluster]


SIMPLEST = [replace(c, cluster=cluster) for cluster in ("none", "x", "w") for c in wgmma.CONFIGS[:2]]


@pytest.mark.gpu
@pytest.mark.parametrize("config", dict.fromkeys([*SIMPLEST, *wgmma.CONFIGS]), ids=str)
@pytest.mark.parametrize("matrix", ["identity", "one-hot"])
def test_on_the_gpu_every_weight_comes_out_in_its_place(config, matrix):
    problem = hand_made(matrix, N=520, K=512)
    launch_on_the_gpu(wgmma, "wgmma", problem, config=config)
    check_places(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*(pytest.param(name, id=f"random-{name}") for name in QUICK), *SLOW])
def test_on_the_gpu_as_well_as_torch(name):
    config, sizes = (QUICK | SLOW)[name]
    problem = Problem(**sizes)
    launch_on_the_gpu(wgmma, "wgmma", problem, config=config)
    problem.check()


@pytest.mark.gpu
@pytest.mark.parametrize("config", wgmma.CONFIGS, ids=str)
def test_on_the_gpu_many_tiles_for_each_block(config):
    """Several tiles for each block of the persistent grid, so that rings and phases wrap from one to the next."""
    problem = Problem(M=5000, N=2056, K=520, **EPILOGUE)
    launch_on_the_gpu(wgmma, "wgmma", problem, config=config)
    problem.check()
