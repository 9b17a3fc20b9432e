"""Modes that the paper's version 2 does not have, for comparison.

attn, ffn: audio tokens that run only the attention, or only the feed-forward part, of every layer.
hybrid: they run every second layer, and are keys and values only in the others.
residual: LAL's tokens, moved on from layer to layer by a learnt share of what they would say to
themselves. Its absence is held against LAL in arXiv 2606.20077, which also has the hybrid.
pal-summary: PAL as the paper's version 3 has it. A few learnt summaries of each connector's tokens
go the PLITS way, all of the tokens LAL's.
flamingo: gated cross-attention (Alayrac et al. 2022): layers of its own, in front of the LLM's,
read the audio, which takes no position among the text.

integrate.py imports this file at its end, so that its MODES holds these too. Try:

    python train.py --mode pal-summary

B batch, T text tokens, N audio tokens, L queries, D width, H heads, d head width.
"""
from functools import partial
from itertools import product

import torch
from torch import nn

from encoders import ENCODERS
from integrate import MODES, CrossAttentionBlock, Segment, valid_mask
from model import PAD_POSITION, attention_mask, rotary, rotate


def announce(llm, audio, cache, positions):
    """Make room for audio tokens (B, N, D) in every layer: their rotary angles, and their mask."""
    positions = cache.extend(audio, positions)
    mask = attention_mask(positions, cache.positions[0], cache.in_order, audio.dtype)
    return rotary(positions, llm.config, audio.dtype), mask


def write_attention_only(llm, audio, route, cache, layers=None, positions=None):
    """Run audio tokens (B, N, D) through the attention of every layer, without feed-forward."""
    angles, mask = announce(llm, audio, cache, positions)
    x = audio
    for i, block in enumerate(llm.model.layers):
        x = x + block.self_attn(block.input_layernorm(x), angles, mask, cache, i)


def write_layer(block, x, angles, cache, i):
    """Write the keys and values of tokens (B, N, D) at layer i; returns the values (B, N, K, d)."""
    attention, normalized = block.self_attn, block.input_layernorm(x)
    k = attention.split_heads(attention.k_proj(normalized))  # (B, N, K, d)
    v = attention.split_heads(attention.v_proj(normalized))
    cache.append(i, rotate(k, angles), v)
    return v


def write_feed_forward_only(llm, audio, route, cache, layers=None, positions=None):
    """Run audio tokens (B, N, D) through the feed-forward part of every layer, without attention;
    each layer's keys and values are those of what the layers before it made."""
    angles = rotary(cache.extend(audio, positions), llm.config, audio.dtype)
    x = audio
    for i, block in enumerate(llm.model.layers):
        write_layer(block, x, angles, cache, i)
        x = x + block.mlp(block.post_attention_layernorm(x))


def write_hybrid(llm, audio, route, cache, layers=None, positions=None):
    """Run audio tokens (B, N, D) through layers 0, 2, 4 and so on; write them in the others."""
    angles, mask = announce(llm, audio, cache, positions)
    x = audio
    for i, block in enumerate(llm.model.layers):
        if i % 2:
            write_layer(block, x, angles, cache, i)
        else:
            x = block(x, angles, mask, cache, i)


def write_residual(shares, llm, audio, route, cache, layers=None, positions=None):
    """Write audio tokens (B, N, D), which move on from layer to layer: x + tanh(share) W_O v, as if
    each token attended to itself alone. shares (layers,) are learnt, from 0 on, which is LAL."""
    angles = rotary(cache.extend(audio, positions), llm.config, audio.dtype)
    x = audio
    for i, (block, share) in enumerate(zip(llm.model.layers, shares.tanh())):
        v = write_layer(block, x, angles, cache, i)
        groups = llm.config.num_attention_heads // v.shape[2]
        x = x + share * block.self_attn.o_proj(v.repeat_interleave(groups, dim=2).flatten(2))


def add_residual(model):
    shares = nn.ParameterList([torch.zeros(model.llm.config.num_hidden_layers)])
    model.connectors["residual"] = shares
    model.write = lambda *args: write_residual(shares[0], *args)  # loading replaces shares[0]


class Summary(nn.Module):
    """Learnt pooling: each of `count` queries q_l averages the audio tokens a_n (B, N, D) with
    weights softmax_n(q_l a_n / sqrt(D)) -> (B, L, D)."""

    def __init__(self, count, width):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, width) / width ** 0.5)

    def forward(self, audio, lengths):
        scores = self.queries @ audio.mT / audio.shape[-1] ** 0.5  # (B, L, N)
        scores = scores.masked_fill(~valid_mask(audio, lengths)[:, None], -torch.inf)
        return scores.softmax(dim=-1) @ audio


def add_summaries(model):
    """Let an AudioLLM hear summaries of its connectors' tokens the PLITS way, then all of the
    tokens LAL's way. Summaries come first, so that they see nothing of the audio's keys."""
    width = model.llm.config.hidden_size
    model.connectors["summaries"] = nn.ModuleList(
        Summary(model.config.summary_tokens, width) for _ in list(model.connectors))
    model.routes = dict.fromkeys(model.routes, "lal")
    model.segments = partial(segments_with_summaries, model, model.segments)


def segments_with_summaries(model, segments, features):
    start, *audio = segments(features)
    summaries = [Segment("plits", summary(segment.tokens, segment.lengths))
                 for summary, segment in zip(model.connectors["summaries"], audio)]
    return [start, *summaries, *audio]


class GatedCrossAttention(CrossAttentionBlock):
    """Flamingo's layer: x + tanh(a) attention(x, audio), then x + tanh(b) MLP(LayerNorm x).

    a and b are learnt from 0 on, so that at first the LLM is as it was without audio.
    """

    def __init__(self, width, heads):
        super().__init__(width, 1, heads, mlp_width=4 * width)
        self.gates = nn.Parameter(torch.zeros(2))

    def forward(self, x, k, v, mask):
        a, b = self.gates.tanh()
        x = x + a * self.attend(x, k, v, mask)
        return x + b * self.mlp(self.norm2(x))  # (B, T, D)


def add_flamingo(model):
    """Put gated layers in front of every `flamingo_every`-th layer of an AudioLLM's LLM."""
    c = model.llm.config
    layers = range(0, c.num_hidden_layers, model.config.flamingo_every)
    gated = nn.ModuleList(GatedCrossAttention(c.hidden_size, c.num_attention_heads)
                          for _ in layers)
    model.connectors["flamingo"] = gated
    model.write = partial(write_flamingo, gated)
    for n, i in enumerate(layers):
        model.llm.model.layers[i].register_forward_pre_hook(partial(read_audio, gated[n], n))


def write_flamingo(gated, llm, audio, route, cache, layers=None, positions=None):
    """Keep the audio's keys and values (B, N, H, d) for each gated layer in the cache's `extra`, so
    that a clip is heard once for many questions. It takes no place among the positions."""
    valid = torch.ones(audio.shape[:2], dtype=torch.bool, device=audio.device)
    cache.extra["audio mask"] = valid if positions is None else positions < PAD_POSITION
    for n, layer in enumerate(gated):
        cache.extra[f"audio keys {n}"], cache.extra[f"audio values {n}"] = layer.project_kv([audio])


def read_audio(gated_layer, n, block, arguments):
    """Forward hook before a block of the LLM: its input x (B, T, D) first reads the audio."""
    x, angles, mask, cache, layer = arguments
    if "audio mask" not in cache.extra:
        return None
    k, v = (cache.extra[f"audio {name} {n}"].expand(len(x), -1, -1, -1)  # (B, N, H, d)
            for name in ("keys", "values"))
    audio_mask = cache.extra["audio mask"][:, None, None]  # (B, 1, 1, N)
    return gated_layer(x, k, v, audio_mask), angles, mask, cache, layer


def set_write(write, model):
    model.write = write


MODES["attn"] = partial(set_write, write_attention_only)
MODES["ffn"] = partial(set_write, write_feed_forward_only)
MODES["hybrid"] = partial(set_write, write_hybrid)
MODES["residual"] = add_residual
MODES["pal-summary"] = add_summaries
MODES["flamingo"] = add_flamingo

# What bench.py --quality compares: train.py's options of each arm
ARMS = {
    "plits": {"mode": "plits"}, "lal": {}, "pal": {"mode": "pal"}, "attn": {"mode": "attn"},
    "ffn": {"mode": "ffn"}, "flamingo": {"mode": "flamingo"}, "hybrid": {"mode": "hybrid"},
    "residual": {"mode": "residual"}, "pal-summary": {"mode": "pal-summary"},
    "lal-no-rope": {"config": "audio_rope=off"},
    "lal-qformer": {"connector": "qformer"}, "lal-lfst": {"connector": "lfst"},
    "lal-ffn-frozen": {"freeze": "ffn"}, "lal-lora": {"freeze": "lora"},
    "lal-llm-frozen": {"freeze": "llm"}, "plits-llm-frozen": {"freeze": "llm", "mode": "plits"},
    "lal-lower": {"lal_layers": ":2"}, "lal-upper": {"lal_layers": "2:"},
    "clap-plits": {"encoders": "clap", "mode": "plits"}, "clap-lal": {"encoders": "clap"},
    "clap-lal-no-rope": {"encoders": "clap", "config": "audio_rope=off"},
}
# Of one encoder half of the layers alone, and every table of routes that is no mode, named by its
# letters: plp is Whisper PLITS, SSLAM LAL, CLAP PLITS
ARMS |= {f"{kind}-{half}": {"lal_layers": f"{kind}={layers}"} for kind in ENCODERS
         for half, layers in (("lower", ":2"), ("upper", "2:"))}
ARMS |= {"".join(letters): {"routes": ",".join(
             f"{kind}={'plits' if letter == 'p' else 'lal'}"
             for kind, letter in zip(ENCODERS, letters))}
         for letters in product("pl", repeat=3) if "".join(letters) not in ("ppp", "lll", "pll")}
