"""Offline compilation: build a Triton or Gluon kernel for a real GPU without a GPU, and inspect the result.

Under TRITON_INTERPRET=1 Triton cannot compile, so the builds run in a child process without it (one child for a whole
list: the imports cost more than most kernels). The bundled ptxas then assembles the PTX again, for its warnings and the
numbers of registers and spills, and cuobjdump disassembles it.
"""

import collections
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Build:
    """One compilation. The signature names every argument that is not in `constexprs`, by Triton's names: '*bf16'
    (pointer), 'i32', 'fp32', 'tensordesc<bf16[128, 64],...>'. A constexpr 'tl.float32' means this object.
    """

    kernel: str  # "package.module:kernel"
    signature: dict
    constexprs: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)  # num_warps, num_stages, ...
    divisible: tuple = ()  # arguments that are multiples of 16; a launcher reads it from their values
    capability: int = 90  # 80, 90 (which means sm_90a), ...

    def at(self, capability):
        return replace(self, capability=capability)


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    sass: str
    registers: int
    spills: int  # bytes, stores + loads
    shared: int  # bytes of dynamic shared memory
    warnings: tuple  # of ptxas, for example "C7510 ... wgmma serialized"

    def count(self, prefix):
        """How many SASS instructions begin with `prefix`, for example 'HGMMA'."""
        return sum(n for op, n in self.histogram().items() if op.startswith(prefix))

    def histogram(self, start=0, end=1 << 62):
        """Instruction -> its count between the two addresses."""
        return collections.Counter(op for address, op, _ in self.instructions() if start <= address <= end)

    def loops(self):
        """(start, end) addresses of every backward branch: the loops, inner and outer."""
        found = []
        for address, op, rest in self.instructions():
            target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
            if target and int(target[1], 16) < address:
                found.append((int(target[1], 16), address))
        return found

    def instructions(self):
        """(address, opcode with its suffixes, operands), predicates removed."""
        for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);", self.sass, re.M):
            op, _, rest = re.sub(r"^@!?U?P\w+\s+", "", text.strip()).partition(" ")
            yield int(address, 16), op, rest


def compile_offline(builds):
    """[Build] -> [Compiled] in the same order. RuntimeError with the compiler's words if one does not compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    request = pickle.dumps([vars(build) for build in builds])  # constexprs may be any objects
    child = subprocess.run([sys.executable, __file__], input=request, env=env, capture_output=True)
    if child.returncode:
        raise RuntimeError(f"offline compilation failed:\n{child.stderr.decode()[-4000:]}")
    return [Compiled(**result) for result in pickle.loads(child.stdout)]


def _compile(build):
    """Runs in the child."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    position = kernel.arg_names.index
    value = {
        k: getattr(tl, v[3:]) if isinstance(v, str) and v.startswith("tl.") else v for k, v in build.constexprs.items()
    }
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        # in the order of the arguments: PTX parameters are numbered by it
        signature={k: "constexpr" if k in value else build.signature[k] for k in kernel.arg_names},
        constexprs={(position(k),): v for k, v in value.items()},
        attrs={(position(k),): [["tt.divisibility", 16]] for k in build.divisible},
    )
    options = {"enable_fp_fusion": True} | build.options  # Triton 3.10 has another default than 3.9
    return asdict(inspected(compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)))


def inspected(kernel):
    """Triton's compiled kernel -> Compiled."""
    return Compiled(kernel.metadata.name, kernel.asm["ptx"], *_assemble(kernel.asm["ptx"], kernel.metadata.shared))


def _assemble(ptx, shared):
    """-> (SASS, registers, spilled bytes, shared, warnings) by the ptxas and cuobjdump that Triton would take."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        architecture = re.search(r"^\.target (sm_\w+)", ptx, re.M)[1]
        ptxas = get_ptxas(int(re.sub(r"\D", "", architecture))).path  # each version of Triton has its own choice
        log = _run(Path(ptxas), "-v", f"-arch={architecture}", source, "-o", binary)
        sass = _run(Path(knobs.nvidia.cuobjdump.path), "-sass", binary)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    warnings = [line for line in log.splitlines() if "warning" in line.lower() or re.search(r"\bC7\d\d\d\b", line)]
    return sass, int(re.search(r"Used (\d+) registers", log)[1]), spills, shared, tuple(warnings)


def _run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0].name}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps([_compile(Build(**build)) for build in pickle.load(sys.stdin.buffer)]))
