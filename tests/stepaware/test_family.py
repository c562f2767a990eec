import json
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsedm import diffusion, samplers
from sparsedm.compressed import CompressedLinear
from sparsedm.compression import compress
from sparsedm.cuda_graph import Graphs
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.models import build_model
from sparsedm.sparsity import masked_layers, sparsify
from sparsedm.stepaware import family as stepaware
from sparsedm.stepaware.family import Family, Strategy, load_strategy, sample
from tests.test_cuda_graph import Tape

TINY = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}
STEPS = 4


def student(pattern="dense", **overrides):
    model = build_model("uvit-tiny", **TINY | overrides)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return sparsify(model, pattern).eval()


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    return stepaware.family("chain", {p: student(p) for p in ("dense", "2:4", "1:4")})


def strategy(indices, sampler="ddim", **overrides):
    return Strategy(
        **{"family": "chain", "networks": ("dense", "2:4", "1:4"), "sampler": sampler} | overrides, indices=indices
    )


# ---- families and costs ----------------------------------------------------------------------------------------------


def test_a_chain_costs_its_kept_weights(chain):
    assert chain.names == ("dense", "2:4", "1:4")
    assert chain.costs == tuple(inspect(network).totals()["macs_after"] for network in chain.networks)
    assert chain.costs[0] > chain.costs[1] > chain.costs[2]
    assert chain.unit == "MACs"
    assert chain.shape == (3, 8, 8)


def test_widths_of_a_slimmable_network_are_a_family():
    model = build_model("slimmable-tiny", image_size=8, multipliers=(1, 1), attention=(), groups=4)
    family = stepaware.family("widths", stepaware.widths(model))
    assert family.names == ("8/8", "6/8", "4/8", "2/8")
    assert list(family.costs) == sorted(family.costs, reverse=True)
    both = stepaware.widths(sparsify(model, "2:4"))
    assert inspect(both["4/8"]).totals()["macs_after"] < 0.6 * family.costs[2]


@pytest.mark.parametrize("sampler", [n for n, s in samplers.SAMPLERS.items() if not s.learned])
def test_cost_is_additive_and_counts_every_call(chain, sampler):
    calls = []
    hooks = [n.register_forward_hook(lambda n, *_: calls.append(n)) for n in chain.networks]
    indices = (2, 0, 1, 1)
    sample(chain, strategy(indices, sampler), 2)
    for hook in hooks:
        hook.remove()
    happened = sum(chain.costs[chain.networks.index(network)] for network in calls)
    assert chain.cost(sampler, indices) == happened
    alone = [chain.cost(sampler, (index,) * 4) for index in range(3)]
    per_step = [samplers.evaluations(sampler, 4)[i] * chain.costs[index] for i, index in enumerate(indices)]
    assert sum(per_step) == happened
    assert alone[2] < happened < alone[0]


def test_measured_costs_are_seconds(chain):
    class Slow(nn.Module):
        config = chain.networks[0].config

        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def example_inputs(self, batch):
            return torch.zeros(batch, 3, 8, 8), torch.zeros(batch)

        def forward(self, x, t, y=None):
            time.sleep(self.seconds)
            return x

    family = stepaware.family("slow", {"a": Slow(0.02), "b": Slow(0.004)}, unit="seconds", batch=4)
    assert family.unit == "seconds"
    assert 0.02 / 4 <= family.costs[0] < 0.02, "of one image, not of the batch"
    assert 0.004 / 4 <= family.costs[1] < family.costs[0]


def test_families_that_are_none(chain):
    with pytest.raises(InputError, match="family nothing is empty"):
        stepaware.family("nothing", {})
    with pytest.raises(InputError, match="one cost and one unique name per network"):
        replace(chain, names=("a", "a", "b"))
    with pytest.raises(InputError, match="one cost and one unique name"):
        replace(chain, costs=(1, 2))
    with pytest.raises(InputError, match="each must be more than 0"):
        replace(chain, costs=(1, 0, 2))
    with pytest.raises(InputError, match="unknown unit 'joules': one of MACs, seconds"):
        stepaware.family("chain", {"a": chain.networks[0]}, unit="joules")
    other = build_model("ddpm-tiny", image_size=8, attention=())
    with pytest.raises(InputError, match="networks of mixed differ in schedule"):
        Family("mixed", (chain.networks[0], other), ("a", "b"), (2, 1))


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [n for n, s in samplers.SAMPLERS.items() if not s.learned])
@pytest.mark.parametrize("index", [0, 2])
def test_a_strategy_of_one_network_is_its_plain_sampler(chain, sampler, index):
    plain = samplers.sample(chain.networks[index], chain.schedule, 3, (3, 8, 8), sampler=sampler, steps=STEPS, seed=5)
    assert torch.equal(sample(chain, strategy((index,) * STEPS, sampler), 3, seed=5), plain)


@pytest.mark.parametrize("sampler", [n for n, s in samplers.SAMPLERS.items() if not s.learned])
def test_it_is_so_with_labels_guidance_and_batches_at_every_width(sampler):
    shape = {"image_size": 8, "multipliers": (1, 1), "attention": (), "groups": 4, "num_classes": 3}
    networks = stepaware.widths(build_model("slimmable-tiny", eighths=(4, 8), **shape).eval())
    family = stepaware.family("widths", networks)
    settings = dict(y=torch.tensor([2, 0, 1]), guidance=0.7, batch_size=2, start=4, clip="every")
    for index, network in enumerate(networks.values()):
        found = Strategy("widths", tuple(networks), sampler, (index,) * 3)
        plain = samplers.sample(network, family.schedule, 3, (3, 8, 8), sampler=sampler, steps=3, **settings)
        assert torch.equal(sample(family, found, 3, **settings), plain)


def test_each_step_is_done_by_its_network(chain):
    order = []
    hooks = [
        network.register_forward_hook(lambda *_, name=name: order.append(name))
        for network, name in zip(chain.networks, chain.names)
    ]
    sample(chain, strategy((2, 0, 1, 1)), 2)
    for hook in hooks:
        hook.remove()
    assert order == ["1:4", "dense", "2:4", "2:4"]


class Operations(TorchDispatchMode):
    """Counts torch's operations with the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.counts[function, tuple(leaf.shape for leaf in tree_leaves(result) if torch.is_tensor(leaf))] += 1
        return result


@pytest.mark.parametrize("form", ["masked", "compressed"])
def test_switching_networks_costs_no_operation_and_copies_no_weight(chain, form):
    networks = [compress(n) if form == "compressed" and masked_layers(n) else n for n in chain.networks]
    family = replace(chain, networks=tuple(networks))

    def operations(indices):
        with Operations() as mode:
            sample(family, strategy(indices), 2)
        return mode.counts

    operations((0, 1, 2))  # weights are arranged once; masks are chosen once for each time that samples are drawn
    held = [(p.data_ptr(), p._version) for n in networks for p in n.state_dict().values()]
    switching = operations((0, 1, 0, 1)) + operations((1, 0, 1, 0))
    assert switching == operations((0, 0, 1, 1)) + operations((1, 1, 0, 0))
    assert held == [(p.data_ptr(), p._version) for n in networks for p in n.state_dict().values()]


def test_a_graph_of_a_network_serves_all_its_steps(chain, monkeypatch):
    for steps in (4, 8):
        indices, tape = (0, 1) * (steps // 2), Tape()
        monkeypatch.setattr(samplers, "Graphs", lambda device, tape=tape: Graphs("cuda", tape))
        replayed = sample(chain, strategy(indices), 2, cuda_graph=True)
        assert torch.equal(replayed, sample(chain, strategy(indices), 2))
        assert tape.recorded == 3, "one for each of two networks, and the last step"


def test_a_strategy_knows_its_networks_by_their_weights_and_not_by_their_folder(chain):
    found = strategy((2, 0, 1), fingerprints=chain.fingerprints)
    moved = replace(chain, name="elsewhere")
    assert found.models(moved) == [chain.networks[i] for i in (2, 0, 1)]
    with pytest.raises(InputError, match="for family chain, not elsewhere"):
        strategy((2, 0, 1)).models(moved)
    networks = dict(zip(chain.names, chain.networks))
    retrained = stepaware.family("chain", networks | {"2:4": student("2:4")})
    assert retrained.fingerprints[0] == chain.fingerprints[0]
    with pytest.raises(InputError, match="the weights of 2:4 changed after the search: search again"):
        found.models(retrained)


def test_fingerprints_tell_configurations_and_patterns_apart_where_the_weights_are_equal():
    weights = student().state_dict()
    marks = {}
    for name, network in {
        "dense": student(),
        "again": student(),
        "2:4": student("2:4"),
        "1:4": student("1:4"),
        "velocity": student(velocity=True),
    }.items():
        network.load_state_dict(weights)
        marks[name] = stepaware.fingerprint(network)
    assert marks.pop("again") == marks["dense"]
    assert len(set(marks.values())) == len(marks)


def test_seconds_are_those_of_the_compressed_networks(chain):
    timed = stepaware.family("chain", dict(zip(chain.names, chain.networks)), unit="seconds", batch=2)
    kinds = [{type(m) for m in network.modules()} & {CompressedLinear} for network in timed.networks]
    assert kinds == [set(), {CompressedLinear}, {CompressedLinear}]
    assert timed.fingerprints == chain.fingerprints, "the strategy fits the family in either unit"


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_seconds_are_those_of_the_dtype_that_would_run(chain, device, dtype, monkeypatch):
    timed = []
    monkeypatch.setattr(stepaware, "seconds_per_image", lambda networks, batch: (timed.extend(networks), [1, 2, 3])[1])
    monkeypatch.setattr(stepaware, "_as_run", lambda n, _, as_run=stepaware._as_run: as_run(n, torch.device(device)))
    family = stepaware.family("chain", dict(zip(chain.names, chain.networks)), unit="seconds")
    assert [n.example_inputs()[0].dtype for n in timed] == [dtype] * 3
    assert [n.example_inputs()[0].dtype for n in family.networks] == [torch.float32] * 3, "quality is measured in fp32"


def test_a_strategy_survives_its_file(tmp_path):
    found = strategy((2, 0, 1), data="synthetic")
    found.save(tmp_path / "s.json")
    assert load_strategy(tmp_path / "s.json") == found
    written = json.loads((tmp_path / "s.json").read_text())
    assert written == {
        "family": "chain",
        "networks": ["dense", "2:4", "1:4"],
        "sampler": "ddim",
        "indices": [2, 0, 1],
        "data": "synthetic",
        "fingerprints": [],
        "clip": None,
        "guidance": None,
        "steps": 3,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": (0, 3)}, "step 1 asks for network 3: the family has 0 to 2"),
        ({"indices": (-1, 0)}, "step 0 asks for network -1"),
        ({"indices": (0, True)}, "step 1 asks for network True"),
        ({"indices": (0, 1.0)}, "step 1 asks for network 1.0"),
        ({"indices": ()}, "needs at least one step"),
        ({"sampler": "dpm3"}, "unknown sampler 'dpm3'"),
        ({"clip": "sometimes"}, "unknown clip 'sometimes', expected one of every"),
        ({"guidance": "1"}, "guidance '1': must be a finite number"),
        ({"guidance": float("inf")}, "guidance inf: must be a finite number"),
        ({"fingerprints": ("ab", "cd")}, "2 fingerprints were given for 3 networks"),
    ],
)
def test_strategies_that_are_none(change, message):
    with pytest.raises(InputError, match=message):
        replace(strategy((0, 1)), **change)


@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        ({"family": "other"}, {}, "the strategy is for family other, not chain"),
        ({"networks": ("dense", "3:4", "1:4")}, {}, "for networks dense, 3:4, 1:4, not dense, 2:4, 1:4"),
        ({}, {"steps": 25}, "for steps 2, not 25"),
        ({}, {"sampler": "heun"}, "for sampler ddim, not heun"),
    ],
)
def test_strategies_for_another_case_are_refused(chain, change, asked, message):
    with pytest.raises(InputError, match=message):
        replace(strategy((0, 1)), **change).models(chain, **asked)


STRATEGY = """{"family": "a", "networks": ["b"], "sampler": "ddim", "indices": %s,
    "data": "", "fingerprints": ["f"], "steps": %s}"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no readable JSON"),
        ("[" * 100_000, "holds no readable JSON"),
        ("1", "must be an object with family"),
        ("[0.3]", "a list must name a width for each step, in eighths such as 0.25"),
        ("[1, true]", "a list must name a width"),
        ("[]", "a list must name a width"),
        ('{"family": "chain"}', "lacks 'networks'"),
        (STRATEGY % ("[1]", "1"), "s.json: step 0 asks for"),
        (STRATEGY % ("[0]", "2"), "says 2 steps and has 1"),
        (STRATEGY % ("[0]", '1, "x": 0'), "x is no part of one"),
        (STRATEGY % ("[0]", '1, "clip": "no"'), "s.json: unknown clip 'no'"),
        (STRATEGY % ("[0]", '1, "guidance": []'), "guidance \\[\\]: must be a finite number"),
        (STRATEGY % ("7", "1"), "'indices' must be of type list"),
        (STRATEGY.replace('"b"', "7") % ("[0]", "1"), "must be texts"),
        (STRATEGY.replace("fingerprints", "prints") % ("[0]", "1"), "lacks 'fingerprints'"),
    ],
)
def test_files_that_hold_no_strategy(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_strategy(tmp_path / "s.json")
    with pytest.raises(InputError, match="is missing"):
        load_strategy(tmp_path / "none.json")


def test_a_strategy_that_ddsm_released_is_read(tmp_path):
    """A list of widths, the least noisy time first; the sampler is DDPM's with the large variance."""
    (tmp_path / "search.txt").write_text("[1, 1.0, 0.25, 0.5]\n")
    found = load_strategy(tmp_path / "search.txt")
    assert found.networks == ("dense 8/8", "dense 4/8", "dense 2/8")
    assert found.indices == (1, 2, 0, 0), "our steps begin with the noisiest"
    assert (found.sampler, found.steps, found.clip, found.guidance) == ("ddpm-large", 4, "final", None)
    model = build_model("slimmable-tiny", image_size=8, multipliers=(1, 1), attention=(), groups=4)
    widths = {f"dense {name}": network for name, network in stepaware.widths(model).items()}
    family = stepaware.family("any", widths)
    used = found.models(family, steps=4)
    assert used == [widths["dense 4/8"], widths["dense 2/8"], widths["dense 8/8"], widths["dense 8/8"]]


def test_strategies_travel_to_other_weights_if_that_is_said(chain):
    found = replace(strategy((0, 2)), fingerprints=("a", "b", "c"))
    with pytest.raises(InputError, match=r"the weights of dense, 2:4, 1:4 changed .*--other-weights"):
        found.models(chain)
    assert found.models(chain, other_weights=True) == [chain.networks[0], chain.networks[2]]
    with pytest.raises(InputError, match="the strategy is for networks dense, 3:4, 1:4"):
        replace(found, networks=("dense", "3:4", "1:4")).models(chain, other_weights=True)


def test_a_family_may_hold_more_than_a_strategy_asks_for_in_any_order(chain):
    found = Strategy("chain", ("dense", "1:4"), "ddim", (1, 0), fingerprints=chain.fingerprints[::2])
    assert found.models(chain) == [chain.networks[2], chain.networks[0]]
    order = (2, 0, 1)
    marks = tuple(chain.fingerprints[i] for i in order)
    turned = Strategy("chain", tuple(chain.names[i] for i in order), "ddim", (0, 1), fingerprints=marks)
    assert turned.models(chain) == [chain.networks[2], chain.networks[0]]
    assert chain.only(("1:4", "dense")).costs == chain.costs[::-2]
    assert replace(chain, fingerprints=()).only(("2:4",)).fingerprints == ()
    with pytest.raises(InputError, match="chain holds no network 3:4: they are dense, 2:4, 1:4"):
        chain.only(("dense", "3:4"))


# ---- the proxy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 3])
def test_the_loss_table_is_the_validation_loss_of_each_network_at_each_step(classes):
    x, y = torch.linspace(-1, 1, 6 * 192).view(6, 3, 8, 8), torch.arange(6) % 3 if classes else None
    networks = {p: student(p, num_classes=classes) for p in ("dense", "2:4", "1:4")}
    family = stepaware.family("any", networks)
    table = stepaware.loss_table(family, x, "dpm++2m", 5, y=y, seed=2)
    assert table.shape == (3, 5)
    times = samplers.time_grid(family.schedule, 5, "logsnr")
    for index, step in ((0, 0), (2, 3)):
        settings = {"y": y, "times": times[step : step + 1], "seed": 2}
        alone = diffusion.validation_loss(family.networks[index], x, family.schedule, **settings)
        assert torch.equal(table[index, step], alone[0])


def test_latents_of_any_shape_have_strategies_too():
    """A three-level U-Net on 4-channel latents: a family of its widths, a table, a strategy, samples."""
    model = build_model("slimmable-tiny", image_size=16, channels=4, multipliers=(1, 1, 2), attention=(4,)).eval()
    family = stepaware.family("latents", stepaware.widths(model))
    found = Strategy("latents", family.names, "ddpm", (3, 1, 0))
    latents = torch.randn(4, 4, 16, 16)
    assert stepaware.loss_table(family, latents, "ddpm", 3).isfinite().all()
    samples = sample(family, found, 2, clip="never")
    assert samples.shape == (2, 4, 16, 16)
    assert samples.isfinite().all()


def test_seconds_are_of_one_image(monkeypatch):
    monkeypatch.setattr(
        stepaware, "interleaved_seconds", lambda calls, *_, **options: [call() or 8.0 for call in calls]
    )
    network = build_model("uvit-tiny", image_size=8, dim=16, depth=2, heads=2)
    assert stepaware.seconds_per_image([network], batch=4) == [2.0]
