"""The instruction loops without a GPU: compiled, their SASS read, and the sparse ones executed in the emulator."""

import functools

import numpy as np
import pytest
import torch

from bench import instruction_rates as rates
from bench.ceilings import INSTRUCTIONS, unsupported
from emulator import tensor_cores
from emulator.launch import run
from emulator.memory import swizzle
from emulator.sass import Build, compile_offline

TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TURNS = 3
INSTRUCTION = {
    "mma": "HMMA.16816",
    "mma.sp": "HMMA.SP.16832",
    "wgmma": "HGMMA.64x256x16",
    "wgmma.sp": "HGMMA.SP.64x256x32",
}


def arguments(name):
    return rates.launch_arguments(name, torch.bfloat16, torch.device("cpu"), blocks=1)


def of_integers(tensors):
    """The same with small integers as operands, whose products and sums are exact in fp32."""
    operands = tensors["x_ptr"][:-1] if "x_ptr" in tensors else tensors["image_ptr"]
    integers = torch.randint(-4, 5, (*operands.shape, 2), device=operands.device).bfloat16()
    operands.copy_(integers.view(torch.int32)[..., 0])
    return tensors


@functools.cache
def compiled():
    builds = {}
    for name in INSTRUCTIONS:
        kernel, tensors, constants = arguments(name)
        where = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
        signature = {key: TYPES[tensor.dtype] for key, tensor in tensors.items()} | {"iterations": "i32"}
        builds[name] = Build(where, signature, constants, {"num_warps": rates.WARPS}, divisible=tuple(tensors))
    return dict(zip(builds, zip(builds.values(), compile_offline(list(builds.values())))))


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_loop_is_almost_only_that_instruction(name):
    _, built = compiled()[name]
    assert built.spills == 0
    assert not built.warnings
    loops = [h for h in (built.histogram(*loop) for loop in built.loops()) if any("MMA" in op for op in h)]
    assert loops  # the loop, unrolled, and its remainder
    for loop in loops:
        products = {op: n for op, n in loop.items() if "MMA" in op}
        assert all(op.startswith(INSTRUCTION[name]) for op in products), products
        assert sum(products.values()) % (8 if name.startswith("mma") else 4) == 0
        others = set(loop) - set(products) - {"NOP", "BRA", "VIADD", "IADD3", "UIADD3"}
        assert all(op.startswith(("ISETP", "WARPGROUP")) for op in others), others


def assert_mma_sp_is_right(tensors):
    """Every accumulator is TURNS times the product of its pair of fragments."""
    x = tensors["x_ptr"].cpu().numpy().reshape(-1, rates.WARPS, 32)
    y = tensors["y_ptr"].cpu().view(rates.TILES_A, rates.TILES_B, 4, rates.WARPS, 32).numpy()
    group, thread = np.arange(32) // 4, np.arange(32) % 4
    for warp in (0, rates.WARPS - 1):
        words = tensor_cores.metadata_words(np.ascontiguousarray(x[-1, warp]), 0)
        for a in range(rates.TILES_A):
            kept = tensor_cores.fragment_a(np.ascontiguousarray(x[4 * a : 4 * a + 4, warp]), tensor_cores.bf16_to_f32)
            for b in range(rates.TILES_B):
                dense = np.empty((32, 8), np.float32)
                for r in range(4):
                    register = np.ascontiguousarray(x[4 * (rates.TILES_A + b) + r, warp]).view(np.uint16).reshape(32, 2)
                    for half in (0, 1):
                        dense[8 * r + 2 * thread + half, group] = tensor_cores.bf16_to_f32(register[:, half].copy())
                product = TURNS * (tensor_cores.expand(kept, words).astype(np.float64) @ dense)
                for i in range(4):
                    expected = product[group + 8 * (i >> 1), 2 * thread + (i & 1)]
                    assert np.array_equal(y[a, b, i, warp], expected), (warp, a, b, i)


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
def test_mma_sp_multiplies_every_pair_of_fragments(early):
    build, built = compiled()["mma.sp"]
    tensors = of_integers(arguments("mma.sp")[1])
    run(build, built.ptx, tensors | {"iterations": TURNS}, (1,), early=early)
    assert_mma_sp_is_right(tensors)


def tile(image, start, rows):
    """(rows, 128 bytes) of shared memory in the 128-byte swizzle, as bf16."""
    linear = start + np.arange(rows)[:, None] * 128 + np.arange(128)
    return tensor_cores.bf16_to_f32(np.ascontiguousarray(image.view(np.uint8)[swizzle(linear, 128)]).view(np.uint16))


def wgmma_answer(name, tensors):
    """TURNS * (W x^T) (128, 256) of what the image holds, in fp64."""
    image = tensors["image_ptr"].cpu().numpy()
    x = [tile(image, panel * rates.COLUMNS * 128, rates.COLUMNS) for panel in (0, 1)]
    w = tile(image, 2 * rates.COLUMNS * 128, rates.ROWS)
    if name == "wgmma":
        return TURNS * (w.astype(np.float64) @ x[0].T)
    e, dense = tensors["e_ptr"].cpu().numpy().reshape(2, rates.WARPS, 32), []
    for step in range(4):  # of 32 columns, of which half are kept
        words = tensor_cores.metadata_words(np.ascontiguousarray(e[step // 2]), step % 2)
        dense.append(tensor_cores.expand(w[:, 16 * step : 16 * step + 16], words))
    return TURNS * (np.concatenate(dense, 1).astype(np.float64) @ np.concatenate(x, 1).T)


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
def test_wgmma_sp_multiplies_what_lies_in_shared_memory(early):
    build, built = compiled()["wgmma.sp"]
    tensors = of_integers(arguments("wgmma.sp")[1])
    run(build, built.ptx, tensors | {"iterations": TURNS}, (1,), early=early)
    assert np.array_equal(tensors["y_ptr"][0].numpy(), wgmma_answer("wgmma.sp", tensors))


def test_operations_are_dense_equivalent():
    assert rates.operations("mma", 10) == 10 * rates.WARPS * 8 * 2 * 16 * 8 * 16
    assert rates.operations("mma.sp", 10) == 2 * rates.operations("mma", 10)
    assert rates.operations("wgmma", 10) == 10 * 2 * 128 * 256 * 64
    assert rates.operations("wgmma.sp", 10) == 2 * rates.operations("wgmma", 10)


def test_what_it_needs():
    cpu = torch.device("cpu")
    assert {unsupported(name, cpu, torch.bfloat16) for name in INSTRUCTIONS} == {"needs an NVIDIA GPU"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_on_a_gpu(name):
    device = torch.device("cuda")
    if reason := unsupported(name, device, torch.bfloat16):
        pytest.skip(reason)
    if name != "mma":  # one block, whose every register is known: the simplest that the sparse instructions can do
        kernel, tensors, constants = rates.launch_arguments(name, torch.bfloat16, device, 1)
        of_integers(tensors)
        kernel[(1,)](*tensors.values(), TURNS, **constants, num_warps=rates.WARPS)
        torch.cuda.synchronize()
        if name == "mma.sp":
            assert_mma_sp_is_right(tensors)
        else:
            assert np.array_equal(tensors["y_ptr"][0].cpu().numpy(), wgmma_answer(name, tensors))
    call, _ = rates.prepare(name, device, torch.bfloat16)
    call()
    torch.cuda.synchronize()
