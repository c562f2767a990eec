"""Gives the tests of `kernel_case.KernelTests` the cases of the file that inherits them."""

import pytest


def pytest_generate_tests(metafunc):
    cases = getattr(metafunc.module, "CASES", {})
    slow = lambda name: [pytest.mark.slow] if cases[name].slow else []  # noqa: E731
    if "cases" in metafunc.fixturenames:
        metafunc.parametrize("cases", [cases], ids=[""])
    if "name" in metafunc.fixturenames and cases:
        metafunc.parametrize("name", [pytest.param(name, id=name, marks=slow(name)) for name in cases])
    if "random" in metafunc.fixturenames:
        ids = [name if cases[name].slow else f"random-{name}" for name in cases]
        metafunc.parametrize("random", list(cases), ids=ids)
    if "fault" in metafunc.fixturenames:
        faults = metafunc.module.FAULTS
        metafunc.parametrize("fault", list(faults.values()), ids=list(faults))
