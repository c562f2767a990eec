"""The sampling speed of trained networks: times of whole sampling, all networks in turns, sparse ones compressed.

Of a dense network the fastest form counts: eager, compiled, or on a CPU with oneDNN's products on packed weights, and
in bf16 where the CPU has instructions for it. Sparse networks run in the dtype of their kernels: fp32 on a CPU, bf16 on
a GPU. Nothing else may run at the same time.
"""

import copy
import functools
import logging

import torch

from bench.cpu import packed_network
from sparsedm import diffusion, samplers
from sparsedm.compression import compress
from sparsedm.kernels.cpu import rules
from sparsedm.sparsity import masked_layers
from sparsedm.timing import interleaved_seconds

log = logging.getLogger(__name__)

IMAGES, ROUNDS = 64, 5  # drawn at once; the median of so many
BF16 = "bf16"  # the form of a dense network on a CPU that has instructions for it


def sampling_seconds(networks, steps, device):
    """{name: network} -> {name: {form: seconds per image}}."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calls, seconds = {}, {}
    for name, network in networks.items():
        for form, made in _forms(network, device).items():
            precision = torch.bfloat16 if form == BF16 else dtype
            call = functools.partial(_sample, made.to(device, precision), steps, precision)
            if form in ("compiled", "packed"):
                try:
                    call()
                except Exception as error:  # for example no compiler: then there is no such form
                    log.warning("%s, %s, is not timed: %s", name, form, str(error).splitlines()[0])
                    continue
            calls[name, form] = call
    for (name, form), value in zip(calls, interleaved_seconds(list(calls.values()), device, ROUNDS)):
        seconds.setdefault(name, {})[form] = value / IMAGES
    return seconds


def _forms(network, device):
    """{name: a form of the network}"""
    if masked_layers(network):
        return {"compressed": compress(network)}
    forms = {"eager": copy.deepcopy(network), "compiled": torch.compile(copy.deepcopy(network))}
    if device.type == "cpu":
        forms["packed"] = packed_network(network)
        if rules.bf16_instructions():
            forms[BF16] = copy.deepcopy(network)
    return forms


def _sample(network, steps, dtype):
    config = network.config
    labels = samplers.labels_in_turn(config, IMAGES)
    shape = config.channels, config.image_size, config.image_size
    schedule = diffusion.schedule_of(network)
    return samplers.sample(network, schedule, IMAGES, shape, steps=steps, y=labels, clip="every", network_dtype=dtype)
