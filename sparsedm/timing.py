"""Times of calls that take turns, so that whatever else runs slows all of them alike."""

import statistics
import time

import torch


def interleaved_seconds(calls, device, rounds, clock=time.perf_counter):
    """[median seconds] of `calls`, functions without arguments. They take turns; a first round more is a warm-up."""
    times = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, seconds in zip(calls, times):
            _wait(device)
            start = clock()
            call()
            _wait(device)
            if number:
                seconds.append(clock() - start)
    return [statistics.median(seconds) for seconds in times]


def _wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
