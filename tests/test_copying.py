"""What a copy of a model takes along, and the functions that are refused because it would not."""

import collections
import copy
import dataclasses
import functools
import pickle
import threading
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsedm.compressed import CompressedLinear
from sparsedm.compression import bake, compress, decompress
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.sparsity import sparsify
from tests.tiny import Small


def closure(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def closure_of_a_block(model):
    block, forward = model.head, model.head.forward
    block.forward = lambda x: forward(x) + 1


def closure_over_a_module(model):
    head = model.head
    model.features = lambda x: head(x)


def default_argument(model):
    model.forward = lambda x, run=model.forward: run(x)


def in_a_list(model):
    model.steps = [lambda x: model.head(x)]


def in_an_object(model):
    place = types.SimpleNamespace(model=model)
    model.forward = lambda x: Small.forward(place.model, x)


def in_a_local_class(model):
    class Place:
        inside = model

    model.forward = lambda x: Small.forward(Place.inside, x)


def weak_reference(model):
    model.owner = weakref.ref(model)


def wrapped_again(model):
    outer = nn.Sequential(model)
    model.forward = functools.wraps(Small.forward)(lambda x: Small.forward(outer[0], x))


def hook_over_a_module(model):
    model.head.register_forward_hook(lambda layer, inputs, y: y + model.conv.weight.sum())


def not_filled_yet(model):
    def forward(x):
        return Small.forward(model, x) if x is not None else later

    if model is None:
        later = 1
    model.forward = forward


def bound_function_over_a_module(model):
    other = model.head
    model.forward = types.MethodType(lambda self, x: Small.forward(self, x) + other.weight.sum(), model)


def in_a_deque(model):
    inside = collections.deque([model])
    model.forward = lambda x: Small.forward(inside[0], x)


def of_a_thread(model):
    place = threading.local()
    place.model = model
    model.forward = lambda x: Small.forward(place.model, x)


def class_of_its_own(model):
    class Other(Small):
        def forward(self, x):
            return Small.forward(model, x)

    model.__class__ = Other


def property_of_an_object(model):
    class Place:
        @property
        def inside(self):
            return model

    place = Place()
    model.forward = lambda x: Small.forward(place.inside, x)


def copied_as_itself(model):
    class Run:
        def __init__(self, run):
            self.run = run

        def __call__(self, x):
            return self.run(x)

        def __deepcopy__(self, memo):
            return self

    model.forward = Run(model.forward)


def bound_function_over_a_parameter(model):
    bias = model.head.bias
    model.forward = types.MethodType(lambda self, x: Small.forward(self, x) + bias.sum(), model)


FORWARD = "Small.forward was replaced by a function"
REPLACED = {
    closure: FORWARD,
    closure_of_a_block: "head.forward was replaced by a function",
    closure_over_a_module: "Small.features was replaced by a function",
    default_argument: FORWARD,
    in_a_list: "Small.steps holds a function",
    in_an_object: FORWARD,
    in_a_local_class: FORWARD,
    weak_reference: "Small.owner holds a function",
    wrapped_again: FORWARD,
    hook_over_a_module: "a hook of head is a function",
    not_filled_yet: FORWARD,
    bound_function_over_a_module: FORWARD,
    in_a_deque: FORWARD,
    of_a_thread: FORWARD,
    class_of_its_own: "Other.class holds a function",
    property_of_an_object: FORWARD,
    bound_function_over_a_parameter: FORWARD,
}


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
def test_a_function_that_would_go_on_running_the_old_network_is_refused_by_name(replace):
    model = sparsify(Small(), "2:4")
    replace(model)
    small = compress(sparsify(Small(), "2:4"))
    replace(small)
    for change, network in ((compress, model), (bake, model), (decompress, small)):
        with pytest.raises(InputError, match=f"^{REPLACED[replace]}"):
            change(network)
    report = inspect(model, (torch.randn(1, 3, 8, 8),))
    assert REPLACED[replace] in str(report)


def test_an_object_that_is_copied_as_itself_is_found_in_the_copy():
    model = sparsify(Small(), "2:4")
    copied_as_itself(model)
    for change in (compress, bake):
        with pytest.raises(InputError, match=r"^Small\.forward holds a function"):
            change(model)


def test_a_method_of_a_layer_that_compress_replaces_is_refused():
    model = sparsify(Small(), "2:4")
    model.first = model.head.forward
    with pytest.raises(InputError, match=r"^Small\.first was replaced by a function"):
        compress(model)


def test_a_second_reference_to_a_weight_reads_all_of_it_in_every_form():
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    model.extra = [model.head.weight]
    model.forward = types.MethodType(lambda self, x: Small.forward(self, x) + self.extra[0].square().sum(), model)
    for change in (compress, bake):
        torch.testing.assert_close(change(model)(x), model(x))


class Keeps(nn.Module):
    """Keeps what its forward computed."""

    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.seen = []

    def forward(self, x):
        self.last = self.inside(x)
        self.seen.append({"last": self.last, "all": self.seen})
        return self.head(self.last)


COMPUTES = {
    "a forward": lambda model: model,
    "weight_norm": lambda model: nn.utils.weight_norm(model.inside),
    "spectral_norm": lambda model: nn.utils.spectral_norm(model.inside),
    "prune": lambda model: prune.random_unstructured(model.inside, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", COMPUTES)
def test_tensors_that_a_module_has_computed_do_not_prevent_a_copy(how):
    model, x = Keeps(), torch.randn(3, 16)
    COMPUTES[how](model)
    sparsify(model, "2:4", ["head"])
    model(x)
    for change in (compress, bake):
        changed = change(model).eval()
        with torch.no_grad():
            torch.testing.assert_close(changed(x), model.eval()(x))
        assert torch.equal(changed.seen[0]["last"], model.seen[0]["last"])
        assert changed.seen[0]["all"] is changed.seen
        model.train()(x)


@dataclasses.dataclass(slots=True, eq=False)
class Slots:
    x: torch.Tensor


CONTAINERS = {
    "deque": lambda x: collections.deque([x]),
    "set": lambda x: {x},
    "namespace": lambda x: types.SimpleNamespace(x=x),
    "slots": Slots,
    "dict of objects": lambda x: collections.defaultdict(list, a=[types.SimpleNamespace(x=(x,))]),
    "partial": lambda x: functools.partial(torch.add, x),
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_a_computed_tensor_in_any_container_does_not_prevent_a_copy(contain):
    model = sparsify(Keeps(), "2:4", ["head"])
    model.kept = contain(model.inside(torch.randn(3, 16)))
    for change in (compress, bake):
        assert type(change(model).kept) is type(model.kept)


def test_a_kept_view_of_a_parameter_is_refused():
    model = sparsify(Keeps(), "2:4", ["head"])
    model.tied = model.inside.weight.t()
    with pytest.raises(InputError, match=r"a kept view \(16, 16\) of a parameter would be a constant in a copy"):
        compress(model)


def test_a_computed_tensor_in_an_unregistered_module_does_not_prevent_a_copy():
    model, other = sparsify(Keeps(), "2:4", ["head"]), Keeps()
    other(torch.randn(3, 16))
    model.others = [other]
    assert torch.equal(compress(model).others[0].last, other.last)


def test_what_a_copy_takes_along_is_no_reason_to_refuse():
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    expected = compress(model)(x)
    model.scale = functools.partial(torch.mul, 2)
    model.forward = types.MethodType(lambda self, x: Small.forward(self, x), model)
    model.head.forward = functools.partial(type(model.head).forward, model.head)
    model.report = print
    del model.head.forward  # a compressed layer has a forward of its own
    small = compress(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(small(x), expected)
    compiled = torch.compile(sparsify(Small(), "2:4"), backend="eager")
    assert isinstance(compress(compiled).head, CompressedLinear)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_copy_of_a_compiled_layer_runs_its_own_weights(compressed):
    model = sparsify(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), "2:4").eval()
    model = compress(model) if compressed else model
    for layer in (model[0], model[2]):
        layer.compile(backend="eager")
    x = torch.randn(4, 16)
    with torch.no_grad():
        expected = model(x)
        copied, sent = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        for other in (copied, sent):
            torch.testing.assert_close(other(x), expected)
    if not compressed:
        compress(model)
