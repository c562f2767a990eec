"""Whole sampling by every provider of a network: time, images/s, memory, and how far a sparse one's images are off.

On a GPU every step replays one CUDA graph of the network, dense and sparse alike; the clock runs around the whole of
it, until the images are on the host.
"""

import torch

from sparsedm import diffusion, samplers
from sparsedm.bench.end_to_end import baked
from sparsedm.bench.environment import stamp
from sparsedm.bench.measure import time_columns
from sparsedm.bench.timing import CpuClock, interleaved

SAMPLER = "dpm++2m"


def sampling_rows(suite, problem, providers, steps, rounds=3):
    """Rows for whole sampling by every provider that can run: time, images/s, memory, and how far its images are off.

    "image difference" is max |a - b| of images in about [-1, 1], drawn from the same noise by this provider and by the
    same sparse network computed densely.
    """
    common = {"suite": suite, **problem.columns(), "mode": f"sampling, {steps} steps"}
    able = [provider for provider in providers if provider.supports(problem) is None]
    networks = {provider: provider.built(problem) for provider in able}
    calls = {provider: graphed(network, problem) for provider, network in networks.items()}
    clock = CpuClock()  # around the whole of it: images arrive on the host
    timed = {p: clock.ready(lambda c=call: draw(c, problem, steps)) for p, call in calls.items()}
    times = interleaved(timed, rounds=rounds, per_round=1)
    reference = draw(baked(problem.masked), problem, steps)
    now, rows = stamp(problem.device), []
    for provider in able:
        row = common | now | {"provider": provider.name, "status": "ok"}

        def value(metric, number, unit, row=row):
            rows.append(row | {"metric": metric, "value": number, "unit": unit})

        rows.append(row | {"metric": "time", **time_columns(times[provider], timed[provider].method)})
        value("images per second", problem.shape.batch / times[provider].p50 * 1e6, "images/s")
        state = [*networks[provider].parameters(), *networks[provider].buffers()]
        value("weights", sum(tensor.nbytes for tensor in state), "bytes")
        if problem.device.type == "cuda":
            value("peak memory", peak_memory(provider, problem), "bytes")
        if provider.sparse:
            images = draw(calls[provider], problem, steps)
            value("image difference", (images - reference).abs().max().item(), "of [-1, 1]")
    return rows


def peak_memory(provider, problem):
    """Bytes on the GPU at the worst moment of a step: weights in all the forms that are kept of them, activations."""
    before = torch.cuda.memory_allocated(problem.device)
    network = provider.built(problem)
    with torch.no_grad():
        network(*problem.inputs)  # arranges weights, tunes
        torch.cuda.reset_peak_memory_stats(problem.device)
        network(*problem.inputs)
    return torch.cuda.max_memory_allocated(problem.device) - before


def draw(call, problem, steps):
    shape, schedule = problem.inputs[0].shape, diffusion.schedule_of(problem.weight)
    with torch.no_grad():
        noise = diffusion.initial_noise(shape[0], shape[1:], seed=0).to(problem.device)
        times = samplers.time_grid(schedule, steps, samplers.SAMPLERS[SAMPLER][1])
        return samplers.integrate(lambda x, t: predict(call, problem, x, t), schedule, noise, times, SAMPLER).cpu()


def predict(call, problem, x, t):
    return call(x.to(problem.dtype), t, *problem.inputs[2:])


def graphed(network, problem):
    """`network`, on a GPU as a CUDA graph that is replayed with new inputs."""
    if problem.device.type != "cuda":
        return network
    held = [x if x is None else x.clone() for x in problem.inputs]
    with torch.no_grad():
        for _ in range(3):
            network(*held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = network(*held)

    def replay(*inputs):
        for mine, theirs in zip(held, inputs):
            if mine is not None:
                mine.copy_(theirs)
        graph.replay()
        return out.clone()

    return replay
