"""Sound files: read and write them, and change their sampling rate.

    python -c "from lib.audio import *; print(load_audio('assets/demo.wav', 16000).shape)"
"""
import math
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# (format tag, bits) of a WAV -> how numpy reads one sample; 24 bits have no type of their own
WAV_TYPES = {(1, 8): "u1", (1, 16): "<i2", (1, 24): "u1", (1, 32): "<i4",
             (3, 32): "<f4", (3, 64): "<f8"}
CONVERT = "convert it, for example: ffmpeg -i IN -c:a pcm_s16le OUT.wav"


def load_audio(path, rate):
    """Read a sound file as (samples,) float32 in [-1, 1], channels averaged, at `rate` Hz.

    WAV is read here; flac, ogg, mp3 and the rest through soundfile, if that is installed.
    Raises ValueError, one line: which file, what is wrong with it, what to do.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not raw:
        raise ValueError(f"{path}: empty file; copy or record it again")
    read = read_wav if raw[:4] == b"RIFF" and raw[8:12] == b"WAVE" else read_other
    wave, file_rate = read(path, raw)
    if len(wave) == 0:
        raise ValueError(f"{path}: holds no samples (0 s of sound); record it again")
    wave = wave.mean(1)  # (samples, channels) -> (samples,)
    if not np.isfinite(wave).all():
        raise ValueError(f"{path}: holds NaN or infinite samples; {CONVERT}")
    return resample(torch.from_numpy(wave), file_rate, rate)


def read_wav(path, raw):
    """The bytes of a RIFF WAVE file -> (samples, channels) float32 array, and its rate in Hz."""
    position, chunks = 12, {}
    while position + 8 <= len(raw) and b"data" not in chunks:
        name, size = struct.unpack_from("<4sI", raw, position)
        chunks[name] = size, memoryview(raw)[position + 8:position + 8 + size]
        position += 8 + size + size % 2  # a chunk of odd length is followed by a padding byte
    for name in b"fmt ", b"data":
        if name not in chunks:
            raise ValueError(f"{path}: a WAV file without its {name.decode()} chunk; {CONVERT}")
    header = bytes(chunks[b"fmt "][1]).ljust(26, b"\0")
    tag, channels, rate, _, _, bits, *_, subformat = struct.unpack_from("<HHIIHHHHIH", header)
    tag = subformat if tag == 0xFFFE else tag  # WAVE_FORMAT_EXTENSIBLE
    if (tag, bits) not in WAV_TYPES or channels == 0 or not 100 <= rate <= 1_000_000:
        raise ValueError(f"{path}: codec {tag}, {bits} bits, {channels} channels, {rate} Hz is no "
                         f"WAV of PCM or float samples; {CONVERT}")
    size, data = chunks[b"data"]
    if len(data) < size != 0xFFFFFFFF:  # which means: written to a pipe, length not known
        raise ValueError(f"{path}: truncated, its header promises {size} bytes of sound and "
                         f"{len(data)} are there; copy it again")
    data = data[:len(data) - len(data) % (channels * bits // 8)]  # whole frames
    data = np.frombuffer(data, WAV_TYPES[tag, bits])
    if bits == 24:  # the upper three bytes of an int32
        data = np.pad(data.reshape(-1, 3), ((0, 0), (1, 0))).view("<i4")[:, 0]
    with np.errstate(over="ignore"):  # a double beyond float32 becomes inf, which is refused
        wave = data.astype(np.float32).reshape(-1, channels)
    if bits == 8:  # the only unsigned format
        wave -= 128
    return wave if tag == 3 else wave / 2.0 ** (8 * data.dtype.itemsize - 1), rate


def read_other(path, raw):
    """As read_wav, for whatever libsndfile knows."""
    try:
        import soundfile
        return soundfile.read(path, dtype="float32", always_2d=True)
    except ImportError:
        raise ValueError(f"{path}: not a WAV file; for flac, ogg and mp3: pip install soundfile"
                         ) from None
    except (RuntimeError, TypeError) as error:  # LibsndfileError is a RuntimeError
        raise ValueError(f"{path}: not a sound file ({error}); {CONVERT}") from None


def save_wav(path, wave, rate):
    """Write (samples,) in [-1, 1], clipped to that, as a 16-bit mono WAV."""
    data = (wave * 32768).round().clamp(-32768, 32767).short().numpy().astype("<i2").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16,
                         1, 1, rate, 2 * rate, 2, 16, b"data", len(data))
    Path(path).write_bytes(header + data)


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
    # Some filters at a time: 44101 -> 16000 Hz has 16000 of them, nearly all of each zero.
    for p in range(0, new, 256):
        phase = torch.arange(p, min(p + 256, new), dtype=torch.float64)[:, None]
        first, last = p * old // new, int(phase[-1]) * old // new + 2 * reach + 1
        inputs = torch.arange(first, last + 1, dtype=torch.float64)
        t = (((inputs - reach) / old - phase / new) * cutoff).clamp(-zeros, zeros)
        h = torch.sinc(t) * torch.cos(t * math.pi / zeros / 2) ** 2 * cutoff / old
        out[:, p:p + 256] = x[first:].unfold(0, len(inputs), old)[:blocks] @ h.to(wave.dtype).T
    return out.flatten()[:length]
