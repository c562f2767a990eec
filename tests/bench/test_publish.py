"""What `publish` does with a campaign's folder, made by hand."""

import json
import re
import zipfile

import pytest

from bench import campaign
from bench.campaign import publish, run_campaign
from bench.results import write
from sparsedm.errors import InputError
from sparsedm.kernels.tuning import read_table


def entry(microseconds):
    return {"config": {"block": 64}, "microseconds": microseconds, "measured": 3}


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "index.json").write_text('{"suites": [], "environment": {"device": "GPU"}}')
    (folder / "first.json").write_text('{"configurations": {"wgmma 0": "right"}, "of": 1}')
    write(folder / "results.csv", [])
    for name in ("log.txt", "counters.txt", ".results.ab12cd34.partial.csv", ".plots.ab12cd34.partial.zip"):
        (folder / name).write_text(f"of {name}")
    with zipfile.ZipFile(folder / "plots.zip", "w") as archive:
        archive.writestr("speed.png", b"pixels")
    tables = {"nvidia-h200-sm-90.json": {"product": {"M=16": entry(5), "M=32": entry(6)}}}
    (folder / "tuned.json").write_text(json.dumps(tables))
    return folder


def test_everything_has_its_place(finished, tmp_path):
    tables, results = tmp_path / "tuned", tmp_path / "results/h200"
    written = publish(finished, results, tables)
    assert {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()} == {
        "index.json", "first.json", "results.csv", "log.txt", "counters.txt", "plots/speed.png",
    }  # fmt: skip
    assert set(written) == {path for folder in (results, tables) for path in folder.rglob("*") if path.is_file()}
    assert (results / "log.txt").read_text() == "of log.txt"
    assert (results / "plots/speed.png").read_bytes() == b"pixels"
    assert read_table(tables / "nvidia-h200-sm-90.json") == {"product": {"M=16": entry(5), "M=32": entry(6)}}


def test_a_shipped_table_keeps_what_was_not_measured_again(finished, tmp_path):
    tables = tmp_path / "tuned"
    tables.mkdir()
    before = {"product": {"M=16": entry(50), "M=64": entry(7)}, "other": {"M=16": entry(8)}}
    (tables / "nvidia-h200-sm-90.json").write_text(json.dumps(before))
    publish(finished, tmp_path / "results", tables)
    merged = {"product": {"M=16": entry(5), "M=32": entry(6), "M=64": entry(7)}, "other": {"M=16": entry(8)}}
    assert read_table(tables / "nvidia-h200-sm-90.json") == merged


@pytest.mark.parametrize(
    ("why", "shipped"),
    [("Refused: a process ended while it ran", False), ("Refused: first contact: wrong", True), ("KeyError: 3", True)],
)
def test_what_won_because_a_process_ended_is_not_shipped(why, shipped, finished, tmp_path):
    """The process may have been killed, and the winner slower."""
    losing = entry(9) | {"failed": [[{"block": 32}, why]]}
    tables = {"nvidia-h200-sm-90.json": {"product": {"M=16": losing, "M=32": entry(6)}}}
    (finished / "tuned.json").write_text(json.dumps(tables))
    publish(finished, tmp_path / "results", tmp_path / "tuned")
    expected = {"M=32": entry(6)} | ({"M=16": losing} if shipped else {})
    assert read_table(tmp_path / "tuned/nvidia-h200-sm-90.json") == {"product": expected}


@pytest.mark.parametrize(
    ("name", "content"),
    [("plots.zip", b"PK"), ("tuned.json", b"[]"), ("tuned.json", b'{"a.json": {"product": {"M=16": 1}}}')]
    + [("tuned.json", b'{"a/b.json": {}}'), ("tuned.json", b'{"a.py": {}}'), ("tuned.json", b'{"..": {}}')]
    + [("index.json", b"{"), ("results.csv", b"not,a,csv"), ("first.json", b"")],
)
def test_a_damaged_campaign_is_refused_before_anything_is_written(finished, tmp_path, name, content):
    (finished / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        publish(finished, tmp_path / "results", tmp_path / "tuned")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.png", "sub/a.png"), "plots.zip holds 'sub/a.png': without folders each name occurs once"),
        (("a.png", "sub/.."), "plots.zip holds 'sub/..': without folders each name occurs once and begins with no dot"),
        (("a.png", ".b.png"), "plots.zip holds '.b.png'"),
        (("a.png", "x" * 300), "cannot write"),
    ],
    ids=["twice", "above", "hidden", "long"],
)
def test_pictures_that_have_no_place_are_refused_before_anything_is_written(names, message, finished, tmp_path):
    with zipfile.ZipFile(finished / "plots.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"pixels")
    with pytest.raises(InputError, match=re.escape(message)):
        publish(finished, tmp_path / "results", tmp_path / "tuned")
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish", "--seconds", "5", "--data", "x"], "the part publish makes no use of --seconds, --data"),
        (["publish", "--only", "mask"], "the part publish makes no use of --only"),
        (["first", "--to", "x"], "the part first makes no use of --to"),
        (["second", "--data", "x"], "the part second makes no use of --data"),
    ],
)
def test_an_option_that_a_part_does_not_use_is_refused(arguments, message, tmp_path, capsys):
    assert campaign.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verdict", ["5", "[]", "null"])
def test_a_damaged_verdict_is_refused(verdict, tmp_path):
    (tmp_path / "first.json").write_text(f'{{"configurations": {{"wgmma 0": {verdict}}}, "of": 1}}')
    with pytest.raises(InputError, match=r"first\.json is damaged: every verdict is text"):
        campaign.suites_of("second", tmp_path)


@pytest.mark.parametrize(
    "index",
    ["[]", '{"suites": [1]}', '{"suites": [], "environment": {}}']
    + [
        f'{{"suites": [], "environment": {{"device": "a"}}, "unpacked": {names}}}' for names in ('["../a"]', "[1]", "1")
    ],
)
def test_a_damaged_index_is_refused(index, tmp_path):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        run_campaign((), tmp_path, 1)


def test_a_folder_without_a_campaign_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="holds no campaign: it has no index"):
        publish(tmp_path / "none", tmp_path / "results")
    assert campaign.main(["publish", "--out", str(tmp_path), "--to", str(tmp_path / "results")]) == 2
    assert "no index.json" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_results_of_another_device_are_not_replaced_and_older_pictures_go(finished, tmp_path):
    results, tables = tmp_path / "results/gpu", tmp_path / "tuned"
    publish(finished, results, tables)
    (results / "plots/mine.png").write_bytes(b"of somebody else")
    (results / "plots/mine").mkdir()
    with zipfile.ZipFile(finished / "plots.zip", "w") as archive:
        archive.writestr("heat.png", b"pixels")
    publish(finished, results, tables)
    assert {path.name for path in (results / "plots").iterdir()} == {"heat.png", "mine.png", "mine"}
    index = json.loads((finished / "index.json").read_text())
    index["environment"]["device"] = "NVIDIA A100"
    (finished / "index.json").write_text(json.dumps(index))
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"gpu holds results of .*, and these are of NVIDIA A100: choose another --to"):
        publish(finished, results, tables)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before
