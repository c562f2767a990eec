"""gpu-marked tests without a GPU, by a pytest plugin: `pytest -p tests.emulated_gpu -m gpu tests/kernels/sparse24`."""

import pytest

from emulator import driver


def start(capability=driver.H200, execute=True):
    """Let Triton, torch and sparsedm find a GPU in this process. Returns the emulator's Device."""
    emulated = driver.start(capability, execute)
    from sparsedm.kernels import launch
    from sparsedm.kernels.sparse24 import dispatch

    for module in (launch, dispatch):
        module.capability = lambda device: capability
    return emulated


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    """Before Triton is imported."""
    early_config.emulated = start()
    early_config.emulated.unused = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = len(item.config.emulated.launches)
    yield
    if len(item.config.emulated.launches) == before:
        item.config.emulated.unused.append(item.name)


def pytest_terminal_summary(terminalreporter, config):
    launches, unused = config.emulated.launches, config.emulated.unused
    terminalreporter.write_line(f"{len(launches)} launches of {', '.join(sorted(set(launches)))}")
    terminalreporter.write_line(f"tests without a launch: {', '.join(unused) or 'none'}")
