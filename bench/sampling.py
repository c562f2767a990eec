"""Whole sampling by every provider of a network: time, images/s, memory, and how far a sparse one's images are off.

On a GPU every step replays one CUDA graph of the network, dense and sparse alike; the clock runs around the whole of
it, until the images are on the host.
"""

import time

import torch

from bench.environment import stamp
from bench.measure import one_line, time_columns
from bench.networks import allocated, baked
from bench.timing import Timed, interleaved
from sparsedm import diffusion, samplers
from sparsedm.cuda_graph import Graphs

SAMPLER = "dpm++2m"


def sampling_mode(steps):
    return f"sampling, {steps} steps"


def sampling_rows(suite, problem, providers, steps, rounds=3):
    """Rows for whole sampling by every provider that can run: time, images/s, memory, and how far its images are off.

    "image difference" is max |a - b| of images in about [-1, 1], drawn from the same noise by this provider and by the
    same sparse network computed densely. A provider that raises gets one row that says so.
    """
    common = {"suite": suite, **problem.columns(), "mode": sampling_mode(steps)}
    graphs = Graphs(problem.device) if problem.device.type == "cuda" else None
    calls, images, rows = {}, {}, []
    for provider in [provider for provider in providers if provider.supports(problem) is None]:
        try:
            calls[provider] = replayed(provider.built(problem).network, graphs)
            images[provider] = draw(calls[provider], problem, steps)  # a warm-up, too
        except Exception as error:
            reason = {"metric": "time", "status": "failed", "reason": one_line(error)}
            rows.append(common | {"provider": provider.name} | reason)
    timed = {provider: Timed(timer(calls[provider], problem, steps), "perf_counter") for provider in images}
    times = interleaved(timed, rounds=rounds, per_round=1)
    reference = draw(baked(problem.masked), problem, steps)
    now = stamp(problem.device)
    for provider in images:
        row = common | {"provider": provider.name, "status": "ok"}

        def value(metric, number, unit, row=row):
            rows.append(row | {"metric": metric, "value": number, "unit": unit})

        rows.append(row | {"metric": "time", **time_columns(times[provider], timed[provider].method)})
        value("images per second", problem.shape.batch / times[provider].p50 * 1e6, "images/s")
        network = provider.built(problem).network
        value("weights", sum(t.nbytes for t in [*network.parameters(), *network.buffers()]), "bytes")
        if problem.device.type == "cuda":
            value("peak memory", peak_memory(provider, problem), "bytes")
        if provider.sparse:
            value("image difference", (images[provider] - reference).abs().max().item(), "of [-1, 1]")
    return [row | now for row in rows]


def peak_memory(provider, problem):
    """Bytes on the GPU at the worst moment of a step: weights in all the forms that are kept of them, activations."""
    network, kept = provider.built(problem)
    torch.cuda.reset_peak_memory_stats(problem.device)
    before = allocated(problem.device)
    problem.outputs(network, problem.inputs)
    return kept + torch.cuda.max_memory_allocated(problem.device) - before


def timer(call, problem, steps):
    """count -> so many times of whole sampling in microseconds."""

    def once():
        start = time.perf_counter()
        draw(call, problem, steps)
        return (time.perf_counter() - start) * 1e6

    return lambda count: [once() for _ in range(count)]


def draw(call, problem, steps):
    shape, schedule = problem.inputs[0].shape, diffusion.schedule_of(problem.weight)
    with torch.no_grad():
        noise = diffusion.initial_noise(shape[0], shape[1:], seed=0).to(problem.device)
        times = samplers.time_grid(schedule, steps, samplers.SAMPLERS[SAMPLER][1])
        return samplers.integrate(lambda x, t: predict(call, problem, x, t), schedule, noise, times, SAMPLER).cpu()


def predict(call, problem, x, t):
    return call(x.to(problem.dtype), t, *problem.inputs[2:])


def replayed(network, graphs):
    """`network`, with `graphs` as a CUDA graph that is replayed with new inputs."""
    if graphs is None:
        return network

    def step(*inputs):
        return (network(*inputs),)

    return lambda *inputs: graphs(step, *inputs)[0]
