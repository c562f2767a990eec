"""What `pip install` gets: an sdist that holds the package alone, and a wheel that works outside of the checkout."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import sparsedm

ROOT = Path(__file__).parents[1]
METHODS = {  # that users call; `mypy --strict` refuses calls of methods without types
    *("set_pattern", "freeze_mask", "current_mask", "masked_weight", "effective_weight", "forward"),
    *("masked", "dense_weight", "measured", "backend_used"),
}
USE = """
import sparsedm, torch
assert sparsedm.__file__.startswith({folder!r}), sparsedm.__file__
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
sparsedm.sparsify(model, "2:4")
masked = model(torch.ones(1, 64))
torch.testing.assert_close(sparsedm.compress(model)(torch.ones(1, 64)), masked)
"""


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_import_is_silent_and_takes_less_than_15_ms():
    code = "import time; start = time.process_time(); import sparsedm; print(time.process_time() - start)"
    assert min(float(run(sys.executable, "-W", "error", "-c", code, cwd=ROOT)) for _ in range(5)) < 0.015


def test_type_checkers_find_every_public_name_with_its_types():
    body = ast.parse((ROOT / "sparsedm/__init__.py").read_text()).body
    (spelled_out,) = (n.value for n in body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert ast.literal_eval(spelled_out) == list(sparsedm._HOME)
    block = next(node for node in body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert homes == sparsedm._HOME
    public = {name: getattr(sparsedm, name) for name in sparsedm.__all__}
    methods = {
        f"{name}.{m}": vars(part)[m]
        for name, of in public.items()
        if isinstance(of, type)
        for part in of.__mro__
        if part.__module__.startswith("sparsedm")
        for m in METHODS & vars(part).keys()
    }
    functions = {name: of for name, of in public.items() if not isinstance(of, type)}
    assert {name.partition(".")[2] for name in methods} == METHODS
    for name, function in (functions | methods).items():
        for parameter in list(inspect.signature(function).parameters.values())[name in methods :]:
            given = parameter.annotation is not parameter.empty
            assert given or parameter.kind is parameter.VAR_KEYWORD, f"{name}: {parameter.name} has no type"
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty, f"{name} says no type"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{"sdist": file, "wheel": file}, the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.mark.slow
def test_the_sdist_holds_the_package_and_what_its_pages_link_to(built):
    with tarfile.open(built["sdist"]) as archive:
        texts = {
            member.name.partition("/")[2]: archive.extractfile(member).read() if member.name.endswith(".md") else None
            for member in archive.getmembers()
        }
    python = {name for name in texts if name.endswith(".py")}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sparsedm").rglob("*.py")}
    assert python == package
    assert texts.keys() >= {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    links = [
        (page, os.path.normpath(Path(page).parent / link))
        for page, text in texts.items()
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", (text or b"").decode())
    ]
    assert len(links) >= 6
    assert [(page, link) for page, link in links if link not in texts] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_what_pip_installs_works_outside_of_the_checkout(built, kind, tmp_path):
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
    run(*pip, "--no-build-isolation", "--target", target, built[kind], cwd=tmp_path)
    top = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")}
    assert top - {"bin"} == {"sparsedm"}
    files = [path.relative_to(ROOT) for path in (ROOT / "sparsedm").rglob("*") if path.suffix in (".c", ".h", ".json")]
    for file in (Path("sparsedm/py.typed"), *files):
        assert (target / file).exists(), f"{file} is not installed"
    code = f"import sys; sys.path.insert(0, {str(target)!r}); {USE.format(folder=str(target))}"
    run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path)
