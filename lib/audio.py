"""Sound files: read and write them, at any sampling rate.

    python -c "from lib.audio import *; print(load_audio('assets/demo.wav', 16000).shape)"
"""
import io
import math
import os
import re
import struct
import warnings
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from lib.resampling import resample

# (format tag, bits of a sample's bytes) of a WAV -> how numpy reads them; 24 bits have no type
WAV_TYPES = {(1, 8): "u1", (1, 16): "<i2", (1, 24): "u1", (1, 32): "<i4",
             (3, 32): "<f4", (3, 64): "<f8"}
CODECS = {1: "PCM", 2: "ADPCM", 3: "float", 6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 85: "MP3"}
CONVERT = "convert it, for example: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
MAX_PIPE_BYTES = 2 ** 30


def load_audio(path, rate, seconds=None):
    """Read a sound file as (samples,) float32 in [-1, 1], channels averaged, at `rate` Hz.

    seconds: read and resample no more than that; it equals the beginning of the whole.
    WAV is read here; flac, ogg, mp3 and rare WAVs through soundfile, if that is installed.
    Raises ValueError, one line: which file, what is wrong with it, what to do.
    """
    with open_sound(path) as (file_rate, frames, read):
        if seconds is not None:
            reach = 7 / min(rate, file_rate)  # and a little more than resample's filter reaches
            frames = min(frames, math.ceil((seconds + reach) * file_rate))
        wave = read(frames).mean(1)  # (samples, channels) -> (samples,)
    if len(wave) == 0 or not np.isfinite(wave).all():
        raise ValueError(f"{path}: holds NaN or infinite samples, or none; {CONVERT}")
    wave = resample(torch.from_numpy(wave), file_rate, rate)
    return wave if seconds is None else wave[:math.ceil(seconds * rate)]


def check_audio(path):
    """How many seconds a sound file has, by its header; the samples are not read. Raises the
    ValueError that load_audio would, but for what only the samples show."""
    with open_sound(path) as (rate, frames, _):
        return frames / rate


@contextmanager
def open_sound(path):
    """Read a sound file's header: its rate in Hz, its number of frames, and a function that reads
    so many of them, (frames, channels) float32."""
    try:
        with open_file(path) as file:
            head = file.read(512)
            if not head:
                raise ValueError(f"{path}: empty file; copy or record it again")
            if not re.search(rb"[\0-\x08\x0e-\x1f]", head):  # which every kind of sound file has
                raise ValueError(f"{path}: not a sound file, but text; fetch it again")
            if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
                rate, frames, read = open_wav(path, file)
            else:
                kind = f"no plain WAV, but {head[:4].decode('latin1')!r} (flac, ogg, mp3, ...)"
                rate, frames, read = open_other(path, file, kind)
            if not 100 <= rate <= 1_000_000:
                raise ValueError(f"{path}: {rate} Hz is no rate of a sound; {CONVERT}")
            if frames == 0:
                raise ValueError(f"{path}: holds no samples (0 s of sound); record it again")
            yield rate, frames, read
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (RuntimeError, TypeError, MemoryError) as error:  # soundfile's
        reason = getattr(error, "error_string", error)
        raise ValueError(f"{path}: not a sound file ({reason}); {CONVERT}") from None


def open_file(path):
    if Path(path).is_fifo():
        return io.BytesIO(read_pipe(str(path)))
    if Path(path).exists() and not Path(path).is_file():  # or /dev/zero would be read for ever
        raise ValueError(f"{path}: a directory, device or socket, no sound file; check the path")
    return open(path, "rb")


@lru_cache(maxsize=1)
def read_pipe(path):
    """All that comes through a pipe, kept, as it comes only once; nothing if nobody writes to it"""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)  # not to wait for a writer, but for what it writes
        raw = file.read(MAX_PIPE_BYTES + 1)
    if len(raw) > MAX_PIPE_BYTES:
        raise ValueError(f"{path}: over 1 GiB comes through this pipe; save it as a file first")
    return raw


def open_wav(path, file):
    """As open_sound, for a RIFF WAVE file."""
    position, end, chunks = 12, file.seek(0, os.SEEK_END), {}
    while position + 8 <= end and b"data" not in chunks:
        file.seek(position)
        name, size = struct.unpack("<4sI", file.read(8))
        chunks[name] = position + 8, size
        position += 8 + size + size % 2  # a chunk of odd length is followed by a padding byte
    for name in b"fmt ", b"data":
        if name not in chunks:
            raise ValueError(f"{path}: a WAV file without its {name.decode()} chunk; {CONVERT}")
    start, size = chunks[b"fmt "]
    file.seek(start)
    header = file.read(min(size, 26)).ljust(26, b"\0")
    tag, channels, rate, _, block, bits, *_, subformat = struct.unpack("<HHIIHHHHIH", header)
    tag = subformat if tag == 0xFFFE else tag  # WAVE_FORMAT_EXTENSIBLE
    kind = f"a WAV of codec {tag} ({CODECS.get(tag, 'rare')}), {bits} bits, {channels} channels"
    if tag not in (1, 3):
        return open_other(path, file, kind)
    block = block or channels * -(-bits // 8)
    stored = block * 8 // max(1, channels)  # bits, of which a sample fills the upper ones
    fits = stored == bits or tag == 1 and (0 < stored - bits < 8 or 16 < bits < stored == 32)
    if not fits or stored * channels != block * 8 or (tag, stored) not in WAV_TYPES:
        raise ValueError(f"{path}: {kind}, {block} bytes in all cannot be read; {CONVERT}")
    start, size = chunks[b"data"]
    frames = count_frames(path, file, start, size, end - start, block)
    return rate, frames, partial(read_wav, file, start, channels, tag, stored)


def count_frames(path, file, start, size, present, block):
    """How many frames of `block` bytes there are, of `size` bytes promised and `present` ones."""
    file.seek(start)
    name, length = file.read(4), int.from_bytes(file.read(4), "little")
    # Writers that cannot go back promise some 2^31 or 2^32 bytes, and those that died still 0.
    unknown = min(abs(size - 2 ** 31), abs(size - 2 ** 32)) <= 8192 or size == 0 and not (
        re.fullmatch(rb"[ -~]{4}", name) and length <= present - 8)  # 0, then another chunk
    size = present if unknown else size
    if size > present + block:
        raise ValueError(f"{path}: truncated, its header promises {size} bytes of sound and "
                         f"{present} are there; copy it again")
    frames = min(size, present) // block
    if frames * block < size:
        warnings.warn(f"{path}: its last frame of sound is cut off; the {frames} before are read")
    return frames


def read_wav(file, start, channels, tag, bits, frames):
    file.seek(start)
    data = np.frombuffer(file.read(frames * channels * bits // 8), WAV_TYPES[tag, bits])
    if bits == 24:  # the upper three bytes of an int32
        data = np.pad(data.reshape(-1, 3), ((0, 0), (1, 0))).view("<i4")[:, 0]
    with np.errstate(over="ignore"):  # a double beyond float32 becomes inf, which is refused
        wave = data.astype(np.float32).reshape(-1, channels)
    if bits == 8:  # the only unsigned format
        wave -= 128
    return wave if tag == 3 else wave / 2.0 ** (8 * data.dtype.itemsize - 1)


def open_other(path, file, kind):
    """As open_sound, for whatever libsndfile knows."""
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"{path}: {kind}; to read it: pip install soundfile") from None
    file.seek(0)
    sound = soundfile.SoundFile(file)
    return sound.samplerate, sound.frames, partial(sound.read, dtype="float32", always_2d=True)


def save_wav(path, wave, rate):
    """Write (samples,) in [-1, 1], clipped to that, as a 16-bit mono WAV."""
    data = (wave * 32768).round().clamp(-32768, 32767).short().numpy().astype("<i2").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16,
                         1, 1, rate, 2 * rate, 2, 16, b"data", len(data))
    Path(path).write_bytes(header + data)
