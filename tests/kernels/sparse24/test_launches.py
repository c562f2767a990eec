"""gpu-marked tests pass on a CPU: through Triton's own launcher, over the stand-in for libcuda, into the emulator."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, as Triton's launcher does")
@pytest.mark.parametrize("kernel", ["mma", "wgmma", "mma_splitk", "wgmma_conv", "mma_conv"])
def test_gpu_tests_pass_through_tritons_own_launcher(kernel, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulated_gpu", "-m", "gpu", "-k", "random"]
    command += ["--color=no", str(HERE / f"test_{kernel}.py")]
    done = subprocess.run(command, cwd=HERE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    launches = int(re.search(r"^(\d+) launches of ", done.stdout, re.M)[1])
    passed = int(re.search(r"^(\d+) passed", done.stdout, re.M)[1])
    assert launches >= passed > 0, "a test passed without a launch"
