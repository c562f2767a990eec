"""Two processes on one CPU make the run that one makes, bit for bit where the sums are taken in the same order."""

import contextlib
import copy
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing

from sparsedm import cli
from sparsedm.diffusion import VPSDE, loss
from sparsedm.errors import InputError
from sparsedm.model_files import save_model
from sparsedm.models import build_model
from sparsedm.sparsity import set_masking, sparsify
from sparsedm.train import distributed, step
from sparsedm.train.data import batch_indices
from sparsedm.train.loop import Interrupted, train
from sparsedm.train.metrics import read_metrics
from sparsedm.train.run_folder import latest
from sparsedm.train.step import Loss, Student
from tests.tiny import OPTIONS, tiny_images
from tests.tolerance import assert_as_good_as_torch
from tests.train.test_loop import final_bits

STOP_AT = 6


def network():
    """Without batch norm and dropout, whose results depend on how a batch is divided."""
    torch.default_generator.manual_seed(0)
    options = dict(image_size=4, channels=2, patch_size=2, dim=16, depth=2, heads=2, num_classes=3)
    model = sparsify(build_model("uvit-tiny", **options), "2:4")
    set_masking(model, decay=2e-4)
    return model


def run(folder, **options):
    student, loss = Student(network()), Loss(VPSDE(), network(), w_kd=0.1)
    settings = {"validation": tiny_images(16, seed=1), "progress": False}
    return train(student, tiny_images(), loss, replace(OPTIONS, **options), folder, **settings)


def worker(rank, ports, folder):
    """One of two processes: a whole run, then one that only the second process is asked to stop, then a mix-up."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    with distributed.process_group(torch.device("cpu")):
        run(folder / "whole")
        run(folder / "masked-adamw", optimizer="masked-adamw")

        def stopping(count, size, step, seed):
            if (rank, step) == (1, STOP_AT - 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return batch_indices(count, size, step, seed)

        step.batch_indices = stopping
        with pytest.raises(Interrupted, match=f"stopped at step {STOP_AT} and saved"):
            run(folder / "stopped")
        model = network()
        distributed.check_masks(model)
        if rank:
            with torch.no_grad():
                model.get_submodule("in_blocks.0.mlp.fc1").weight.normal_()
        with pytest.raises(InputError, match=r"the masks of processes \[1\] differ from those of process 0"):
            distributed.check_masks(model)
        with pytest.raises(InputError, match="9 images cannot be divided equally by 2 processes x 1 parts"):
            distributed.shares(9, 1)
        draw_all(folder)
        refusal = (InputError, "has other options") if not rank else (distributed.Refused, "process 0 refused to go on")
        with pytest.raises(refusal[0], match=refusal[1]) as caught:
            run(folder / "whole", lr=0.5)
        assert getattr(caught.value, "exit_code", 2) == 2
    for port, name in zip(ports[1:], COMMANDS):
        os.environ["MASTER_PORT"] = str(port)
        assert command(name, folder, folder) == 0


COUNTS = {(1, 4), (2, 4), (5, 2), (7, 2), (8, 4), (9, 100)}  # images, images at a time
COMMANDS = {  # what it writes: the command
    "drawn.npz": "sample {folder}/model.safetensors",
    "numbers.json": "evaluate {folder}/model.safetensors --data {folder}/set.npz --dense {folder}/dense.safetensors",
}


def command(name, folder, out):
    line = f"{COMMANDS[name]} --count 10 --batch-size 4 --sampling-steps 2"
    return cli.main([*line.format(folder=folder).split(), "--out", str(out / name)])


def draw_all(folder):
    """What `distributed.gather` gives and asks for, in each process."""
    for count, size in COUNTS:
        asked = []

        def draw(start, stop, asked=asked):
            asked.append((start, stop))
            return torch.stack([torch.full((2, 3), i, dtype=torch.float64) for i in range(start, stop)]).clone()

        out = distributed.gather(count, size, draw)
        torch.save((out, asked), folder / f"drawn-{count}-{size}-{distributed.rank()}.pt")


def prepare(folder):
    """Models and images for COMMANDS."""
    sizes = dict(image_size=8, dim=16, depth=2, heads=2, num_classes=3)
    for name in ("model", "dense"):
        model = build_model("uvit-tiny", **sizes)
        for parameter in model.parameters():  # the last layer begins at zero, and all its pictures would be alike
            torch.nn.init.normal_(parameter, std=0.3)
        save_model(folder / f"{name}.safetensors", sparsify(model, "2:4") if name == "model" else model)
    images = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8)
    np.savez(folder / "set.npz", images=images.numpy(), labels=(torch.arange(40) % 3).numpy())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    prepare(folder)
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(1 + len(COMMANDS))]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    torch.multiprocessing.spawn(worker, (ports, folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(folder, accumulate=2)
    return folder


def test_two_processes_make_the_run_of_one(two_processes, one_process):
    """Half a batch each; one process that takes the same halves one after the other adds up the same numbers."""
    assert final_bits(two_processes / "whole") == final_bits(one_process)
    curves = [
        [(r["step"], r["loss"], r.get("validation_loss"), r["flip_rate"]) for r in read_metrics(folder)]
        for folder in (two_processes / "whole", one_process)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == len({step for step, *_ in curves[0]}), "the first process alone writes"


def test_the_optimizer_that_selects_masks_does_so_alike_in_all_processes(two_processes, tmp_path):
    run(tmp_path, accumulate=2, optimizer="masked-adamw")
    assert final_bits(two_processes / "masked-adamw") == final_bits(tmp_path)


def test_a_run_is_resumed_with_another_number_of_processes(two_processes, one_process):
    """A signal to one process stops both after the same step; what they saved is where one process goes on."""
    folder = two_processes / "stopped"
    assert latest(folder).name == f"step-{STOP_AT:08d}"
    run(folder, accumulate=2)
    assert final_bits(folder) == final_bits(one_process)


@pytest.mark.parametrize(("count", "size"), sorted(COUNTS))
def test_images_are_drawn_by_all_processes_in_whole_batches(two_processes, count, size):
    (out, first), (nothing, second) = (torch.load(two_processes / f"drawn-{count}-{size}-{i}.pt") for i in (0, 1))
    assert nothing is None
    assert torch.equal(out[:, 1, 2], torch.arange(count, dtype=torch.float64))
    assert out.shape == (count, 2, 3)
    drawn = [i for start, stop in first + second for i in range(start, stop)]
    assert drawn == list(range(count))
    if count > size:
        assert all(start % size == 0 for start, _ in first + second)
        assert abs(-(-first[0][1] // size) * 2 - -(-count // size)) <= 1  # half of the batches, give or take one
    elif count > 1:
        assert abs(first[0][1] * 2 - count) <= 1


def test_the_commands_draw_with_two_processes_what_one_draws(two_processes, tmp_path, capsys):
    """Ten images, four at a time: eight of the first process, two of the other, in the batches of one process."""
    for name in COMMANDS:
        assert command(name, two_processes, tmp_path) == 0
    ours, theirs = (np.load(folder / "drawn.npz")["images"] for folder in (tmp_path, two_processes))
    assert np.array_equal(ours, theirs)
    assert len({image.tobytes() for image in ours}) == 10
    assert (tmp_path / "numbers.json").read_bytes() == (two_processes / "numbers.json").read_bytes()


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_average_to_its_gradient(parts):
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.arange(8) % 3
    model = network().double()

    def gradient(dtype, rows):
        cast = copy.deepcopy(model).to(dtype)
        for part in rows:
            generator = torch.Generator().manual_seed(7)
            loss(cast, x.to(dtype), VPSDE(), y=y, generator=generator, rows=part).total.backward()
        return [parameter.grad / len(rows) for parameter in cast.parameters()]

    whole, size = [slice(None)], 8 // parts
    divided = [slice(start, start + size) for start in range(0, 8, size)]
    high, low, out = gradient(torch.float64, whole), gradient(torch.float32, whole), gradient(torch.float32, divided)
    assert_as_good_as_torch(*(torch.cat([g.flatten() for g in gradients]) for gradients in (out, high, low)))


def test_alone_nothing_is_exchanged():
    assert (distributed.rank(), distributed.world(), distributed.is_main_process()) == (0, 1, True)
    assert distributed.shares(6, 3) == [(0, slice(0, 2)), (1, slice(2, 4)), (2, slice(4, 6))]
    model, values = network(), torch.ones(2)
    assert distributed.parallel(model) is model
    assert distributed.mean(values) is values
    assert distributed.anywhere([1]) is True
    with pytest.raises(InputError, match="8 images cannot be divided equally by 1 processes x 3 parts each"):
        distributed.shares(8, 3)


def test_the_parts_of_all_processes_are_the_batch(monkeypatch):
    parts = []
    monkeypatch.setattr(distributed, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts += distributed.shares(12, 2)
    assert parts == [(number, slice(2 * number, 2 * number + 2)) for number in range(6)]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    """Also where --device names none in particular. What is exchanged between CPUs does not wait for GPUs."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("left"))
    for device in ("cuda", "cuda:1"):
        with distributed.process_group(torch.device(device)):
            pass
    gpus = [torch.device("cuda", 3), torch.device("cuda", 1)]
    assert calls == [call for gpu in gpus for call in (gpu, "cpu:gloo,cuda:nccl", "left")]


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    """torchrun on `sparsedm train`: the same losses as without it, said once."""
    arguments = "train --model uvit-tiny --set dim=16 --set depth=2 --set heads=2 --set image_size=12"
    arguments += " --data synthetic --limit 64 --chain dense,2:4 --steps 8 --batch-size 8 --log-every 2"
    command = [*arguments.split(), "--run"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "sparsedm"]
    done = subprocess.run(
        [sys.executable, *launcher, *command, str(tmp_path / "two")], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("validation loss") == 2
    assert cli.main([*command, str(tmp_path / "one"), "--accumulate", "2"]) == 0
    for stage in ("00-dense", "01-2of4"):
        losses = [[r["loss"] for r in read_metrics(tmp_path / name / stage)] for name in ("one", "two")]
        assert losses[0] == losses[1]
