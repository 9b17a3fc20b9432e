"""Change a sound's sampling rate.

    python -c "import torch; from lib.resampling import *; print(resample(torch.ones(9), 3, 2))"
"""
import math

import torch
import torch.nn.functional as F


def resample(wave, old, new, zeros=6, rolloff=0.99):
    """(samples,) at `old` Hz -> (ceil(samples * new / old),) at `new` Hz, band-limited as
    torchaudio.functional.resample does by default: out(m) = sum_n x(n) h(n / old - m / new), h a
    sinc cut off at `rolloff` of the lower Nyquist frequency, Hann-windowed to `zeros` crossings.
    """
    if old == new:
        return wave
    length = math.ceil(len(wave) * new / old)
    old, new = old // math.gcd(old, new), new // math.gcd(old, new)
    cutoff = min(old, new) * rolloff
    reach = math.ceil(zeros * old / cutoff)  # how many inputs h extends to either side
    blocks = math.ceil(length / new)  # every `new` outputs the same filters meet `old` new inputs
    x = F.pad(wave, (reach, blocks * old + reach + 1 - len(wave)))
    out = wave.new_empty(blocks, new)
    # Few filters at a time: 44101 -> 16000 Hz has 16000 of them, nearly all of each zero. And few
    # blocks: the product copies the inputs of each.
    size = max(8, min(256, 4 * reach * new // old))
    for p in range(0, min(new, length), size):
        phase = torch.arange(p, min(p + size, new), dtype=torch.float64)[:, None]
        first, last = p * old // new, int(phase[-1]) * old // new + 2 * reach + 1
        inputs = torch.arange(first, last + 1, dtype=torch.float64)
        t = (((inputs - reach) / old - phase / new) * cutoff).clamp(-zeros, zeros)
        h = (torch.sinc(t) * torch.cos(t * math.pi / zeros / 2) ** 2 * cutoff / old).to(wave).T
        windows = x[first:].unfold(0, len(inputs), old)[:blocks]
        for b in range(0, blocks, 2 ** 14):
            out[b:b + 2 ** 14, p:p + size] = windows[b:b + 2 ** 14] @ h
    return out.flatten()[:length]
