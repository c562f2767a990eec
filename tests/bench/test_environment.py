import subprocess

import pytest
import torch

from bench import environment
from bench.results import COLUMNS


@pytest.fixture(autouse=True)
def _ask_again():
    environment.commit.cache_clear()
    environment._fixed.cache_clear()


def test_a_stamp_fills_columns_and_guesses_nothing():
    stamp = environment.stamp("cpu")
    assert set(stamp) <= set(COLUMNS)
    assert stamp["device"].startswith("CPU: ")
    assert stamp["torch"] == torch.__version__
    empty = {name for name, value in stamp.items() if value == ""}
    assert empty >= {"capability", "driver", "cuda", "cusparselt", "sm_mhz", "memory_mhz", "power_w"}


def test_a_missing_nvidia_smi_leaves_empty_cells(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": "0"}))
    monkeypatch.setenv("PATH", "")
    assert environment.sensors("cuda") == {"sm_mhz": "", "memory_mhz": "", "power_w": ""}


def test_nvidia_smi_is_asked_for_this_device(monkeypatch):
    asked = []

    def smi(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1980, 3201, 655.1\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": "ab-12"}))
    monkeypatch.setattr(subprocess, "run", smi)
    assert environment.sensors("cuda:1") == {"sm_mhz": "1980", "memory_mhz": "3201", "power_w": "655.1"}
    assert "--id=GPU-ab-12" in asked[0]


def test_the_commit_may_be_told(monkeypatch):
    monkeypatch.setenv(environment.COMMIT, "abc123")
    assert environment.commit() == "abc123"


@pytest.mark.parametrize(
    ("changed", "tracked", "commit"),
    [("", True, "0123abc"), (" M file\n", True, "0123abc+dirty"), ("", False, "")],
    ids=["clean", "dirty", "inside-another-repository"],
)
def test_the_commit_is_that_of_this_code(monkeypatch, changed, tracked, commit):
    def git(command, **options):
        if "ls-files" in command and not tracked:
            raise subprocess.CalledProcessError(1, command)
        out = {"rev-parse": "0123abc\n", "ls-files": "environment.py\n", "status": changed}[command[1]]
        return subprocess.CompletedProcess(command, 0, out)

    monkeypatch.delenv(environment.COMMIT, raising=False)
    monkeypatch.setattr(subprocess, "run", git)
    assert environment.commit() == commit


def test_the_command_line_holds_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/somebody/run.py", "--suite", "gemm x"])
    assert environment.stamp("cpu")["command"] == "run.py --suite 'gemm x'"
