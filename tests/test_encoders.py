"""Encoders: front ends and encoders against a second version of themselves and, as public
checkpoints, against the originals' own outputs.

    python -m pytest tests/test_encoders.py
"""
import json
import math
import re
import subprocess
import sys
import time
import tracemalloc
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import encoders
from encoders import (ENCODERS, SSLAM, Encoder, SSLAMConfig, Whisper, WhisperConfig, load_encoder,
                      make_encoder, mel_filters)
from golden.make_encoders import sound, sslam_positions, weight
from test_audio import close
from test_weights import LEGACY, one_line, pickled, write_safetensors


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So little work is not worth sharing: on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(module, seed=0):
    """Every parameter at random and far from its start: a zero bias hides errors."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
        p.data = torch.randn(p.shape, generator=g) * scale + (1.0 if "norm" in name and
                                                              name.endswith("weight") else 0)
    return module.eval()


def clip(seconds, rate=16000, seed=0):
    """A chirp in noise, with an offset: something for every mel band, and a mean to subtract."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * (200 + 700 * t) * t) + 0.02 * rng.standard_normal(len(t)) + 0.05
    return torch.from_numpy(x.astype(np.float32))


# ---------------------------------------------------------------------------------------------
# Front ends, each against a slow numpy version

def slow_whisper(x, mels, seconds):
    samples = round(seconds * 16000)
    x = np.pad(x.astype(np.float64), (0, max(0, samples - len(x))))[:samples]
    x = np.pad(x, 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = [np.abs(np.fft.fft(x[i:i + 400] * window)[:201]) ** 2 for i in range(0, samples, 160)]

    def hz_of(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * math.log(8) / math.log(6.4)  # 8000 Hz
    f = [hz_of(top * i / (mels + 1)) for i in range(mels + 2)]
    filters = np.zeros((201, mels))
    for k in range(201):
        for m in range(mels):
            up = (k * 40 - f[m]) / (f[m + 1] - f[m])
            down = (f[m + 2] - k * 40) / (f[m + 2] - f[m + 1])
            filters[k, m] = max(0, min(up, down)) * 2 / (f[m + 2] - f[m])
    log = np.log10(np.maximum(np.array(power) @ filters, 1e-10)).T
    return (np.maximum(log, log.max() - 8) + 4) / 4


@pytest.mark.parametrize("mels, seconds", [(80, 4.0), (80, 2.0), (128, 2.5)])
def test_whisper_front_end(mels, seconds):
    wave = clip(2.3)  # padded to the first window, cut to the second
    encoder = Whisper(WhisperConfig(mels, 64, 1, seconds=seconds))
    with torch.no_grad():
        ours = encoder.front_end(wave[None, :round(seconds * 16000)])
    theirs = slow_whisper(wave.numpy(), mels, seconds)
    assert ours.shape == (1, mels, seconds * 100)
    assert np.abs(ours[0].numpy() - theirs).max() < 1e-3


def slow_kaldi(x):
    """Kaldi's fbank of 128 bins with torchaudio's settings for AudioSet models, frame by frame."""
    x = x.astype(np.float64) - x.astype(np.float64).mean()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)

    def mel(f):
        return 1127 * math.log(1 + f / 700)

    low, step = mel(20), (mel(8000) - mel(20)) / 129
    filters = np.zeros((256, 128))
    for k in range(256):
        for m in range(128):
            distance = (mel(k * 31.25) - low) / step - m  # 0, 1, 2 at the triangle's corners
            filters[k, m] = max(0, min(distance, 2 - distance))
    rows = []
    for i in range(1 + (len(x) - 400) // 160):
        frame = x[i * 160:i * 160 + 400]
        frame = frame - frame.mean()
        frame = np.append(frame[0] * 0.03, frame[1:] - 0.97 * frame[:-1]) * window
        power = np.abs(np.fft.fft(np.pad(frame, (0, 112)))[:256]) ** 2
        rows.append(np.log(np.maximum(power @ filters, 1.1920929e-07)))
    return np.array(rows)


@pytest.mark.parametrize("seconds", [4.0, 1.237, 5.1])
def test_sslam_front_end(seconds, recwarn):
    wave = clip(seconds)
    rows = slow_kaldi(wave.numpy())
    assert len(rows) == 1 + (len(wave) - 400) // 160
    rows = np.pad(rows, ((0, max(0, 400 - len(rows))), (0, 0)))[:400]  # zeros, then normalised
    ours = make_encoder("sslam").front_end(wave[None])
    assert len(recwarn) == (seconds > 4)
    assert np.abs(ours[0, 0].numpy() - (rows + 4.268) / 9.138).max() < 1e-3
    if seconds < 4:
        assert abs(ours[0, 0, -1, 0].item() - 0.46706) < 1e-5


# ---------------------------------------------------------------------------------------------
# Encoders

@pytest.mark.parametrize("mels, bins, rate, low, high", [(64, 513, 48000, 50, 14000),
                                                         (40, 257, 16000, 20, 8000)])
def test_htk_mel_filters(mels, bins, rate, low, high):
    """Each number by itself: mel(f) = 2595 log10(1 + f / 700), triangles of height 1 over Hz."""
    def mel(hz):
        return 2595 * math.log10(1 + hz / 700)

    step = (mel(high) - mel(low)) / (mels + 1)
    corners = [700 * (10 ** ((mel(low) + i * step) / 2595) - 1) for i in range(mels + 2)]
    expected = np.zeros((bins, mels))
    for k in range(bins):
        f = k * rate / 2 / (bins - 1)
        for m, (left, peak, right) in enumerate(zip(corners, corners[1:], corners[2:])):
            expected[k, m] = max(0, min((f - left) / (peak - left), (right - f) / (right - peak)))
    ours = mel_filters(mels, bins, rate, low, high, "htk")
    assert ours.dtype == torch.float32 and np.abs(ours.numpy() - expected).max() < 1e-5
    fused = ENCODERS["clap"].sizes["fused"]
    assert (fused.scale, fused.bank_rate, fused.high) == ("htk", 48000, 14000)


def test_whisper_by_another_composition():
    """nn.MultiheadAttention, and convolutions as products, in place of the module's forward."""
    encoder = randomise(Whisper(WhisperConfig(20, 128, 2, seconds=0.6)))
    s, x = encoder.state_dict(), torch.randn(2, 20, 60)

    def conv(x, name, stride):
        x = F.pad(x, (1, 1)).unfold(2, 3, stride)  # (B, C, F, 3)
        y = torch.einsum("bcfk,dck->bdf", x, s[name + ".weight"]) + s[name + ".bias"][:, None]
        return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))

    h = conv(conv(x, "conv1", 1), "conv2", 2).transpose(1, 2)
    i, p = torch.arange(64), torch.arange(30)[:, None]
    angle = p * 10000.0 ** (-i / 63)
    h = h + torch.cat([angle.sin(), angle.cos()], 1)
    for n in range(2):
        w = {k.removeprefix(f"blocks.{n}."): v for k, v in s.items() if f"blocks.{n}." in k}
        attention = nn.MultiheadAttention(128, 2, batch_first=True)
        names = "query", "key", "value"
        attention.in_proj_weight.data = torch.cat([w[f"attn.{q}.weight"] for q in names])
        attention.in_proj_bias.data = torch.cat([w["attn.query.bias"], torch.zeros(128),
                                                 w["attn.value.bias"]])
        attention.out_proj.weight.data = w["attn.out.weight"]
        attention.out_proj.bias.data = w["attn.out.bias"]
        y = F.layer_norm(h, (128,), w["attn_ln.weight"], w["attn_ln.bias"])
        h = h + attention(y, y, y)[0]
        y = F.layer_norm(h, (128,), w["mlp_ln.weight"], w["mlp_ln.bias"])
        y = F.gelu(y @ w["mlp.0.weight"].T + w["mlp.0.bias"])
        h = h + y @ w["mlp.2.weight"].T + w["mlp.2.bias"]
    h = F.layer_norm(h, (128,), s["ln_post.weight"], s["ln_post.bias"])
    close(encoder(x), h.detach(), 1e-5)


def test_sslam_by_another_composition():
    """Patches cut by hand, positions as a double loop, blocks as nn.TransformerEncoderLayer."""
    encoder = randomise(SSLAM(SSLAMConfig(128, 2, seconds=0.48)))
    s, x = encoder.state_dict(), torch.randn(2, 1, 48, 128)
    rows = []
    for t in range(3):
        for f in range(8):
            patch = x[:, 0, t * 16:t * 16 + 16, f * 16:f * 16 + 16].flatten(1)  # (B, 256)
            position = [trig(index * 10000 ** (-i / 32)) for index in (f, t)
                        for trig in (math.sin, math.cos) for i in range(32)]
            rows.append(patch @ s["local_encoder.proj.weight"].flatten(1).T
                        + s["local_encoder.proj.bias"] + torch.tensor(position))
    h = torch.stack([s["extra_tokens"][0, 0].expand(2, -1)] + rows, 1)
    h = F.layer_norm(h, (128,), s["pre_norm.weight"], s["pre_norm.bias"], 1e-6)
    for n in range(2):
        layer = nn.TransformerEncoderLayer(128, 2, 512, 0, "gelu", 1e-6, batch_first=True)
        layer.load_state_dict({
            theirs + end: s[f"blocks.{n}.{ours}{dot}{end}"]
            for ours, theirs, dot in (("attn.qkv", "self_attn.in_proj_", "."),
                                      ("attn.proj", "self_attn.out_proj.", "."),
                                      ("mlp.fc1", "linear1.", "."), ("mlp.fc2", "linear2.", "."),
                                      ("norm1", "norm1.", "."), ("norm2", "norm2.", "."))
            for end in ("weight", "bias")})
        h = layer(h)
    close(encoder(x), h.detach(), 1e-5)


def test_real_sizes():
    with torch.device("meta"):
        sslam = make_encoder("sslam", "base")
        whisper = make_encoder("whisper", "large-v3")
    assert sum(p.numel() for p in sslam.parameters()) == 85_254_144
    assert (sslam.grid, sslam.num_prefix_tokens, sslam.seconds) == ((64, 8), 1, 10.24)
    assert (whisper.grid, whisper.num_tokens(30), whisper.num_tokens(10)) == ((1500, 1), 1500, 500)
    assert (sslam.num_tokens(10.24), sslam.num_tokens(1)) == (513, 1 + 7 * 8)
    # Whisper large-v3's encoder, without its fixed positions
    assert sum(p.numel() for p in whisper.parameters()) == 635_048_960


@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_fill_the_grid_and_count_the_clip(kind):
    encoder = make_encoder(kind).eval()
    steps, bands = encoder.grid
    spectrogram = encoder.front_end(clip(4.0).expand(2, -1))
    out = encoder(spectrogram)
    assert out.shape == (2, encoder.num_prefix_tokens + steps * bands, encoder.width)
    step = encoder.seconds / steps
    for n in range(1, steps + 1):  # clips that end with step n, or just start the next
        assert encoder.steps(n * step) == n
        assert encoder.steps(n * step + 0.001) == min(n + 1, steps)
    assert encoder.steps(0.001) == 1 and encoder.steps(100) == steps
    assert encoder.num_tokens(4.0) == out.shape[1]
    assert encoder.num_tokens(step) == encoder.num_prefix_tokens + bands


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_batch_gives_what_each_clip_gives_alone(kind):
    encoder = randomise(make_encoder(kind))
    clips = [clip(s, seed=i) * 10.0 ** -i for i, s in enumerate((4.0, 0.01, 1.7, 3.99))]
    with torch.no_grad():
        together = encoder(encoder.front_end(clips))
        for row, alone in zip(together, clips):
            close(row[None], encoder(encoder.front_end(alone[None])), 1e-5)
    same = encoder.front_end(torch.stack([clips[0], clips[0] * 1e-3]))
    close(same[1:], encoder.front_end(clips[0][None] * 1e-3), 1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_long_clip_is_heard_from_its_start_and_said_so(kind):
    encoder, wave = make_encoder(kind), clip(7.0)
    with pytest.warns(match="hears the first 4 s"):
        long = encoder.front_end(wave[None])
    short = encoder.front_end(wave[None, :64000])
    if kind == "sslam":  # of a longer clip it has two more frames, where the short one is padded
        long, short = long[:, :, :398], short[:, :, :398]
    assert long.equal(short)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            encoder.front_end(wave[None])
    assert len(said) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_half_precision_listens_in_float32(kind, dtype):
    encoder = make_encoder(kind).eval()
    spectrogram = encoder.front_end(clip(4.0)[None])
    exact = encoder(spectrogram).detach()
    encoder.to(dtype)
    rough = encoder.front_end(clip(4.0)[None])
    assert rough.dtype == torch.float32 and rough.equal(spectrogram)
    half = encoder(spectrogram).detach()
    assert half.dtype == dtype and (half - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_miniature_can_learn_and_does_not_when_it_is_frozen(kind):
    encoder = make_encoder(kind)
    spectrogram = encoder.front_end(torch.stack([clip(4.0), clip(4.0, seed=1)]))
    before = {name: b.clone() for name, b in encoder.named_buffers()}
    encoder.eval()(spectrogram)
    assert all(b.equal(before[name]) for name, b in encoder.named_buffers())
    y = encoder.train()(spectrogram)
    (y * torch.randn(y.shape)).sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    moved = {name for name, b in encoder.named_buffers() if not b.equal(before[name])}
    assert moved == {name for name in before if name.startswith("bn0.")}


@pytest.mark.parametrize("kind", ENCODERS)
def test_silence_is_finite(kind):
    encoder = make_encoder(kind)
    assert encoder(encoder.front_end(torch.zeros(1, 64000))).isfinite().all()


# ---------------------------------------------------------------------------------------------
# Public checkpoints: each naming scheme, with its published code's outputs

def hugging_face(folder, state):
    """A model in two files and their index."""
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        write_safetensors(folder / shard, {name: state[name] for name in part})
    index = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


class Config:
    """An object of the research code, as found in its checkpoints."""

    def __init__(self):
        self.nested = {"lr": np.float64(1e-3), "names": {"a", "b"}, "me": Path("x")}


JUNK = torch.ones(2, 3)
FORMS = {  # name of the golden file and a form it is published in -> the file
    "whisper_openai pt": lambda d, s: pickled(d / "a.pt", {
        "dims": {"n_mels": 80}, "model_state_dict":
        {f"encoder.{k}": v for k, v in s.items()} | {"decoder.ln.weight": JUNK}}),
    "whisper_hf folder": lambda d, s: hugging_face(d, {f"model.{k}": v for k, v in s.items()}
                                                   | {"proj_out.weight": JUNK}),
    "whisper_hf bin": lambda d, s: pickled(d / "pytorch_model.bin", s, **LEGACY).parent,
    "whisper_hf encoder": lambda d, s: write_safetensors(d / "a.safetensors", {
        k.removeprefix("encoder."): v for k, v in s.items() if k.startswith("encoder.")}),
    "sslam_hf safetensors": lambda d, s: write_safetensors(d / "model.safetensors", s),
    "sslam_pretrained pt": lambda d, s: pickled(d / "a.pt", {
        "cfg": Config(), "args": None, "extra_state": {"loss": np.float32(3)},
        "last_optimizer_state": {"state": {0: {"exp_avg": JUNK}}},
        "model": s | {"_ema": {"blocks.0.norm1.weight": JUNK},
                      "modality_encoders.IMAGE.decoder.proj.weight": JUNK}}),
    "sslam_finetuned pt": lambda d, s: pickled(d / "a.pt", {
        "cfg": Config(), "model": s | {"fc_norm.weight": JUNK, "head.weight": JUNK}}),
    "clap_laion pt": lambda d, s: pickled(d / "a.pt", {
        "epoch": np.int64(3), "optimizer": {"state": {0: {"exp_avg": JUNK}}},
        "state_dict": {f"module.{k}": v for k, v in s.items()} | {
            "module.text_branch.x": JUNK, "module.logit_scale_a": JUNK,
            "module.audio_projection.0.weight": JUNK,
            "module.audio_branch.spectrogram_extractor.stft.conv_real.weight": JUNK}}),
    "clap_laion_base pt": lambda d, s: pickled(d / "a.pt", {"state_dict": s}),
    "clap_laion_fused pt": lambda d, s: pickled(d / "a.pt", {"state_dict": s}),
    "clap_microsoft pth": lambda d, s: pickled(d / "a.pth", {"model": s | {
        "audio_encoder.projection.linear1.weight": JUNK, "caption_encoder.base.x": JUNK}}),
    "clap_hf safetensors": lambda d, s: write_safetensors(d / "model.safetensors", {
        f"audio_model.{k}": v for k, v in s.items()} | {"text_model.x": JUNK,
                                                        "audio_projection.linear1.weight": JUNK}),
    "clap_hf_fused bin": lambda d, s: pickled(d / "pytorch_model.bin", s).parent,
}


def golden(name):
    """The stored outputs, and a new copy of the state dict that they were made with."""
    data, state = read_golden(name)
    return data, {n: x.clone() for n, x in state.items()}


@lru_cache(maxsize=None)
def read_golden(name):
    data = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    state = {n: weight(n, shape) for n, shape in json.loads(str(data["learned"])).items()}
    state |= {n.removeprefix("fixed:"): data[n] for n in data.files if n.startswith("fixed:")}
    if "sslam" in name:
        top = "model." if name == "sslam_hf" else next(
            n for n in state if n.endswith("extra_tokens")).removesuffix("extra_tokens")
        state[top + "fixed_positional_encoder.positions"] = sslam_positions(32)
    return data, {n: torch.from_numpy(np.asarray(x)) for n, x in state.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_public_checkpoint_gives_what_its_own_code_gives(form, tmp_path):
    name, kind = form.split()[0], form.split("_")[0]
    data, state = golden(name)
    encoder = load_encoder(kind, FORMS[form](tmp_path, state))
    seconds = 0.7 if kind == "whisper" else 3.3
    with torch.no_grad():
        x = encoder.front_end(torch.from_numpy(sound(seconds, encoder.rate))[None])
        y = encoder(x)
    x = x[:, :, ::8] if kind == "whisper" else x[:, :, ::{"sslam": 8, "clap": 32}[kind]]
    assert np.abs(x.numpy() - data["features"]).max() < 1e-3
    close(y[:, ::7] if kind == "sslam" else y, data["tokens"], 1e-4)


def test_microsoft_without_its_mel_filters_hears_the_same(tmp_path):
    data, state = golden("clap_microsoft")
    state = {n: t for n, t in state.items() if "melW" not in n}
    encoder = load_encoder("clap", pickled(tmp_path / "a.pth", {"model": state}))
    x = encoder.front_end(torch.from_numpy(sound(3.3, 44100))[None])
    assert np.abs(x[:, :, ::32].numpy() - data["features"]).max() < 1e-3


@pytest.mark.parametrize("name, theirs, ours", [
    ("whisper_hf", "encoder.layers.1.fc2.bias", "blocks.1.mlp.2.bias"),
    ("sslam_hf", "model.blocks.1.norm2.weight", "blocks.1.norm2.weight"),
    ("clap_laion", "audio_branch.layers.3.blocks.0.norm1.bias", "layers.3.blocks.0.norm1.bias"),
    ("clap_hf", "audio_encoder.layers.0.blocks.1.attention.self.key.bias",
     "layers.0.blocks.1.attn.qkv.bias"),
])
def test_a_missing_misshapen_or_unknown_tensor_is_named(name, theirs, ours, tmp_path):
    kind, state = name.split("_")[0], golden(name)[1]

    def refusal(changed, *words):
        with pytest.raises(ValueError) as error:
            load_encoder(kind, write_safetensors(tmp_path / "x.safetensors", changed))
        one_line(error, "x.safetensors", kind, *words)

    refusal({n: t for n, t in state.items() if n != theirs}, f"{ours} is missing")
    refusal(state | {theirs: state[theirs][:-1]}, f"{ours} is")
    refusal(state | {theirs: state[theirs][None]}, ours)
    refusal(state | {theirs + ".more": JUNK}, ".more does not belong")


@pytest.mark.parametrize("form", ["whisper_hf bin", "sslam_hf safetensors", "clap_hf_fused bin"])
def test_weights_may_be_loaded_at_half_precision(form, tmp_path):
    name, kind = form.split()[0], form.split("_")[0]
    data, state = golden(name)
    encoder = load_encoder(kind, FORMS[form](tmp_path, state), torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    seconds = 0.7 if kind == "whisper" else 3.3
    with torch.no_grad():
        y = encoder(encoder.front_end(torch.from_numpy(sound(seconds, encoder.rate))[None]))
    y, theirs = y[:, ::7 if kind == "sslam" else 1].float(), torch.from_numpy(data["tokens"])
    assert (y - theirs).abs().mean() < 0.03 * theirs.abs().mean()


def test_a_table_of_positions_for_longer_clips_is_cut(tmp_path):
    state = golden("sslam_hf")[1]
    state["model.fixed_positional_encoder.positions"] = torch.from_numpy(sslam_positions(768))
    encoder = load_encoder("sslam", write_safetensors(tmp_path / "x.safetensors", state))
    assert encoder.grid == (64, 8) and encoder.seconds == 10.24
    assert encoder.front_end(clip(10.0)[None]).shape == (1, 1, 1024, 128)


def test_the_mel_filters_that_a_checkpoint_carries_are_those_it_hears_with(tmp_path):
    state = golden("clap_laion")[1]
    x = clip(10.0, 48000)[None]
    plain = load_encoder("clap", pickled(tmp_path / "a.pt", state)).front_end(x)
    state["audio_branch.logmel_extractor.melW"] *= 10
    louder = load_encoder("clap", pickled(tmp_path / "b.pt", state)).front_end(x)
    assert (louder - plain - 10).abs().max() < 1e-3  # dB


SCHEMES = ["whisper_openai", "whisper_hf", "sslam_hf", "clap_laion", "clap_hf", "clap_microsoft"]
TRAINING = ["optimizer_state_dict", "optimizer", "optim_state", "lr_scheduler", "scheduler_state",
            "scaler", "grad_scaler", "rng_state", "ema_state_dict", "model_ema", "_ema", "args",
            "callbacks", "cfg", "criterion", "extra_state"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "state_dict.",
                                    "model_state_dict.module.", "_orig_mod.module.model.",
                                    "state_dict.model._orig_mod.model.module."])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_wrappers_and_training_loops_add_is_left_out(scheme, prefix, monkeypatch):
    kind, state = scheme.split("_")[0], golden(scheme)[1]
    files = {"plain": state, "wrapped": {prefix + name: t for name, t in state.items()}}
    files["wrapped"] |= {f"{name}.state.0.exp_avg": JUNK for name in TRAINING}
    files["wrapped"] |= {f"{prefix}{name}.blocks.0.x": JUNK for name in TRAINING}
    files["wrapped"] |= {"epoch": torch.tensor(3), "train_loss": torch.tensor(3.0)}
    monkeypatch.setattr(encoders, "load_tensors", lambda path: dict(files[path]))
    plain, wrapped = (load_encoder(kind, path) for path in files)
    assert plain.config == wrapped.config and plain.filters.equal(wrapped.filters)
    expected = plain.state_dict()
    assert all(t.equal(expected[name]) for name, t in wrapped.state_dict().items())


def test_a_wrapper_may_stand_inside_a_name_too(monkeypatch):
    state = {name.replace("encoder.", "encoder._orig_mod.").replace("layers.", "layers.module."): t
             for name, t in golden("whisper_hf")[1].items()}
    monkeypatch.setattr(encoders, "load_tensors", lambda path: state)
    assert load_encoder("whisper", "x").config.layers == 2


def test_two_models_in_one_file_are_refused(tmp_path):
    state = golden("whisper_hf")[1]
    with pytest.raises(ValueError) as error:
        load_encoder("whisper", pickled(tmp_path / "a.pt", {"model": state, "module": dict(state)}))
    one_line(error, "a.pt", "is there twice")


ABSURD = {
    "10^7 rows, stride 0": lambda t: torch.zeros(1).expand(10 ** 7, *t.shape[1:]),
    "10^7 columns, stride 0": lambda t: torch.zeros(1).expand(*t.shape[:-1], 10 ** 7),
    "10^7 real rows": lambda t: torch.zeros(10 ** 7).view(-1, *t.shape[:0], *[1] * (t.ndim - 1)),
    "10^7 real columns": lambda t: torch.zeros(10 ** 7).view(*[1] * (t.ndim - 1), -1),
    "no rows": lambda t: t[:0], "no columns": lambda t: t[..., :0], "no axis": lambda t: t.sum(),
    "one of everything": lambda t: torch.zeros([1] * t.ndim), "more axes": lambda t: t[None, None],
    "nowhere": lambda t: t.to("meta"), "sparse": lambda t: t.to_sparse(), "no tensor": lambda t: 3,
    "whole numbers": lambda t: t.long(), "complex": lambda t: t + 0j,
}


@pytest.fixture
def limited_memory(absurdity):
    """Memory stays below ten times 10^7 numbers. It is traced only where something is large."""
    if "10^7" not in absurdity:
        yield
        return
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 10 ** 8


@pytest.mark.parametrize("absurdity", ABSURD)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_absurd_shapes_are_refused_in_a_line_and_take_no_memory(scheme, absurdity, monkeypatch,
                                                                limited_memory):
    kind, state = scheme.split("_")[0], golden(scheme)[1]
    # those that sizes are read off, and a norm of the first block
    names = [name for name in state if re.search(
        r"(conv1\.weight|positional_embedding|encoder\.embed_positions\.weight|positions|melW|"
        r"extra_tokens|patch_embed\.proj\.weight|0\.blocks\.0\..*bias_table)$", name)]
    assert len(names) >= 2
    for name in names:
        changed = state | {name: ABSURD[absurdity](state[name])}
        monkeypatch.setattr(encoders, "load_tensors", lambda path, changed=changed: changed)
        with pytest.raises(ValueError) as error:
            load_encoder(kind, "x.pt")
        one_line(error, "x.pt")


@pytest.mark.parametrize("kind, name", [("whisper", "blocks.{}.x"), ("sslam", "blocks.{}.x"),
                                        ("clap", "layers.{}.blocks.0.x"),
                                        ("clap", "layers.0.blocks.{}.x")])
def test_thousands_of_blocks_are_not_built(kind, name, monkeypatch):
    scheme = {"whisper": "whisper_openai", "sslam": "sslam_hf", "clap": "clap_laion"}[kind]
    state = golden(scheme)[1] | {name.format(i): JUNK for i in range(10 ** 4)}
    monkeypatch.setattr(encoders, "load_tensors", lambda path: state)
    began = time.process_time()
    with pytest.raises(ValueError) as error:
        load_encoder(kind, "x.pt")
    one_line(error, "x.pt", "modules")
    assert time.process_time() - began < 5


def test_a_shape_that_a_file_does_not_hold(tmp_path):
    state = golden("whisper_hf")[1]
    state["encoder.conv1.weight"] = torch.zeros(1).expand(10 ** 7, 80, 3)
    path = pickled(tmp_path / "a.pt", state)
    assert path.stat().st_size < 10 ** 7
    with pytest.raises(ValueError) as error:
        load_encoder("whisper", path)
    one_line(error, "a.pt", "conv1.weight")


@pytest.mark.parametrize("name", ["a.pt", "model.safetensors"])
def test_a_pointer_in_place_of_the_weights_is_called_by_its_name(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n"
                                 f"oid sha256:{'0' * 64}\nsize 151061672\n")
    with pytest.raises(ValueError) as error:
        load_encoder("whisper", tmp_path / name if name == "a.pt" else tmp_path)
    one_line(error, name, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("kind, name", [("whisper", "sslam_hf"), ("sslam", "clap_hf"),
                                        ("clap", "whisper_hf"), ("sslam", "whisper_openai")])
def test_the_wrong_kind_of_encoder_is_refused(kind, name, tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", golden(name)[1])
    with pytest.raises(ValueError) as error:
        load_encoder(kind, path)
    one_line(error, "x.safetensors", f"no {kind} encoder")


@dataclass(frozen=True)
class LoudnessConfig:
    width: int = 8
    seconds: float = 4.0


class Loudness(Encoder):
    """A new encoder: the energy of each tenth of a second, times a vector."""
    Config = LoudnessConfig
    sizes = {"mini": LoudnessConfig()}
    rate, grid = 16000, (40, 1)
    key_map = (("^net[.]", ""), ("^projection", "proj"))
    ignored_keys = "decoder[.]"

    def __init__(self, config):
        super().__init__(config)
        self.filters = torch.ones(1, 1)
        self.proj = nn.Linear(1, config.width)

    def spectrogram(self, wave):
        wave = F.pad(wave, (0, max(0, 64000 - wave.shape[1])))[:, :64000]
        return wave.square().unflatten(1, (40, 1600)).mean(2, keepdim=True)

    def forward(self, x):
        return self.proj(x)

    @staticmethod
    def infer_config(state, names):
        return LoudnessConfig(width=len(state["proj.weight"]))


def test_a_new_encoder_is_one_class_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "loudness", Loudness)
    state = {"net.projection.weight": torch.ones(24, 1), "net.projection.bias": torch.zeros(24),
             "net.decoder.x": JUNK}
    public = load_encoder("loudness", write_safetensors(tmp_path / "x.safetensors", state))
    for encoder, width in (make_encoder("loudness"), 8), (public, 24):
        out = encoder(encoder.front_end(clip(1.0)[None]))
        assert out.shape == (1, encoder.num_tokens(4), width) and encoder.num_tokens(1.05) == 11
        assert (encoder.general, encoder.pool_size, encoder.frozen) == (True, 1, True)
    assert public.checkpoint_path == str(tmp_path / "x.safetensors")


def test_other_files_without_an_encoder(tmp_path):
    decoder = {n: t for n, t in golden("whisper_hf")[1].items() if n.startswith("decoder")}
    assert len(decoder) > 10
    for path, words in (
            (write_safetensors(tmp_path / "d.safetensors", decoder), ("no whisper encoder",)),
            (tmp_path / "absent.pt", ("No such file",)),
            (tmp_path, ("no weights in this folder",))):
        with pytest.raises(ValueError) as error:
            load_encoder("whisper", path)
        one_line(error, str(path), *words)
    hugging_face(tmp_path, golden("whisper_hf")[1])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        load_encoder("whisper", tmp_path)
    one_line(error, "b.safetensors", "No such file")


PEAK = """
import sys
import torch
from encoders import load_encoder
def memory(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
torch.ones(9).half().float()
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what there is
before = memory("VmRSS")
encoder = load_encoder(sys.argv[1], sys.argv[2])
sum(t.sum() for t in encoder.state_dict().values())  # what is mapped counts once it is read
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_loading_holds_the_weights_and_next_to_nothing_else(kind, half, tmp_path):
    """A float32 file is its weights; the weights of a float16 file are twice its size."""
    size = {"whisper": "small", "sslam": "base", "clap": "base"}[kind]
    state = make_encoder(kind, size).state_dict()
    if half:
        state = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    if kind == "clap":  # as Hugging Face has them: in three parts, to be joined
        for name in [name for name in state if ".attn.qkv." in name]:
            for part, t in zip(("query", "key", "value"), state.pop(name).chunk(3)):
                state[name.replace("attn.qkv", f"attention.self.{part}")] = t.clone()
    path = write_safetensors(tmp_path / "x.safetensors", state)
    result = subprocess.run([sys.executable, "-c", PEAK, kind, path], text=True, check=True,
                            cwd=Path(__file__).parents[1], capture_output=True)
    peak = int(result.stdout) / path.stat().st_size
    print(f"{kind}: {peak:.2f} times the file")
    assert peak < (2.2 if half else 1.2)
