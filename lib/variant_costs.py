"""What attn, ffn, hybrid, residual and flamingo cost: exact counts of matrix products and of what
is saved, and a step to be measured. (pal-summary is in bench.py itself.)

    python bench.py --measure nothing      # the table of costs has them beside PLITS, LAL and PAL

In all of them N audio tokens come before T text tokens in the same LLM. They differ in what the
audio does at each layer. Figures are of one step of B rows, without LoRA or frozen parts.

c an LLMConfig, D width of the LLM, Hd and Kd widths of all its queries and of all its keys.
"""
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import nn

from integrate import Segment, prefill
from lib.variants import (GatedCrossAttention, read_audio, write_attention_only,
                          write_feed_forward_only, write_flamingo, write_hybrid, write_residual)

VARIANTS = ("attn", "ffn", "hybrid", "residual", "flamingo")


class Layer(NamedTuple):
    """How many tokens take part in what, at one layer."""
    queries: int       # ask: W_Q x, and their pairs with all keys up to their own
    outputs: int       # pass W_O
    keys: int          # leave keys and values: W_K x, W_V x
    feed_forward: int


def widths(c):
    """D, Hd, Kd: widths of the residual stream, of all queries, of all keys."""
    return c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


def audio_layers(c, mode, N):
    """The Layer of N audio tokens at each layer of the LLM."""
    run, written, absent = Layer(N, N, N, N), Layer(0, 0, N, 0), Layer(0, 0, 0, 0)
    L = c.num_hidden_layers
    return {"attn": [Layer(N, N, N, 0)] * L, "ffn": [Layer(0, 0, N, N)] * L,
            "hybrid": [written if i % 2 else run for i in range(L)],
            "residual": [Layer(0, N, N, 0)] * L, "flamingo": [absent] * L}[mode]


def count_pairs(audio, T, causal):
    """Query-key pairs of a row and head: the audio's among themselves, and of T text tokens with
    the audio's keys and each other. causal: only those where the query sees the key."""
    hidden = causal * (audio.queries * (audio.queries - 1) + T * (T - 1)) // 2
    return audio.queries ** 2 + T * (audio.keys + T) - hidden


def layer_flops(c, layer, pairs):
    """FLOPs of a layer: 2 m k n for each product of (m, k) and (k, n)."""
    D, Hd, Kd = widths(c)
    return {"q, o": 2 * D * Hd * (layer.queries + layer.outputs),
            "k, v": 2 * D * 2 * Kd * layer.keys,
            "attention": 2 * 2 * Hd * pairs,
            "feed-forward": 2 * D * 3 * c.intermediate_size * layer.feed_forward}


def forward_flops(c, mode, B, N, T, causal=False):
    """FLOPs of one forward pass with logits at every text token, part by part."""
    D = c.hidden_size
    parts = {"logits": B * T * 2 * D * c.vocab_size}
    for audio in audio_layers(c, mode, N):
        both = Layer(*(n + T for n in audio))
        for name, flops in layer_flops(c, both, count_pairs(audio, T, causal)).items():
            parts[name] = parts.get(name, 0) + B * flops
    if mode == "flamingo":  # q and out, k and v of the audio, attention, an MLP of width 4 D
        gated = 2 * T * 2 * D * D + N * 2 * D * 2 * D + 2 * T * N * 2 * D + 2 * T * 2 * D * 4 * D
        parts["gated layers"] = c.num_hidden_layers * B * gated
    return parts


def backward_flops(c, mode, B, N, T, causal=False):
    """FLOPs of the backward pass: twice the forward pass, but for what nothing reads: what the
    audio computes at the last layer after its keys and values."""
    audio = audio_layers(c, mode, N)[-1]
    unread = layer_flops(c, audio._replace(keys=0), count_pairs(audio._replace(keys=0), 0, causal))
    return 2 * sum(forward_flops(c, mode, B, N, T, causal).values()) - 2 * B * sum(unread.values())


def cache_bytes(c, mode, B, N, T, size):
    """Bytes of what a question reads of the audio, and of its own keys and values."""
    Kd, flamingo = c.num_key_value_heads * c.head_dim, mode == "flamingo"
    numbers = T * Kd + N * (c.hidden_size if flamingo else Kd)
    return 2 * size * B * c.num_hidden_layers * numbers


def saved_activation_bytes(c, mode, B, N, T, size, fused=True):
    """Bytes that the forward pass saves for the backward pass, as bench.py's function of this name
    counts them; logits left out."""
    D, Hd, Kd = widths(c)
    layers, last = audio_layers(c, mode, N), c.num_hidden_layers - 1
    norm = D if fused else 2 * D              # x, and x / rms for the gain's gradient
    numbers, float32 = T * (norm + D), T      # last norm, the logits' input
    for i, audio in enumerate(layers):
        keys = audio.keys + T
        numbers += keys * (norm + D + 2 * Kd)  # the first norm and its output; k, v
        float32 += keys
        if i == last:                          # nothing reads what the audio does after that
            audio = Layer(0, 0, 0, 0)
        queries, feed_forward = audio.queries + T, audio.feed_forward + T
        numbers += 2 * Hd * queries            # q, softmax(...) v
        numbers += 2 * Kd * audio.queries      # k, v once more: of the audio's own pass
        float32 += c.num_attention_heads * queries
        numbers += feed_forward * (norm + D + 4 * c.intermediate_size)
        float32 += feed_forward
        if mode == "residual":
            numbers += audio.outputs * (Hd + D)  # v for each head, W_O v
        if mode == "ffn" or mode == "hybrid" and i % 2:
            numbers -= audio.keys * D          # both norms, or those of two layers, save the same x
    mask_keys = N + T
    if mode == "flamingo":
        mask_keys = T
        # two norms and their outputs, q, what is read, W_O of it, the MLP: in, out
        text = T * (4 * D + 2 * D + D + 8 * D + D)
        numbers += len(layers) * (text + N * 2 * D + N) + N * D  # k, v, the mask; the audio
        float32 += len(layers) * T * (2 + 2 + c.num_attention_heads)
    shared = 2 * mask_keys * c.head_dim        # cos and sin of the positions
    if not fused and 1 < T < mask_keys:
        shared += T * mask_keys                # the mask
    return size * (B * numbers + shared) + 4 * B * float32


def variant_flops(c, mode, B, N, T):
    """FLOPs of a training step."""
    return sum(forward_flops(c, mode, B, N, T).values()) + backward_flops(c, mode, B, N, T)


def variant_costs(c, mode, B, N, T):
    """A row of bench.py's table of costs: GFLOPs, and MB at 2 bytes a number."""
    parts = {name: flops / 1e9 for name, flops in forward_flops(c, mode, B, N, T).items()}
    return {"mode": mode, **parts, "forward": sum(parts.values()),
            "backward": backward_flops(c, mode, B, N, T) / 1e9,
            "saved MB": saved_activation_bytes(c, mode, B, N, T, 2) / 1e6,
            "cache MB": cache_bytes(c, mode, B, N, T, 2) / 1e6}


def make_variant(llm, mode):
    """(the function that writes audio into a cache in this mode, its own parameters, and a forward
    pre-hook for each block, if it has any) for an LLM."""
    if mode == "residual":
        shares = nn.Parameter(next(llm.parameters()).new_zeros(llm.config.num_hidden_layers))
        return partial(write_residual, shares), [shares], []
    if mode == "flamingo":
        c, like = llm.config, next(llm.parameters())
        gated = nn.ModuleList(GatedCrossAttention(c.hidden_size, c.num_attention_heads)
                              for _ in range(c.num_hidden_layers)).to(like)
        hooks = [partial(read_audio, layer, n) for n, layer in enumerate(gated)]
        return partial(write_flamingo, gated), list(gated.parameters()), hooks
    write = {"attn": write_attention_only, "ffn": write_feed_forward_only, "hybrid": write_hybrid}
    return write[mode], [], []


def cross_entropy(logits, ids):
    """The mean over all tokens, of logits (B, T, V) and ids (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def variant_loss(llm, variant, ids, audio):
    """Cross-entropy of ids (B, T) at their own places, after audio (B, N, D). variant: as
    make_variant gives it."""
    write, _, hooks = variant
    handles = [block.register_forward_pre_hook(hook)
               for block, hook in zip(llm.model.layers, hooks)]
    segments = [Segment("lal", audio), Segment("plits", llm.embed(ids))]
    hidden = prefill(llm, segments, write=write)
    for handle in handles:
        handle.remove()
    return cross_entropy(llm.head(hidden), ids)


def variant_step(llm, mode, ids, audio):
    """A training step, forward and backward, as a function to be called."""
    variant = make_variant(llm, mode)

    def step():
        llm.zero_grad(set_to_none=True)
        for p in variant[1]:
            p.grad = None
        variant_loss(llm, variant, ids, audio).backward()

    return step
