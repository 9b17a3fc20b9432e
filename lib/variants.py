"""Modes that the paper does not have, for comparison: attn, ffn and flamingo.

attn and ffn lie between PLITS and LAL: audio tokens that run only the attention, or only the
feed-forward part, of every layer. flamingo is gated cross-attention (Alayrac et al. 2022): layers
of its own, in front of the LLM's, read the audio, which takes no position among the text.
integrate.py imports this file at its end, so that its MODES holds these too. Try:

    python train.py --mode flamingo

B batch, T text tokens, N audio tokens, L queries, D width, H heads, d head width.
"""
from functools import partial

import torch
from torch import nn

from integrate import MODES, CrossAttentionBlock
from model import PAD_POSITION, attention_mask, rotary, rotate


def write_attention_only(llm, audio, route, cache, positions=None):
    """Run audio tokens (B, N, D) through the attention of every layer, without feed-forward."""
    positions = cache.extend(audio, positions)
    angles = rotary(positions, llm.config, audio.dtype)
    mask = attention_mask(positions, cache.positions[0], cache.no_padding, audio.dtype)
    x = audio
    for i, block in enumerate(llm.model.layers):
        x = x + block.self_attn(block.input_layernorm(x), angles, mask, cache, i)


def write_feed_forward_only(llm, audio, route, cache, positions=None):
    """Run audio tokens (B, N, D) through the feed-forward part of every layer, without attention;
    each layer's keys and values are those of what the layers before it made."""
    angles = rotary(cache.extend(audio, positions), llm.config, audio.dtype)
    x = audio
    for i, block in enumerate(llm.model.layers):
        attention, normalized = block.self_attn, block.input_layernorm(x)
        k = attention.split_heads(attention.k_proj(normalized))  # (B, N, K, d)
        v = attention.split_heads(attention.v_proj(normalized))
        cache.append(i, rotate(k, angles), v)
        x = x + block.mlp(block.post_attention_layernorm(x))


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


def write_flamingo(gated, llm, audio, route, cache, positions=None):
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


MODES["attn"] = lambda model: setattr(model, "write", write_attention_only)
MODES["ffn"] = lambda model: setattr(model, "write", write_feed_forward_only)
MODES["flamingo"] = add_flamingo
