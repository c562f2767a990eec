"""All measurements that need a GPU, for a GPU lent for fifteen minutes: `python -m bench.campaign PART --out DIR`.

first     about 185 s: is every configuration of the kernels right, and how fast beside cuBLAS and cuSPARSELt; one
          sampler step, one training step, the bandwidth of masks
second    about 385 s, by value, of what `first` found right: the layers of the models, whole networks, tests, counters,
          curves. If nothing was right, it looks for the reason instead
quality   with --data: which method trains best, and the search for step-aware networks
publish   the folder's results and pictures to --to, its tuned tables into the package

Each suite is a process with a limited time: a crash, a hang or a GPU error ends that suite, not the campaign. Its
results so far remain. Run the same command again to continue: it runs suites that did not finish, and continues inside
a suite that was cut. DIR holds a few files, up to date after every suite: index.json (which suites ran, failed, were
cut or skipped), first.json (which configurations are right), results.csv, log.txt (all output, shortened), targets.md
(targets and measured values), tuned.json (configurations found), counters.txt, quality.zip. plots.zip is drawn while
the next suites run.
"""

import functools
import importlib.util
import itertools
import os
import re
import sys
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from bench import check_used, command_line, plot, program, targets
from bench.first_contact import COMPILES_FOR, RIGHT
from bench.results import read, stamp
from bench.suite import Suite, interruptible, side_by_side
from sparsedm import plots
from sparsedm.commands.options import positive
from sparsedm.errors import InputError, check_memory
from sparsedm.files import atomic_file, cache_folder, check_writable, read_json, read_text, write_json, write_text
from sparsedm.kernels import tuning
from sparsedm.kernels.launch import triton

LOG_LIMIT = 200_000  # characters of each suite's output that are kept: the end, where the errors are
SECONDS = {"first": 185, "second": 385, "quality": 540}  # the first two fit into one command of 600 s
OPTIONS = ("seconds", "only", "data", "to")
USED = {"quality": OPTIONS[:3], "publish": OPTIONS[3:]}  # by these parts; the others use the first two
SAID = ("name", "status", "reason")  # of every suite in index.json, as text
UNPACKED = r"[^/.\0][^/\0]*/[^/.\0][^/\0]*"  # FOLDER/NAME, below the folder of results
RESERVE = 10  # of these seconds, for the last pictures
TESTS = Path(__file__).parents[1] / "tests"
UNTUNED = ("env", "SPARSEDM_AUTOTUNE=off")  # masked products in torch: compiling all ours takes longer than this suite
LARGE, HUGE, SMALL = (f"uvit-{name}" for name in ("imagenet256-large@64", "imagenet256-huge@64", "cifar10-small@64"))


def python(module, *arguments):
    return (sys.executable, "-m", module, *arguments)


def bench(suites, *arguments):
    """The command line that measures these suites. A hang of a product costs 20 s: first contact has compiled it."""
    fixed = ("--resume", "--out", "{csv}", "--seconds", "{seconds}", "--timeout", "20", "--suite", suites)
    return python("bench.run", *fixed, *arguments)


def pytest(*arguments):
    """The gpu-marked tests. Each is named as it ends, in case the run is cut."""
    return python("pytest", "-v", "-m", "gpu", "--color=no", "-p", "no:cacheprovider", *arguments)


def sanitizer(tool, *command, name=""):
    """A command under compute-sanitizer. name: of the suite; default: the tool's. torch allocates each tensor from the
    driver: in torch's own pool an access beyond a tensor would stay inside an allocation."""
    watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command)
    command = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched)
    return Suite(name or tool, command, 120, "checks", "compute-sanitizer")


Measures = functools.partial(Suite, least=15)  # in less it would import torch and be ended


def first_suites():
    eager = ("--no-compile", "--no-sampling")
    training = bench("train", "--shapes", "uvit-cifar10-small@128", "--no-compile")
    return (
        Suite("environment", ("nvidia-smi",), 10, needs="nvidia-smi"),
        Suite("first contact", python("bench.first_contact", "--out", "{folder}", "--seconds", "{seconds}"), 90),
        Measures("step", bench("end-to-end", "--shapes", LARGE, "--providers", "dense,sparsedm 2:4", *eager), 60),
        Measures("training step", (*UNTUNED, *training), 40),
        Measures("mask: 8192", bench("ceiling,mask", "--shapes", "square@8192"), 25),
    )


def second_suites():
    """Ordered by value: first the suites for the project's targets, then the curves. Suites in which torch.compile
    tunes for minutes come after quick ones. Sanitizers are last."""
    layers = f"{LARGE},{HUGE},dit-imagenet256-xlarge@64"
    compared = ("--providers", "dense,dense compiled,sparsedm 2:4,sparsedm 2:4 compiled")
    with_rival = (compared[0], f"{compared[1]},cuSPARSELt")
    # in several processes, one of which dies with a test that crashes or hangs, and is replaced
    workers = ("-n", str(max(1, min(12, (os.cpu_count() or 1) - 4)))) if importlib.util.find_spec("xdist") else ()
    counters = python("bench.counters", "{csv}", "--count", "1", "--out", "{folder}/counters.txt")
    kernels = ("mma", "mma_splitk", "mma_conv", "wgmma", "wgmma_conv")
    watched = [str(TESTS / f"kernels/sparse24/test_{name}.py") for name in kernels]
    watched = pytest("-k", "random", *watched)
    main = [str(TESTS / name) for name in ("kernels", "bench/test_timing.py", "test_cuda_graph.py")]
    quick = "--no-compile"
    return (
        Measures("gemm: models", bench("gemm", "--shapes", layers, quick), 120),
        Measures("steps", bench("end-to-end", "--shapes", f"{SMALL},{HUGE}", quick, "--no-sampling", *compared), 50),
        Measures("steps, compiled", bench("end-to-end", "--shapes", LARGE, *compared), 120),
        Suite("tests", pytest(*workers, *main), 80),
        Measures("counters", counters, 60, needs="ncu"),
        Measures("train", (*UNTUNED, *bench("train", "--shapes", "uvit-cifar10-small@128")), 120),
        Measures("gemm: square", bench("gemm", "--shapes", "square", quick), 120),
        Measures("mask", bench("ceiling,mask"), 60),
        Measures("conv", bench("conv", "--shapes", "ddpm-cifar10@64,sd-1.5@16", quick), 120),
        Measures("steps, compiled: all", bench("end-to-end", "--shapes", f"{SMALL},{HUGE}", *with_rival), 240),
        Measures("gemm: compiled", bench("gemm", "--shapes", f"square,{layers}"), 240),
        Measures("masked-train", bench("masked-train", "--shapes", layers), 120),
        Measures("gemm: grid", bench("gemm", "--shapes", "grid,m-sweep", quick), 240),
        Measures("table3", bench("table3", quick), 240),
        Measures("gemm: all", bench("gemm", quick)),
        Suite("tests: all", pytest(*workers, str(TESTS)), 240),
        sanitizer("memcheck", *watched),
        sanitizer("racecheck", *watched),
    )


def search_for_the_fault():
    """If no configuration is right: single instructions, every weight's place, one configuration with a sanitizer."""
    one = python("bench.first_contact", "--one", "wgmma,0", "--again", "--small")
    kernels = [str(TESTS / "kernels/sparse24"), str(TESTS / "bench/test_instruction_rates.py")]
    return (
        Suite("instructions", pytest(*kernels, "-k", "instruction or hot or identity or test_on_a_gpu"), 120),
        *(sanitizer(tool, *one, name=f"{tool}: one") for tool in ("memcheck", "racecheck")),
    )


def quality_suites(data):
    """Training and search on images from `data`. Their folders are too large for the campaign's folder."""
    suites = []
    for name in ("arms", "search", "ratio", "fixed-vs-inplace-vs-chain"):
        command = python("sparsedm" if name == "search" else "bench.experiments", name, "--scale", "lite")
        places = ("--data", data, "--out", f"{{folder}}-quality/{name}", "--minutes", "{minutes}")
        suites.append(Suite(f"quality: {name}", (*command, *places), least=120))
    return tuple(suites)


def suites_of(part, folder, data=None):
    """The suites of a part, as `first` decided. Raises: InputError if something for it is missing."""
    if part == "first":
        return first_suites()
    if part == "quality":
        if not data:
            raise InputError("the part quality trains: give it images with --data")
        return quality_suites(data)
    verdicts, ended = set(), False
    if (folder / "first.json").exists():
        first = _first(folder / "first.json")
        verdicts, ended = set(first["configurations"].values()), len(first["configurations"]) == first["of"]
    if RIGHT in verdicts and any(Path(triton.knobs.cache.dir).glob("*")):
        return second_suites()
    if ended and RIGHT not in verdicts and not all(verdict.startswith(COMPILES_FOR) for verdict in verdicts):
        return search_for_the_fault()
    print("`first` did not end, or it was on another machine: its first contact compiles again", file=sys.stderr)
    contact = next(suite for suite in first_suites() if suite.name == "first contact")
    return (replace(contact, name="first contact again", always=True), *second_suites())


def _first(file):
    first = read_json(file, configurations=dict, of=int)
    if not all(isinstance(verdict, str) for verdict in first["configurations"].values()):
        raise InputError(f"{file} is damaged: every verdict is text")
    return first


def run_campaign(suites, folder, seconds, *, now=time.monotonic, device="cpu"):
    """Run the suites that did not run yet into `folder`. Returns the index, which is written after every suite.

    Raises: InputError if the folder holds a campaign of another device or commit: its verdicts are not of this one.
    """
    folder, start = Path(folder), now()
    index = _index(folder / "index.json")
    entries = {entry["name"]: entry for entry in index["suites"]}
    environment = stamp(device)
    held = index.get("environment", environment)
    if held["device"] != environment["device"]:
        raise InputError(f"{folder} holds a campaign on {held['device']}: choose another --out")
    commits = held.get("commit"), environment.get("commit")
    if all(commits) and commits[0] != commits[1]:
        raise InputError(f"{folder} holds a campaign of commit {commits[0]}: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_partial(folder)
    if not environment.get("commit"):
        print("the commit is not known, so other code could go on in this folder: set SPARSEDM_COMMIT", file=sys.stderr)
    index["environment"] = environment | {"commit": environment.get("commit") or held.get("commit", "")}
    drawing = _Drawing(folder)
    for _, group in itertools.groupby(suites, key=lambda suite: suite.group or suite.name):
        todo = [suite for suite in group if suite.always or entries.get(suite.name, {}).get("status") != "ran"]
        for entry, output in side_by_side(todo, folder, seconds - RESERVE - (now() - start)):
            if entry["status"] == "skipped":
                entries.setdefault(entry["name"], entry)
            else:
                entries[entry["name"]] = entry
                _log(folder, entry["name"], output)
        index["suites"] = list(entries.values())
        write_json(folder / "index.json", index)
        _leave(folder)
        drawing.begin()
    drawing.finish(again=now() - start < seconds)
    _remove_partial(folder)
    return index


def _remove_partial(folder):
    """What writers left that were killed."""
    for rest in folder.glob(".*.partial*"):
        if rest.is_file():
            rest.unlink()


def _index(file):
    if not file.exists():
        return {"suites": []}
    index = read_json(file, suites=list, environment=dict)
    said = [entry.get(name) for entry in index["suites"] if isinstance(entry, dict) for name in SAID]
    if len(said) < len(SAID) * len(index["suites"]) or not all(isinstance(text, str) for text in said):
        raise InputError(f"{file} is damaged: every suite has {', '.join(SAID)}")
    if not isinstance(index["environment"].get("device"), str):
        raise InputError(f"{file} is damaged: the environment has a device")
    unpacked = index.get("unpacked", [])
    if not isinstance(unpacked, list) or not all(isinstance(n, str) and re.fullmatch(UNPACKED, n) for n in unpacked):
        raise InputError(f"{file} is damaged: a file that was unpacked is named FOLDER/NAME")
    return index


CHECKS = {"index.json": _index, "first.json": _first, "results.csv": read}  # each raises InputError


class _Drawing:
    """Makes plots.zip from results.csv in a thread of its own, while suites run."""

    def __init__(self, folder):
        self.results, self.archive, self.drawn, self.job = folder / "results.csv", folder / "plots.zip", None, None
        self.pool = ThreadPoolExecutor(1)

    def begin(self):
        """Start drawing, unless a drawing is in progress or nothing is new."""
        now = self.results.stat().st_mtime_ns if self.results.exists() else None
        if now != self.drawn and (self.job is None or self.job.done()):
            self.drawn, self.job = now, self.pool.submit(self._draw)

    def finish(self, again):
        """Wait for a drawing in progress. again: then draw what is newer."""
        if self.job:
            self.job.result()
        if again:
            self.begin()
        self.pool.shutdown()

    def _draw(self):
        try:
            plot.draw_archive([self.results], self.archive)
        except InputError:
            pass  # nothing was measured yet
        except Exception:  # a picture is not worth the rest of the measurements
            traceback.print_exc()


def _log(folder, name, output):
    path = folder / "log.txt"
    before = read_text(path) if path.exists() else ""
    # progress bars redraw their line: the last state of each is enough
    lines = [line.rsplit("\r", 1)[-1] for line in output.split("\n")]
    write_text(path, f"{before}==== {name}\n" + "\n".join(lines)[-LOG_LIMIT:] + "\n")


def _leave(folder):
    """targets.md; tuned.json: the tables of configurations found on this machine, by their file name; quality.zip:
    reports, tables and pictures of the studies and their runs, without checkpoints."""
    if (folder / "results.csv").exists():
        write_text(folder / "targets.md", targets.report(read(folder / "results.csv")))
    tables = {path.name: tuning.read_table(path) for path in (cache_folder() / "tuned").glob("*.json")}
    if any(tables.values()):
        write_json(folder / "tuned.json", tables)
    studies = folder.with_name(f"{folder.name}-quality")
    found = [path.relative_to(studies) for path in sorted(studies.rglob("*")) if path.suffix in (".md", ".csv", ".png")]
    paths = [path for path in found if not any(part.startswith(".") for part in path.parts)]  # of killed writers
    if paths:
        with atomic_file(folder / "quality.zip") as partial, zipfile.ZipFile(partial, "w") as archive:
            for path in paths:
                archive.write(studies / path, "--".join(path.parts))


def publish(folder, results, tables=tuning.SHIPPED):
    """Copy a campaign's files to the folder `results`, unpack its pictures there, and add its tuned configurations to
    the tables of the package, entry by entry, except what holds only where a process ended: see
    `tuning.may_be_shipped`. Returns the paths that were written. The index in `results` lists what was unpacked:
    what an earlier index lists and this campaign's archives lack is removed.

    Raises: InputError, before anything is written, if `folder` holds no campaign, or a damaged file, or if a file
    cannot be written.
    """
    folder, results, files, unpacked, tuned, before = Path(folder), Path(results), {}, {}, {}, []
    if not (folder / "index.json").is_file():
        raise InputError(f"{folder} holds no campaign: it has no index.json")
    index = _index(folder / "index.json")
    if (results / "index.json").is_file():
        held = _index(results / "index.json")
        there, here = (found["environment"]["device"] for found in (held, index))
        if there != here:
            raise InputError(f"{results} holds results of {there}, and these are of {here}: choose another --to")
        before = held.get("unpacked", [])
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        if path.name in CHECKS:
            CHECKS[path.name](path)
        if path.suffix == ".zip":
            unpacked |= {f"{path.stem}/{name}": content for name, content in _unpacked(path).items()}
        elif path.name == "tuned.json":
            tuned = read_json(path)
            if not isinstance(tuned, dict) or not all(map(tuning.is_table, tuned.values())):
                raise InputError(f"{path} is damaged: it must hold tables of configurations")
            if strange := [name for name in tuned if Path(name).name != name or not name.endswith(".json")]:
                raise InputError(f"{path} is damaged: {strange[0]!r} is no name of a table, NAME.json")
        elif path.name != "index.json":
            files[results / path.name] = path.read_bytes()
    files |= {results / name: content for name, content in unpacked.items()}
    added = {tables / name: found for name, found in tuned.items()}
    for path in (*files, results / "index.json", *added):
        check_writable(path)
    write_json(results / "index.json", index | {"unpacked": sorted({*before, *unpacked})})
    for path, content in files.items():
        with atomic_file(path) as partial:
            partial.write_bytes(content)
    for path, found in added.items():
        table = tuning.read_table(path)
        for section, shapes in found.items():
            lasting = {shape: entry for shape, entry in shapes.items() if tuning.may_be_shipped(entry)}
            table.setdefault(section, {}).update(lasting)
        write_json(path, table)
    folders = {Path(name).parent for name in unpacked}
    older = {name for name in before if Path(name).parent in folders} - {*unpacked}  # an earlier campaign drew more
    for name in older:
        if (results / name).is_file():
            (results / name).unlink()
    write_json(results / "index.json", index | {"unpacked": sorted({*before, *unpacked} - older)})
    return [*files, results / "index.json", *added]


def _unpacked(path):
    """{name without folders: content} of every file in a zip file."""
    found = {}
    try:
        with zipfile.ZipFile(path) as held:
            check_memory(sum(member.file_size for member in held.infolist()), f"unpacking {path}")
            for member in (member for member in held.infolist() if not member.is_dir()):
                name = Path(member.filename).name
                if name in found or not name or name.startswith("."):
                    rule = "without folders each name occurs once and begins with no dot"
                    raise InputError(f"{path} holds {member.filename!r}: {rule}")
                found[name] = held.read(member)
            return found
    except InputError:
        raise
    except Exception as error:  # of a damaged archive any
        raise InputError(f"{path} is not a readable zip file ({error})") from error


@program("bench")
def main(arguments=None):
    """Returns the exit code: 0 if every suite ran, 1 if one failed, 3 if time was short, 2 for bad input."""
    parser = command_line("bench.campaign", __doc__)
    parser.add_argument("part", choices=(*SECONDS, "publish"))
    parser.add_argument("--out", default="bench-campaign", help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=positive, help="for everything together (default: see above)")
    parser.add_argument("--only", action="append", metavar="SUITE", help="run only this suite (may be repeated)")
    parser.add_argument("--data", help="of quality: images to train on, as for `sparsedm train`")
    parser.add_argument("--to", help="of publish: folder (default: bench/results/gpu)")
    options = parser.parse_args(arguments)
    check_used(options, OPTIONS, USED.get(options.part, OPTIONS[:2]), f"the part {options.part}")
    folder = Path(options.out)
    if options.part == "publish":
        print(*publish(folder, options.to or "bench/results/gpu"), sep="\n")
        return 0
    if not torch.cuda.is_available():
        raise InputError("a campaign measures a GPU, and torch sees none: use `make bench` on a CPU")
    suites = suites_of(options.part, folder, options.data)
    names = [suite.name for suite in suites]
    if unknown := set(options.only or ()) - set(names):
        raise InputError(f"unknown suites {', '.join(sorted(unknown))}: they are {', '.join(names)}")
    suites = [suite for suite in suites if not options.only or suite.name in options.only]
    with interruptible():
        index = run_campaign(suites, folder, options.seconds or SECONDS[options.part], device="cuda")
    mine = [entry for entry in index["suites"] if entry["name"] in names]
    rows = [(entry["name"], entry["status"], entry.get("seconds", ""), entry["reason"]) for entry in mine]
    print(plots.table(("suite", "status", "seconds", "why"), rows, left=(0, 1, 3)))
    if (folder / "targets.md").exists():
        print(f"\n{(folder / 'targets.md').read_text(encoding='utf-8')}")
    statuses = {entry["status"] for entry in mine}
    return 1 if "failed" in statuses else 3 if statuses - {"ran"} else 0


if __name__ == "__main__":
    sys.exit(main())
