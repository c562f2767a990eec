"""A campaign's folder made by hand, and what becomes of it."""

import json
import zipfile

import pytest

from bench.publish import main, publish
from sparsedm.errors import InputError
from sparsedm.kernels.tuning import read_table


def entry(microseconds):
    return {"config": {"block": 64}, "microseconds": microseconds, "measured": 3}


@pytest.fixture
def campaign(tmp_path):
    folder = tmp_path / "gpu"
    folder.mkdir()
    for name in ("index.json", "results.csv", "log.txt", "counters.txt"):
        (folder / name).write_text(f"of {name}")
    with zipfile.ZipFile(folder / "plots.zip", "w") as archive:
        archive.writestr("speed.png", b"pixels")
    tables = {"nvidia-h200-sm-90.json": {"product": {"M=16": entry(5), "M=32": entry(6)}}}
    (folder / "tuned.json").write_text(json.dumps(tables))
    return folder


def test_everything_has_its_place(campaign, tmp_path):
    tables, results = tmp_path / "tuned", tmp_path / "results/h200"
    written = publish(campaign, results, tables)
    assert {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()} == {
        "index.json", "results.csv", "log.txt", "counters.txt", "plots/speed.png",
    }  # fmt: skip
    assert set(written) == {path for folder in (results, tables) for path in folder.rglob("*") if path.is_file()}
    assert (results / "results.csv").read_text() == "of results.csv"
    assert (results / "plots/speed.png").read_bytes() == b"pixels"
    assert read_table(tables / "nvidia-h200-sm-90.json") == {"product": {"M=16": entry(5), "M=32": entry(6)}}


def test_a_shipped_table_keeps_what_was_not_measured_again(campaign, tmp_path):
    tables = tmp_path / "tuned"
    tables.mkdir()
    before = {"product": {"M=16": entry(50), "M=64": entry(7)}, "other": {"M=16": entry(8)}}
    (tables / "nvidia-h200-sm-90.json").write_text(json.dumps(before))
    publish(campaign, tmp_path / "results", tables)
    merged = {"product": {"M=16": entry(5), "M=32": entry(6), "M=64": entry(7)}, "other": {"M=16": entry(8)}}
    assert read_table(tables / "nvidia-h200-sm-90.json") == merged


def test_a_folder_without_a_campaign_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="holds no campaign: it has no index"):
        publish(tmp_path / "none", tmp_path / "results")
    assert main([str(tmp_path), str(tmp_path / "results")]) == 2
    assert "no index.json" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
