"""What a search leaves to be read: report.json, report.md with the table, and its pictures but the samples."""

from sparsedm.files import write_json, write_text
from sparsedm.stepaware import pictures as search_pictures

NOTE = """\
found: the front of the search. It was chosen on one set of noises; the table measures it, like all others, on another
one, so it shows what choosing really gains. One seed, no error bars."""


def write_report(folder, report):
    """report: as `search_study.study` makes it."""
    write_json(folder / "report.json", report)
    title = f"{report['family']}: {report['steps']} steps of {report['sampler']}"
    text = table(report)
    write_text(folder / "report.md", f"# Which network at which step\n\n{title}\n\n```\n{text}\n```\n\n{NOTE}\n")

    quality = "proxy" if report["quality"] == "proxy" else f"Fréchet distance ({report['features']})"
    groups = {}
    for row in report["rows"]:
        groups.setdefault(row["group"], []).append((row["strategy"], row["cost"], row["quality"]))
    cloud = [(e["cost"], e["quality"]) for e in report["tried"]] if report["count"] == report["final_count"] else []
    search_pictures.plot_front(folder / "front.png", groups, cloud, report["dearest"], quality, title)
    bands = [(_band(row, report), row["indices"]) for row in report["rows"] if row["group"] in ("found", "by hand")]
    search_pictures.plot_strategies(folder / "strategies.png", bands, report["names"], report["times"], title)
    pairs = [(e["proxy"], e["quality"]) for e in report["tried"]]
    correlation = report["rank_correlation"]["logarithms"]
    search_pictures.plot_proxy(
        folder / "proxy.png", report["losses"], report["names"], report["times"], pairs, correlation, quality
    )


def table(report):
    """The report's table and totals, as text."""
    lines = [f"{'strategy':<14}{'cost':>12}{'share':>7}{'distance':>10}   network of each step, from noise to image"]
    for row in report["rows"]:
        genes = "".join(str(index) for index in row["indices"]) if len(report["names"]) <= 10 else ""
        share = f"{row['cost'] / report['dearest']:.0%}"
        lines.append(f"{row['strategy']:<14}{_cost(row, report):>12}{share:>7}{row['quality']:>10.3f}   {genes}")
    correlation = report["rank_correlation"]
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in report["seconds"].items())
    return "\n".join(
        [
            *lines,
            "",
            "networks: " + ", ".join(f"{index} = {name}" for index, name in enumerate(report["names"])),
            f"distance: {_distance(report)}; cost: {report['unit']} of one image",
            f"rank correlation of the proxy with {report['quality']}, over {len(report['tried'])} strategies: "
            f"{correlation['logarithms']:.2f} (plain sum of the losses: {correlation['losses']:.2f})",
            f"spent: {spent}",
        ]
    )


def _distance(report):
    if report["quality"] == "proxy":
        return "the proxy (sum of the logarithms of the validation losses), nothing was sampled for it"
    return f"Fréchet ({report['features']}) of {report['final_count']:,} images"


def _cost(row, report):
    return f"{row['cost'] / 1e6:,.1f} M" if report["unit"] == "MACs" else f"{row['cost'] * 1e3:.3f} ms"


def _band(row, report):
    return f"{row['strategy']}: cost {row['cost'] / report['dearest']:.0%}, distance {row['quality']:.3g}"
