"""Every configuration compiles for every GPU that has its instructions, without a spill."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.kernels.compile_table import ARCHITECTURES, main, serves


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_compiles_without_spills(architecture):
    capability = tuple(map(int, architecture.split(".")))
    code = f"import json; from tests.kernels.compile_table import compiled; print(json.dumps(compiled({capability})))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(child.stdout.splitlines()[-1])
    assert {"mma", "mma_splitk", "mma_conv"} <= set(found)
    assert all(map(serves, found.values())), found


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([{"products": [16], "spills": 0}, {"config": "b", "error": "OutOfResources: shared memory"}], 0),
        ([{"products": [16], "spills": 0}, {"config": "b", "error": "CompilationError: at 1:1"}], "sm_9.0 mma"),
        ([{"products": [16], "spills": 8}], "sm_9.0 mma"),
        ([{"config": "b", "error": "OutOfResources: shared memory"}], "sm_9.0 mma"),
    ],
)
def test_a_table_with_a_failure_fails(results, status, monkeypatch):
    child = SimpleNamespace(returncode=0, stdout=json.dumps({"mma": results}))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: child)
    with pytest.raises(SystemExit) as ended:
        main(["9.0"])
    assert ended.value.code == (f"fail or spill: {status}" if status else 0)
