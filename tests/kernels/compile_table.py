"""Which sparse kernels compile, for which GPU, with today's Triton: `python -m tests.kernels.compile_table [8.0 ...]`.

Prints one row for each architecture. A cell holds: configurations that compile and whose shared memory fits, products
in a main loop, bytes spilled. Nothing runs; no GPU is needed. Each architecture has a process of its own.
"""

import importlib
import json
import subprocess
import sys

ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0")
KERNELS = ("mma", "mma_splitk", "mma_conv", "wgmma", "wgmma_conv")
LINEAR = dict(M=264, N=392, K=264, bias=True, activation="gelu", residual=True)
CONVOLUTION = dict(B=2, C=64, H=16, W=16, N=136, bias=True, activation="silu", residual=True)


def compiled(capability):
    """{kernel: [{name, products, spills} or {error} for each configuration]} by the process's Triton."""
    from tests.emulated_gpu import start

    device = start(capability, execute=False)
    from emulator.sass import inspected
    from tests.kernels.sparse24.kernel_case import Convolution, Problem, launch_on_the_gpu

    found = {}
    for name in KERNELS:
        if name.startswith("wgmma") and capability != (9, 0):  # alone has these instructions
            continue
        module = importlib.import_module(f"sparsedm.kernels.sparse24.{name}")
        found[name] = []
        for config in module.CONFIGS:
            device.kernels.clear()
            try:
                problem = Convolution(**CONVOLUTION) if name.endswith("conv") else Problem(**LINEAR)
                launch_on_the_gpu(module, problem, config=config)
                builds = [inspected(kernel) for kernel in device.kernels.values()]
            except Exception as error:
                found[name].append({"config": str(config), "error": f"{type(error).__name__}: {error}"[:300]})
                continue
            products = [count for built in builds for count in products_per_loop(built)]
            found[name].append({"products": products, "spills": sum(built.spills for built in builds)})
    return found


def products_per_loop(built):
    """Sparse products in the smallest loop around each of them."""
    sparse = [address for address, op, _ in built.instructions() if op.startswith(("HMMA.SP", "HGMMA.SP"))]
    around = [[(end - start, start, end) for start, end in built.loops() if start <= at <= end] for at in sparse]
    loops = {min(loops) for loops in around if loops}
    return [sum(start <= at <= end for at in sparse) for _, start, end in loops]


def cell(results):
    if not results:
        return "-"
    right = [result for result in results if "error" not in result]
    products = [count for result in right for count in result["products"]]
    between = "-".join(map(str, sorted({min(products), max(products)}))) if products else "no"
    return f"{len(right)}/{len(results)}, {between}, {sum(result['spills'] for result in right)}"


def serves(results):
    """Whether configurations of a kernel compile without a spill, and the others only lack shared memory."""
    errors = [result["error"] for result in results if "error" in result]
    spills = sum(result.get("spills", 0) for result in results)
    return len(errors) < len(results) and all("shared memory" in error for error in errors) and not spills


def main(architectures):
    import triton

    wrong = []
    print(f"| Triton {triton.__version__} | {' | '.join(KERNELS)} |\n|---{len(KERNELS) * '|---'}|", flush=True)
    for architecture in architectures or ARCHITECTURES:
        capability = tuple(map(int, architecture.split(".")))
        code = f"import json; from {__spec__.name} import compiled; print(json.dumps(compiled({capability})))"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if child.returncode:
            sys.exit(child.stderr[-3000:])
        found = json.loads(child.stdout.splitlines()[-1])
        print(f"| sm_{architecture.replace('.', '')} | {' | '.join(cell(found.get(k)) for k in KERNELS)} |", flush=True)
        for name, results in found.items():
            for result in results:
                if "error" in result:
                    print(f"sm_{architecture} {name} {result['config']}: {result['error']}", file=sys.stderr)
        wrong += [f"sm_{architecture} {name}" for name, results in found.items() if not serves(results)]
    sys.exit(f"fail or spill: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
