"""MaskedAdamW against torch's AdamW with the decay added by hand: in torch, and by the kernel in the interpreter."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsedm import MaskedAdamW
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.kernels import masked_adamw as kernel
from sparsedm.kernels.pattern import group_view, select_mask_ref, ungroup
from sparsedm.sparsity import hold_masks, masked_layers, set_masking, sparsify

DECAY = 0.05


class Small(nn.Module):
    """A convolution, linears of two widths, one that stays dense, and what has no mask."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 32, 2), nn.BatchNorm1d(32)
        self.first, self.second, self.last = nn.Linear(32, 16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x):
        hidden = F.silu(self.conv(x)).mean((2, 3))
        return self.last(self.second(F.silu(self.first(self.norm(hidden)))))


@pytest.fixture(params=["torch", "kernel"])
def way(request, monkeypatch):
    if request.param == "kernel":
        monkeypatch.setattr(kernel, "uses_triton", lambda *tensors: True)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """How many works each launch had that selected, and that stepped."""
    found, launch = [], kernel.launch

    def counted(works):
        found.append((sum(w.selection is not None for w in works), sum(w.moments is not None for w in works)))
        return launch(works)

    monkeypatch.setattr(kernel, "launch", counted)
    return found


def model(seed=0, pattern="2:4", decay=DECAY):
    torch.manual_seed(seed)
    found = sparsify(Small(), pattern, "conv|first|second")
    set_masking(found, decay=decay)
    return found


def groups(network):
    """With rates of their own, and a parameter that no gradient reaches."""
    unused = nn.Parameter(torch.ones(3))
    return [
        {"params": [*network.conv.parameters(), *network.norm.parameters(), unused], "lr": 3e-3},
        {"params": [network.first.weight], "betas": (0.3, 0.9), "weight_decay": 0.2},
        {"params": [network.first.bias, *network.second.parameters(), *network.last.parameters()], "eps": 1e-5},
    ]


def optimizer_of(network, **options):
    return MaskedAdamW(groups(network), 1e-2, model=network, **options)


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, 3, 3, generator=generator) for _ in range(count)]


def train(network, optimizer, inputs, clip=0.5, hold=True, amp=False):
    for x in inputs:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            if hold:
                with hold_masks(network, optimizer=optimizer):
                    network(x).square().mean().backward()
            else:
                network(x).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def reference(network, optimizer, inputs, clip=0.5, amp=False):
    """torch.optim.AdamW; the decay is added by hand, after clipping."""
    rates = {name: layer.rule.decay for name, layer in masked_layers(network)}
    set_masking(network, decay=0.0)
    for x in inputs:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            network(x).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        for name, layer in masked_layers(network):
            layer.weight.grad += rates[name] * layer.weight.detach() * ~mask_of(layer)
        optimizer.step()
        optimizer.zero_grad()


def mask_of(layer):
    return ungroup(select_mask_ref(group_view(layer.weight), layer.pattern), layer.weight.shape)


def adamw(network):
    return torch.optim.AdamW(groups(network), 1e-2)


def assert_same(way, network, expected, optimizer=None, other=None):
    """In torch bit for bit; the kernel rounds in another order."""
    compare = torch.equal if way == "torch" else lambda a, b: torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    for (name, mine), theirs in zip(network.named_parameters(), expected.parameters()):
        assert compare(mine, theirs) is not False, name
        if optimizer:
            slots = optimizer.state[mine], other.state[theirs]
            assert list(slots[0]) == list(slots[1])
            assert all(compare(slots[0][key], slots[1][key]) is not False for key in slots[0]), name


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("amp", [False, True])
def test_is_torchs_adamw_with_the_decay_after_the_clipping(way, hold, amp):
    network, expected = model(), model()
    mine, theirs = optimizer_of(network), adamw(expected)
    if amp and way == "kernel":
        pytest.skip("the interpreter cuts instead of rounding to bf16")
    train(network, mine, batches(), hold=hold, amp=amp)
    reference(expected, theirs, batches(), amp=amp)
    assert_same(way, network, expected, mine, theirs)
    without = model(decay=0.0)
    train(without, optimizer_of(without), batches())
    assert not torch.allclose(without.first.weight, network.first.weight, atol=1e-4), "the decay did something"


@pytest.mark.parametrize("settings", [{"kept": 0.5, "dropped": 2.0, "decay": DECAY}, {"frozen": True, "dropped": 0.0}])
def test_other_gradient_rules(way, settings):
    network, expected = model(), model()
    for one in (network, expected):
        set_masking(one, **settings)
    mine, theirs = optimizer_of(network), adamw(expected)
    train(network, mine, batches(), clip=1e9)
    for x in batches():  # nothing is clipped, so that a hook may add the decay before
        expected(x).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
    assert_same("kernel", network, expected, mine, theirs)


def test_inside_of_a_block_the_masks_are_of_todays_weights(way):
    network = model()
    optimizer = optimizer_of(network)
    for x in batches(3):
        train(network, optimizer, [x])
        with torch.no_grad(), hold_masks(network, optimizer=optimizer):
            held = {name: (layer.effective_weight(), layer.current_mask()) for name, layer in masked_layers(network)}
            y = network.eval()(x)
        network.train()
        for name, layer in masked_layers(network):
            assert torch.equal(held[name][1], mask_of(layer))
            assert torch.equal(held[name][0], layer.weight * mask_of(layer))
        torch.testing.assert_close(y, compress(network)(x))


def test_a_step_of_the_kernel_is_one_launch_and_a_block_none(launches, monkeypatch):
    monkeypatch.setattr(kernel, "uses_triton", lambda *tensors: True)
    network = model()
    optimizer = optimizer_of(network)
    train(network, optimizer, batches(1))
    assert launches == [(3, 0), (3, 3)], "the first block selects"
    launches.clear()
    train(network, optimizer, batches(2))
    assert launches == [(3, 3)] * 2
    launches.clear()
    with hold_masks(network):
        pass
    assert launches == [(3, 0), (0, 0)], "without the optimizer it selects and, at the end, compares"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_weight_that_anybody_else_writes_is_noticed(way, grad, where):
    network, x = model(), batches(1)[0]
    optimizer = optimizer_of(network)
    train(network, optimizer, [x])

    def write():
        network.first.weight.data.copy_(network.first.weight.flip(0))

    def block():
        with torch.set_grad_enabled(grad), hold_masks(network, optimizer=optimizer):
            if where == "inside":
                write()
            network(x)
        if grad:
            network(x).sum().backward()
            optimizer.step()

    if where == "before":
        write()
    with pytest.raises(InputError, match="the weight of first was changed while its mask was held, or since"):
        block()
    where = "neither"
    block()  # and the next block selects anew
    with hold_masks(network, optimizer=optimizer):
        assert torch.equal(network.first.current_mask(), mask_of(network.first))


def test_masks_of_a_loaded_model_are_selected_anew(way):
    network, x = model(), batches(1)[0]
    optimizer = optimizer_of(network)
    train(network, optimizer, [x])
    network.load_state_dict(model(seed=1).state_dict())
    with hold_masks(network, optimizer=optimizer):
        assert all(torch.equal(layer.current_mask(), mask_of(layer)) for _, layer in masked_layers(network))


def test_rates_in_tensors_are_loaded_as_numbers():
    network, expected = model(), model()
    mine = MaskedAdamW(network.parameters(), model=network)
    theirs = torch.optim.AdamW(expected.parameters(), torch.tensor(1e-2))
    mine.load_state_dict(theirs.state_dict())
    train(network, mine, batches(1))
    reference(expected, theirs, batches(1))
    assert_same("kernel", network, expected)  # torch rounds otherwise, with a rate in a tensor


class Counted(list):
    read = 0

    def __iter__(self):
        Counted.read += 1
        return super().__iter__()


def test_a_step_reads_each_group_as_often_however_many_there_are():
    network, counts = nn.Linear(4, 4), []
    for number in (4, 8):
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(number)]
        optimizer = MaskedAdamW([{"params": [p]} for p in parameters], model=network)
        for group in optimizer.param_groups:
            group["params"] = Counted(group["params"])
        before = Counted.read
        optimizer.step()
        counts.append(Counted.read - before)
    assert counts[1] == 2 * counts[0]


def test_a_mask_that_another_block_held_through_a_step_is_not_taken_over(way):
    network, x = model(), batches(1)[0]
    optimizer = MaskedAdamW(network.parameters(), 0.5, model=network)
    train(network, optimizer, [x])

    def step_inside():
        with hold_masks(network):
            network(x).sum().backward()
            optimizer.step()
            with hold_masks(network, optimizer=optimizer):
                pass

    with pytest.raises(InputError, match="was changed while its mask was held"):
        step_inside()
    with hold_masks(network, optimizer=optimizer):
        assert all(torch.equal(layer.current_mask(), mask_of(layer)) for _, layer in masked_layers(network))


def test_a_step_outside_of_blocks_believes_nobody(way):
    """What no block has used may change as it likes."""
    network, expected = model(), model()
    mine, theirs = optimizer_of(network), adamw(expected)
    train(network, mine, batches(2))
    reference(expected, theirs, batches(2))
    for one in (network, expected):
        one.first.weight.data.mul_(-0.5)
    train(network, mine, batches(2), hold=False)
    set_masking(expected, decay=DECAY)
    reference(expected, theirs, batches(2))
    assert_same(way, network, expected, mine, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_is_adamws_both_ways(way, fused):
    network, expected = model(), model()
    mine, theirs = optimizer_of(network), torch.optim.AdamW(groups(expected), 1e-2, fused=fused)
    reference(expected, theirs, batches(2))
    network.load_state_dict(expected.state_dict())
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    set_masking(expected, decay=DECAY)
    train(network, mine, batches(2))
    reference(expected, theirs, batches(2))
    if not fused:
        assert_same(way, network, expected, mine, theirs)
    back = torch.optim.AdamW(groups(expected), 1e-2, fused=fused)
    back.load_state_dict(copy.deepcopy(mine.state_dict()))
    expected.load_state_dict(network.state_dict())
    set_masking(expected, decay=DECAY)
    train(network, mine, batches(2))
    reference(expected, back, batches(2))
    assert_same(way, network, expected)


def test_resuming_is_exact(way):
    whole, network = model(), model()
    optimizer = optimizer_of(whole)
    train(whole, optimizer, batches(3))
    first = optimizer_of(network)
    train(network, first, batches(3)[:2])
    again = model(seed=5)
    second = optimizer_of(again)
    train(again, second, batches(1))
    again.load_state_dict(network.state_dict())
    second.load_state_dict(first.state_dict())
    train(again, second, batches(3)[2:])
    assert_same("torch", again, whole, second, optimizer)


def test_accumulation_scaling_and_closures_need_no_correction(way):
    x = batches(1)[0]
    results = []
    for kind in ("plain", "scaler", "closure", "two backwards"):
        network = model()
        optimizer = optimizer_of(network)
        if kind == "plain":
            train(network, optimizer, [x], clip=1e9)
        elif kind == "scaler":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            scaler.scale(network(x).square().mean()).backward()
            scaler.step(optimizer)
        elif kind == "closure":
            optimizer.step(lambda network=network: [loss := network(x).square().mean(), loss.backward()][0])
        else:
            for _ in range(2):
                (network(x).square().mean() / 2).backward()
        if kind == "two backwards":
            optimizer.step()
        results.append(network)
    for other in results[1:]:
        torch.testing.assert_close(other.first.weight, results[0].first.weight)


def test_the_decay_is_the_optimizers_while_it_lives():
    network, x = model(), batches(1)[0]

    def decays(layer):
        layer.zero_grad()
        F.linear(torch.zeros(1, layer.weight.shape[1]), layer.effective_weight()).sum().backward()
        return layer.weight.grad.count_nonzero() > 0

    assert decays(network.first)
    optimizer = optimizer_of(network)
    twin = copy.deepcopy(network)
    assert not decays(network.first)
    assert decays(twin.first), "a copy is another model"
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    compiled(x).mul(0).sum().backward()
    assert not network.first.weight.grad.count_nonzero()
    second = optimizer_of(network)
    del optimizer
    gc.collect()
    assert not decays(network.first), "another one has taken over"
    del second
    gc.collect()
    assert decays(network.first)
    network.first.weight = nn.Parameter(torch.randn(16, 32))
    third = MaskedAdamW([network.conv.weight], model=network)
    assert decays(network.first), "a weight that is none of its parameters"
    del third


def test_a_layer_that_is_made_sparse_later_counts(way):
    network, expected = model(), model()
    for one in (network, expected):
        sparsify(one, None)
    mine, theirs = optimizer_of(network), adamw(expected)
    for layers in ("conv", "conv|first"):
        for one in (network, expected):
            sparsify(one, "2:4", layers)
            set_masking(one, decay=DECAY)
        train(network, mine, batches(2))
        reference(expected, theirs, batches(2))
    assert_same(way, network, expected, mine, theirs)


def test_a_tied_weight_is_stepped_once(way):
    torch.manual_seed(0)
    network = sparsify(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), "2:4")
    network[2].weight = network[0].weight
    set_masking(network, decay=DECAY)
    expected = copy.deepcopy(network)
    mine = MaskedAdamW(network.parameters(), 1e-2, model=network)
    theirs = torch.optim.AdamW(expected.parameters(), 1e-2)
    for x in torch.randn(3, 5, 32):
        with hold_masks(network, optimizer=mine):
            network(x).square().mean().backward()
        mine.step(), mine.zero_grad()
        expected(x).square().mean().backward()
        theirs.step(), theirs.zero_grad()
    assert_same("kernel", network, expected)


def test_a_compiled_model_takes_the_masks_of_the_block(monkeypatch):
    """Of which the kernel makes the bits alone."""
    monkeypatch.setattr(kernel, "uses_triton", lambda *tensors: True)
    torch._dynamo.reset()
    network, expected = model(), model()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    mine, theirs = optimizer_of(network), optimizer_of(expected)
    for x in batches(3):
        with hold_masks(network, optimizer=mine):
            compiled(x).square().mean().backward()
        mine.step(), mine.zero_grad()
    train(expected, theirs, batches(3), clip=1e9)
    assert_same("kernel", network, expected)


def test_weights_in_channels_last_are_held_and_stepped(way):
    network, expected = (model().to(memory_format=torch.channels_last) for _ in range(2))
    mine, theirs = optimizer_of(network), adamw(expected)
    train(network, mine, batches())
    reference(expected, theirs, batches())
    assert_same(way, network, expected, mine, theirs)
    for one in (network, expected):
        one.to(memory_format=torch.contiguous_format)
    set_masking(expected, decay=DECAY)
    train(network, mine, batches(1))
    reference(expected, theirs, batches(1))
    assert_same(way, network, expected, mine, theirs)
    with pytest.raises(InputError, match="the weight of conv was changed"), hold_masks(network):
        network.conv.weight.data.neg_()


def test_nan_is_said_by_the_next_block(way):
    network, x = model(), batches(1)[0]
    optimizer = optimizer_of(network)
    train(network, optimizer, [x])
    with hold_masks(network, optimizer=optimizer):
        (network(x).square().mean() * float("nan")).backward()

    def step_and_hold():
        optimizer.step()
        with hold_masks(network, optimizer=optimizer):
            pass

    with pytest.raises(InputError, match=r"(conv|first|second): .*of its weights are NaN"):
        step_and_hold()


@pytest.mark.parametrize(
    "moved", [lambda t: t.to("meta"), lambda t: t.bfloat16(), lambda t: t[1:]], ids=["device", "dtype", "shape"]
)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_moments_left_behind_are_refused_before_anything_changes(way, name, moved):
    """As after a model has moved to a GPU between two steps: the kernel would read them at an address of the CPU."""
    network, (x, *_) = model(), batches()
    optimizer = optimizer_of(network)
    train(network, optimizer, [x])
    state = optimizer.state[network.first.weight]
    right, before = state[name], {p: p.clone() for p in network.parameters()}
    state[name] = moved(right)
    with pytest.raises(
        InputError, match=f"{name} is torch.* on .*, its parameter torch.float32 .* on cpu, and they must be"
    ):
        train(network, optimizer, [x])
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}
    assert all(torch.equal(p, old) for p, old in before.items())
    state[name] = right
    optimizer.zero_grad()
    train(network, optimizer, [x])


def sparse():
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.ones(4, 4).to_sparse()
    return [parameter]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: optimizer_of(m, amsgrad=True), "MaskedAdamW has no amsgrad=True: there is no maximum of second"),
        (lambda m: optimizer_of(m, maximize=True), "has no maximize=True: it minimises"),
        (lambda m: optimizer_of(m, capturable=True), "has no capturable=True: the rates of a step come from the CPU"),
        (lambda m: optimizer_of(m, fused=True), "has no fused=True: it chooses its kernel itself"),
        (lambda m: optimizer_of(m, momentum=0.9), "has no momentum=0.9: it is no option of it"),
        (lambda m: MaskedAdamW([{"params": m.parameters(), "amsgrad": True}], model=m), "has no amsgrad=True"),
        (lambda m: MaskedAdamW(m.parameters(), -1.0, model=m), "lr=-1.0 must be a number of at least 0"),
        (lambda m: MaskedAdamW(m.parameters(), torch.tensor(0.1), model=m), r"lr=tensor\(0.1.* must be a number"),
        (lambda m: MaskedAdamW(m.parameters(), float("nan"), model=m), "lr=nan must be a number of at least 0"),
        (lambda m: MaskedAdamW(m.parameters(), betas=(0.9, 1.0), model=m), r"betas=\(0.9, 1.0\) must be two numbers"),
        (lambda m: MaskedAdamW(m.parameters(), "1e-3", model=m), "lr='1e-3' must be a number of at least 0"),
        (lambda m: MaskedAdamW(m.parameters(), betas=(0.9,), model=m), r"betas=\(0.9,\) must be two numbers"),
        (lambda m: MaskedAdamW(m.parameters(), betas=[0.9] * 3, model=m), "must be two numbers"),
        (lambda m: MaskedAdamW(m.parameters(), betas=0.9, model=m), "betas=0.9 must be two numbers"),
        (lambda m: MaskedAdamW(m.parameters(), eps=-1e-8, model=m), "eps=-1e-08 must be"),
        (lambda m: MaskedAdamW(m.parameters(), weight_decay=-1.0, model=m), "weight_decay=-1.0 must be"),
        (lambda m: MaskedAdamW(m.parameters(), model="m"), "model='m': must be a module, or several"),
        (lambda m: MaskedAdamW(m.parameters(), model=None), "model=None: must be a module, or several"),
        (lambda m: MaskedAdamW([nn.Parameter(torch.ones(2) * 1j)], model=m), "is torch.complex64, and must be real"),
        (lambda m: MaskedAdamW(sparse(), model=m).step(), r"a gradient of shape \(4, 4\) is sparse: it must be dense"),
        (
            lambda m: MaskedAdamW([*m.parameters(), nn.Parameter(torch.ones(2, device="meta"))], model=m),
            "all parameters must be on one device, not on cpu and meta",
        ),
        (lambda m: copy.deepcopy(optimizer_of(m)), "belongs to its model: make another one, and load its state_dict"),
        (
            lambda m: optimizer_of(m).load_state_dict(
                torch.optim.AdamW(groups(m), 1e-2, amsgrad=True).state_dict(),
            ),
            "the state was made with amsgrad=True: there is no maximum",
        ),
        (
            lambda m: hold_masks(m, optimizer=torch.optim.AdamW(m.parameters())).__enter__(),
            "optimizer=AdamW: only a MaskedAdamW selects masks",
        ),
    ],
)
def test_refusals(make, message):
    network = model()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=message):
        make(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_in_zero_each_process_would_own_a_part_of_the_decay():
    def construct(model):
        return MaskedAdamW(model.parameters(), model=model)

    globals_of_zero = {"__name__": "torch.distributed.optim.zero_redundancy_optimizer", "MaskedAdamW": MaskedAdamW}
    in_zero = type(construct)(construct.__code__, globals_of_zero)
    with pytest.raises(InputError, match="MaskedAdamW cannot be used by a ZeroRedundancyOptimizer"):
        in_zero(sparsify(nn.Linear(16, 8), "2:4"))
