"""The arithmetic of bench.py is what torch counts, to the last FLOP and byte, and its report holds."""
import json
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from bench import LLM, LLMConfig, batch

SMALL = LLMConfig(96, 48, 112, 3, 6, 2, 10)


def random_setting(seed, **also):
    """Sizes, a mode, and a Batch: every one different each time."""
    dice = random.Random(seed)
    K, group, L = dice.randint(1, 3), dice.randint(2, 3), dice.randint(1, 4)
    c = LLMConfig(vocab_size=dice.randint(40, 99), hidden_size=4 * dice.randint(4, 12),
                  intermediate_size=dice.randint(20, 99), num_hidden_layers=L,
                  num_attention_heads=K * group, num_key_value_heads=K,
                  head_dim=2 * dice.randint(2, 6), tie_word_embeddings=dice.random() < 0.5,
                  qkv_bias=dice.random() < 0.3)
    layers = sorted(dice.sample(range(L), dice.randint(1, L)))
    layers = None if dice.random() < 0.5 else layers
    sizes = {"B": dice.randint(1, 3), "Na": dice.randint(4, 40), "Nt": dice.randint(2, 20)}
    return c, batch(c, mode=dice.choice(list(bench.SHARES)), share=dice.random(), layers=layers,
                    **{**sizes, **also})


def counted(f):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = f()
    return counter.get_total_flops(), result


def heard(c, b, frozen=False):
    torch.manual_seed(0)
    llm = LLM(c).requires_grad_(not frozen)
    return llm, bench.inputs(llm, b)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_flops_of_a_step_are_those_that_torch_counts(seed, frozen):
    c, b = random_setting(seed)
    llm, (ids, *audio) = heard(c, b, frozen)
    flops, loss = counted(lambda: bench.loss(llm, b, ids, *audio))
    assert flops == sum(bench.forward_flops(c, b).values())
    flops, _ = counted(loss.backward)
    assert flops == bench.backward_flops(c, b, frozen)
    assert all((p.grad is None) == frozen for p in llm.parameters())
    assert all(a is None or a.grad.abs().sum() > 0 for a in audio)


@pytest.mark.parametrize("seed", range(12))
def test_the_flops_and_the_cache_of_an_answer_are_those_that_torch_counts(seed):
    c, b = random_setting(seed)
    llm, (ids, *audio) = heard(c, b, frozen=True)  # or the counter trips over generate's tensors
    audio = [None if a is None else a.detach() for a in audio]
    flops, cache = counted(lambda: bench.listen(llm, b, *audio))
    assert flops == bench.hear_flops(c, b)
    stores = [t for t in cache.keys + cache.values if t is not None]
    assert sum(t.numel() * 4 for t in stores) == bench.cache_bytes(c, replace(b, text=0), 4)
    new = 5
    flops, answers = counted(lambda: llm.generate(ids, new, cache=cache))
    assert flops == bench.ask_flops(c, b, new) and all(len(a) == new for a in answers)
    room = cache.fork(range(b.B), b.text + new)
    llm.model(llm.embed(ids), None, room)
    assert sum(t.untyped_storage().nbytes() for t in room.keys + room.values) == bench.cache_bytes(
        c, b, 4, new)


def test_causal_flops_are_the_pairs_that_see_each_other():
    for seed in range(20):
        c, b = random_setting(seed)
        for written, _ in b.kinds(c):
            kinds = "p" * b.prefix + "w" * written + "t" * b.text
            seen = sum(i >= j for i, query in enumerate(kinds) if query != "w"
                       for j in range(len(kinds)))
            assert bench.pairs(b, written, causal=True) == seen
            assert bench.pairs(b, written, causal=False) == len(kinds) * (b.prefix + b.text)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_kept_for_backward_is_what_autograd_saves(seed, frozen):
    c, b = random_setting(seed, B=3, Na=60, Nt=30)
    llm, inputs = heard(c, b, frozen)
    saved = bench.saved_bytes(lambda: bench.loss(llm, b, *inputs), [*llm.parameters(), inputs[0]])
    told = bench.kept_bytes(c, b, 4, frozen, fused=False) + 4 * b.B * b.text * c.vocab_size
    assert saved == pytest.approx(told, rel=0.02)


def test_storages_that_share_memory_count_once_and_parameters_never():
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    saved = bench.saved_bytes(lambda: (x.exp() * w).sin().sum(), [x, w])
    assert saved == 2 * 64  # exp(x), and the sine's argument
    saved = bench.saved_bytes(lambda: (lambda y: (y * y[0]).sum())(x.exp()), [x, w])
    assert saved == 64


@pytest.mark.parametrize("c", [SMALL, replace(SMALL, qkv_bias=True, tie_word_embeddings=False)])
def test_parameters_are_counted(c):
    assert sum(p.numel() for p in LLM(c).parameters()) == bench.parameters(c)
    with torch.device("meta"):
        assert sum(p.numel() for p in LLM(bench.LLMS["llama-3.2-1b"]).parameters()) == (
            bench.parameters(bench.LLMS["llama-3.2-1b"])) == 1235814400
