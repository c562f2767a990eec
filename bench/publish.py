"""A campaign's files to where the repository keeps results: `python -m bench.publish runs/gpu FOLDER`.

Results, log and counters are copied, the pictures unpacked beside them; the tuned configurations are added to the
tables that the package ships (`kernels/tuning.py`), entry by entry. index.json goes along: it says what failed.
"""

import argparse
import json
import shutil
import sys
import zipfile
from pathlib import Path

from bench import program
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, write_json
from sparsedm.kernels import tuning


def publish(campaign, results, tables=tuning.SHIPPED):
    """Returns the paths that were written. Raises: InputError if the folder `campaign` holds none."""
    campaign, results = Path(campaign), Path(results)
    if not (campaign / "index.json").is_file():
        raise InputError(f"{campaign} holds no campaign: it has no index.json")
    results.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(campaign.iterdir()):
        if path.suffix == ".zip":
            written += _unpacked(path, results / path.stem)
        elif path.name == "tuned.json":
            written += _merged(json.loads(path.read_text(encoding="utf-8")), tables)
        elif path.is_file():
            with atomic_file(results / path.name) as partial:
                shutil.copyfile(path, partial)
            written.append(results / path.name)
    return written


def _unpacked(archive, folder):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as held:
        for name in held.namelist():
            with atomic_file(folder / Path(name).name) as partial:
                partial.write_bytes(held.read(name))
    return [folder / Path(name).name for name in held.namelist()]


def _merged(found, tables):
    for name, table in found.items():
        path = tables / Path(name).name
        shipped = tuning.read_table(path)
        for section, shapes in table.items():
            shipped.setdefault(section, {}).update(shapes)
        path.parent.mkdir(exist_ok=True)
        write_json(path, shipped)
        yield path


@program("bench")
def main(arguments=None):
    """Returns the exit code: 0, or 2 for bad input."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.publish", description=__doc__, formatter_class=text)
    parser.add_argument("campaign", help="folder of `python -m bench.campaign`")
    parser.add_argument("results", help="folder to write to, one for each device")
    options = parser.parse_args(arguments)
    print(*publish(options.campaign, options.results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
