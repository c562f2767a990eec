"""The rules of the house: a file imports from floors below its own and, without a circle, from its own floor; no
function is longer than a screen or two, or takes more than a dozen arguments."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import sparsedm

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (  # the room that names a module most closely counts
    (7, "bench", "emulator"),
    (6, "sparsedm.__main__", "sparsedm.cli", "sparsedm.commands"),
    (5, "sparsedm.stepaware", "sparsedm.recipes"),
    (4, "sparsedm.train", "sparsedm.evaluate"),
    (3, "sparsedm.models", "sparsedm.diffusion", "sparsedm.samplers"),
    (2, "sparsedm.layers", "sparsedm.compressed", "sparsedm.sparsity", "sparsedm.compression", "sparsedm.optim"),
    (2, "sparsedm.decay_hook", "sparsedm.selections", "sparsedm.copying", "sparsedm.permutation"),
    (2, "sparsedm.inspection", "sparsedm.memory", "sparsedm.layer_times"),
    (2, "sparsedm.model_files", "sparsedm.tensor_files"),
    (1, "sparsedm.kernels"),
    (0, "sparsedm.files", "sparsedm.errors", "sparsedm.plots", "sparsedm.features", "sparsedm.cuda_graph"),
    (0, "sparsedm.timing", "sparsedm.__version__"),
)
FILES = sorted(
    path
    for room in ("sparsedm", "bench", "emulator")
    for path in (ROOT / room).rglob("*.py")
    if path != ROOT / "sparsedm/__init__.py" and "tests" not in path.parts
)
OURS = ("sparsedm", "bench", "emulator", "tests")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module):
    for number, *rooms in FLOORS:
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


MODULES = {module_name(path): path for path in FILES}


def imports(source):
    """The names of all modules that a source imports, those given to `importlib` as strings included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if node.module == "sparsedm":
                    yield sparsedm._HOME.get(alias.name, name)
                else:
                    yield name if name in MODULES else node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.split(":")[0]
            if "." in name and name in MODULES:  # "bench" alone is a word
                yield name


def violations(module, source):
    for name in imports(source):
        room = name.split(".")[0]
        if room == "triton" and module.startswith("sparsedm.") and not module.startswith("sparsedm.kernels"):
            yield f"{module} imports triton outside kernels/"
        if name == "sparsedm":
            yield f"{module} imports the whole package, every floor of it: name the module"
        elif room in OURS and (room == "tests" or floor(name) > floor(module)):
            yield f"{module} imports {name}"
        if module.split(".")[0] == "emulator" and room in OURS and room != "emulator":
            yield f"{module} imports {name}: the emulator knows nothing of us"


def circle(edges):
    """The modules of one circle of imports, or None."""
    state = {}

    def visit(module, path):
        if state.get(module) == "done":
            return None
        if module in path:
            return path[path.index(module) :]
        found = next(filter(None, (visit(name, [*path, module]) for name in edges.get(module, ()))), None)
        state[module] = "done"
        return found

    return next(filter(None, (visit(module, []) for module in edges)), None)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
    assert not list(violations(module_name(path), path.read_text(encoding="utf-8")))


def test_no_circle():
    edges = {
        module: {name for name in imports(path.read_text(encoding="utf-8")) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    assert circle(edges) is None


def test_a_wrong_import_is_noticed():
    assert list(violations("sparsedm.layers", "from sparsedm.models import uvit")) == [
        "sparsedm.layers imports sparsedm.models.uvit"
    ]
    assert list(violations("sparsedm.kernels.mask", "from sparsedm import sparsify")) == [
        "sparsedm.kernels.mask imports sparsedm.sparsity"
    ]
    assert list(violations("sparsedm.kernels.mask", "import sparsedm as package"))
    assert not list(violations("sparsedm.cli", "from sparsedm import __version__, sparsify"))
    assert list(violations("sparsedm.evaluate", "import sparsedm.commands.train"))
    assert list(violations("sparsedm.train.loop", "import triton"))
    assert list(violations("sparsedm.kernels.launch", "importlib.import_module('sparsedm.layers')"))
    assert list(violations("sparsedm.cli", "from bench import run"))
    assert list(violations("emulator.sass", "from sparsedm import files"))
    assert not list(violations("sparsedm.train.chain", "from sparsedm.train.loop import train"))
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert circle({"a": ["b", "c"], "b": ["c"]}) is None


def too_big(source):
    """The functions of more than 80 lines or 12 parameters. Kernels, custom operators and their fakes are what they
    compute: every pointer, stride and shape is a parameter there."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(word in ast.unparse(d) for d in node.decorator_list for word in ("jit", "custom_op", "register_fake")):
            continue
        lines = node.end_lineno - node.lineno + 1
        parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        if lines > 80 or parameters > 12:
            yield f"{node.name}: {lines} lines, {parameters} parameters"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_can_be_read(path):
    assert not list(too_big(path.read_text(encoding="utf-8")))


def test_a_function_that_is_too_big_is_noticed():
    parameters = ", ".join(f"p{i}" for i in range(13))
    assert list(too_big(f"def f({parameters}): pass")) == ["f: 1 lines, 13 parameters"]
    assert list(too_big("def f():\n" + "    pass\n" * 80)) == ["f: 81 lines, 0 parameters"]
    assert not list(too_big(f"@triton.jit\ndef f({parameters}): pass"))


def test_every_public_name_is_there():
    importlib.import_module("sparsedm.models")  # no module of ours may have the name of a public function
    assert sparsedm.__all__
    for name in sparsedm.__all__:
        assert callable(getattr(sparsedm, name))
        assert f"sparsedm.{name}" not in MODULES, "once imported, the module would hide the function"
    with pytest.raises(AttributeError, match="no attribute 'pruning'"):
        _ = sparsedm.pruning


def test_import_is_lazy_and_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import sparsedm; "
        "assert 'torch' not in sys.modules; sparsedm.Linear(8, 4, pattern='2:4')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
