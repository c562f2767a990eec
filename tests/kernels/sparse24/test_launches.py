"""gpu-marked tests pass on a CPU: through Triton's own launcher, over the stand-in for libcuda, into the emulator."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [HERE / f"test_{kernel}.py" for kernel in ("mma", "wgmma", "mma_splitk", "wgmma_conv", "mma_conv")]


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, as Triton's launcher does")
def test_gpu_tests_pass_through_tritons_own_launcher(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.emulated_gpu", "-m", "gpu", "-k", "random"]
    command += ["--color=no", *map(str, FILES)]
    done = subprocess.run(command, cwd=HERE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "tests without a launch: none" in done.stdout
    passed = [Path(line.split("::")[0]).name for line in re.findall(r"^(.*) PASSED", done.stdout, re.M)]
    assert set(passed) == {file.name for file in FILES}
