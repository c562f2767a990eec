"""Every configuration compiles for every GPU that has its instructions, without a spill."""

import json
import subprocess
import sys

import pytest

from tests.kernels.compile_table import ARCHITECTURES


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_compiles_without_spills(architecture):
    capability = tuple(map(int, architecture.split(".")))
    code = f"import json; from tests.kernels.compile_table import compiled; print(json.dumps(compiled({capability})))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(child.stdout.splitlines()[-1])
    assert {"mma", "mma_splitk", "mma_conv"} <= set(found)
    for results in found.values():
        fits = [result for result in results if "error" not in result]
        assert all("shared memory" in result["error"] for result in results if "error" in result), results
        assert fits
        assert not sum(result["spills"] for result in fits)
