"""The C library of this folder: compiled by the system's `cc` at first use, cached, and loaded by ctypes.

Its name has a hash of the sources and flags, and one of the compiler. Without a compiler a library that any other has
made serves, so an image may be built with `cc` and run without it. The flags depend on the CPU features that torch
reports, not on -march=native, so that different machines may share a home folder. A cached file is loaded only if it is
complete (its last 32 bytes are the SHA-256 of the rest) and this user or root owns it.

OpenMP: the sources are compiled with -fopenmp and linked without it. Their calls then reach the libgomp that torch
loaded, under any file name. So there is one pool of threads, and `torch.set_num_threads` applies.

Without compiler and cached file, or on a CPU that is neither x86 with AVX2 nor aarch64, `library()` is None. The reason
is logged once and returned by `unavailable_because()`; callers then compute in torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import get_num_threads

from sparsedm.errors import InputError
from sparsedm.files import atomic_file, cache_folder

FOLDER = Path(__file__).parent
SOURCES = ("product.c", "attention.c", "mask.c")
FLAGS = ("-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
INSTRUCTIONS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "neon": (),
}
TIMEOUT = 300  # seconds for one call of the compiler
log = logging.getLogger(__name__)


class _Unavailable(Exception):
    """Why there is no library."""


@functools.cache
def instruction_set():
    """ "avx512", "avx2", "neon", or None where the library does not serve the CPU."""
    if not sys.platform.startswith("linux"):
        return None
    if platform.machine() == "aarch64":
        return "neon"
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability) if platform.machine() == "x86_64" else None


def cpu_name():
    """What results call this CPU, such as "CPU: AMD EPYC 7571 (AVX2)": several generations share one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU: {name} ({torch.backends.cpu.get_cpu_capability()})"


def library():
    """The loaded library, or None. The first call may compile for some seconds.

    OpenMP has a number of threads for each thread that calls it. Torch sets it when it is first asked there.
    """
    get_num_threads()
    return _loaded()[0]


def unavailable_because():
    """A phrase: why `library()` is None; None if it is available."""
    return _loaded()[1]


def serving():
    """-> (instruction set, None) if `library()` can be called, else (None, why not)."""
    reason = unavailable_because()
    return (None, reason) if reason else (instruction_set(), None)


# as `torch.compiler.assume_constant_result`, which imports the whole compiler: two seconds of every command
serving._dynamo_marked_constant = True


@functools.cache
def _loaded():
    instructions = instruction_set()
    if instructions is None:
        return None, "the C kernels need Linux on x86 with AVX2 or on aarch64"
    _share_openmp()
    for threads in ("-fopenmp",), ():
        try:
            return _load((*FLAGS, *INSTRUCTIONS[instructions], *threads)), None
        except _Unavailable as error:
            reason = str(error)
            if not any(word in reason for word in ("GOMP", "kmpc", "omp_", "fopenmp")):  # of GCC, Clang, both
                break
    log.warning("CPU kernels are not available (%s): torch's dense products run instead", reason)
    return None, reason


def _load(flags):
    """The library of these flags, from the cache or compiled. Raises _Unavailable."""
    compiler, folder, sources = shutil.which("cc"), cache_folder() / "cpu", _digest_of_sources(flags)
    own = compiler and folder / f"{sources}-{_digest_of(compiler)}.so"
    for kept in [own] if own else sorted(folder.glob(f"{sources}-*.so")):
        if _is_whole(kept):
            try:
                return _open(kept)
            except OSError:  # of another system: compiled anew
                pass
    if compiler is None:
        raise _Unavailable("there is no C compiler `cc`")
    try:
        with tempfile.TemporaryDirectory() as place:
            return _compiled_anew(flags, compiler, Path(place), own)
    except OSError as error:  # no folder, or no space in it
        raise _Unavailable(f"there is no place to compile in: {error}") from None


def _compiled_anew(flags, compiler, folder, kept):
    """The library of these flags, made in `folder` and kept at the path `kept` if possible."""
    built = _compile(flags, compiler, folder)
    try:
        with atomic_file(kept) as partial:
            shutil.copyfile(built, partial)
        built = kept
    except InputError as error:
        log.warning("the compiled CPU kernels are not kept for the next process: %s", error)
    try:
        return _open(built)
    except OSError as error:
        raise _Unavailable(f"the compiled library cannot be loaded: {error}") from None


def _open(path):
    """The library at `path`; where its folder is mounted noexec, from a copy. Raises OSError."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        with tempfile.TemporaryDirectory() as place:
            return ctypes.CDLL(shutil.copyfile(path, f"{place}/library.so"))  # a loaded file may be removed


def _digest_of_sources(flags):
    digest = hashlib.sha256("\0".join([platform.machine(), *flags]).encode())
    for name in ("vectors.h", *SOURCES):
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:32]


def _digest_of(compiler):
    path = os.path.realpath(compiler)
    status = os.stat(path)
    return hashlib.sha256("\0".join(map(str, (path, status.st_size, status.st_mtime_ns))).encode()).hexdigest()[:16]


def _is_whole(path):
    try:
        if path.stat().st_uid not in (os.getuid(), 0) or not path.is_file():
            return False
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > 32 and hashlib.sha256(data[:-32]).digest() == data[-32:]


def _compile(flags, compiler, folder):
    """The sources' shared library in `folder`, its own SHA-256 appended."""
    objects = [folder / f"{name}.o" for name in SOURCES]
    _call_all([[compiler, *flags, "-c", FOLDER / name, "-o", out] for name, out in zip(SOURCES, objects)])
    built = folder / "library.so"
    _call_all([[compiler, "-shared", *objects, "-o", built, "-lm"]])
    if not built.exists():
        raise _Unavailable("`cc` ended with 0 and wrote no library")
    with open(built, "r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
    return built


def _call_all(commands):
    """Run the commands side by side. Raises _Unavailable if one fails."""
    processes, failure = [], None
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, **pipes, start_new_session=True))
        for process in processes:
            output = process.communicate(timeout=TIMEOUT)[0].decode(errors="replace").strip().splitlines()
            if process.returncode and not failure:
                told = next((line for line in output if "error" in line), output[0] if output else "it said nothing")
                failure = f"`cc` ended with {process.returncode}: {told.strip()}"
    except subprocess.TimeoutExpired:
        failure = f"`cc` did not end within {TIMEOUT} seconds"
    except OSError as error:
        failure = f"`cc` did not run: {error}"
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # what `cc` has started holds the pipe open
                process.wait()
            process.stdout.close()
    if failure:
        raise _Unavailable(failure)


def _share_openmp():
    """Make the functions of torch's OpenMP library visible to our library."""
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())  # a name on Linux is bytes
    except OSError:
        return
    paths = set(re.findall(r"/.*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*", maps))
    for path in sorted(paths, key=lambda path: "/torch" not in path):
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
