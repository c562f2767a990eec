"""A run folder belongs to one run and one process, and nothing in it is lost."""

import dataclasses
import json
import os

import pytest

from sparsedm.errors import InputError
from sparsedm.train import run_folder


def checkpoint_of(folder):
    path = folder / "checkpoints" / "step-00000004"
    path.mkdir(parents=True)
    return path


def test_claim_accepts_the_same_and_lists_differences(tmp_path):
    record = {"steps": 5, "betas": (0.9, 0.99), "stages": [{"lr": 1e-3, "log_every": 3}], "empty": {}}
    run_folder.claim(tmp_path / "new", record)
    assert json.loads((tmp_path / "new" / "options.json").read_text()) == {**record, "betas": [0.9, 0.99]}
    run_folder.claim(tmp_path / "new", record)
    changed = {"steps": 6, "betas": (0.9,), "stages": [{"lr": 1e-3, "log_every": 4}], "more": "x"}
    with pytest.raises(InputError) as caught:
        run_folder.claim(tmp_path / "new", changed, free=("log_every",))
    assert str(caught.value).endswith(
        "has other options, choose another folder: steps is 5 there and 6 here; betas.1 is 0.99 there and "
        "not set here; empty is {} there and not set here; more is not set there and x here"
    )
    with pytest.raises(InputError, match=r"stages.0.log_every is 3 there and 4 here"):
        run_folder.claim(tmp_path / "new", changed)
    with pytest.raises(InputError, match=r"; and 5 more$"):
        run_folder.claim(tmp_path / "new", {f"option {i}": i for i in range(7)})


def test_two_names_of_one_folder_are_one_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    run_folder.claim("run", {"data": "images"})
    for name in ("./images", str(tmp_path / "images"), "link"):
        run_folder.claim("run", {"data": name})
    (tmp_path / "others").mkdir()
    with pytest.raises(InputError, match="data is images there and others here"):
        run_folder.claim("run", {"data": "others"})


def test_claim_says_why_a_number_may_not_grow(tmp_path):
    may_grow = {"steps": None, "width": "it is the networks'"}
    run_folder.claim(tmp_path, {"steps": 5, "width": 8})
    run_folder.claim(tmp_path, {"steps": 6, "width": 8}, may_grow=may_grow)
    with pytest.raises(
        InputError, match="steps is 6 there and 7 here; width is 8 there and 9 here: it is the networks'"
    ):
        run_folder.claim(tmp_path, {"steps": 7, "width": 9}, may_grow=may_grow)
    with pytest.raises(InputError, match="steps is 6 there and not set here"):
        run_folder.claim(tmp_path, {"width": 8}, may_grow=may_grow)
    with pytest.raises(InputError, match="steps is 6 there and None here"):
        run_folder.claim(tmp_path, {"steps": None, "width": 8}, may_grow=may_grow)
    (tmp_path / "options.json").write_text('{"steps": "6", "width": 8}')
    with pytest.raises(InputError, match=r"steps is 6 there and 7 here$"):
        run_folder.claim(tmp_path, {"steps": 7, "width": 8}, may_grow=may_grow)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '"x"', "3", '{"options": []}', '{"options": null, "run": 1}'])
def test_options_that_hold_none_are_damaged_not_others(tmp_path, text):
    (tmp_path / "options.json").write_text(text)
    with pytest.raises(InputError, match=r"options.json is damaged: "):
        run_folder.claim(tmp_path, {"options": {"lr": 0.5}})


def test_options_without_work_are_replaced(tmp_path):
    for lr in (0.5, 0.1):
        run_folder.claim(tmp_path, {"lr": lr}, started=run_folder.holds_work(tmp_path))
        (tmp_path / ".lock").touch()
    (tmp_path / "found.jsonl").touch()
    with pytest.raises(InputError, match=r"lr is 0\.1 there and 0\.2 here"):
        run_folder.claim(tmp_path, {"lr": 0.2}, started=run_folder.holds_work(tmp_path))


def test_lock_sweeps_and_excludes(tmp_path):
    partial = tmp_path / "checkpoints" / ".step-00000003.x.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_text("half")
    kept = partial.with_name("step-00000004")
    kept.mkdir()
    with run_folder.lock(tmp_path):
        assert list((tmp_path / "checkpoints").iterdir()) == [kept]
        with pytest.raises(InputError, match="another process is at work in"), run_folder.lock(tmp_path):
            pass
    with run_folder.lock(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write .*file: it is no folder"),
        run_folder.lock(tmp_path / "file"),
    ):
        pass


def test_a_refused_run_leaves_nothing(tmp_path):
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "options.json")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "options.json").write_text("[]")
    before = sorted(tmp_path.rglob("*"))
    for name in ("piped", "damaged"):
        with pytest.raises(InputError, match=r"options.json is "), run_folder.lock(tmp_path / name):
            run_folder.claim(tmp_path / name, {"lr": 1})
    with pytest.raises(InputError, match="no"), run_folder.lock(tmp_path / "a" / "b"):
        raise InputError("no")
    assert sorted(tmp_path.rglob("*")) == before
    kept = checkpoint_of(tmp_path / "a")
    with pytest.raises(InputError, match="no"), run_folder.lock(tmp_path / "a"):
        raise InputError("no")
    assert kept.exists()


def test_a_lock_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """Opened before the holder, whose run was refused, removed it; locked after."""

    def replaced(handle, operation):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()

    monkeypatch.setattr(run_folder.fcntl, "flock", replaced)
    with pytest.raises(InputError, match="another process"), run_folder.folder_lock(tmp_path):
        pass
    assert (tmp_path / ".lock").exists()


def test_other_things_beside_the_checkpoints_are_none(tmp_path):
    path = checkpoint_of(tmp_path)
    for name in ("step-zz", "step-99999999.bak", "step-1"):
        (path.parent / name).mkdir()
    assert run_folder.latest(tmp_path) == path


def test_what_an_older_folder_does_not_know_had_its_default(tmp_path):
    @dataclasses.dataclass
    class Options:
        lr: float = 0.1
        schedule: str = "vp-sde"

    run_folder.claim(tmp_path, {"options": {"lr": 0.5}})
    run_folder.claim(tmp_path, {"options": {"lr": 0.5, "schedule": "vp-sde"}}, classes=[Options])
    with pytest.raises(InputError, match=r"options.schedule is vp-sde there and ddpm here"):
        run_folder.claim(tmp_path, {"options": {"lr": 0.5, "schedule": "ddpm"}}, classes=[Options])


def test_a_run_folder_that_could_not_be_read_again_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not UTF-8"):
        run_folder.claim(tmp_path / "caf\udce9", {"lr": 1})
    assert not list(tmp_path.iterdir())
