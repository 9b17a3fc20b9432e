"""Sound to tokens: make the spectrogram of a wave, encode it into a grid of tokens.

The paper's three audio encoders: Whisper for speech, SSLAM (self-supervised learning from audio
mixtures) and CLAP (contrastive language-audio pretraining) for sounds in general. They have the
originals' architectures and parameter names and open the originals' checkpoints; each also has a
miniature that a laptop trains. Nothing here computes with a language model.

    python -c "from encoders import *; wave = load_audio('assets/demo.wav', 16000); \
               m = make_encoder('sslam'); print(m(m.front_end(wave[None])).shape, m.grid)"

A new encoder is a subclass of Encoder and one entry in ENCODERS. B batch, N tokens, D an encoder's
width, H heads, F frames of a spectrogram, M its mel bands, R the side of CLAP's square map, nW its
windows; LN is layer normalisation, STFT the short-time Fourier transform.
"""
import math
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.audio import load_audio  # noqa: F401 - for whoever has a file, as in the line above
from lib.weights import (as_value_error, build_for, holds_numbers, load_tensors, load_weights,
                         strip_prefixes)

# ---------------------------------------------------------------------------------- spectrograms

def mel_filters(mels, bins, rate, low, high, scale="slaney"):
    """Mel filters (bins, mels) float32: triangle m rises from corner m to m + 1, falls to m + 2.

    Bin k stands for k * rate / (2 (bins - 1)) Hz. Corners are evenly spaced in mel from low to
    high: log(1 + f / 700) for HTK and Kaldi; for Slaney 3 f / 200 below 1 kHz, and above it
    15 + 27 log(f / 1000) / log(6.4). HTK's triangles are 1 high and linear in Hz, Kaldi's 1 high
    and linear in mel; Slaney's, linear in Hz, are 2 / (their width in Hz) high: of equal areas.
    """
    assert scale in ("slaney", "htk", "kaldi"), f"scale {scale!r}"
    hz = np.linspace(0, rate / 2, bins)
    if scale == "slaney":
        step = math.log(6.4) / 27
        low, high = (f * 3 / 200 if f < 1000 else 15 + math.log(f / 1000) / step
                     for f in (low, high))
        mel = np.linspace(low, high, mels + 2)
        corners = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * step))
    else:
        mel = np.linspace(math.log1p(low / 700), math.log1p(high / 700), mels + 2)
        corners = 700 * np.expm1(mel)
    if scale == "kaldi":
        hz, corners = np.log1p(hz / 700), mel
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    rise, fall = (hz[:, None] - left) / (peak - left), (right - hz[:, None]) / (right - peak)
    filters = np.maximum(0, np.minimum(rise, fall)).astype(np.float32)
    if scale == "slaney":
        filters *= (2 / (right - left)).astype(np.float32)
    return torch.from_numpy(filters)


def power_spectrum(wave, window, hop):
    """(B, samples) -> (B, 1 + samples / hop, bins): |STFT|^2, frames centred, ends reflected."""
    x = torch.stft(wave, len(window), hop, window=window.to(wave.device), return_complex=True)
    return (x.real.square() + x.imag.square()).transpose(1, 2)


# ----------------------------------------------------------------------- what the encoders share

class Encoder(nn.Module):
    """A clip becomes a spectrogram, a spectrogram becomes tokens:

        encoder.front_end(wave (B, samples) at encoder.rate) -> spectrogram, float32
        encoder(spectrogram) -> (B, N, D), N = num_prefix_tokens + steps * bands

    Every clip fills one window of `seconds`: shorter ones are padded, of longer ones the first
    window is heard, with a warning. After the prefix tokens (SSLAM's cls) come those of `grid` =
    (time steps, frequency bands), low to high: token num_prefix_tokens + t * bands + f. `window`
    and `filters` (bins, mels) make the spectrogram: no weights, always float32.

    A subclass has `spectrogram`, `forward`, and for public files infer_config(state, names) ->
    Config: state is the renamed tensors, in which it may drop or cut some; names all of the file's.
    """
    Config = None           # a dataclass of sizes, `width` and `seconds` among them
    sizes = {}              # name: a Config
    general = True          # for any sound: PAL sends its tokens LAL's way; False for speech
    pool_size = 1           # how many tokens AudioLLM averages into one for a connector
    num_prefix_tokens = 0   # leading tokens that belong to no time
    frozen = True           # not trained; AudioLLM minds it
    checkpoint_path = None  # the public file that the weights came from
    key_map = ()            # (pattern, replacement), in turn: a public file's names -> ours
    ignored_keys = r"$^"    # which names, once mapped, load_encoder leaves out

    def __init__(self, config):
        super().__init__()
        self.config, self.width, self.seconds = config, config.width, config.seconds

    def steps(self, seconds):
        """How many of the grid's time steps, from the first, carry a clip of so many seconds."""
        steps = self.grid[0]
        return min(steps, max(1, math.ceil(round(seconds * steps / self.seconds, 6))))

    def num_tokens(self, seconds):
        """How many tokens, from the first, carry a clip of so many seconds; the rest is padding."""
        return self.num_prefix_tokens + self.steps(seconds) * self.grid[1]

    @torch.no_grad()
    def front_end(self, wave):
        """(B, samples) -> this encoder's spectrogram. Clips of unequal length come as a list of
        (samples,): each is padded as if it were alone, which padded waves would not be."""
        if isinstance(wave, (list, tuple)):
            return torch.cat([self.front_end(clip[None]) for clip in wave])
        assert wave.ndim == 2 and wave.shape[1] > 0, f"wanted (B, samples), got {wave.shape}"
        if wave.shape[1] > math.ceil(self.seconds * self.rate):
            warnings.warn(f"{type(self).__name__} hears the first {self.seconds:g} s of a clip; "
                          "some are longer", stacklevel=3)  # the caller's line, past no_grad
        return self.spectrogram(wave.float())


class Block(nn.Module):
    """The parts of a transformer block under timm's names, which SSLAM and CLAP share."""

    def __init__(self, width, heads, eps=1e-5):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width),
                                   "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps)
        fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def attend(self, x, mask=None):
        q, k, v = self.attn["qkv"](x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, N, D/H)
        return self.attn["proj"](x.transpose(1, 2).flatten(2))  # (B, N, D)


def sinusoids(positions, omega):
    """(n,), (m,) -> (n, 2m) float32: sines of position * omega, then cosines."""
    angle = positions[:, None] * omega
    return torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32))


# ------------------ Whisper (Radford et al. 2022; names and sizes of openai/whisper), for speech

@dataclass(frozen=True)
class WhisperConfig:
    mels: int = 80
    width: int = 384
    layers: int = 4
    seconds: float = 30.0


class WhisperBlock(nn.Module):
    """Pre-LN: each part reads a normalised copy and adds to the stream."""

    def __init__(self, width):
        super().__init__()
        self.attn = nn.ModuleDict({  # a bias of the keys would shift all scores alike
            name: nn.Linear(width, width, bias=name != "key")
            for name in ("query", "key", "value", "out")})
        self.attn_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x):
        y = self.attn_ln(x)
        q, k, v = (self.attn[name](y).unflatten(-1, (-1, 64)).transpose(1, 2)  # (B, H, N, 64)
                   for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        x = x + self.attn["out"](y)
        return x + self.mlp(self.mlp_ln(x))


class Whisper(Encoder):
    """Spectrogram (B, M, F), a frame each 10 ms -> (B, F/2, D), a token each 20 ms."""
    Config = WhisperConfig
    sizes = {"tiny": WhisperConfig(), "base": WhisperConfig(width=512, layers=6),
             "small": WhisperConfig(width=768, layers=12),
             "medium": WhisperConfig(width=1024, layers=24),
             "large-v2": WhisperConfig(width=1280, layers=32),
             "large-v3": WhisperConfig(mels=128, width=1280, layers=32),  # and turbo
             "mini": WhisperConfig(width=128, layers=3, seconds=4.0)}
    general = False  # it hears speech
    pool_size = 4
    rate = 16000
    key_map = (
        (r"^encoder\.", ""),  # openai/whisper; Hugging Face, as all that follows
        (r"^layers\.", "blocks."), (r"^layer_norm\.", "ln_post."),
        (r"^embed_positions\.weight", "positional_embedding"),
        (r"\.self_attn_layer_norm\.", ".attn_ln."), (r"\.final_layer_norm\.", ".mlp_ln."),
        (r"\.self_attn\.q_proj\.", ".attn.query."), (r"\.self_attn\.k_proj\.", ".attn.key."),
        (r"\.self_attn\.v_proj\.", ".attn.value."), (r"\.self_attn\.out_proj\.", ".attn.out."),
        (r"\.fc1\.", ".mlp.0."), (r"\.fc2\.", ".mlp.2."))
    ignored_keys = r"decoder\.|proj_out\.|projector\.|classifier\.|layer_weights$"

    def __init__(self, config):
        super().__init__(config)
        d = config.width
        self.frames = round(config.seconds * 100)
        self.grid = (math.ceil(self.frames / 2), 1)
        self.window = torch.from_numpy(np.hanning(401)[:-1].astype(np.float32))  # periodic
        self.filters = mel_filters(config.mels, 201, self.rate, 0, 8000)
        self.conv1 = nn.Conv1d(config.mels, d, 3, padding=1)
        self.conv2 = nn.Conv1d(d, d, 3, stride=2, padding=1)
        omega = 10000.0 ** -(np.arange(d // 2) / (d // 2 - 1))
        self.register_buffer("positional_embedding", sinusoids(np.arange(self.grid[0]), omega))
        self.blocks = nn.Sequential(*(WhisperBlock(d) for _ in range(config.layers)))
        self.ln_post = nn.LayerNorm(d)

    def crop(self, seconds):
        """Hear no more than so many seconds from now on: a shorter window has fewer tokens, and
        short clips need less work. The tokens differ a little, as they see less silence."""
        self.config = replace(self.config, seconds=min(seconds, self.seconds))
        self.seconds = self.config.seconds
        self.frames = round(self.seconds * 100)
        self.grid = (math.ceil(self.frames / 2), 1)
        self.positional_embedding = self.positional_embedding[:self.grid[0]].clone()

    def spectrogram(self, wave):
        """(B, samples) -> (B, M, F): the wave is padded with zeros or cut to F * 160 samples; x is
        log10 of its mel power (at least 1e-10) without the last frame, no more than 8 below the
        clip's largest; the result is (x + 4) / 4."""
        samples = self.frames * 160
        wave = F.pad(wave, (0, samples - wave.shape[1]))  # cuts if that is negative
        x = power_spectrum(wave, self.window, 160)[:, :-1] @ self.filters.to(wave.device)
        x = x.clamp(min=1e-10).log10()
        x = torch.maximum(x, x.amax((1, 2), keepdim=True) - 8)  # 80 dB below each clip's own peak
        return ((x + 4) / 4).transpose(1, 2)  # (B, F, M) -> (B, M, F)

    def forward(self, x):
        x = F.gelu(self.conv1(x.to(self.conv1.weight.dtype)))  # (B, M, F) -> (B, D, F)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, F/2, D)
        x = x.contiguous() + self.positional_embedding[:x.shape[1]]  # or each norm would copy it
        return self.ln_post(self.blocks(x))

    @staticmethod
    def infer_config(state, names):
        length, width = state["positional_embedding"].shape
        mels = state["conv1.weight"].shape[1]
        if mels > 201 or width % 64:
            raise ValueError(f"with {mels} mel bands, {width} wide")
        return WhisperConfig(mels, width, count_modules(state, "blocks."), seconds=length / 50)


# ------ SSLAM (Alex et al., ICLR 2025; built as EAT, names of its Hugging Face port), for sounds

@dataclass(frozen=True)
class SSLAMConfig:
    width: int = 768
    layers: int = 12
    seconds: float = 10.24  # 1024 frames of 10 ms; frames come in columns of 16


class SSLAMBlock(Block):
    """Post-LN: the stream itself is normalised after each part."""

    def forward(self, x):
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))


class SSLAM(Encoder):
    """Spectrogram (B, 1, F, 128), a frame each 10 ms -> (B, 1 + F/16 * 8, D): cls, then patches."""
    Config = SSLAMConfig
    sizes = {"base": SSLAMConfig(),
             "large": SSLAMConfig(width=1024, layers=24),  # EAT-large
             "mini": SSLAMConfig(width=128, layers=3, seconds=4.0)}
    rate = 16000
    pool_size = 4
    num_prefix_tokens = 1  # cls
    key_map = (
        (r"^modality_encoders\.IMAGE\.(context_encoder\.norm\.)", "pre_norm."),
        (r"^modality_encoders\.IMAGE\.", ""))
    # decoders and heads
    ignored_keys = r"(shared_)?decoder\.|recon_proj\.|cls_proj\.|center$|fc_norm\.|head\."

    def __init__(self, config):
        super().__init__(config)
        d = config.width
        self.frames = round(config.seconds * 100)
        assert self.frames % 16 == 0, f"{config.seconds} s are not a multiple of 0.16 s"
        self.grid = (self.frames // 16, 8)
        self.window = torch.from_numpy(np.hanning(400).astype(np.float32))  # not periodic
        self.filters = mel_filters(128, 257, self.rate, 20, 8000, "kaldi")
        self.extra_tokens = nn.Parameter(nn.init.uniform_(torch.empty(1, 1, d), -0.03, 0.03))
        self.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(1, d, 16, stride=16)})
        # The first half of the width tells a patch's band, the second its time.
        t, f = np.divmod(np.arange(self.frames // 2), 8)
        omega = 10000.0 ** -(np.arange(d // 4) / (d // 4))
        positions = torch.cat([sinusoids(f, omega), sinusoids(t, omega)], 1)[None]  # (1, N, D)
        self.fixed_positional_encoder = nn.Module()
        self.fixed_positional_encoder.register_buffer("positions", positions)
        self.pre_norm = nn.LayerNorm(d, eps=1e-6)
        self.blocks = nn.Sequential(*(SSLAMBlock(d, d // 64, 1e-6) for _ in range(config.layers)))

    def spectrogram(self, wave):
        wave = F.pad(wave, (0, max(0, 400 - wave.shape[1])))  # at least one frame
        x = wave[:, :240 + self.frames * 160].unfold(1, 400, 160)  # (B, F, 400)
        x = x - x.mean(2, keepdim=True)  # which undoes any offset of the whole clip as well
        x = x - 0.97 * F.pad(x, (1, 0))[..., :-1]  # pre-emphasis; the window is 0 where it starts
        x = torch.fft.rfft(x * self.window.to(x.device), 512)
        x = (x.real.square() + x.imag.square()) @ self.filters.to(wave.device)
        x = x.clamp(min=2.0 ** -23).log()
        # Zeros first, normalisation after: to the model padding is 0.467, not 0 and not silence.
        x = F.pad(x, (0, 0, 0, self.frames - x.shape[1]))
        return ((x + 4.268) / (2 * 4.569))[:, None]  # (B, 1, F, 128)

    def forward(self, x):
        proj = self.local_encoder["proj"]
        x = proj(x.to(proj.weight.dtype)).flatten(2).transpose(1, 2)  # (B, F/16 * 8, D)
        x = x + self.fixed_positional_encoder.positions[:, :x.shape[1]]
        x = torch.cat([self.extra_tokens.expand(len(x), -1, -1), x], 1)  # cls has no position
        return self.blocks(self.pre_norm(x))

    @staticmethod
    def infer_config(state, names):
        name = "fixed_positional_encoder.positions"
        _, length, width = state[name].shape
        columns = min(64, length // 8)  # some files have positions for 122 s
        state[name] = state[name][:, :columns * 8]
        return SSLAMConfig(width, count_modules(state, "blocks."), seconds=columns * 0.16)


# ------------------ CLAP (Wu et al. 2022, Elizalde et al. 2023; names of laion_clap), for sounds

@dataclass(frozen=True)
class CLAPConfig:
    width: int = 96         # of the first stage; each further one doubles it and halves the map
    depths: tuple = (2, 2, 6, 2)
    heads: int = 4          # of the first stage, doubled along with the width
    image: int = 256        # side of the square that the spectrogram is folded into
    seconds: float = 10.0
    rate: int = 48000
    hop: int = 480
    scale: str = "slaney"   # of the mel filters, or htk
    high: float = 14000.0   # where the mel filters end, in Hz
    bank_rate: int = 48000  # Microsoft's filters were made for 32 kHz, its sound is at 44.1
    repeat_to_fill: bool = False  # short clips: repeat to the end, or whole copies, then zeros


class SwinBlock(Block):
    """Pre-LN; attention inside windows of 8 x 8, moved by half a window in every other block."""

    def __init__(self, width, heads, side, shift):
        super().__init__(width, heads)
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros(15 * 15, heads))
        self.shift = shift
        y, x = np.divmod(np.arange(64), 8)
        index = (y[:, None] - y + 7) * 15 + (x[:, None] - x + 7)  # query minus key
        self.register_buffer("index", torch.from_numpy(index), persistent=False)
        # After a shift the last windows hold what lies at opposite edges: kept apart by the mask.
        i = np.arange(side)
        edge = 1 * (i >= side - 8) + (i >= side - shift)
        region = into_windows(torch.from_numpy(3 * edge[:, None] + edge)[None, :, :, None])
        mask = -100.0 * (region != region.transpose(1, 2))[:, None]  # (nW, 1, 64, 64)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        B, R = x.shape[:2]  # x is (B, R, R, D)
        bias = self.attn.relative_position_bias_table[self.index].permute(2, 0, 1)[None]
        y = self.norm1(x)
        if self.shift:
            bias = (bias + self.mask.to(bias.dtype)).repeat(B, 1, 1, 1)  # (1 or B nW, H, 64, 64)
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = self.attend(into_windows(y), bias)
        y = y.view(B, R // 8, R // 8, 8, 8, -1).transpose(2, 3).reshape(x.shape)
        x = x + (y.roll((self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.mlp(self.norm2(x))


def into_windows(x):
    """(B, R, R, D) -> (B nW, 64, D), windows row by row."""
    B, R, _, D = x.shape
    return x.view(B, R // 8, 8, R // 8, 8, D).transpose(2, 3).reshape(-1, 64, D)


class PatchMerging(nn.Module):
    """(B, R, R, D) -> (B, R/2, R/2, 2D)"""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = torch.cat([x[:, y::2, z::2] for z in (0, 1) for y in (0, 1)], -1)  # (B, R/2, R/2, 4D)
        return self.reduction(self.norm(x))


class CLAP(Encoder):
    """Spectrogram (B, 1, F, 64) -> (B, N, D); the real sizes have 32 time steps x 2 bands.

    HTSAT is a Swin transformer made for square images. The long, low spectrogram is stretched to
    image^2 / 64 frames and cut in image / 64 pieces, which are laid one below the other.
    """
    Config = CLAPConfig
    sizes = {"tiny": CLAPConfig(),  # clap-htsat-unfused
             "fused": CLAPConfig(scale="htk"),  # fuses parts of clips longer than 10 s
             "base": CLAPConfig(width=128, depths=(2, 2, 12, 2)),  # larger_clap_*
             "microsoft": CLAPConfig(seconds=7.0, rate=44100, hop=320, bank_rate=32000,
                                     repeat_to_fill=True),
             "mini": CLAPConfig(width=32, depths=(2, 2, 2), heads=2, image=128, seconds=4.0,
                                rate=16000, hop=256, high=8000.0, bank_rate=16000)}
    pool_size = 2
    key_map = (
        (r"^(audio_branch|audio_encoder\.base\.htsat)\.", ""),  # laion_clap; Microsoft
        (r"^(audio_model\.)?audio_encoder\.", ""),  # Hugging Face, as all that follows
        (r"^batch_norm\.", "bn0."), (r"^logmel_extractor\.melW$", "filters"),
        (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.self\.(query|key|value)\.", r".attn.qkv.\1."),  # joined on loading
        (r"\.attention\.self\.", ".attn."), (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."))
    # text towers, heads, copies of what is computed here, what long clips alone need
    ignored_keys = (r"text_|caption_encoder\.|logit_scale|(audio_)?projection\.|audio_transform\.|"
                    r"spectrogram_extractor\.|tscam_conv\.|head\.|"
                    r".*\.(attn_mask|relative_position_index)$|"
                    r".*\b(mel_conv[12]d|fusion_model)\.")

    def __init__(self, config):
        super().__init__(config)
        self.rate, d = config.rate, config.width
        self.pieces = config.image // 64
        self.frames = config.image * self.pieces
        self.samples = round(config.seconds * config.rate)
        assert 1 + self.samples // config.hop <= self.frames, f"{config} is too long for its image"
        self.window = torch.from_numpy(np.hanning(1025)[:-1].astype(np.float32))
        self.filters = mel_filters(64, 513, config.bank_rate, 50, config.high, config.scale)
        self.bn0 = nn.BatchNorm2d(64)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, d, 4, 4), "norm": nn.LayerNorm(d)})
        self.layers = nn.Sequential()
        for i, depth in enumerate(config.depths):
            r = config.image // 4 >> i  # side of this stage's map
            blocks = (SwinBlock(d << i, config.heads << i, r, 4 if j % 2 and r > 8 else 0)
                      for j in range(depth))
            stage = OrderedDict(blocks=nn.Sequential(*blocks))
            if i < len(config.depths) - 1:
                stage["downsample"] = PatchMerging(d << i)
            self.layers.append(nn.Sequential(stage))
        self.width = d << i
        self.norm = nn.LayerNorm(self.width)
        self.grid = (self.pieces * r, r // self.pieces)

    def spectrogram(self, wave):
        wave = wave[:, :self.samples]
        wave = wave.repeat(1, self.samples // wave.shape[1] + self.config.repeat_to_fill)
        wave = F.pad(wave, (0, self.samples - wave.shape[1]))  # cuts if that is negative
        mel = power_spectrum(wave, self.window, self.config.hop) @ self.filters.to(wave.device)
        return 10 * mel.clamp(min=1e-10).log10()[:, None]  # (B, 1, F, 64), in dB

    def forward(self, x):
        x = x.to(self.norm.weight.dtype).transpose(1, 3)
        x = self.bn0(x).transpose(1, 3)  # each mel band on its own scale
        x = F.interpolate(x, (self.frames, 64), mode="bicubic", align_corners=True)
        x = x.unflatten(2, (self.pieces, -1)).transpose(3, 4).flatten(2, 3)  # (B, 1, image, image)
        x = self.patch_embed["proj"](x).permute(0, 2, 3, 1)  # (B, R, R, D), R = image / 4
        x = self.norm(self.layers(self.patch_embed["norm"](x)))
        x = x.unflatten(1, (self.pieces, -1))  # (B, pieces, bands, steps in one, D)
        return x.transpose(2, 3).flatten(1, 3)  # (B, steps * bands, D)

    @staticmethod
    def infer_config(state, names):
        size = "microsoft" if "audio_encoder.base.htsat." in names else "tiny"
        if size == "tiny" and re.search(r"mel_conv[12]d\.|fusion_model\.", names):
            size = "fused"
            state.pop("filters", None)  # they are in the file, but its training did not use them
        depths = [count_modules(state, f"layers.{i}.blocks.")
                  for i in range(count_modules(state, "layers."))]
        bias_table = state["layers.0.blocks.0.attn.relative_position_bias_table"]
        return replace(CLAP.sizes[size], width=len(state["patch_embed.proj.weight"]),
                       depths=tuple(depths), heads=bias_table.shape[1])


# ---------------------------------------------------------------------------- public checkpoints

ENCODERS = {"whisper": Whisper, "sslam": SSLAM, "clap": CLAP}


def make_encoder(kind, size="mini"):
    """A new encoder with random weights, of one of ENCODERS[kind].sizes."""
    return ENCODERS[kind](ENCODERS[kind].sizes[size])


def load_encoder(kind, path, dtype=torch.float32):
    """Open a public checkpoint, a file or a Hugging Face folder, as ENCODERS[kind], in eval mode.

    Its form and sizes are read off its tensors: Whisper of openai/whisper and Hugging Face; SSLAM
    of fairseq, pre-trained and fine-tuned, and Hugging Face; CLAP of laion_clap, fused or not,
    Hugging Face, and Microsoft 2023. A file whose numbers have this `dtype` is mapped, not copied.
    ValueError, one line: what is missing or misshapen.
    """
    encoder_class, tensors = ENCODERS[kind], load_tensors(path)
    names = list(tensors)
    with as_value_error(path, f"{kind} encoder among its {len(names)} tensors"):
        state = rename_keys(encoder_class, strip_prefixes(tensors))
        config = encoder_class.infer_config(state, " ".join(names))
        with build_for(state):
            encoder = encoder_class(config)
        filters = state.pop("filters", encoder.filters)  # CLAP's files may bring their own
        if filters.shape != encoder.filters.shape or not filters.is_floating_point():
            raise ValueError(f"its mel filters are {filters.dtype} {tuple(filters.shape)}, not "
                             f"{tuple(encoder.filters.shape)}")
    load_weights(encoder, state, f"{path}: not quite a {kind} encoder", dtype)
    encoder.filters, encoder.checkpoint_path = filters.float(), str(path)
    return encoder.eval()


def rename_keys(encoder_class, tensors):
    """The encoder's own tensors, by the names that they have here. Empties `tensors`, so that what
    is put together anew, or not needed, does not stay in memory."""
    state = {}
    while tensors:
        name, tensor = tensors.popitem()
        for pattern, replacement in encoder_class.key_map:
            name = re.sub(pattern, replacement, name)
        if re.match(encoder_class.ignored_keys, name):
            continue
        if name in state or not holds_numbers(tensor):
            raise ValueError(f"{name} is there twice, or has not the numbers of its shape")
        state[name] = tensor
    for name in [name for name in state if ".qkv.query." in name]:
        parts = [name.replace("qkv.query", f"qkv.{part}") for part in ("query", "key", "value")]
        if all(part in state and state[part].shape == state[name].shape for part in parts):
            joined = torch.cat([state.pop(part) for part in parts])
            state[name.replace("qkv.query", "qkv")] = joined
    return state


def count_modules(state, prefix):
    """How many modules there are in the list `prefix`."""
    count = len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})
    if count > 200:
        raise ValueError(f"{count} modules {prefix}")
    return count
