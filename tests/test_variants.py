"""Modes beyond the paper: what defines each. Equalities in float64."""
import pytest
import torch
from test_integrate import (SEEDS, WRITE, audio_llm, audio_segments, cross_attention, in_mode,
                            random, randomized, same, setting)

from integrate import CrossAttentionBlock, IntegrationConfig, Segment, hear, pal, prefill
from lib.lora import LoRALinear, add_lora
from lib.variants import GatedCrossAttention, Summary, write_hybrid, write_residual
from model import PAD_POSITION, KVCache, rotary


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


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hybrid_runs_every_second_layer_and_writes_the_others(seed):
    llm, ids, a = setting(seed)
    lengths = torch.tensor([5, 3])
    positions = torch.arange(a.shape[1])[None].masked_fill(
        torch.arange(a.shape[1]) >= lengths[:, None], PAD_POSITION)
    caches = {name: KVCache(3) for name in ("hybrid", "plits", "lal")}
    write_hybrid(llm, a, "hybrid", caches["hybrid"], positions)
    for route in ("plits", "lal"):
        hear(llm, a, route, caches[route], positions=positions)
    valid = positions < PAD_POSITION
    keys = {name: [k[valid] for k in cache.keys] for name, cache in caches.items()}
    # layers 0 and 1 see what PLITS makes of the audio; layer 1 passes it on as it is
    assert all(same(keys["hybrid"][i], keys["plits"][i]) for i in (0, 1))
    assert not same(keys["hybrid"][2], keys["plits"][2], 1e-2)
    for name, p in llm.named_parameters():  # layers that add nothing: LAL
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data.zero_()
    hybrid = KVCache(3)
    write_hybrid(llm, a, "hybrid", hybrid, positions)
    assert all(same(k[valid], other) for k, other in zip(hybrid.keys, keys["lal"]))


class CacheOfOne:
    """A cache that holds the newest token alone."""

    def append(self, layer, k, v):
        return k, v


def test_residual_starts_as_lal_and_each_token_moves_on_by_itself():
    llm, _, a = setting(0)
    shares = torch.zeros(3, dtype=torch.float64)

    def written(shares, audio):
        cache = KVCache(3)
        write_residual(shares, llm, audio, "residual", cache)
        return cache

    plain, lal = written(shares, a), hear(llm, a, "lal")
    assert all(same(x, y) for x, y in zip(plain.keys + plain.values, lal.keys + lal.values))
    moved = written(shares + 0.7, a)
    assert same(moved.values[0], lal.values[0])
    # the second layer reads x + tanh(share) of the attention of each token to itself alone
    first, second = llm.model.layers[:2]
    angles = rotary(torch.zeros(1, 1, dtype=torch.long), llm.config, a.dtype)
    tokens = first.input_layernorm(a).flatten(0, 1)[:, None]  # (B N, 1, D)
    alone = first.self_attn(tokens, angles, {}, CacheOfOne(), 0).view_as(a)
    alone = a + (shares[0] + 0.7).tanh() * alone
    want = second.self_attn.split_heads(second.self_attn.v_proj(second.input_layernorm(alone)))
    assert same(moved.values[1], want)
    later = a.clone()
    later[:, -1] += 1
    assert all(same(x[:, :-1], y[:, :-1])
               for x, y in zip(written(shares + 0.7, later).values, moved.values))


def test_a_summary_is_an_average_of_what_is_not_padding():
    summary = Summary(4, 6).double()
    audio, lengths = random(2, 5, 6), torch.tensor([5, 2])
    for b, n in enumerate(lengths):
        for query, got in zip(summary.queries, summary(audio, lengths)[b]):
            scores = torch.stack([query @ token / 6 ** 0.5 for token in audio[b, :n]])
            assert same(got, scores.softmax(0) @ audio[b, :n])
    summary.queries.data.zero_()
    assert same(summary(audio, None), audio.mean(1, keepdim=True).expand(-1, 4, -1))


def test_pal_summary_runs_summaries_and_writes_all():
    model = audio_llm("pal-summary", config=IntegrationConfig(summary_tokens=3))
    model.connectors.double()
    features = [{kind: random(n, 64) for kind in ("whisper", "sslam")} for n in (4, 4)]
    ids = torch.randint(50, (2, 5))
    segments = model.segments(features)
    assert [s.route for s in segments] == ["plits"] * 3 + ["lal"] * 2
    assert [s.tokens.shape[1] for s in segments[1:3]] == [3, 3]
    prefix, side = (torch.cat([s.tokens for s in part], 1) for part in (segments[1:3],
                                                                        segments[3:]))
    before = torch.tensor([[model.tokenizer.bos_id]])
    assert same(model.llm.head(model(features, ids)), pal(model.llm, ids, prefix, side, before))
    model(features, ids).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.connectors.parameters())


def test_lora_starts_as_the_llm_and_is_a_change_of_its_weights():
    llm, ids, a = setting(0)
    bare = in_mode("lal", llm, ids, a[:, :4], a[:, 4:])
    add_lora(llm, 2)
    llm.double()
    assert same(in_mode("lal", llm, ids, a[:, :4], a[:, 4:]), bare)
    for p in llm.parameters():
        p.data += 0.1 * random(*p.shape)
    adapted = {mode: in_mode(mode, llm, ids, a[:, :4], a[:, 4:]) for mode in ("plits", "lal")}
    assert not same(adapted["lal"], bare, 1e-2)
    for block in llm.model.layers:
        for name in ("q_proj", "v_proj"):
            lora = getattr(block.self_attn, name)
            assert isinstance(lora, LoRALinear)
            lora.linear.weight.data += lora.lora_b.data @ lora.lora_a.data
            setattr(block.self_attn, name, lora.linear)
    for mode, logits in adapted.items():
        assert same(in_mode(mode, llm, ids, a[:, :4], a[:, 4:]), logits)
