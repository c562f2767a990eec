"""The stand-in for libcuda: Triton launches through it, and it refuses what a driver would refuse."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.driver import Map, build_driver

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, as Triton's launcher does")
ROOT = Path(__file__).parents[2]
BF16 = 9  # of CUtensorMapDataType
SWIZZLE_128 = 3


LAUNCHED = """
from emulator import driver
device = driver.start()
import torch
from emulator.tests import kernels
kernels.{name}()
print(device.launches)
"""


@pytest.mark.parametrize("name", ["check_scaled_sum", "check_transposed", "check_refusals"])
def test_tritons_own_launcher_runs_kernels_here(name):
    """In a process of its own: what `start` does cannot be undone."""
    command = [sys.executable, "-c", LAUNCHED.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "_kernel" in done.stdout, "nothing was launched"


@pytest.fixture(scope="module")
def driver():
    return build_driver()


def encoded(driver, *, address=0x1000, sizes=(64, 100), stride=128, box=(64, 8), swizzle=SWIZZLE_128):
    """(the error, the map) of a bf16 tensor map; sizes, strides in bytes and boxes innermost first."""
    room = ctypes.create_string_buffer(256)
    place = -(-ctypes.addressof(room) // 64) * 64
    two = lambda kind, values: (kind * 2)(*values)  # noqa: E731
    error = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(place), BF16, 2, ctypes.c_void_p(address), two(ctypes.c_uint64, sizes),
        (ctypes.c_uint64 * 1)(stride), two(ctypes.c_uint32, box), two(ctypes.c_uint32, (1, 1)), 0, swizzle, 0, 0,
    )  # fmt: skip
    return error, Map.from_buffer_copy(ctypes.string_at(place, ctypes.sizeof(Map)))


def test_a_legal_map_holds_what_it_was_made_of(driver):
    error, found = encoded(driver)
    assert error == 0
    assert (found.address, found.rank, found.swizzle) == (0x1000, 2, 128)
    assert (list(found.size)[:2], found.stride[0], list(found.box)[:2]) == ([64, 100], 128, [64, 8])


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"address": 0x1008}, "globalAddress must be 16-byte aligned, not 8"),
        ({"sizes": (64, 0)}, "globalDim must be from 1"),
        ({"stride": 136}, "globalStrides must be multiples of 16, not 136"),
        ({"stride": 0}, "globalStrides must not fall, not 0"),
        ({"box": (64, 257)}, "boxDim must be from 1 to 256, not 257"),
        ({"box": (4, 8)}, "the inner box must be a multiple of 16 bytes, not 8"),
        ({"box": (128, 8)}, "the inner box must fit into the swizzle, not 256"),
    ],
    ids=str,
)
def test_an_illegal_map_is_refused(driver, wrong, rule):
    error, _ = encoded(driver, **wrong)
    assert error != 0
    said = ctypes.c_char_p()
    driver.cuGetErrorString(error, ctypes.byref(said))
    assert rule in said.value.decode()
