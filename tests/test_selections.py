"""What blocks of `hold_masks` keep for a while: blocks that end in any order, and reports that arrive later."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsedm import selections, sparsity
from sparsedm.errors import InputError
from sparsedm.sparsity import hold_masks, sparsify


def test_a_report_from_another_gpu_than_the_current_one_is_waited_for(monkeypatch):
    """An event is recorded in the current device's stream, unless it is told another one."""
    arrived = []

    class Event:
        def record(self, stream=None):
            self.stream = stream

        def query(self):
            return self.stream != "of cuda:1" or arrived

    class Here:
        copy_, tolist = lambda *_, **__: None, lambda self: [bool(arrived)]

    monkeypatch.setattr(selections, "_unseen", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Here())
    flags = SimpleNamespace(is_cuda=True, shape=(1,), device=torch.device("cuda", 1))
    selections.raise_flagged(flags, ["fc1"], selections.CHANGED)
    assert len(selections._unseen) == 1
    arrived.append(True)
    with pytest.raises(InputError, match="the weight of fc1 was changed"):
        selections.raise_flagged(flags, ["fc1"], selections.CHANGED)


def test_a_block_in_another_thread_that_ends_later_restores_no_mask_of_a_block_that_is_closed(monkeypatch):
    model = sparsify(nn.Sequential(nn.Linear(64, 64)), "2:4")
    inside, go, select = threading.Event(), threading.Event(), sparsity.select_all

    def slow(*arguments):
        found = select(*arguments)
        if threading.current_thread() is other:
            inside.set()
            assert go.wait(60)
        return found

    def block():
        with hold_masks(model):
            pass

    monkeypatch.setattr(sparsity, "select_all", slow)
    other = threading.Thread(target=block)
    with hold_masks(model):
        other.start()
        assert inside.wait(60)
    go.set()
    other.join()
    assert model[0]._held is None

    monkeypatch.undo()

    def later():
        with hold_masks(model):
            inside.set()
            assert go.wait(60)

    inside.clear()
    go.clear()
    other = threading.Thread(target=later)
    with hold_masks(model):
        other.start()
        assert inside.wait(60)
        mine = model[0]._held
    assert model[0]._held is mine, "the other block is open"
    go.set()
    other.join()
    assert model[0]._held is None


def test_a_block_that_ends_while_another_one_is_set_does_not_wait_for_itself():
    """The garbage collector may close an abandoned generator, and its block, at any allocation."""
    model, ended = sparsify(nn.Linear(16, 8), "2:4"), []

    def inside():
        with sparsity._HOLDING, hold_masks(model):
            ended.append(model._held is not None)

    thread = threading.Thread(target=inside, daemon=True)
    thread.start()
    thread.join(60)
    assert ended == [True]
