import pytest

from bench.results import COLUMNS, Results, read, write
from sparsedm.errors import InputError

ROW = {"suite": "gemm", "shape": "square 8", "mode": "plain", "dtype": "float32", "provider": "dense", "status": "ok"}


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "a.csv"
    row = ROW | {"M": 1052672, "p50_us": 12.3456789, "reason": 'a "quoted", comma', "value": None, "samples": 40.0}
    write(path, [row])
    (back,) = read(path)
    assert back["M"] == 1052672
    assert back["p50_us"] == 12.3457, "six digits are kept"
    assert back["reason"] == row["reason"]
    assert back["value"] is None
    assert back["samples"] == 40
    assert set(back) == set(COLUMNS)


def test_the_file_is_whole_after_every_addition(tmp_path):
    results = Results(tmp_path / "a.csv")
    for i in range(3):
        results.add([ROW | {"value": float(i)}])
        assert [r["value"] for r in read(tmp_path / "a.csv")] == [0.0, 1.0, 2.0][: i + 1]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.csv"], "no temporary file is left"


def test_resume_keeps_what_is_there_and_knows_it(tmp_path):
    Results(tmp_path / "a.csv").add([ROW | {"M": 8, "value": 0.5}])
    resumed = Results(tmp_path / "a.csv", resume=True)
    identity = {"suite": "gemm", "shape": "square 8", "mode": "plain", "dtype": "float32"}
    assert [row["provider"] for row in resumed.matching(identity)] == ["dense"]
    assert not resumed.matching(identity | {"mode": "epilogue"})
    resumed.add([ROW | {"mode": "epilogue"}])
    assert [(r["mode"], r["M"]) for r in read(tmp_path / "a.csv")] == [("plain", 8.0), ("epilogue", None)]


def test_what_was_begun_and_never_finished_is_a_failure(tmp_path):
    results, identity = Results(tmp_path / "a.csv"), {name: ROW[name] for name in ("suite", "shape", "mode", "dtype")}
    results.begin(identity)
    results.begin(identity | {"provider": "dense"})
    (row,) = Results(tmp_path / "a.csv", resume=True).rows
    assert row["provider"] == "dense", "the latest note, which says who was under way"
    assert (row["status"], row["reason"]) == ("failed", "the process ended in the middle of this: a crash, or a hang")
    results.add([ROW])
    assert [row["status"] for row in read(tmp_path / "a.csv")] == ["ok"], "finished: the note is gone"


def test_an_existing_file_is_not_overwritten(tmp_path):
    Results(tmp_path / "a.csv").add([ROW])
    with pytest.raises(InputError, match=r"exists: remove it, choose another --out, or continue it with --resume"):
        Results(tmp_path / "a.csv")


def test_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such columns: speed"):
        Results(tmp_path / "a.csv").add([ROW | {"speed": 1}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "is no results file: it has no column"),
        ("", "is no results file: it has no column"),
        (",".join(COLUMNS) + "\n" + ",".join("x" for _ in COLUMNS) + "\n", "a row is broken or cut short"),
        (",".join(COLUMNS) + "\ngemm,linear\n", "a row is broken or cut short"),
    ],
    ids=["other-csv", "empty", "text-for-a-number", "cut"],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.csv"):
        read(tmp_path / "none.csv")
