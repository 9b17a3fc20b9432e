"""Several processes that train one model, started by torchrun, and the signals that stop them.

    torchrun --nproc_per_node=2 train.py --mode lal
"""
import os
import signal
import sys
from contextlib import contextmanager
from functools import partialmethod

import torch
import torch.distributed as dist
from tqdm import tqdm


def join_processes(device):
    """Under torchrun, become one of several processes, of which the first one prints for all.

    device: as --device names it. Returns the name of this process's own device.
    """
    if not dist.is_torchelastic_launched():
        return device
    on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else device


def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_size():
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(model, *numbers):
    """Add up the processes' gradients, in place, and numbers that each of them has; returns the
    sums of the numbers."""
    if not dist.is_initialized():
        return numbers
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    sums = torch.tensor(numbers, dtype=torch.float64, device=model.device)
    dist.all_reduce(sums)
    return sums.tolist()


def gather_lists(own):
    """The lists that all processes have, joined; every one of them has to call this."""
    lists = [own]
    if dist.is_initialized():
        lists = [None] * dist.get_world_size()
        dist.all_gather_object(lists, own)
    return sum(lists, [])


def start_session(worker=0):
    """Leave the terminal's session, for a Ctrl-C there is for the first process to act on."""
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


@contextmanager
def catch_stop_signals():
    """A list that SIGTERM and Ctrl-C add to, instead of ending the program; the second one does."""
    received = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
