"""Sound files: every format, every bad file, what is read of a long one; resampling.

    python -m pytest tests/test_audio.py
"""
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import wave as wave_module
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.audio import check_audio, load_audio, save_wav
from lib.resampling import resample
from test_weights import one_line


def close(ours, theirs, relative):
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    worst = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    assert worst < relative, f"differs by {worst:.1e} of the largest value"


# ---------------------------------------------------------------------------------------------
# Reading files

def riff(*chunks, kind=b"WAVE"):
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
                    for name, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + kind + body


def fmt(tag, channels, rate, bits, extra=b"", block=None):
    block = channels * bits // 8 if block is None else block
    return b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits) + extra


def extensible(tag, channels, rate, bits):
    guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
    return fmt(0xFFFE, channels, rate, bits, struct.pack("<HHI", 22, bits, 0) + guid)


VALUES = [0.0, 0.5, -0.5, -1.0, 0.25, 0.9921875, -0.0078125]  # exact in 8 bits
ENCODE = {
    (1, 8): lambda v: struct.pack("B", round(v * 128) + 128),
    (1, 16): lambda v: struct.pack("<h", round(v * 2 ** 15)),
    (1, 24): lambda v: struct.pack("<i", round(v * 2 ** 23))[:3],
    (1, 32): lambda v: struct.pack("<i", round(v * 2 ** 31)),
    (3, 32): lambda v: struct.pack("<f", v),
    (3, 64): lambda v: struct.pack("<d", v),
}


@pytest.mark.parametrize("header", [fmt, extensible])
@pytest.mark.parametrize("tag, bits", ENCODE)
def test_every_wav_format_gives_the_samples_that_were_written(tmp_path, tag, bits, header):
    data = b"".join(ENCODE[tag, bits](v) for v in VALUES)
    junk = b"LIST", b"odd"  # an unknown chunk, of odd length, so padded
    path = tmp_path / "a.wav"
    path.write_bytes(riff(junk, header(tag, 1, 8000, bits), junk, (b"data", data), junk))
    assert load_audio(path, 8000).tolist() == VALUES
    assert load_audio(str(path), 8000).dtype == torch.float32


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_averaged(tmp_path, channels):
    frames = np.random.default_rng(0).integers(-30000, 30000, (50, channels), dtype=np.int16)
    with wave_module.open(str(tmp_path / "a.wav"), "wb") as f:
        f.setparams((channels, 2, 16000, 50, "NONE", ""))
        f.writeframes(frames.tobytes())
    expected = frames.astype(np.float64).mean(1) / 32768
    assert np.abs(load_audio(tmp_path / "a.wav", 16000).numpy() - expected).max() < 1e-7


def left_justified(values, width):
    return b"".join(struct.pack("<i", round(v * 2 ** 31))[4 - width:] for v in values)


@pytest.mark.parametrize("bits, width, channels", [(12, 2, 1), (20, 3, 1), (24, 4, 1), (24, 4, 2),
                                                   (20, 4, 3), (24, 3, 2), (16, 2, 1)])
def test_samples_lie_in_the_upper_bits_of_the_bytes_that_the_block_align_gives(
        tmp_path, bits, width, channels):
    frames = np.random.default_rng(0).integers(-2 ** 11, 2 ** 11, (50, channels)) / 2 ** 11
    header = fmt(1, channels, 16000, bits, block=channels * width)
    (tmp_path / "a.wav").write_bytes(riff(header, (b"data", left_justified(frames.flat, width))))
    assert np.abs(load_audio(tmp_path / "a.wav", 16000).numpy() - frames.mean(1)).max() < 1e-7


@pytest.mark.parametrize("tag, bits, channels, block", [
    (1, 16, 1, 4), (1, 16, 2, 2), (1, 24, 1, 2), (1, 12, 1, 1), (1, 8, 1, 4), (1, 16, 2, 5),
    (3, 32, 1, 8), (3, 16, 1, 2), (3, 24, 1, 4), (1, 64, 1, 8), (1, 0, 1, 2), (1, 16, 0, 2)])
def test_a_block_align_that_contradicts_the_bits_is_refused(tmp_path, tag, bits, channels, block):
    header = fmt(tag, channels, 8000, bits, block=block)
    (tmp_path / "a.wav").write_bytes(riff(header, (b"data", bytes(80))))
    for read in check_audio, lambda path: load_audio(path, 8000):
        with pytest.raises(ValueError) as error:
            read(tmp_path / "a.wav")
        one_line(error, "a.wav", f"{bits} bits, {channels} channels, {block} bytes", "convert it")


def with_data_size(raw, size):
    """A WAV whose header promises `size` bytes of sound."""
    at = raw.index(b"data") + 4
    return raw[:at] + struct.pack("<I", size) + raw[at + 4:]


STEREO = riff(fmt(1, 2, 16000, 16), (b"data", b"\0\x40" * 8))  # 4 frames of 0.5
UNKNOWN_SIZES = [0, 0x7FFFF000, 0x7FFFF000 - 36, 0x7FFFFFFF, 0x7FFFFFFF - 44, 0x7FFFFFFE,
                 0x80000000, 0x80000024, 0x7FFFFFD4, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0xFFFFFFFF - 80,
                 0xFFFFF000]


@pytest.mark.parametrize("size", UNKNOWN_SIZES)
def test_what_a_pipe_or_a_dead_recorder_left_is_read_to_its_end(tmp_path, size, recwarn):
    path = tmp_path / "a.wav"
    path.write_bytes(with_data_size(STEREO, size))
    assert load_audio(path, 16000).tolist() == [0.5] * 4 and not recwarn
    path.write_bytes(with_data_size(STEREO, size)[:-1])
    with pytest.warns(match="a.wav: its last frame of sound is cut off; the 3 before are read"):
        assert load_audio(path, 16000).tolist() == [0.5] * 3


@pytest.mark.parametrize("missing, frames", [(0, 4), (1, 3), (3, 3), (4, 3), (5, None)])
def test_a_frame_may_be_missing_and_no_more(tmp_path, missing, frames, recwarn):
    path = tmp_path / "a.wav"
    path.write_bytes(STEREO[:len(STEREO) - missing])
    if frames:
        assert load_audio(path, 16000).tolist() == [0.5] * frames
        assert check_audio(path) == frames / 16000 and bool(recwarn) == bool(missing)
        return
    for read in check_audio, lambda path: load_audio(path, 16000):
        with pytest.raises(ValueError) as error:
            read(path)
        one_line(error, "a.wav", "truncated, its header promises 16 bytes of sound and 11")


def test_no_sound_and_then_a_chunk_is_no_sound(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(riff(fmt(1, 1, 16000, 16), (b"data", b""), (b"LIST", b"INFO" + bytes(40))))
    with pytest.raises(ValueError, match="no samples"):
        load_audio(path, 16000)
    path.write_bytes(riff(fmt(1, 1, 16000, 16), (b"data", b"")) + b"loudloud" + bytes(36))
    assert load_audio(path, 16000).shape == (22,)  # "loud" are samples: no such chunk fits there


def test_save_wav_is_read_back_and_clips(tmp_path):
    save_wav(tmp_path / "a.wav", torch.tensor([0.5, -1.0, 3.0, -3.0, 1e-5]), 16000)
    assert load_audio(tmp_path / "a.wav", 16000).tolist() == [0.5, -1, 32767 / 32768, -1, 0]
    with wave_module.open(str(tmp_path / "a.wav")) as f:
        assert f.getparams()[:4] == (1, 2, 16000, 5)


GOOD = riff(fmt(1, 1, 16000, 16), (b"data", b"\1\2" * 100))
NAN = struct.pack("<3f", 0, math.nan, 0)
BAD_FILES = {
    "empty file": b"",
    "not a sound file, but text": b"Dear reader, this is no sound.",
    "truncated, its header promises 200 bytes of sound and 150": GOOD[:-50],
    "without its data chunk": GOOD[:30],
    "without its fmt  chunk": riff((b"data", b"1234")),
    "0 bits": riff((b"fmt ", b"\1\0"), (b"data", b"1234")),
    "holds no samples": riff(fmt(1, 1, 16000, 16), (b"data", b"")),
    "holds NaN": riff(fmt(3, 1, 16000, 32), (b"data", NAN)),
    "infinite": riff(fmt(3, 1, 16000, 64), (b"data", struct.pack("<d", 1e300))),
    "codec 6 (A-law), 8 bits, 1 channels; to read it: pip install soundfile":
        riff(fmt(6, 1, 8000, 8), (b"data", b"1234")),
    "codec 7 (mu-law), 8 bits, 1 channels; to read it: pip install soundfile":
        riff(extensible(7, 1, 8000, 8), (b"data", b"1234")),
    "codec 2 (ADPCM), 4 bits, 1 channels; to read it: pip install soundfile":
        riff(fmt(2, 1, 8000, 4), (b"data", b"1234")),
    "'RF64' (flac, ogg, mp3, ...); to read it: pip install soundfile": b"RF64" + GOOD[4:],
    "'RIFX' (flac, ogg, mp3, ...); to read it: pip install soundfile": b"RIFX" + GOOD[4:],
    "text; fetch it": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title>",
    "12 bits": riff(fmt(1, 1, 8000, 12), (b"data", b"1234")),
    "0 channels": riff(fmt(1, 0, 8000, 16), (b"data", b"1234")),
    "0 Hz": riff(fmt(1, 1, 0, 16), (b"data", b"1234")),
}


@pytest.mark.parametrize("why", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, why, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as if it were not installed
    (tmp_path / "bad.wav").write_bytes(BAD_FILES[why])
    with pytest.raises(ValueError) as error:
        load_audio(tmp_path / "bad.wav", 16000)
    one_line(error, "bad.wav", why, ";")
    if why in ("holds NaN", "infinite"):  # no header says so
        assert check_audio(tmp_path / "bad.wav") > 0
        return
    with pytest.raises(ValueError) as header_error:
        check_audio(tmp_path / "bad.wav")
    assert str(header_error.value) == str(error.value)


@pytest.mark.parametrize("name, why", [("absent.wav", "No such file"), (".", "a directory"),
                                       ("/dev/zero", "device"), ("socket", "socket"),
                                       ("fifo", "empty file")])
@pytest.mark.parametrize("read", [check_audio, lambda path: load_audio(path, 16000)])
def test_what_is_no_file_is_refused_in_one_line_and_at_once(tmp_path, name, why, read):
    if name == "fifo":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no such pipes here")
        os.mkfifo(tmp_path / name)  # and nobody writes to it
    if name == "socket":
        if not hasattr(socket, "AF_UNIX"):
            pytest.skip("no such sockets here")
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(tmp_path / name))  # a path of at most 108 letters
        server.close()
    if not Path("/dev/zero").exists() and name == "/dev/zero":
        pytest.skip("no such device here")
    with pytest.raises(ValueError) as error:
        read(tmp_path / name)
    one_line(error, str(tmp_path / name), why, ";")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_what_comes_through_a_pipe_is_read_once_for_all_who_ask(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    save_wav(tmp_path / "a.wav", torch.rand(30000) - 0.5, 16000)  # more than a pipe holds
    raw = with_data_size((tmp_path / "a.wav").read_bytes(), 0xFFFFFFFF)
    keep_open = os.open(tmp_path / "pipe", os.O_RDWR)  # as if the writer were there already
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[raw])
    writer.start()
    threading.Timer(0.1, os.close, [keep_open]).start()
    for rate in 16000, 48000:
        assert load_audio(tmp_path / "pipe", rate).equal(load_audio(tmp_path / "a.wav", rate))
    writer.join()


def test_other_formats_go_through_soundfile_or_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.flac").write_bytes(b"fLaC\0")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError) as error:
        load_audio(tmp_path / "a.flac", 16000)
    one_line(error, "a.flac", "'fLaC'", "pip install soundfile")

    class Stub:
        samplerate, frames = 16000, 2 ** 40  # what the header says

        def __init__(self, file):
            if file.read() == b"bad\0":
                raise RuntimeError("Format not recognised.")

        def read(self, frames, dtype, always_2d):
            return np.array([[0.5, 0.25]] * min(frames, 3), np.float32)

    monkeypatch.setitem(sys.modules, "soundfile", type("soundfile", (), {"SoundFile": Stub}))
    assert load_audio(tmp_path / "a.flac", 16000).tolist() == [0.375] * 3
    assert load_audio(tmp_path / "a.flac", 16000, 2 / 16000).tolist() == [0.375] * 2
    (tmp_path / "bad.flac").write_bytes(b"bad\0")
    with pytest.raises(ValueError) as error:
        load_audio(tmp_path / "bad.flac", 16000)
    one_line(error, "bad.flac", "not recognised")


SOUNDFILE_FORMS = [("WAV", "ULAW"), ("WAV", "ALAW"), ("WAV", "MS_ADPCM"), ("WAV", "IMA_ADPCM"),
                   ("RF64", "PCM_16"), ("RIFX", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"),
                   ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")]


@pytest.mark.parametrize("form, subtype", SOUNDFILE_FORMS)
def test_soundfile_reads_what_is_not_read_here(tmp_path, form, subtype, capfd):
    soundfile = pytest.importorskip("soundfile")
    wave = 0.4 * np.sin(np.arange(32000) / 20)
    path, endian = tmp_path / "a.sound", "BIG" if form == "RIFX" else "FILE"
    soundfile.write(path, wave, 16000, subtype, endian, "WAV" if form == "RIFX" else form)
    assert check_audio(path) == pytest.approx(2, abs=0.1)
    whole, start = load_audio(path, 24000), load_audio(path, 24000, 0.5)
    expected = 0.4 * np.sin(np.arange(24000) / 30)
    assert np.abs(whole.numpy()[1000:24000] - expected[1000:]).max() < 0.05
    assert len(start) == 12000 and (start - whole[:12000]).abs().max() < 1e-6
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------
# Long files

@pytest.mark.parametrize("seconds", [0.001, 0.5, 1.0, 1.9999, 2.0, 99.0])
@pytest.mark.parametrize("file_rate, rate", [(16000, 16000), (48000, 16000), (44100, 16000),
                                             (8000, 48000), (44101, 16000), (100, 44100)])
def test_the_first_seconds_are_the_beginning_of_the_whole(tmp_path, seconds, file_rate, rate):
    save_wav(tmp_path / "a.wav", torch.rand(2 * file_rate) - 0.5, file_rate)
    whole = load_audio(tmp_path / "a.wav", rate)
    start = load_audio(tmp_path / "a.wav", rate, seconds)
    assert len(start) == min(len(whole), math.ceil(seconds * rate))
    assert (start - whole[:len(start)]).abs().max() < 1e-6
    assert check_audio(tmp_path / "a.wav") == 2


@pytest.mark.parametrize("channels, rate", [(2, 48000), (1, 100), (1, 999983)])
def test_of_a_long_file_only_what_is_heard_is_read(tmp_path, channels, rate):
    size, path = 2 ** 31 - 2 ** 20, tmp_path / "long.wav"
    with open(path, "wb") as file:
        file.write(with_data_size(riff(fmt(1, channels, rate, 16), (b"data", b"")), size))
        file.truncate(44 + size)  # 2 GiB of zeros, which take no room
    began = time.process_time()
    tracemalloc.start()
    assert load_audio(path, 16000, 4.0).shape == (64000,)
    assert check_audio(path) == size / 2 / channels / rate
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 ** 8 and time.process_time() - began < 10


MEMORY_OF_RESAMPLING = """
import torch
from lib.resampling import resample
def memory(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
torch.set_num_threads(1)
for samples, rate in (5_000_000, 48000), (60_000, 100), (3_000_000, 44101):
    x = torch.zeros(samples)
    resample(x[:999], rate, 16000)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what there is
    before = memory("VmRSS")
    y = resample(x, rate, 16000)
    peak = (memory("VmHWM") - before) / 4 / (len(x) + len(y))
    assert peak < 3, f"{rate} Hz: {peak:.1f} times what it reads and makes"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resampling_takes_little_more_memory_than_its_input_and_output():
    subprocess.run([sys.executable, "-c", MEMORY_OF_RESAMPLING], cwd=Path(__file__).parents[1],
                   check=True)


# ---------------------------------------------------------------------------------------------
# Resampling

def slow_resample(x, old, new):
    """The sum itself, in float64, an output at a time."""
    g = math.gcd(old, new)
    old, new = old // g, new // g
    cutoff, n = min(old, new) * 0.99, np.arange(len(x))
    out = []
    for m in range(math.ceil(len(x) * new / old)):
        t = np.clip((n / old - m / new) * cutoff, -6, 6)
        out.append((x * np.sinc(t) * np.cos(np.pi * t / 12) ** 2).sum() * cutoff / old)
    return np.array(out)


@pytest.mark.parametrize("old, new", [(44100, 16000), (8000, 16000), (48000, 16000),
                                      (16000, 44100), (22050, 16000), (11025, 16001)])
def test_resample_is_the_windowed_sinc_sum(old, new):
    x = np.random.default_rng(1).standard_normal(701)
    ours = resample(torch.from_numpy(x).float(), old, new)
    close(ours, slow_resample(x, old, new), 1e-5)


def test_a_sine_stays_a_sine_and_what_cannot_be_heard_is_gone():
    t = torch.arange(44100, dtype=torch.float64) / 44100
    ours = resample(torch.sin(2 * math.pi * 1000 * t).float(), 44100, 16000)
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)
    assert len(ours) == 16000
    assert (ours - expected)[100:-100].abs().max() < 2e-3
    too_high = resample(torch.sin(2 * math.pi * 12000 * t).float(), 44100, 16000)
    assert too_high[100:-100].abs().max() < 2e-3


def test_rates_without_a_common_divisor_need_no_more_memory_than_others():
    assert len(resample(torch.ones(44101), 44101, 16000)) == 16000  # all at once: 2.8 GB
