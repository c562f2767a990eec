"""Before anything else: without a GPU, Triton kernels run in its interpreter, chosen when they are decorated."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

LONGEST = 120  # seconds of one gpu test, if its marker says nothing else: what hangs ends with its process only


def pytest_configure():
    """A run that is ended says what has failed until then, as after Ctrl-C. The workers of pytest-xdist just end."""
    if "PYTEST_XDIST_WORKER" not in os.environ and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword is also the name of the folder
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_fault_is_one_failure(request):
    """On a GPU, end the process of a test that hangs or leaves the device in error; pytest-xdist starts another."""
    marker = request.node.get_closest_marker("gpu")
    if not marker:
        yield
        return
    faulthandler.dump_traceback_later(marker.kwargs.get("seconds", LONGEST), exit=True, file=sys.__stderr__)
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # every later call of this process would fail too
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def python_signals():
    """Python's own handlers, which a process started in the background of a shell does not have for SIGINT."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in own.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def current_device(monkeypatch):
    """The tensors whose devices `torch.cuda.device_of` makes current, innermost last: Triton launches there."""
    tensors = []

    @contextlib.contextmanager
    def device_of(tensor):
        tensors.append(tensor)
        yield
        tensors.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return tensors


@pytest.fixture
def imaginary_gpu(tmp_path, monkeypatch):
    """The tables of a GPU on which nothing has been tuned yet; nothing is forced."""
    from sparsedm.kernels import tuning

    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA Imaginary/1 sm_90")
    for name in ("SPARSEDM_AUTOTUNE", "SPARSEDM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
