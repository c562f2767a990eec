"""`sparsedm inspect`: the table of layers of a preset or of a trained model, and its chart."""

import os

from sparsedm.commands.options import add_model_arguments, check_out, count, load_named, picture_name
from sparsedm.errors import InputError
from sparsedm.files import write_json
from sparsedm.inspection import ARCHS, inspect
from sparsedm.layer_times import time_report
from sparsedm.models import build_model, parse_overrides
from sparsedm.sparsity import sparsify

EXAMPLES = (
    "--model uvit-cifar10-small --pattern 2:4",
    "--model uvit-cifar10-small --pattern 2:4 --where all",
    "runs/quickstart",
    "--model uvit-imagenet256-large --pattern 2:4 --arch sm_90a --batch 64",
    "--model uvit-imagenet256-large --pattern 2:4 --time --batch 64",
)


def add_arguments(parser):
    parser.add_argument("run", nargs="?", help="run folder, stage folder or model file")
    add_model_arguments(parser)
    parser.add_argument("--pattern", help="N:M to apply, for example 2:4; M is 2, 4, 8, 16 or 32")
    parser.add_argument(
        "--where", help="layers to make sparse: all, or a regular expression on their names (default: the model's own)"
    )
    parser.add_argument(
        "--arch", choices=ARCHS, help="show the kernels the compressed model would use there, in bf16 (cpu: fp32)"
    )
    parser.add_argument("--batch", type=count, default=1, help="images at a time, for --arch and --time (default: 1)")
    parser.add_argument("--time", action="store_true", help="time each sparse layer here, dense and compressed")
    parser.add_argument("--plot", metavar="PNG", help="write the chart to PNG (default: MODEL-PATTERN-layers.png)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")


def run(options):
    if options.run is None and options.model is None:
        raise InputError("name something to inspect: a run folder or model file, or --model")
    if options.where and not options.pattern:
        raise InputError(f"--where {options.where} selects layers for a pattern: give one with --pattern")
    name = os.path.basename(os.path.abspath(options.run)).removesuffix(".safetensors") if options.run else options.model
    title = f"{name} {options.pattern or ''}".strip()
    chart = picture_name(options.plot or f"{title.replace(':', 'of').replace(' ', '-')}-layers.png")
    for file in filter(None, (chart, options.json)):
        check_out(file, options.run)
    if options.json and os.path.realpath(options.json) == os.path.realpath(chart):
        raise InputError(f"--json {options.json} is the file of the chart: name another")
    if options.run:
        model = load_named(options).model
    else:
        model = build_model(options.model, device="meta", **parse_overrides(options.set))
    if options.pattern:
        sparsify(model, options.pattern, options.where)
    table = inspect(model, arch=options.arch, batch=options.batch)
    print(table)
    if options.time:
        print(f"\n{time_report(model, options.batch)}")
    if options.json:
        write_json(options.json, table.to_dict())
        print(f"numbers: {options.json}")
    table.plot(chart, f"{title}: parameters per layer, before and after")
    print(f"chart: {chart}")
