"""The example scripts, as a user without a network connection runs them."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {  # script and options: size of the picture it leaves
    ("ddpm_pipeline.py", "--tuning-steps", "2"): (64, 32),
    ("dit_guidance.py", "--tuning-steps", "2"): (64, 32),
    ("stable_diffusion.py",): (64, 64),
    ("stable_diffusion.py", "--version", "3"): (64, 64),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {script for script, *_ in SCRIPTS}


@pytest.mark.interop
@pytest.mark.parametrize("command", SCRIPTS, ids=" ".join)
def test_an_example_leaves_its_picture(command, tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    picture = tmp_path / "picture.png"
    script, *options = command
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *options, "--out", picture], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"2:4 compressed below: {picture}" in result.stdout
    with Image.open(picture) as image:
        width, height = SCRIPTS[command]
        assert image.size == (width, height)
