"""What blocks of `hold_masks` keep for a while, also of compiled models; in any order; reports that arrive later."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparsedm import selections, sparsity
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.kernels import mask as mask_file
from sparsedm.kernels import masked_adamw
from sparsedm.kernels.cpu import library
from sparsedm.kernels.launch import broken
from sparsedm.sparsity import hold_masks, masks, set_masking, sparsify
from tests.tiny import Small


@pytest.fixture
def choices(monkeypatch):
    """How often a mask was chosen, in eager code or inside of a graph."""
    calls, choose = [], mask_file._select_in_torch
    monkeypatch.setattr(mask_file, "_select_in_torch", lambda *a: (calls.append(1), choose(*a))[1])
    together = selections.products.select_masks

    def count(weights, patterns, sum_up=True):  # of many weights: by `hold_masks`
        calls.extend(weights if sum_up else ())
        return together(weights, patterns, sum_up)

    monkeypatch.setattr(selections.products, "select_masks", count)
    return calls


def gradients(model, compiled, x):
    model.zero_grad()
    loss = compiled(x).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.skipif(library.library() is None, reason="no C kernels")
def test_a_block_selects_all_masks_in_one_call_and_each_is_that_of_its_layer(monkeypatch):
    model, calls, together = sparsify(Small(), "2:4"), [], selections.products.select_masks
    layers = [layer for layer in model.modules() if getattr(layer, "pattern", None)]
    layers[0].freeze_mask()
    expected = [layer.effective_weight().detach() for layer in layers]
    monkeypatch.setattr(
        selections.products, "select_masks", lambda *a, **o: (calls.append(len(a[0])), together(*a, **o))[1]
    )
    with hold_masks(model):
        assert calls == [len(layers) - 1]
        assert all(torch.equal(layer.effective_weight(), weight) for layer, weight in zip(layers, expected))
    assert calls == [len(layers) - 1]
    with torch.no_grad():
        layers[-1].weight.view(-1)[5] = torch.nan
    with pytest.raises(InputError, match="head: 1 of its weights are NaN"), hold_masks(model):
        pass
    with pytest.raises(InputError, match=r"^Linear: 1 of its weights are NaN"), hold_masks(layers[-1]):
        pass


@pytest.mark.parametrize("amp", [False, True])
def test_a_compiled_model_whose_masks_are_held_chooses_once_per_step(choices, amp):
    torch._dynamo.reset()
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    set_masking(model, decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for _ in range(3):
        choices.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            with hold_masks(model, model):
                for _ in range(2):
                    found = gradients(model, compiled, x)
            assert len(choices) == 2, "one for each masked layer"
            expected = gradients(model, model, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        optimizer.step()
    assert graphs.frame_count == 1


def test_outside_of_the_block_and_for_other_weights_a_compiled_model_chooses_by_itself(choices):
    torch._dynamo.reset()
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    call = torch.compile(lambda w: torch.func.functional_call(model, w, (x,)), fullgraph=True, backend="aot_eager")
    with hold_masks(model):
        held = compiled(x)
        exported_there = torch.export.export(model, (x,)).module()
        assert torch.equal(call(others), torch.func.functional_call(model, others, (x,)))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), held)
    exported_there.load_state_dict(model.state_dict())
    assert torch.equal(exported_there(x), model(x))
    with hold_masks(model):
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.zeros_(model.head.weight),
        lambda model: model.load_state_dict(Small().state_dict()),
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(30, 32))),
        lambda model: torch.optim.AdamW(model.parameters(), 0.1, fused=True).step(),
        lambda model: model.double(),
        lambda model: model.head.weight.data.neg_(),
        lambda model: model.conv.weight.data.copy_(model.conv.weight.flip(0)),
        lambda model: model.conv.weight.data.copy_(model.conv.weight.flip(1)),
        lambda model: model.head.weight.detach().numpy().__iadd__(1e-7),
    ],
    ids=[
        "in place",
        "load_state_dict",
        "new parameter",
        "fused step",
        ".double()",
        "signs",
        "rows",
        "columns",
        "numpy",
    ],
)
@pytest.mark.parametrize("way", ["C", "no library"])
def test_a_weight_that_changes_while_its_mask_is_held_is_refused(change, way, monkeypatch):
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    if way == "no library":
        monkeypatch.setattr(library, "library", lambda: None)
    with pytest.raises(InputError, match=r"the weight of (conv|head) was changed while its mask"), hold_masks(model):
        change(model)
    with hold_masks(model):
        pass  # and it can be held again


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (2, 3, 0, 1)])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_weight_is_held_in_whatever_order_it_lies(order, kernel_size):
    model, x = sparsify(nn.Sequential(nn.Conv2d(16, 8, kernel_size)), "2:4"), torch.randn(2, 16, 5, 5)
    back = [order.index(axis) for axis in range(4)]
    weight = model[0].weight.detach().permute(order).contiguous().permute(back)
    model[0].weight = nn.Parameter(weight)
    with hold_masks(model):
        held = model(x)
    assert torch.equal(held, model(x))
    with pytest.raises(InputError, match="the weight of 0 was changed"), hold_masks(model):
        weight.copy_(weight.flip(0))


@pytest.mark.parametrize("form", ["masked", "compressed"])
def test_a_generator_that_is_closed_in_a_block_lets_go_and_tells(form):
    def steps(model):
        with hold_masks(model):
            while True:
                yield model(torch.ones(1, 16))

    model = sparsify(nn.Sequential(nn.Linear(16, 8)), "2:4")
    model = compress(model) if form == "compressed" else model
    weight = model[0].values if form == "compressed" else model[0].weight.data
    for changed in (False, True):
        running = steps(model)
        next(running)
        if changed:
            weight.neg_()
            with pytest.raises(InputError, match=r"the (compressed )?weight of 0 was changed while"):
                running.close()
        running.close()
        assert not vars(model[0]).get("_held")
        assert "held" not in vars(model[0]).get("_prepacked", {})
    running = steps(model)
    next(running)
    with pytest.raises(KeyError, match="mine"):  # an error of the block itself is not hidden
        running.throw(KeyError("mine"))
    assert not vars(model[0]).get("_held")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("change", [lambda model: model.double(), lambda model: model[0].weight.data.neg_()])
def test_on_a_gpu_one_launch_sums_up_all_weights(change, frozen, monkeypatch):
    model = sparsify(nn.Sequential(nn.Linear(32, 2)), "2:4")
    set_masking(model, frozen=frozen)
    monkeypatch.setattr(masked_adamw, "uses_triton", lambda *tensors: True)
    monkeypatch.setattr(selections, "_checksum", lambda weight: pytest.fail("a launch for one weight"))
    with hold_masks(model):
        assert torch.equal(model[0].current_mask(), masks(model)["0"])
    with pytest.raises(InputError, match="the weight of 0 was changed while its mask"), hold_masks(model):
        change(model)
    assert not broken, "a weight that the kernel does not take says nothing of the kernel"


def test_a_mask_that_is_set_while_it_is_held_counts(choices):
    torch._dynamo.reset()
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with hold_masks(model):
        before = compiled(x)
        sparsify(model, "1:4")
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(before, model(x))


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
    monkeypatch.setattr(torch, "empty", lambda *_, device, **__: Here() if device == "cpu" else pytest.fail(device))
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
