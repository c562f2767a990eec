"""The sampling speed of trained networks: times of whole sampling, all networks in turns, sparse ones compressed.

The denominator is the fastest form of the dense network: eager or compiled. fp32 on a CPU, bf16 on a GPU, the dtypes of
the sparse kernels. Nothing else may run at the same time.
"""

import copy
import functools
import logging

import torch

from sparsedm import diffusion, samplers
from sparsedm.sparsity import compress, masked_layers
from sparsedm.stepaware.family import interleaved_seconds

log = logging.getLogger(__name__)

IMAGES, ROUNDS = 64, 5  # drawn at once; the median of so many


def sampling_seconds(networks, control, steps, device):
    """{name: network} -> {name: seconds per image}. For `control`, a dense network, the time of its fastest form."""
    forms = {name: compress(n) if masked_layers(n) else copy.deepcopy(n) for name, n in networks.items()}
    compiled = "compiled " + control
    forms[compiled] = torch.compile(copy.deepcopy(networks[control]))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calls = {name: functools.partial(_sample, form.to(device, dtype), steps, dtype) for name, form in forms.items()}
    try:
        calls[compiled]()
    except Exception as error:  # for example no compiler: then there is no compiled form
        log.warning("%s is not timed: %s", compiled, str(error).splitlines()[0])
        del calls[compiled]
    seconds = dict(zip(calls, interleaved_seconds(list(calls.values()), device, ROUNDS)))
    if compiled in seconds:
        seconds[control] = min(seconds[control], seconds.pop(compiled))
    return {name: value / IMAGES for name, value in seconds.items()}


def _sample(network, steps, dtype):
    config = network.config
    labels = torch.arange(IMAGES) % config.num_classes if config.num_classes else None
    shape = config.channels, config.image_size, config.image_size
    schedule = diffusion.schedule_of(network)
    return samplers.sample(network, schedule, IMAGES, shape, steps=steps, y=labels, clip="every", network_dtype=dtype)
