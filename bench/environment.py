"""What every measurement is stamped with: device, clocks, versions, commit, date, command line."""

import functools
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sparsedm import __version__

COMMIT = "SPARSEDM_COMMIT"  # environment variable: the commit, where the code was copied without its repository
SENSORS = ("clocks.sm", "clocks.mem", "power.draw")  # MHz, MHz, W


def stamp(device):
    """{column: text} for measurements on `device` now. What cannot be read is an empty text, never a guess."""
    return {**_fixed(str(device)), **sensors(device), "date": datetime.now(UTC).isoformat(timespec="seconds")}


@functools.cache
def _fixed(device):
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU: {cpu_name()}",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else "",
        "threads": torch.get_num_threads(),
        "driver": _nvidia_smi(device, "driver_version")[0] if cuda else "",
        "cuda": (torch.version.cuda or "") if cuda else "",
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cusparselt": str(torch.backends.cusparselt.version() or "") if cuda else "",
        "sparsedm": __version__,
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def sensors(device):
    """SM clock and memory clock in MHz and power in W, as nvidia-smi reads them now."""
    values = _nvidia_smi(device, *SENSORS) if torch.device(device).type == "cuda" else [""] * len(SENSORS)
    return dict(zip(("sm_mhz", "memory_mhz", "power_w"), values))


def _nvidia_smi(device, *fields):
    number = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"  # nvidia-smi does not count as torch does
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", number]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [""] * len(fields)
    return [value.strip() for value in answer.strip().split(",")]


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def commit():
    """The commit of the code that runs, with +dirty where files differ from it; $SPARSEDM_COMMIT overrules."""
    if os.environ.get(COMMIT):
        return os.environ[COMMIT]
    here = Path(__file__).parent
    try:
        git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=20, check=True)
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])  # fails in somebody else's repository
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+dirty" if changed else "")


def _installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
