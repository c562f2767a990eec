"""What the tests' own conftest does, in a run of its own."""

import os
import subprocess
import sys

TESTS = """
import os, signal

def test_fails():
    raise AssertionError("found before the end")

def test_is_ended():
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""


def test_a_run_that_is_ended_says_what_has_failed(tmp_path):
    (tmp_path / "test_two.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = (sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, "interrupted"
    assert "E       AssertionError: found before the end" in done.stdout
    assert "1 failed" in done.stdout
