"""The tests of the exercises, test_exNN_*, which a student's `check NN` runs; and tests that these
work: red for an open exercise, for wrong bodies and for planted bugs, green for the original.

Every exercise has tests of its own, which need as little of the rest as possible. What goes wrong
is said with its shapes and numbers, as it is all that the student is shown.
"""
import functools
import importlib
import json
import math
import re
import shlex
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from exercise_texts import EXERCISES, FILL_INS, HUNTS

import exercises

ROOT = Path(__file__).parents[1]


# --------------------------------------------------------------------------- helpers of the tests

def close(actual, expected, what, atol=1e-9):
    """Two tensors are equal but for rounding; else an AssertionError with shapes and numbers."""
    assert torch.is_tensor(actual), f"{what}: expected a tensor, got {type(actual).__name__}"
    assert actual.shape == expected.shape, (
        f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    difference = (actual.double() - expected.double()).abs().flatten()
    if difference.numel() and not difference.max() <= atol:
        i = int(difference.nan_to_num(torch.inf).argmax())
        raise AssertionError(f"{what}, shape {tuple(expected.shape)}: expected "
                             f"{expected.flatten()[i]:.6g} at number {i}, got "
                             f"{actual.flatten()[i]:.6g}")


def equal(actual, expected, what):
    assert actual == expected, f"{what}: expected {expected}, got {actual}"


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_llm(layers=2, **sizes):
    from model import LLM, LLMConfig
    llm = LLM(LLMConfig(50, 24, 40, layers, 4, 2, 6, **sizes)).double()
    for i, p in enumerate(llm.parameters()):
        p.data = 0.4 * random(*p.shape, seed=i)
    return llm


def rotated(x, positions, theta=10000.0):
    """x (B, T, heads, d) with each pair (i, i + d/2) turned by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


# --------------------------------------------------------------------------------------- fill in

def mel_triangles(mels, bins, rate, low, high, scale):
    """Each filter at each bin, by its definition."""
    def to_mel(f):
        if scale != "slaney":
            return math.log1p(f / 700)
        return 3 * f / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)

    def to_hz(m):
        if scale != "slaney":
            return 700 * math.expm1(m)
        return 200 * m / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    start, end = to_mel(low), to_mel(high)
    mel = [start + (end - start) * i / (mels + 1) for i in range(mels + 2)]
    corners = mel if scale == "kaldi" else [to_hz(m) for m in mel]
    filters = torch.zeros(bins, mels, dtype=torch.float64)
    for k in range(bins):
        x = k * rate / 2 / (bins - 1)
        x = to_mel(x) if scale == "kaldi" else x
        for m, (left, peak, right) in enumerate(zip(corners, corners[1:], corners[2:])):
            height = 2 / (right - left) if scale == "slaney" else 1
            filters[k, m] = height * max(0, min((x - left) / (peak - left),
                                                (right - x) / (right - peak)))
    return filters


def test_ex01_mel_filters():
    from encoders import mel_filters
    for scale in ("slaney", "htk", "kaldi"):
        expected = mel_triangles(20, 201, 16000, 20, 7000, scale)
        actual = mel_filters(20, 201, 16000, 20, 7000, scale)
        close(actual, expected, f"mel_filters(20, 201, 16000, 20, 7000, {scale!r})", 1e-6)
        equal(actual.dtype, torch.float32, "dtype")


def test_ex02_log_mel_spectrogram():
    from encoders import Whisper, WhisperConfig
    encoder = Whisper(WhisperConfig(20, 64, 1, seconds=0.5))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    waves = random(2, 9000) * torch.tensor([[1.0], [1e-3]])  # a loud clip and a soft one
    waves[:, 2000:3000] *= 1e-6  # near silence, for the floor
    for n in (5000, 8000, 9000):
        expected = []
        for wave in waves[:, :n].numpy():
            x = np.pad(wave, (0, max(0, 8000 - n)))[:8000]
            x = np.pad(x, 200, mode="reflect")
            power = [np.abs(np.fft.fft(x[i:i + 400] * window)[:201]) ** 2
                     for i in range(0, 8000, 160)]
            log = np.log10(np.maximum(np.array(power) @ encoder.filters.double().numpy(), 1e-10)).T
            expected.append((np.maximum(log, log.max() - 8) + 4) / 4)
        actual = encoder.spectrogram(waves[:, :n].float())
        close(actual, torch.tensor(np.array(expected)), f"spectrogram of 2 x {n} samples", 2e-3)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def test_ex03_rotary_positions():
    from model import LLMConfig, rotary
    positions = torch.tensor([[0, 1, 5], [2, 9, 40]])
    for scaling in (None, LLAMA3):
        config = LLMConfig(head_dim=8, rope_theta=100.0, rope_scaling=scaling)
        frequencies = []
        for i in range(4):
            w = 100.0 ** (-2 * i / 8)
            if scaling:
                s = min(1, max(0, (64 * w / (2 * math.pi) - 1) / (4 - 1)))
                w *= s + (1 - s) / 8
            frequencies.append(w)
        angles = (positions[..., None] * torch.tensor(frequencies, dtype=torch.float64))[:, :, None]
        cos, sin = rotary(positions, config, torch.float64)
        name = "with rope_scaling, " if scaling else ""
        close(cos, torch.cat([angles.cos()] * 2, -1), name + "cos")
        close(sin, torch.cat([-angles.sin(), angles.sin()], -1), name + "sin")
        for dtype in (torch.float32, torch.bfloat16):  # computed in float32, whatever is returned
            low = rotary(positions, config, dtype)[0]
            equal(low.dtype, dtype, "dtype")
            close(low.double(), cos, f"{name}cos in {dtype}", 0.01)
        equal(rotary(positions[:1], config, torch.float32)[0].shape, (1, 3, 1, 8), "shape")


def test_ex04_the_position_mask():
    from model import PAD_POSITION, position_mask
    queries, keys = torch.tensor([[2, 0, 3]]), torch.tensor([[0, 3, 1, 2], [1, 0, PAD_POSITION, 5]])
    actual = position_mask(queries, keys, torch.float64)
    assert actual.shape == (2, 1, 3, 4), f"expected shape (2, 1, 3, 4), got {tuple(actual.shape)}"
    equal(actual.dtype, torch.float64, "dtype")
    for b in range(2):
        for t, query in enumerate(queries[0].tolist()):
            expected = [0.0 if key <= query else -math.inf for key in keys[b].tolist()]
            equal(actual[b, 0, t].tolist(), expected,
                  f"query at {query}, keys at {keys[b].tolist()}")


def filled_cache():
    """Two clips in two of three layers: of one row the last two tokens are padding."""
    from model import KVCache, make_positions
    cache, tokens = KVCache(3), torch.zeros(2, 5, 1)
    positions, _ = make_positions(0, 5, torch.tensor([5, 3]))
    cache.extend(tokens, positions, [0, 2])
    for layer in (0, 2):
        cache.append(layer, random(2, 5, 2, 4, seed=layer), random(2, 5, 2, 4, seed=layer + 10))
    cache.extra = {"mask": torch.tensor([[1], [2]]), "one": torch.ones(1, 3)}
    return cache


def test_ex05_a_fork_continues_the_rows_that_it_was_asked_for():
    from model import KVCache
    cache = filled_cache()
    before = cache.keys[0].clone(), cache.positions[0].clone()
    fork = cache.fork([1, 0, 1], 2)
    assert isinstance(fork, KVCache) and fork is not cache, f"expected a new KVCache, got {fork!r}"
    equal(fork.positions[1], None, "positions of a layer that holds nothing")
    equal(fork.keys[1], None, "keys of a layer that holds nothing")
    for layer in (0, 2):
        for name in ("keys", "values"):
            store = getattr(fork, name)[layer]
            equal(tuple(store.shape), (3, 7, 2, 4), f"shape of {name}, 5 tokens and 2 to come")
            close(store[:, :5], getattr(cache, name)[layer][[1, 0, 1]], f"{name} of rows 1, 0, 1")
        close(fork.positions[layer], cache.positions[layer][[1, 0, 1]], "positions of rows 1, 0, 1")
    equal(fork.next_position.tolist(), [[3], [5], [3]], "next_position")
    equal(fork.in_order, False, "in_order")
    equal(fork.extra["mask"].tolist(), [[2], [1], [2]], "extra, one row a clip")
    equal(tuple(fork.extra["one"].shape), (1, 3), "extra, one row for all")


def test_ex05_the_original_stays_and_the_fork_grows():
    cache = filled_cache()
    before = cache.keys[0].clone(), cache.positions[0].clone()
    fork = cache.fork([1, 0, 1], 2)
    new = random(3, 2, 2, 4, seed=5)
    for layer, held in enumerate((5, 0, 5)):
        if layer == 0:
            positions = fork.extend(torch.zeros(3, 2, 1))
            equal(positions.tolist(), [[3, 4], [5, 6], [3, 4]], "positions of two tokens more")
        keys, _ = fork.append(layer, new, new)
        close(keys[:, held:], new, f"new keys of layer {layer}")
    fork.keys[0].zero_()
    close(cache.keys[0], before[0], "keys of the original")
    close(cache.positions[0], before[1], "positions of the original")


def test_ex05_one_row_stands_for_all():
    from model import KVCache
    cache = KVCache(1)
    cache.extend(torch.zeros(1, 4, 1))
    cache.append(0, random(1, 4, 2, 4), random(1, 4, 2, 4, seed=1))
    fork = cache.fork([0, 0], 3)
    equal(fork.next_position, 4, "next_position")
    equal(fork.positions[0].tolist(), [[0, 1, 2, 3]], "positions of a row that stands for all")
    close(fork.keys[0][:, :4], cache.keys[0].expand(2, -1, -1, -1), "keys of both rows")
    again = fork.fork([1, 0], 1)  # of keys, spare slots are no tokens
    equal(tuple(again.keys[0].shape), (2, 5, 2, 4), "shape of the keys of a fork's fork")
    equal(KVCache(2).fork([0], 1).next_position, 0, "next_position of an empty cache's fork")


def check_lal_cache(llm, audio, cache, layers, positions, rotate_keys=True):
    for i in layers:
        block = llm.model.layers[i]
        attention = block.self_attn
        rms = (audio.square().mean(-1, keepdim=True) + llm.config.rms_norm_eps).sqrt()
        n = audio / rms * block.input_layernorm.weight
        assert cache.keys[i] is not None, f"layer {i} holds no keys and values after hear"
        k = (n @ attention.k_proj.weight.T + attention.k_proj.bias).unflatten(-1, (2, 6))
        v = (n @ attention.v_proj.weight.T + attention.v_proj.bias).unflatten(-1, (2, 6))
        close(cache.values[i][:, -audio.shape[1]:], v, f"values of layer {i}")
        k = rotated(k, positions if rotate_keys else 0 * positions)
        close(cache.keys[i][:, -audio.shape[1]:], k, f"keys of layer {i}")


def test_ex06_lal_writes_keys_and_values():
    from integrate import hear
    from model import KVCache
    llm, audio = small_llm(3, qkv_bias=True), 3 * random(2, 5, 24)
    ran = []
    for block in llm.model.layers:
        block.mlp.register_forward_hook(lambda *_: ran.append("an MLP"))
        block.self_attn.register_forward_hook(lambda *_: ran.append("attention"))
    cache = hear(llm, audio, "lal")
    assert isinstance(cache, KVCache), f"expected a KVCache, got {type(cache).__name__}"
    equal(ran, [], "what ran, though LAL only writes")
    check_lal_cache(llm, audio, cache, range(3), torch.arange(5)[None])
    equal(cache.next_position, 5, "next_position")
    check_lal_cache(llm, audio, hear(llm, audio, "lal", rotate_keys=False), range(3),
                    torch.arange(5)[None], False)
    more = hear(llm, audio + 1, "lal", cache, [0, 2])  # after what is there, in two layers
    assert more is cache, "expected the cache that was given, extended"
    equal([cache.keys[i].shape[1] for i in range(3)], [10, 5, 10], "tokens in each layer")
    equal([cache.positions[i].shape[1] for i in range(3)], [10, 5, 10], "positions of each layer")
    check_lal_cache(llm, audio + 1, cache, [0, 2], torch.arange(5, 10)[None])
    far = torch.tensor([[7, 9, 11, 13, 15], [0, 1, 2, 3, 4]])
    check_lal_cache(llm, audio, hear(llm, audio, "lal", positions=far), range(3), far)


def test_ex06_plits_runs_and_other_routes_are_refused():
    from integrate import hear
    from model import KVCache
    llm, audio, expected = small_llm(2), random(1, 4, 24), KVCache(2)
    llm.model(audio, cache=expected)
    cache = hear(llm, audio, "plits")
    close(cache.keys[1], expected.keys[1], "keys that PLITS leaves in layer 1")
    for route, layers, what in (("silent", None, "route 'silent'"), ("plits", [0], "layers [0]")):
        try:
            hear(llm, audio, route, layers=layers)
        except AssertionError:
            continue
        raise AssertionError(f"{what} was accepted in route {route}; expected an AssertionError")


def test_ex06_a_layer_in_place_of_a_weight_is_called():
    from integrate import hear
    llm, audio = small_llm(1), random(1, 4, 24)
    v_proj = llm.model.layers[0].self_attn.v_proj
    llm.model.layers[0].self_attn.v_proj = torch.nn.Sequential(v_proj, torch.nn.Tanh())
    values = hear(llm, audio, "lal").values[0].flatten(2)
    close(values, v_proj(llm.model.layers[0].input_layernorm(audio)).tanh(),
          "values of a v_proj that is wrapped, as LoRA wraps it")


class Recorder:
    """Stands for an LLM: notes each call, and takes tokens into the cache."""

    def __init__(self):
        self.calls = []
        self.config = SimpleNamespace(num_hidden_layers=1)

    def note(self, name, tokens, positions, cache, layers=None):
        listed = None if positions is None else positions.tolist()
        layers = () if layers is None else (layers,)
        self.calls.append((name, tuple(tokens.shape), listed, *layers))
        cache.extend(tokens, positions)

    def model(self, x, positions=None, cache=None):
        self.note("run", x, positions, cache)
        return 2 * x

    def write(self, llm, audio, route, cache=None, layers=None, positions=None):
        self.note(route, audio, positions, cache, layers)


def test_ex07_groups_are_run_or_written_in_order():
    from integrate import Segment, prefill
    from model import KVCache
    llm = Recorder()
    text = random(2, 3, 4)
    segments = [Segment("plits", random(1, 1, 4)), Segment("plits", random(2, 2, 4, seed=1)),
                Segment("lal", random(2, 4, 4)), Segment("plits", random(2, 0, 4)),
                Segment("lal", random(2, 1, 4)), Segment("plits", text)]
    hidden = prefill(llm, segments, write=llm.write)
    equal(llm.calls, [("run", (2, 3, 4), None), ("lal", (2, 5, 4), None),
                      ("run", (2, 3, 4), None)], "calls (name, shape, positions)")
    close(hidden, 2 * text, "hidden states of the last group")
    equal(prefill(Recorder(), segments[:3], write=llm.write), None,
          "hidden states where the last group is written")
    equal(prefill(Recorder(), [], write=llm.write), None, "hidden states of nothing")
    llm, upper = Recorder(), Segment("lal", random(2, 1, 4), layers=[0])
    prefill(llm, [segments[2], upper, upper], write=llm.write)
    equal(llm.calls, [("lal", (2, 4, 4), None), ("lal", (2, 2, 4), None, [0])],
          "calls of segments for all layers, and for some")
    llm, cache = Recorder(), KVCache(1)
    hidden = prefill(llm, [segments[2], Segment("plits", random(1, 2, 4))], cache, llm.write)
    equal(llm.calls, [("lal", (2, 4, 4), None), ("run", (2, 2, 4), None)],
          "calls, where one row of text is for both clips")
    equal(cache.next_position, 6, "next_position of the cache that was given")


def test_ex07_padding_has_its_position():
    from integrate import PAD_POSITION, Segment, prefill
    from model import KVCache
    llm, cache = Recorder(), KVCache(1)
    prefill(llm, [Segment("plits", random(1, 1, 4)),
                  Segment("lal", random(2, 3, 4), torch.tensor([3, 1])),
                  Segment("plits", random(2, 2, 4))], cache, llm.write)
    padded = [[1, 2, 3], [1, PAD_POSITION, PAD_POSITION]]
    equal(llm.calls[1], ("lal", (2, 3, 4), padded), "the call for clips of 3 and 1 tokens")
    equal(cache.next_position.tolist(), [[6], [4]], "next_position of each row")


def test_ex08_the_order_of_pal():
    from integrate import hear, pal
    llm = small_llm(2)
    before, ids = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, 8]])
    prefix, side = random(2, 4, 24), random(2, 5, 24, seed=1)
    text, start = llm.embed(ids), llm.embed(before).expand(2, -1, -1)
    expected = llm(embeds=torch.cat([start, prefix, text], 1))[:, -3:]
    close(pal(llm, ids, prefix, None, before), expected, "logits after a PLITS prefix", 1e-8)
    close(pal(llm, ids, None, side), llm(ids, cache=hear(llm, side, "lal")),
          "logits after LAL's side", 1e-8)
    cache = hear(llm, torch.cat([start, prefix], 1), "plits")
    cache = hear(llm, side, "lal", cache, [1])
    close(pal(llm, ids, prefix, side, before, [1]), llm(ids, cache=cache),
          "logits after both, LAL in layer 1 alone", 1e-8)
    close(pal(llm, ids, None, None), llm(ids), "logits without audio", 1e-8)


def test_ex09_pooling_of_encoder_tokens():
    from integrate import pool
    x = random(11, 3)
    for size in (1, 2, 4, 11, 20):
        expected = torch.stack([x[i:i + size].mean(0) for i in range(0, 11, size)])
        close(pool(x, size), expected, f"11 tokens pooled by {size}", 1e-5)
        equal(pool(x.bfloat16(), size).dtype, torch.bfloat16, "dtype")
    ones = torch.full((512, 1), 1.0625, dtype=torch.bfloat16)
    close(pool(ones, 512), ones[:1], "the mean of 512 equal numbers in bfloat16", 1e-9)


def test_ex10_the_mlp_connector():
    from integrate import IntegrationConfig, MLPConnector, make_mlp
    x = random(2, 3, 6)
    for hidden in (None, 7):
        net = make_mlp(6, 5, hidden) if hidden else make_mlp(6, 5)
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        n = hidden or 5
        equal(shapes, {"0.weight": (n, 6), "0.bias": (n,), "2.weight": (5, n), "2.bias": (5,)},
              "parameters")
        net.double()
        y = x @ net[0].weight.T + net[0].bias
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2 @ net[2].weight.T + net[2].bias
        close(net(x), y, f"the output, hidden={hidden}")
    connector = MLPConnector([SimpleNamespace(width=6)], 5, IntegrationConfig()).double()
    close(connector([x], [None])[0], connector.net(x), "the connector's output")


def test_ex11_the_answers_only_weighted_loss():
    llm, hidden = small_llm(1), random(2, 5, 24)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]])
    weights = torch.tensor([[9, 0, 0.5, 2, 0, 1], [9, 1, 0, 0.25, 0, 0]])
    log_p = (hidden @ llm.model.embed_tokens.weight.T).log_softmax(-1)
    expected = -sum(weights[b, t] * log_p[b, t - 1, ids[b, t]]
                    for b in range(2) for t in range(1, 6))
    seen = []
    head, llm.head = llm.head, lambda x: seen.append(x.shape[:-1].numel()) or head(x)
    close(llm.loss(hidden, ids, weights), expected.detach(), "the loss", 1e-8)
    assert sum(seen) <= 5, f"logits of {sum(seen)} tokens, and only 5 have a weight"


def test_ex12_nucleus_sampling():
    from model import sample_token
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits, rng = p.log().expand(20000, 4), torch.Generator().manual_seed(0)

    def share(temperature, top_p):
        tokens = sample_token(logits, temperature, top_p, rng)
        equal(tuple(tokens.shape), (20000,), "shape of tokens for logits (20000, 4)")
        return tokens.bincount(minlength=4) / 20000

    close(share(0, 1.0), torch.tensor([0, 1.0, 0, 0]), "shares at temperature 0")
    close(share(1.0, 1.0), p, "shares at temperature 1", 0.02)
    close(share(1.0, 0.7), torch.tensor([0, 0.625, 0, 0.375]), "shares at top_p 0.7", 0.02)
    close(share(1.0, 0.45), torch.tensor([0, 1.0, 0, 0]), "shares at top_p 0.45: one is enough")
    close(share(1.0, 1e-9), torch.tensor([0, 1.0, 0, 0]), "shares at top_p 1e-9")
    warm = p.sqrt() / p.sqrt().sum()  # of which the first two are the fewest that reach 0.6
    two = torch.tensor([0, warm[1], 0, warm[3]])
    close(share(2.0, 0.6), two / two.sum(), "shares at temperature 2 and top_p 0.6", 0.02)
    close(share(0.5, 1.0), p.square() / p.square().sum(), "shares at temperature 0.5", 0.02)
    again = [sample_token(logits[:9], 1.0, 1.0, torch.Generator().manual_seed(1)).tolist()
             for _ in range(2)]
    equal(again[1], again[0], "tokens drawn with the same generator state")


def test_ex13_byte_pair_merging():
    from lib.tokenizers import BPETokenizer
    merges = ["b c", "a b", "l o", "e r", "lo w", "a a", "low er", "aa aa"]
    vocab = sorted({c for merge in merges for c in merge if c != " "})
    vocab += [merge.replace(" ", "") for merge in merges] + ["bcb"]
    spec = {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(vocab)},
                      "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}
    tokenizer = BPETokenizer(spec)
    cases = {"lower": ["lower"], "lowe": ["low", "e"], "abc": ["a", "bc"], "ab": ["ab"],
             "aaa": ["aa", "a"], "aaaaa": ["aaaa", "a"], "abab": ["ab", "ab"], "bcb": ["bc", "b"],
             "a": ["a"], "wol": ["w", "o", "l"], "azb": ["ab"]}  # z is not in the vocabulary
    for piece, expected in cases.items():
        ids = tokenizer.merge(piece)
        assert isinstance(ids, list), f"merge({piece!r}): expected a list, got {type(ids).__name__}"
        equal([vocab[i] for i in ids], expected, f"the tokens of {piece!r}")
    spec["model"]["ignore_merges"] = True
    equal(BPETokenizer(spec).merge("bcb"), [vocab.index("bcb")], "ids of 'bcb' with ignore_merges")


def test_ex14_forward_flops_of_a_layer():
    from bench import layer_flops
    from model import Block, LLMConfig
    c = LLMConfig(96, 48, 112, 3, 6, 2, 10)
    weights = {name: p.numel() for name, p in Block(c).named_parameters() if p.ndim == 2}

    def products(*names):
        return 2 * sum(n for name, n in weights.items() if name.split(".")[1] in names)

    for run, written, pairs in ((7, 0, 0), (0, 5, 0), (0, 0, 11), (3, 4, 21)):
        expected = {"q, o": run * products("q_proj", "o_proj"),
                    "k, v": (run + written) * products("k_proj", "v_proj"),
                    "attention": pairs * 6 * 4 * 10,  # of 6 heads, 10 wide
                    "feed-forward": run * products("gate_proj", "up_proj", "down_proj")}
        equal(layer_flops(c, run, written, pairs), expected,
              f"layer_flops(run={run}, written={written}, pairs={pairs})")


def test_ex15_edit_distance():
    from lib.scores import edit_distance
    for answer, reference, expected in (
            ("", "", 0), ("a b c", "", 3), ("", "a", 1), ("a b c", "a b c", 0), ("a c", "a b c", 1),
            ("a x c", "a b c", 1), ("b a", "a b", 2), ("x a b c", "a b c d", 2),
            ("k i t t e n", "s i t t i n g", 3), ("s a t u r d a y", "s u n d a y", 3)):
        equal(edit_distance(answer.split(), reference.split()), expected,
              f"edit_distance({answer.split()}, {reference.split()})")
    start = time.perf_counter()
    equal(edit_distance(["a"] * 60, ["b"] * 61), 61, "60 words against 61 others")
    assert time.perf_counter() - start < 5, "60 words take longer than 5 s: no recursion"


def check_attention_weights():
    from model import KVCache
    from lib.attention import attention_weights
    llm, ids, outputs = small_llm(2), torch.tensor([[3, 4, 5]]), []
    cache = KVCache(2, 9)  # with two slots to spare
    llm.model(random(1, 4, 24), cache=cache)
    for block in llm.model.layers:
        block.self_attn.register_forward_hook(lambda m, x, output: outputs.append((m, output)))
    layers = attention_weights(llm, lambda: llm(ids, cache=cache))
    assert isinstance(layers, list) and len(layers) == 2, (
        f"expected a list with an entry for each of 2 layers, got {layers!r:.60}")
    for i, ((weights, positions), (module, output)) in enumerate(zip(layers, outputs)):
        equal(tuple(weights.shape), (1, 4, 3, 7), "shape of the weights (B, H, T, S)")
        equal(positions.tolist(), [list(range(7))], "positions of the keys")
        visible = torch.arange(7) <= torch.arange(4, 7)[:, None]
        equal(((weights[0] > 0) == visible).all().item(), True, "weight on all that is not after")
        close(weights.sum(-1), torch.ones(1, 4, 3), "the sum of a query's weights")
        v = cache.values[i][:, :7].repeat_interleave(2, dim=2)
        y = module.o_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
        close(y, output, f"what layer {i} makes of the values, by these weights")


@torch.no_grad()
def test_ex16_attention_of_an_answers_words():
    check_attention_weights()
    from lib.attention import attention_weights
    llm = small_llm(2)

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        attention_weights(llm, fail)
    hooks = sum(len(block.self_attn._forward_hooks) for block in llm.model.layers)
    equal(hooks, 0, "hooks that are left when read() has failed")


# ------------------------------------------------------------------------------------ bug hunts

def change(a, b):
    """The largest difference of two tensors."""
    return (a - b).abs().max().item()


@torch.no_grad()
def test_ex21_the_first_word_hears_the_last_audio_token():
    from integrate import lal
    llm, audio, ids = small_llm(2), random(1, 6, 24), torch.tensor([[1, 2, 3]])
    other = audio.clone()
    other[:, -1] += 3
    logits = change(lal(llm, ids, audio)[:, 0], lal(llm, ids, other)[:, 0])
    assert logits > 1e-3, ("another last audio token changes the first word's logits by "
                           f"{logits:.3g}; in a model that hears it by 0.1 and more")


@torch.no_grad()
def test_ex22_one_layer_of_lal_is_plits():
    from integrate import lal, plits
    llm, audio, ids = small_llm(1), 3 * random(1, 6, 24), torch.tensor([[1, 2, 3]])
    logits = change(lal(llm, ids, audio), plits(llm, ids, audio))
    assert logits < 1e-9, (f"with one layer LAL's logits differ from those of PLITS by {logits:.3g}"
                           "; by definition by 0")


@torch.no_grad()
def test_ex23_lal_tells_before_from_after():
    from integrate import lal
    llm, audio, ids = small_llm(2), random(1, 6, 24), torch.tensor([[1, 2, 3]])
    logits = change(lal(llm, ids, audio), lal(llm, ids, audio.flip(1)))
    assert logits > 1e-3, (f"the audio in reverse order changes LAL's logits by {logits:.3g}; "
                           "in a model that knows about order by 0.1 and more")
    from integrate import hear
    keys, turned = (hear(llm, audio, "lal", rotate_keys=rotate).keys[0] for rotate in (False, True))
    assert change(keys, turned) > 1e-3, "rotate_keys=False changes the keys by 0"


def test_ex24_the_answer_alone_is_learnt():
    from data.lists import tokenize_conversation
    from lib.tokenizers import train_tokenizer
    tokenizer = train_tokenizer([f"what is {n} said or heard" for n in range(60)], 300)
    pairs = [("what is heard\n", "17"), ("what is said\n", "3 or 4")]
    ids, weights = tokenize_conversation(tokenizer, pairs)
    answers = sum(len(tokenizer.reply(answer)) for _, answer in pairs)
    learnt = sum(weight > 0 for weight in weights)
    assert learnt == answers, (f"{learnt} of the {len(ids)} tokens of two questions with answers "
                               f"count in the loss; the answers have {answers}")


def test_ex25_frozen_encoders_stay_as_they_are():
    from encoders import CLAP, CLAPConfig
    from integrate import AudioLLM
    clap = CLAP(CLAPConfig(width=16, depths=(1, 1, 1), heads=1, image=128, seconds=1.0, rate=16000,
                           hop=256, high=8000.0, bank_rate=16000))
    model = AudioLLM(small_llm(1).float(), None, {"clap": clap}, "lal")
    loud, soft = (lambda rate, s=s: s * random(16000, seed=3).float() for s in (1.0, 1e-3))
    model.train()
    alone, = model.features([loud])
    together, _ = model.features([loud, soft])
    difference = change(alone["clap"], together["clap"])
    assert difference < 1e-4, (f"in training CLAP's features of a clip differ by {difference:.3g} "
                               "if another clip is in the batch; frozen ones by 0")
    clap.frozen = False
    assert model.train().encoders["clap"].training, "0 of 1 encoders that are not frozen train"


@torch.no_grad()
def test_ex26_a_clip_in_a_batch_is_as_if_alone():
    from integrate import Segment, prefill
    llm, audio, ids = small_llm(2), random(2, 6, 24), torch.tensor([[1, 2, 3]])
    text = Segment("plits", llm.embed(ids))
    batch = prefill(llm, [Segment("lal", audio, torch.tensor([6, 2])), text])
    alone = prefill(llm, [Segment("lal", audio[1:, :2]), text])
    difference = change(batch[1:], alone)
    assert difference < 1e-9, ("after a clip of 2 tokens, beside one of 6, hidden states differ by "
                               f"{difference:.3g} from those after it alone; they should by 0")


@torch.no_grad()
def test_ex27_over_the_cache_is_as_in_one_pass():
    from integrate import hear, plits
    llm, audio, ids = small_llm(2), random(1, 6, 24), torch.tensor([[1, 2, 3]])
    difference = change(llm(ids, cache=hear(llm, audio, "plits")), plits(llm, ids, audio))
    assert difference < 1e-9, ("a question read over the cache that holds the audio has logits that"
                               f" differ by {difference:.3g} from those of one pass; they should "
                               "by 0")


def test_ex28_what_follows_a_short_clip():
    from encoders import SSLAM, SSLAMConfig
    encoder = SSLAM(SSLAMConfig(64, 1, seconds=0.64))
    end = encoder.front_end(random(1, 3200).float())[0, 0, -1]
    assert (end - 0.46706).abs().max() < 1e-4, (
        f"after its end a short clip is {end.mean():.3g}; the original code has 0.467 there")


def test_ex29_answers_belong_to_their_questions():
    import sample

    def ask(model, clips, texts, choices, clip_index, batch):
        return [(f"{clips[i]} {text}", None) for i, text in zip(clip_index, texts)]

    model = SimpleNamespace(eval=lambda: None, hear=lambda clips: clips)
    questions = [(n * 7 % 5, f"question {n}", ()) for n in range(20)]
    with mock.patch.object(sample, "ask", ask):
        answers = sample.answer_all(model, list, questions, batch=3)
    right = sum(answer == f"{clip} {text}"
                for (answer, _), (clip, text, _) in zip(answers, questions))
    assert right == 20, (f"a model that knows every answer scores {right} of 20 on questions that "
                         "are not sorted by clip")


def test_ex30_the_first_run_is_not_timed():
    from lib.profiling import time_in_turns
    runs = []

    def slow_at_first():
        time.sleep(0 if runs else 0.2)
        runs.append(1)

    seconds = time_in_turns({"step": slow_at_first}, torch.device("cpu"), 3)["step"]
    equal((len(runs), len(seconds)), (4, 3), "runs, and those that are timed")
    assert max(seconds) < 0.1, ("a step that takes no time but 0.2 s when it is first run is "
                                f"measured at {max(seconds):.2g} s")


@torch.no_grad()
def test_ex31_the_weights_are_those_of_the_model():
    check_attention_weights()


@pytest.mark.slow
def test_symptoms_name_what_the_shipped_model_does():
    import train
    from data.lists import add_token_ids
    from data.world import load_world
    from integrate import AudioLLM
    clips, items = load_world("test", 45, 0, 1)
    model = AudioLLM.load(ROOT / "assets" / "lal.pt")
    features = dict(zip(clips, model.features(list(clips.values()))))

    def one_by_one():
        right = [model.ask(model.hear([features[item["clip"]]]), [item["instruction"]])
                 == [item["output"]] for item in items[:150]]
        return 100 * np.mean(right)

    def score():
        return 100 * train.exact_match(model, features, items)

    @torch.no_grad()
    def loss():
        keys = ("clip", "instruction", "output")  # without the token ids, which are made anew
        rows = [{key: item[key] for key in keys} for item in items[:64]]
        return train.answer_loss(model, features, add_token_ids(model.tokenizer, rows)).item()

    for number, measure, before, after in (
            (21, one_by_one, 93.3, 10.7), (22, score, 93.6, 0), (23, score, 93.6, 89.0),
            (24, loss, 0.07, 42.8), (27, score, 93.6, 14.9)):
        bug = EXERCISES[number]
        assert abs(measure() - before) < 1 and str(before) in bug.text.replace("\n", " "), number
        with running(bug, exercises.put_in_bug(file_text(bug), bug)):
            assert abs(measure() - after) < 1 and str(after or "none") in bug.text, number


# --------------------------------------------------------- exercises are red, originals are green

# Bodies of functions: some that look right and are not, and other ways to write what is right. As
# these are solutions, the file is not handed out; without it the tests that need it are skipped.
BODIES = Path(__file__).with_name("exercises.json")
WRONG, RIGHT = [{int(number): ["\n".join(lines) for lines in bodies]
                 for number, bodies in group.items()} for group in (
                     json.loads(BODIES.read_text(encoding="utf-8")).values()
                     if BODIES.exists() else ({}, {}))]
needs_bodies = pytest.mark.skipif(not WRONG, reason="tests/exercises.json was not handed out")


def graders(number):
    return [value for name, value in globals().items() if name.startswith(f"test_ex{number:02}_")]


def grade(number):
    for test in graders(number):
        test()


def file_text(exercise):
    return (ROOT / exercise.file).read_text(encoding="utf-8")


@functools.cache
def compiled(text):
    return compile(text, "exercise", "exec")


@contextmanager
def running(exercise, text):
    """While this lasts, the function is as it is in `text`, another text of the same file."""
    function = importlib.import_module(exercise.file[:-3].replace("/", "."))
    code = compiled(text)
    for name in exercise.function.split("."):
        function = vars(function)[name]
        code, = [c for c in code.co_consts if getattr(c, "co_name", None) == name]
    original, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = original


@functools.cache
def emptied_text(exercise):
    return exercises.take_out_body(file_text(exercise), exercise)


def emptied(exercise):
    return running(exercise, emptied_text(exercise))


@needs_bodies
@pytest.mark.parametrize("exercise", FILL_INS, ids=lambda e: str(e.number))
def test_an_open_exercise_is_red_and_wrong_bodies_are_too(exercise):
    with emptied(exercise), pytest.raises(NotImplementedError, match=f"exercise {exercise.number}"):
        grade(exercise.number)
    assert len(WRONG[exercise.number]) >= 2
    for body in WRONG[exercise.number]:
        text = exercises.replace_body(file_text(exercise), exercise, body)
        with running(exercise, text), pytest.raises((AssertionError, TypeError, AttributeError,
                                                     RuntimeError, IndexError, KeyError)):
            grade(exercise.number)


@needs_bodies
@pytest.mark.parametrize("number", RIGHT)
def test_another_way_to_write_it_is_green(number):
    for body in RIGHT[number]:
        text = exercises.replace_body(file_text(EXERCISES[number]), EXERCISES[number], body)
        with running(EXERCISES[number], text):
            grade(number)


@pytest.mark.parametrize("exercise", FILL_INS, ids=lambda e: str(e.number))
def test_an_exercise_needs_no_other_but_those_that_it_names(exercise):
    needed = {exercise.number, *exercise.needs}
    assert all({*EXERCISES[n].needs} < needed for n in exercise.needs)
    with ExitStack() as stack:
        for other in FILL_INS:
            if other.number not in needed:
                stack.enter_context(emptied(other))
        grade(exercise.number)


@pytest.mark.parametrize("exercise", HUNTS, ids=lambda e: str(e.number))
def test_a_planted_bug_shows_its_symptom_and_is_undone_by_a_few_lines(exercise):
    text = file_text(exercise)
    bug = exercises.put_in_bug(text, exercise)
    changed = sum(a != b for a, b in zip(text.split("\n"), bug.split("\n")))
    assert 1 <= changed <= 3 and text.count("\n") == bug.count("\n")
    with running(exercise, bug), pytest.raises(AssertionError, match=r"\d"):
        grade(exercise.number)
    assert exercises.replace_function(bug, exercise, exercises.get_function(text, exercise)) == text


# ------------------------------------------------------------------------------- the program

@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of what the exercises need, without git, in a folder with a difficult name."""
    root = tmp_path_factory.mktemp("copy") / "a b \u00e4"
    for folder in ("lib", "data", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns(
            "__pycache__", "golden"))
    for path in [*ROOT.glob("*.py"), ROOT / "pytest.ini"]:
        shutil.copy(path, root)
    return root


@pytest.fixture
def files(tmp_path):
    """A copy of the files that are changed, in which no tests can run."""
    for exercise in EXERCISES.values():
        path = tmp_path / exercise.file
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / exercise.file, path)
    return tmp_path


@pytest.fixture
def do(capsys):
    """do(root, "start", 4) runs the program: (exit code, what it printed)."""
    def run(root, *words):
        code = exercises.main([*map(str, words), "--root", str(root)])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def edit(root, exercise, body):
    path = root / exercise.file
    text = exercises.read_source(path)
    exercises.write_source(path, exercises.replace_body(text, exercise, body))


def go_through(root, do, exercise):
    """Start, check, solve, check: nothing but the one file is changed, which ends as it was."""
    before = contents(root)
    code, text = do(root, "plant" if exercise.is_hunt else "start", exercise.number)
    assert code == 0 and exercise.title in text and f"check {exercise.number}" in text
    if exercise.is_hunt:
        lines = [line.strip() for line in exercise.new.split("\n")]
        assert exercise.file not in text and not any(line in text for line in lines)
    changed = {name for name, content in contents(root).items() if before.get(name) != content}
    assert {name for name in changed if not name.startswith("out/")} == {exercise.file}
    code, text = do(root, "check", exercise.number)
    assert code == 1 and len(text.splitlines()) == 1
    assert ("still there" if exercise.is_hunt else "nothing is filled in yet") in text
    code, text = do(root, "solve", exercise.number)
    assert code == 0 and "+" in text
    assert (root / exercise.file).read_bytes() == before[exercise.file]
    code, text = do(root, "check", exercise.number)
    assert code == 0 and "green" in text


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda e: str(e.number))
def test_every_exercise_can_be_gone_through(exercise, repository, do):
    go_through(repository, do, exercise)


def test_the_way_of_a_student(repository, do, monkeypatch):
    exercise = EXERCISES[4]
    original = (repository / "model.py").read_bytes()
    do(repository, "start", 4)
    assert "open" in do(repository)[1]
    edit(repository, exercise,
         "return torch.zeros(len(keys), queries.shape[1], keys.shape[1], dtype=dtype)")
    code, text = do(repository, "check", 4)
    assert code == 1 and len(text.splitlines()) == 1
    assert "expected shape (2, 1, 3, 4), got (2, 3, 4)" in text and exercise.hints[0] in text
    edit(repository, exercise, "hidden = keys[:, None, None] > queries[:, None, :, None]\n"
                               "return torch.where(hidden, -torch.inf, 0.0).to(dtype)")
    own = (repository / "model.py").read_bytes()
    monkeypatch.setattr(exercises, "run_tests", lambda *_: {4: None})  # as grading all is slow too
    code, text = do(repository, "check", 4)
    assert code == 0 and exercise.then in text
    assert re.search(r"4 the position mask .* done", do(repository)[1])
    code, text = do(repository, "solve", 4)
    assert "-    return torch.where(hidden" in text and "+    return torch.zeros_like" in text
    assert (repository / "model.py").read_bytes() == original != own
    assert "torch.where" in (repository / "out/exercises/04-attempt-01.py").read_text()


@pytest.mark.slow
def test_all_are_handed_out_and_graded(repository, do):
    before = contents(repository)
    assert do(repository, "start", "all")[0] == 0
    do(repository, "solve", 15)
    do(repository, "plant", 24)
    code, text = do(repository, "grade")
    result = json.loads(text.splitlines()[-1])
    assert code == 0 and result["of"] >= 17
    # bugs that other tests have planted here, and removed, count too, and may be green
    assert [str(n) for n in range(1, len(FILL_INS) + 1) if result["exercises"][str(n)]] == ["15"]
    assert not result["exercises"]["24"]
    for number in [*range(1, len(FILL_INS) + 1), 24]:
        do(repository, "solve", number)
    after = contents(repository)
    assert all(after[name] == content for name, content in before.items()
               if not name.startswith("out/"))


@pytest.mark.parametrize("form", ["lf", "crlf", "bom"])
def test_line_ends_stay_and_twice_in_a_row_is_once(form, files, do):
    path, exercise = files / "model.py", EXERCISES[12]
    if form != "lf":
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    if form == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    original = path.read_bytes()
    do(files, "start", 12)
    once = path.read_bytes()
    assert once.count(b"\n") - once.count(b"\r\n") == (once.count(b"\n") if form == "lf" else 0)
    assert once.startswith(b"\xef\xbb\xbf") == (form == "bom") and len(once) < len(original)
    text = do(files, "start", 12)[1]
    assert "open already" in text and path.read_bytes() == once
    for n, body in enumerate(["return 1", "return 2", "return 1"]):  # work that is lost nowhere
        edit(files, exercise, body)
        text = do(files, "start", 12)[1]
        assert f"12-attempt-0{1 + n % 2}.py" in text and path.read_bytes() == once
    assert "return 2" in (files / "out/exercises/12-attempt-02.py").read_text()
    do(files, "solve", 12)
    assert path.read_bytes() == original
    assert "there already" in do(files, "solve", 12)[1] and path.read_bytes() == original
    do(files, "plant", 26)
    once = path.read_bytes()
    assert "planted already" in do(files, "plant", 26)[1] and path.read_bytes() == once != original
    do(files, "solve", 26)
    assert path.read_bytes() == original


def test_hints_come_one_by_one_and_end(files, do):
    hints = EXERCISES[3].hints
    for n, words in enumerate(hints):
        assert do(files, "hint", 3)[1].strip() == f"hint {n + 1} of {len(hints)}: {words}"
    assert "no more hints" in do(files, "hint", 3)[1]


@pytest.mark.parametrize("words, problem, options", [
    ("no exercise 99", None, ("start", 99)), ("no exercise x", None, ("check", "x")),
    ("needs a number", None, ("start",)), ("bug hunt: plant 21", None, ("start", 21)),
    ("start 4", None, ("plant", 4)), ("not begun here", None, ("solve", 4)),
    ("no exercise all", None, ("check", "all")), ("invalid choice", None, ("begin", 4)),
    ("model.py, line", lambda path: path.write_text("def f(:\n"), ("check", 4)),
    ("no function position_mask", lambda path: path.write_text(
        path.read_text().replace("def position_mask", "def mask")), ("start", 4)),
    ("model.py: cannot be read", lambda path: path.unlink(), ("start", 4)),
    ("not UTF-8", lambda path: path.write_bytes(b"# \xff\n"), ("start", 4)),
    ("cannot be planted", lambda path: path.write_text(
        path.read_text().replace("steps >= lengths", "lengths <= steps")), ("plant", 26)),
    ("the tests cannot start", None, ("check", 4))])  # as there are none in this folder
def test_a_mistake_is_one_clear_line(words, problem, options, files, do, capsys):
    if problem:
        problem(files / "model.py")
    before = contents(files)
    try:
        code, text = do(files, *options)
    except SystemExit as exit:
        code, text = exit.code, capsys.readouterr().err
    assert code == 2 and words in text and len(text.splitlines()) == 1, text
    assert contents(files) == before


def test_what_does_not_parse_is_in_the_list_and_the_grades(files, do):
    (files / "model.py").write_text("def f(:\n")
    assert re.search(r"4 the position mask .* \?", do(files)[1])
    code, text = do(files, "grade")
    result = json.loads(text.splitlines()[-1])
    assert code == 0 and result["green"] == 0 and result["of"] == len(FILL_INS)
    assert "model.py, line 1" in text


def test_an_endless_loop_is_one_clear_line(repository, do, monkeypatch):
    monkeypatch.setattr(exercises, "TIME_LIMIT", -9.8)  # and 10 for the exercise
    code, text = do(repository, "check", 4)
    assert code == 2 and "endless loop" in text and len(text.splitlines()) == 1


def test_a_function_with_a_bug_is_not_taken_for_the_original(files, do):
    original = (files / "integrate.py").read_bytes()
    do(files, "plant", 22)
    code, text = do(files, "start", 6)
    assert code == 2 and "solve 22 first" in text
    edit(files, EXERCISES[22], "return 'mine'")
    assert "kept, your own" in do(files, "solve", 22)[1]
    assert (files / "integrate.py").read_bytes() == original
    assert "mine" in (files / "out/exercises/22-attempt-01.py").read_text()


def test_a_bug_that_was_mended_stays_so_when_its_function_is_emptied(files, do, monkeypatch):
    monkeypatch.setattr(exercises, "run_tests", lambda *_: {22: None})
    path = files / "integrate.py"
    original = path.read_text()
    do(files, "plant", 22)
    planted = path.read_text()
    assert re.search(r"22 .* open", do(files)[1])
    path.write_text(original)  # mended by hand
    do(files, "check", 22)
    do(files, "start", 6)
    assert re.search(r"22 .* done", do(files)[1]) and re.search(r"\n +6 .* open", do(files)[1])
    path.write_text(planted)
    assert re.search(r"22 .* open", do(files)[1])


def test_each_text_is_complete_and_plain():
    assert len(FILL_INS) >= 12 and len(HUNTS) >= 8
    assert sorted(EXERCISES) == [e.number for e in FILL_INS + HUNTS]
    for e in EXERCISES.values():
        assert e.text.isascii() and all(hint.isascii() for hint in e.hints) and len(e.hints) >= 2
        assert graders(e.number) and (e.is_hunt or e.then)
        assert all(len(line) <= 100 for line in e.text.split("\n"))


@pytest.mark.parametrize("exercise", FILL_INS, ids=lambda e: str(e.number))
def test_what_to_try_next_exists(exercise):
    words = shlex.split(exercise.then)
    if words[:3] == ["python", "-m", "pytest"]:
        names = re.findall(r"^def (test_\w+)", (ROOT / words[3]).read_text(encoding="utf-8"), re.M)
        wanted = words[5].split(" or ") if "-k" in words else ["test"]
        assert all(any(word in name for name in names) for word in wanted), exercise.then
    elif words[1] != "-m":
        assert (ROOT / words[1]).is_file()


# ------------------------------------------------------------------------- the tour, the glossary

def test_the_tour_runs_without_matplotlib_and_is_small(monkeypatch):
    path = ROOT / "docs" / "tour.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 25 and path.stat().st_size < 1e6
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    assert sum("image/png" in output.get("data", {}) for cell in code
               for output in cell["outputs"]) >= 4
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(ROOT / "docs")  # where Jupyter starts it
    scope = {}
    for i, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"tour.ipynb, code cell {i + 1}", "exec"), scope)


def test_the_glossary_names_lines_that_are_there():
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| [^|]+ \| [^|]+ \| `([\w/]+\.py)` \| `(.*)` \|$", text, re.M)
    assert len(terms) == 30
    for file, line in terms:
        assert (ROOT / file).read_text(encoding="utf-8").count(line) == 1, f"{file}: {line}"
    for e in EXERCISES.values():
        assert e.title in " ".join(text.split()), f"docs/exercises.md does not list {e.title}"
        assert e.is_hunt or f"| {e.number} | {e.title} | `{e.function}` | {e.minutes} |" in text
