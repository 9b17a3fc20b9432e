"""What the training loops of train.py and data/pretrain.py share.

    python -c "from lib.optim import *; print([cosine_schedule(i, 20) for i in range(20)])"
"""
import math
import sys

import torch


def cosine_schedule(step, steps):
    """Share of the peak learning rate: linear warm-up over the first 5%, then a cosine to 5%."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def peak_memory(device):
    """The most memory in use so far, MiB: the GPU's if `device` is one, else this process's; nan
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # there is none on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
