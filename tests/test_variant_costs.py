"""The arithmetic of the modes beyond the paper is what torch counts, to the last FLOP."""
import random

import pytest
import torch

from integrate import Segment, prefill
from lib.profiling import count_flops, count_saved_bytes
from lib.variant_costs import (VARIANTS, audio_layers, backward_flops, cache_bytes, count_pairs,
                               forward_flops, make_variant, saved_activation_bytes, variant_loss)
from model import LLM, KVCache, LLMConfig


def random_sizes(seed):
    rng = random.Random(seed)
    K, group = rng.randint(1, 3), rng.randint(2, 3)
    c = LLMConfig(vocab_size=rng.randint(40, 99), hidden_size=4 * K * group * rng.randint(2, 4),
                  intermediate_size=rng.randint(20, 99), num_hidden_layers=rng.randint(1, 4),
                  num_attention_heads=K * group, num_key_value_heads=K,
                  head_dim=2 * rng.randint(2, 6), tie_word_embeddings=rng.random() < 0.5,
                  qkv_bias=rng.random() < 0.3)
    return c, rng.randint(1, 3), rng.randint(20, 60), rng.randint(20, 40)


def make(c, mode, B, N, T):
    torch.manual_seed(0)
    llm = LLM(c)
    ids = torch.randint(c.vocab_size, (B, T))
    return llm, make_variant(llm, mode), ids, torch.randn(B, N, c.hidden_size).requires_grad_()


@pytest.mark.parametrize("mode", VARIANTS)
@pytest.mark.parametrize("seed", range(6))
def test_flops_and_saved_activations_are_those_that_torch_counts(mode, seed):
    c, *sizes = random_sizes(seed)
    llm, variant, ids, audio = make(c, mode, *sizes)
    flops, loss = count_flops(lambda: variant_loss(llm, variant, ids, audio))
    assert flops == sum(forward_flops(c, mode, *sizes).values())
    flops, _ = count_flops(loss.backward)
    assert flops == backward_flops(c, mode, *sizes)
    saved = count_saved_bytes(lambda: variant_loss(llm, variant, ids, audio),
                              [*llm.parameters(), *variant[1], ids])
    predicted = saved_activation_bytes(c, mode, *sizes, 4, fused=False)
    predicted += 4 * ids.numel() * c.vocab_size  # the softmax of the logits
    assert saved == pytest.approx(predicted, rel=0.001)


@pytest.mark.parametrize("mode", VARIANTS)
def test_the_cache_has_the_bytes_that_are_counted(mode):
    c, B, N, T = random_sizes(1)
    llm, (write, *_), ids, audio = make(c, mode, B, N, T)
    cache = KVCache(c.num_hidden_layers)
    prefill(llm, [Segment("lal", audio), Segment("plits", llm.embed(ids))], cache, write)
    stores = cache.keys + cache.values
    stores += [x for name, x in cache.extra.items() if name != "audio mask"]
    assert sum(x.numel() * 4 for x in stores) == cache_bytes(c, mode, B, N, T, 4)


@pytest.mark.parametrize("mode", VARIANTS)
def test_causal_pairs_are_those_that_see_each_other(mode):
    N, T = 7, 5
    for audio in audio_layers(LLMConfig(), mode, N):
        seen = sum(i >= j for i in range(audio.queries) for j in range(N))
        seen += sum(audio.keys + i >= j for i in range(T) for j in range(audio.keys + T))
        assert count_pairs(audio, T, causal=True) == seen
