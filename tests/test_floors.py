"""The floors of the house: a file imports only from floors below its own (train/ files may import each other)."""

import ast
import pathlib
import subprocess
import sys

import pytest

import sparsedm

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (  # first match wins; a higher number may import a lower one
    ("sparsedm.errors", -2),
    ("sparsedm.files", -1),
    ("sparsedm.kernels", 0),
    ("sparsedm.layers", 1),
    ("sparsedm.compressed", 1.1),
    ("sparsedm.sparsity", 1.2),
    ("sparsedm.tensor_files", 1),
    ("sparsedm.inspection", 1.5),
    ("sparsedm.permutation", 1.5),
    ("sparsedm.cuda_graph", 1.8),
    ("sparsedm.diffusion", 1.8),
    ("sparsedm.samplers", 2),
    ("sparsedm.models", 2),
    ("sparsedm.train", 3),
    ("sparsedm.stepaware", 3),
    ("sparsedm.search", 3),
    ("sparsedm.search_pictures", 3.2),
    ("sparsedm.search_report", 3.5),
    ("sparsedm.search_study", 4.2),
    ("sparsedm.search_command", 4.4),
    ("sparsedm.features", 2.9),
    ("sparsedm.evaluate", 3),
    ("sparsedm.pictures", 3),
    ("sparsedm.bench", 3.5),
    ("sparsedm.commands", 4),
    ("sparsedm.drawing", 4.1),
    ("sparsedm.importing", 4),
    ("sparsedm.quickstart", 4.3),
    ("sparsedm.experiments", 4.4),
    ("sparsedm.cli", 4.6),
)
ROOMS = (
    "sparsedm.kernels",
    "sparsedm.models",
    "sparsedm.train",
    "sparsedm.bench",
    "sparsedm.experiments",
)  # may import inside themselves
FILES = sorted(p for p in (ROOT / "sparsedm").rglob("*.py") if p.name != "__init__.py" or p.parent.name != "sparsedm")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module):
    for prefix, number in FLOORS:
        if module == prefix or module.startswith(prefix + "."):
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS and to the file tree in the README")


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            yield node.module


def violations(module, source):
    for name in imports(source):
        if name.startswith("sparsedm."):
            same_room = any(module.startswith(r) and name.startswith(r) for r in ROOMS)
            if floor(name) >= floor(module) and not same_room:
                yield f"{module} imports {name}"
        if name.split(".")[0] == "triton" and not module.startswith("sparsedm.kernels"):
            yield f"{module} imports triton outside kernels/"
        if name.split(".")[0] in ("bench", "tests"):
            yield f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
    assert not list(violations(module_name(path), path.read_text(encoding="utf-8")))


def test_a_wrong_import_is_noticed():
    assert list(violations("sparsedm.layers", "from sparsedm.models import uvit")) == [
        "sparsedm.layers imports sparsedm.models"
    ]
    assert list(violations("sparsedm.evaluate", "import sparsedm.train.loop"))
    assert list(violations("sparsedm.train.loop", "import triton"))
    assert not list(violations("sparsedm.train.chain", "from sparsedm.train.loop import train"))


def test_every_public_name_is_there():
    assert sparsedm.__all__
    for name in sparsedm.__all__:
        assert callable(getattr(sparsedm, name))
    with pytest.raises(AttributeError, match="no attribute 'pruning'"):
        _ = sparsedm.pruning


def test_import_is_lazy_and_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import sparsedm; "
        "assert 'torch' not in sys.modules; sparsedm.Linear(8, 4, pattern='2:4')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
