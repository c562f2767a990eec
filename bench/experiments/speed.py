"""The sampling speed of trained networks: times of whole sampling, all networks in turns, sparse ones compressed.

The denominator is the fastest form of the dense network: eager, compiled, or on a CPU with oneDNN's products on packed
weights. fp32 on a CPU, bf16 on a GPU, the dtypes of the sparse kernels. Nothing else may run at the same time.
"""

import copy
import functools
import logging
import math

import torch

from bench.cpu import packed_network
from sparsedm import diffusion, samplers
from sparsedm.compression import compress
from sparsedm.sparsity import masked_layers
from sparsedm.stepaware.family import interleaved_seconds

log = logging.getLogger(__name__)

IMAGES, ROUNDS = 64, 5  # drawn at once; the median of so many


def sampling_seconds(networks, control, steps, device):
    """{name: network} -> {name: seconds per image}. For `control`, a dense network, the time of its fastest form."""
    forms = {name: compress(n) if masked_layers(n) else copy.deepcopy(n) for name, n in networks.items()}
    others = {f"{control}, compiled": torch.compile(copy.deepcopy(networks[control]))}
    if device.type == "cpu":
        others[f"{control}, packed"] = packed_network(networks[control])
    forms |= others
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calls = {name: functools.partial(_sample, form.to(device, dtype), steps, dtype) for name, form in forms.items()}
    for name in others:
        try:
            calls[name]()
        except Exception as error:  # for example no compiler: then there is no such form
            log.warning("%s is not timed: %s", name, str(error).splitlines()[0])
            del calls[name]
    seconds = dict(zip(calls, interleaved_seconds(list(calls.values()), device, ROUNDS)))
    seconds[control] = min(seconds[control], *(seconds.pop(name) for name in others if name in seconds), math.inf)
    return {name: value / IMAGES for name, value in seconds.items()}


def _sample(network, steps, dtype):
    config = network.config
    labels = torch.arange(IMAGES) % config.num_classes if config.num_classes else None
    shape = config.channels, config.image_size, config.image_size
    schedule = diffusion.schedule_of(network)
    return samplers.sample(network, schedule, IMAGES, shape, steps=steps, y=labels, clip="every", network_dtype=dtype)
