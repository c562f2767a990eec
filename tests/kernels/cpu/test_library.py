"""The compiler, the cache, and other machines."""

import ctypes
import errno
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsedm.kernels.cpu import library

FAKE_COMPILER = """#!/bin/sh
# writes what it is given instead of compiling: a library to a .so, nothing to a .o
echo "$@" >> {calls}
while [ "$1" != -o ]; do shift; done
case "$2" in *.so) {make_library} ;; *) : > "$2" ;; esac
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(command): put a `cc` in the place of the real one; it runs `command` to make its output "$2"."""
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("sh", "cp", "sleep", "kill"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    library._loaded.cache_clear()

    def put(command):
        (folder / "cc").write_text(FAKE_COMPILER.format(calls=calls, make_library=command))
        (folder / "cc").chmod(0o755)

    put.calls = lambda: len(calls.read_text().splitlines()) if calls.exists() else 0
    yield put
    library._loaded.cache_clear()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A library as the compiler would make it, without our checksum."""
    if library.library() is None:
        pytest.skip("no C kernels")
    data = Path(library.library()._name)
    if not data.exists():  # loaded from a temporary folder
        pytest.skip("the library is not kept on this machine")
    path = tmp_path_factory.mktemp("built") / "library.so"
    path.write_bytes(data.read_bytes()[:-32])
    return path


def test_without_a_compiler_there_is_a_reason_and_one_line_of_log(compiler, caplog):
    assert library.library() is None
    assert library.library() is None
    assert "no C compiler" in library.unavailable_because()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [("echo product.c:1: error: no such thing; exit 1", "no such thing"), ("kill -9 $$", "ended with -9"),
     ("echo not a library > $2", "cannot be loaded"), ("exit 0", "wrote no library")],
)  # fmt: skip
def test_a_compiler_that_fails_is_killed_or_writes_nonsense(compiler, caplog, tmp_path, command, reason):
    compiler(command)
    assert library.library() is None
    assert reason in library.unavailable_because()
    assert len(caplog.records) == 1
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_compiler_that_hangs_ends_with_what_it_has_started(compiler, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "TIMEOUT", 1)
    compiler(f"sleep 30 & echo $! > {tmp_path / 'child'}; sleep 30")
    start = time.monotonic()
    assert library.library() is None
    assert time.monotonic() - start < 20
    assert "did not end within 1 seconds" in library.unavailable_because()
    assert len(caplog.records) == 1
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1]


def test_without_a_place_to_compile_in_there_is_a_reason(compiler, caplog, monkeypatch):
    def full(*arguments, **options):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    compiler("exit 1")
    monkeypatch.setattr(library.tempfile, "TemporaryDirectory", full)
    assert library.library() is None
    assert "no place to compile in" in library.unavailable_because()
    assert len(caplog.records) == 1


def is_compiled_once(compiler, built):
    """Whether the library serves, and a second process would compile nothing."""
    compiler(f"cp {built} $2")
    found, calls = [library.library()], compiler.calls()
    library._loaded.cache_clear()
    found.append(library.library())
    return None not in found and compiler.calls() == calls


def test_the_library_is_compiled_once_and_then_read_from_the_cache(compiler, built):
    assert is_compiled_once(compiler, built)


def test_a_kept_library_serves_where_the_compiler_is_gone(compiler, built, tmp_path, caplog):
    compiler(f"cp {built} $2")
    assert library.library() is not None
    (tmp_path / "bin/cc").unlink()
    library._loaded.cache_clear()
    assert library.library() is not None
    assert not caplog.records
    for kept in (tmp_path / "cache/cpu").iterdir():
        data = kept.read_bytes()
        kept.unlink()  # written in place, the loaded library would lose its pages: a segfault at exit
        kept.write_bytes(data[:-1])
    library._loaded.cache_clear()
    assert library.library() is None, "damaged"
    assert "no C compiler" in library.unavailable_because()


@pytest.mark.parametrize("damage", ["truncated", "empty", "another system's", "another user's"])
def test_a_cached_file_that_is_not_ours_or_not_whole_is_made_anew(compiler, built, tmp_path, monkeypatch, damage):
    compiler(f"cp {built} $2")
    assert library.library() is not None
    # a path that is loaded already would not be read again
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "moved"))
    path = next((tmp_path / "moved").rglob("*.so"))
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    if damage == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: os.stat(path).st_uid + 1)
        if os.stat(path).st_uid == 0:
            os.chown(path, 12345, -1)
            monkeypatch.setattr(os, "getuid", lambda: 0)
    elif damage == "another system's":
        foreign = b"\x7fELF of another machine"
        path.write_bytes(foreign + hashlib.sha256(foreign).digest())
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    calls = compiler.calls()
    library._loaded.cache_clear()
    assert library.library() is not None
    assert compiler.calls() > calls
    assert path.read_bytes() == data


def test_a_pipe_in_the_place_of_the_library_is_not_read(compiler, built, tmp_path):
    compiler(f"cp {built} $2")
    assert library.library() is not None
    (path,) = (tmp_path / "cache").rglob("*.so")
    path.unlink()
    os.mkfifo(path)
    library._loaded.cache_clear()
    assert library.library() is not None


def test_a_cache_that_cannot_be_written_costs_one_line_of_log(compiler, built, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    compiler(f"cp {built} $2")
    assert library.library() is not None
    assert library.unavailable_because() is None
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the compiled CPU kernels are not kept for the next process"
    ]


def test_a_cache_folder_from_which_nothing_may_be_loaded_saves_the_compilation(compiler, built, tmp_path, monkeypatch):
    real = ctypes.CDLL

    def load(path, *options, **named):
        if str(path).startswith(str(tmp_path / "cache")):  # as on a file system that is mounted noexec
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path, *options, **named)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert is_compiled_once(compiler, built)


def test_torchs_openmp_is_found_beside_files_of_any_name(tmp_path, monkeypatch):
    path, loaded = tmp_path / os.fsdecode(b"not utf-8: \xfc, and a space/libgomp.so.1"), []
    path.parent.mkdir()
    path.write_bytes(bytes(mmap.PAGESIZE))
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: loaded.append(path))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        library._share_openmp()
    assert str(path) in loaded


@pytest.mark.parametrize("symbol", ["GOMP_parallel", "__kmpc_fork_call", "omp_get_max_threads"])
def test_a_library_without_threads_is_taken_where_no_openmp_is_loaded(compiler, built, monkeypatch, symbol):
    compiler(f"""case "$*" in *none*) exit 1 ;; esac; cp {built} $2""")
    real, flags = library._load, []

    def load(given):
        flags.append(given)
        if "-fopenmp" in given:
            raise library._Unavailable(f"undefined symbol: {symbol}")
        return real(given)

    monkeypatch.setattr(library, "_load", load)
    assert library.library() is not None
    assert ["-fopenmp" in given for given in flags] == [True, False]


def test_two_processes_at_once(compiler, built, tmp_path):
    compiler(f"sleep 1; cp {built} $2")
    program = "from sparsedm.kernels.cpu import library; assert library.library() is not None"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 1
