"""Modes beyond the paper: what defines attn, ffn and flamingo. Equalities in float64."""
import pytest
import torch
from test_integrate import (SEEDS, WRITE, audio_llm, audio_segments, cross_attention, in_mode,
                            random, randomized, same, setting)

from integrate import CrossAttentionBlock, IntegrationConfig, Segment, hear, prefill
from lib.variants import GatedCrossAttention
from model import PAD_POSITION, KVCache


@pytest.mark.parametrize("seed", SEEDS)
def test_attn_and_ffn_are_the_two_halves_between_plits_and_lal(seed):
    """Where feed-forward adds nothing attn writes what PLITS writes, and ffn what LAL writes; where
    attention adds nothing it is the other way round."""
    routes = ("plits", "attn", "ffn", "lal")
    for part, pairs in (("mlp.down_proj", {("plits", "attn"), ("ffn", "lal")}), ("none", set()),
                        ("self_attn.o_proj", {("plits", "ffn"), ("attn", "lal")})):
        llm, ids, a = setting(seed)
        for name, p in llm.named_parameters():
            if part in name:
                p.data.zero_()
        written = {}
        for route in routes:
            cache = KVCache(3)
            prefill(llm, [Segment("plits", llm.embed(ids)),
                          *audio_segments(route, a[:, :4], a[:, 4:], (None, torch.tensor([5, 3])))],
                    cache, WRITE.get(route, hear))
            valid = cache.positions[0] < PAD_POSITION
            written[route] = torch.stack([x[valid] for x in cache.keys + cache.values])
        for i, one in enumerate(routes):
            for other in routes[i + 1:]:
                alike = (one, other) in pairs
                assert same(written[one], written[other], 1e-12 if alike else 1e-2) == alike


def test_hearing_by_halves_into_a_cache_first_gives_what_one_pass_gives():
    llm, ids, a = setting(0)
    for route, write in WRITE.items():
        cache = KVCache(3)
        write(llm, a[:, :4], route, cache)
        write(llm, a[:, 4:], route, cache)
        assert same(llm(ids, cache=cache), in_mode(route, llm, ids, a[:, :4], a[:, 4:]))


def test_gated_layers_let_through_what_the_tanh_of_their_gates_says():
    layer = randomized(GatedCrossAttention(6, 2))
    assert layer.mlp[0].out_features == 24
    assert CrossAttentionBlock(6, 1, 2).mlp[0].out_features == 6
    x, audio = random(2, 3, 6), random(2, 4, 6)
    mask = torch.tensor([4, 2])[:, None, None, None] > torch.arange(4)
    got = layer(x, *layer.project_kv([audio]), mask)
    for row, n in enumerate((4, 2)):
        tokens = [(0, token) for token in audio[row, :n]]
        for t in range(3):
            want = cross_attention(layer, x[row, t], tokens, layer.gates.tanh())
            assert same(got[row, t], want)


def test_flamingo_starts_as_the_text_model_and_then_hears():
    model = audio_llm("flamingo", config=IntegrationConfig(flamingo_every=2))
    model.connectors.double()
    assert len(model.connectors["flamingo"]) == 2  # before layers 0 and 2
    features = [{kind: random(n, 64).requires_grad_() for kind in ("whisper", "sslam")}
                for n in (4, 7)]
    ids = torch.randint(50, (2, 5))
    hidden = model(features, ids)
    assert not same(hidden, model([{}, {}], ids), 1e-2)
    for row in range(2):  # each row reads all of its clip and nothing else
        for i, f in enumerate(features):
            for grad in torch.autograd.grad(hidden[row, 0].sum(), f.values(), retain_graph=True):
                used = grad.abs().amax(dim=1) > 0
                assert used.all() if i == row else not used.any()
        assert same(model(features[row:row + 1], ids[row:row + 1]), hidden[row:row + 1])
    for layer in model.connectors["flamingo"]:
        layer.gates.data -= 1  # as they were before audio_llm opened them
    assert same(model(features, ids), model([{}, {}], ids))
    alone = model.llm(torch.cat([torch.tensor([[model.tokenizer.bos_id]] * 2), ids], dim=1))
    assert same(model.llm.head(model(features, ids)), alone[:, 1:])
