"""Optimizers of torch and of others, tried for real: after every step the masks are of today's weights."""

import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from sparsedm import MaskedAdamW, compress, hold_masks, sparsify
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import select_mask_ref
from sparsedm.sparsity import masked_layers


def network():
    torch.default_generator.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16, bias=False)), "2:4")


X, TARGET = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).unbind()
TARGET = TARGET[:, :16]


def loss_of(model):
    return (model(X) - TARGET).square().mean()


def check(model):
    for _, layer in masked_layers(model):
        assert torch.equal(layer.effective_weight(), layer.weight * select_mask_ref(layer.weight, layer.pattern))
    with torch.no_grad():
        torch.testing.assert_close(compress(model)(X), model(X))
        with hold_masks(model):
            torch.testing.assert_close(compress(model)(X), model(X))


def train(model, optimizer, steps=4):
    first = loss_of(model).item()
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        before = [layer.weight.detach().clone() for _, layer in masked_layers(model)]
        optimizer.step(closure)
        assert not any(torch.equal(a, layer.weight) for a, (_, layer) in zip(before, masked_layers(model)))
        check(model)
    assert loss_of(model) < first


class ThroughData(torch.optim.Optimizer):
    """Writes where torch's version counter does not see it."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure):
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-group["lr"])
        return loss


FOREACH = [{"foreach": False}, {"foreach": True}]
FUSED = [*FOREACH, {"fused": True}]
KINDS = {  # name: (rate, variants)
    **{name: (0.01, FUSED) for name in ("Adam", "AdamW", "Adagrad")},
    "SGD": (0.1, [{"momentum": 0.9, "nesterov": True, **variant} for variant in FUSED]),
    **{name: (0.01, FOREACH) for name in ("Adamax", "NAdam", "RAdam", "RMSprop", "ASGD", "Rprop")},
    "Adadelta": (1.0, FOREACH),
    "Adafactor": (0.05, FOREACH),
    "LBFGS": (0.5, [{}, {"line_search_fn": "strong_wolfe"}]),
    "Muon": (0.02, [{}]),
}
TORCHS = [(name, rate, variant) for name, (rate, variants) in KINDS.items() for variant in variants]


@pytest.mark.parametrize(("name", "rate", "variant"), TORCHS, ids=lambda value: str(value))
def test_torchs(name, rate, variant):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    model = network()
    parameters = [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]
    train(model, getattr(torch.optim, name)(parameters, lr=rate, **variant))


def test_one_that_writes_through_data():
    model = network()
    train(model, ThroughData(model.parameters(), 0.1))


OTHERS = {  # module, class: options
    ("prodigyopt", "Prodigy"): {"lr": 1.0, "d0": 1e-3},
    ("dadaptation", "DAdaptAdam"): {"lr": 1.0, "d0": 1e-4, "growth_rate": 1.02},
    ("dadaptation", "DAdaptSGD"): {"lr": 1.0, "d0": 1e-2},
    ("dadaptation", "DAdaptLion"): {"lr": 1.0, "d0": 1e-3},
    ("lion_pytorch", "Lion"): {"lr": 1e-3},
    ("schedulefree", "AdamWScheduleFree"): {"lr": 0.01},
    ("schedulefree", "SGDScheduleFree"): {"lr": 0.1},
}


@pytest.mark.parametrize(("module", "name"), OTHERS, ids=str)
def test_others(module, name):
    kind, model = getattr(pytest.importorskip(module), name), network()
    optimizer = kind(model.parameters(), **OTHERS[module, name])
    for mode in ("train", "eval"):  # schedule-free: the average of the weights is written over them and taken back
        if hasattr(optimizer, mode):
            optimizer.train()
        train(model, optimizer)
        if hasattr(optimizer, mode):
            optimizer.eval()
            check(model)


# ---- several processes -----------------------------------------------------------------------------------------------


def steps_alone(count):
    """The network after each of so many steps of one process."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        yield copy.deepcopy(model)


def with_zero(rank):
    model = network()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    for expected in steps_alone(4):
        optimizer.zero_grad()
        loss_of(parallel).backward()
        optimizer.step()
        check(model)
        for mine, theirs in zip(model.parameters(), expected.parameters()):
            torch.testing.assert_close(mine, theirs)


def with_fsdp(rank):
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for expected in steps_alone(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        for mine, theirs in zip(model.parameters(), expected.parameters()):
            torch.testing.assert_close(mine.full_tensor(), theirs)
        with torch.no_grad():
            torch.testing.assert_close(model(X), compress(expected)(X))
    model.reshard()
    with pytest.raises(InputError, match=r"the weight of 0 is sharded: its mask can be selected only inside a forward"):
        hold_masks(model).__enter__()
    with pytest.raises(InputError, match=r"MaskedAdamW: a parameter of shape \(32, 32\) is sharded \(a DTensor\)"):
        MaskedAdamW(model.parameters(), model=model)


def with_compressed_buffers(rank):
    """DDP gives all processes the buffers of the first; a compressed layer was called before, with other ones."""
    torch.default_generator.manual_seed(rank)
    both = nn.ModuleDict({"student": nn.Linear(32, 32)})
    for pattern in ("2:4", "1:4"):
        both[pattern.replace(":", " of ")] = compress(sparsify(nn.Linear(32, 32), pattern))
    teachers = [layer for layer in both.values() if not isinstance(layer, nn.Linear)]

    def results():
        with torch.no_grad():
            plain = [layer(X) for layer in teachers]
            with torch.autocast("cpu", torch.bfloat16):
                return plain + [layer(X) for layer in teachers]

    before = results()
    nn.parallel.DistributedDataParallel(both)
    expected = [nn.functional.linear(X, layer.dense_weight(), layer.bias) for layer in teachers]
    for y, reference in zip(results(), 2 * expected):
        torch.testing.assert_close(y.float(), reference, rtol=0, atol=1e-6 if y.dtype == torch.float32 else 0.03)
    assert all(torch.equal(*pair) for pair in zip(before, results())) == (rank == 0)
    for layer in teachers:  # a plain broadcast moves no version: the layer must be told
        layer.values.data.mul_(2)
        layer.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(X), nn.functional.linear(X, layer.dense_weight(), layer.bias))


def worker(rank, port, run):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    run(rank)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("run", [with_zero, with_fsdp, with_compressed_buffers])
def test_two_processes_that_share_weights(run):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, run), nprocs=2)
