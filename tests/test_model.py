"""The decoder, its cache, its mask and generation."""
import math

import pytest
import torch
from torch.nn.attention.bias import CausalBias

from model import (LLM, PAD_POSITION, KVCache, LLMConfig, make_positions,
                   position_mask, sample_token)


def make(seed=0, **sizes):
    """A small decoder in float64 whose weights are large enough for its choices to be clear."""
    torch.manual_seed(seed)
    config = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    llm = LLM(LLMConfig(**(config | sizes))).double()
    for p in llm.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return llm


def straight_line(llm, ids):
    """The same logits with nothing shared, cached or fused: one query, one head at a time."""
    c, x = llm.config, llm.model.embed_tokens.weight[ids].clone()  # (T, D)
    norm = lambda x, m: x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * m.weight

    def rotated(v, position):
        d = c.head_dim
        out = v.clone()
        for i in range(d // 2):
            angle = position * c.rope_theta ** (-2 * i / d)
            a, b = v[i], v[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    for block in llm.model.layers:
        h, a = norm(x, block.input_layernorm), block.self_attn
        q, k, v = ((p(h)).view(len(ids), -1, c.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        rows = []
        for t in range(len(ids)):
            heads = []
            for head in range(c.num_attention_heads):
                shared = head // (c.num_attention_heads // c.num_key_value_heads)
                scores = torch.stack([rotated(q[t, head], t) @ rotated(k[s, shared], s)
                                      for s in range(t + 1)]) / c.head_dim ** 0.5
                heads.append(scores.softmax(0) @ v[:t + 1, shared])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ a.o_proj.weight.T
        h, m = norm(x, block.post_attention_layernorm), block.mlp
        gate = h @ m.gate_proj.weight.T
        x = x + (gate * gate.sigmoid() * (h @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    head = llm.model.embed_tokens if c.tie_word_embeddings else llm.lm_head
    return norm(x, llm.model.norm) @ head.weight.T


@pytest.mark.parametrize("sizes", [
    {}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": False},
    {"qkv_bias": True}, {"rope_theta": 100.0}])
def test_logits_equal_a_straight_line_computation(sizes):
    llm = make(1, **sizes)
    ids = torch.randint(50, (6,))
    assert torch.allclose(llm(ids[None])[0], straight_line(llm, ids), rtol=0, atol=1e-10)


def test_only_the_distance_between_tokens_matters():
    llm, ids = make(2), torch.randint(50, (1, 7))
    far_away = llm(ids, positions=torch.arange(7)[None] + 1000)
    assert torch.allclose(llm(ids), far_away, rtol=0, atol=1e-9)
    assert not torch.allclose(llm(ids), llm(ids, positions=2 * torch.arange(7)[None]), atol=1e-3)


@pytest.mark.parametrize("capacity", [0, 12])
@pytest.mark.parametrize("cuts", [(12,), (1, 11), (5, 1, 6), (1,) * 12])
def test_a_cache_read_in_pieces_gives_the_same_logits(capacity, cuts):
    llm, ids = make(3), torch.randint(50, (2, 12))
    cache = KVCache(3, capacity)
    with torch.no_grad():
        pieces = [llm(part, cache=cache) for part in ids.split(list(cuts), dim=1)]
        assert torch.allclose(torch.cat(pieces, 1), llm(ids), rtol=0, atol=1e-12)


def test_gradients_flow_through_the_growing_cache():
    llm, ids = make(4), torch.randint(50, (1, 6))
    whole = llm.embed(ids).detach().requires_grad_()
    llm(embeds=whole)[:, -1].square().sum().backward()
    parts = llm.embed(ids).detach().requires_grad_()
    cache = KVCache(3)
    llm(embeds=parts[:, :4], cache=cache)
    llm(embeds=parts[:, 4:], cache=cache)[:, -1].square().sum().backward()
    assert torch.allclose(whole.grad, parts.grad, rtol=0, atol=1e-9)


def test_positions_go_on_where_the_last_ones_lie_and_lengths_may_lie_elsewhere():
    """As on a GPU, after padded audio: "meta" is a device that no other may be mixed with."""
    start = torch.zeros(2, 1, dtype=torch.long, device="meta")
    for tensor in make_positions(start, 3, torch.tensor([2, 3])):
        assert tensor.device.type == "meta"


def test_padding_is_a_position_that_no_query_reaches():
    llm = make(5)
    ids = torch.randint(50, (2, 8))
    positions, next_position = make_positions(0, 8, torch.tensor([8, 5]))
    cache = KVCache(3)
    logits = llm(ids, positions=positions, cache=cache)
    assert torch.allclose(logits[1, :5], llm(ids[1:, :5])[0], rtol=0, atol=1e-12)
    assert next_position.tolist() == [[8], [5]]
    assert torch.equal(cache.next_position, next_position)
    more = torch.randint(50, (2, 1))
    alone = llm(torch.cat([ids[1, :5], more[1]])[None])[0, -1]
    assert torch.allclose(llm(more, cache=cache)[1, 0], alone, rtol=0, atol=1e-12)


def test_the_one_rule():
    keys, queries = torch.tensor([[0, 3, 1, PAD_POSITION]]), torch.tensor([[2, 0, 3]])
    visible = position_mask(queries, keys, torch.float32)[0, 0] == 0
    assert visible.tolist() == [[True, False, True, False], [True, False, False, False],
                             [True, True, True, False]]


def uncached(llm, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(llm(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


@pytest.mark.parametrize("seed", range(3))
def test_generation_of_unequal_prompts_equals_each_alone_uncached(seed):
    llm = make(seed)
    prompts = [[3, 4, 5, 6, 7], [9], [1, 2, 30], [8, 8, 8, 8, 8]]
    want = [uncached(llm, p, 10) for p in prompts]
    assert llm.generate(prompts, 10) == want
    assert [llm.generate(p, 10) for p in prompts] == want
    assert llm.generate(torch.tensor([prompts[0], prompts[3]]), 10) == [want[0], want[3]]


def test_generation_leaves_the_cache_alone_and_chooses_its_rows():
    llm = make(1)
    cache = KVCache(3)
    llm(torch.tensor([[3, 4, 5], [6, 7, 8]]), cache=cache)
    prompts = [[6, 7, 8, 9, 1], [3, 4, 5, 2], [6, 7, 8, 9], [3, 4, 5, 9]]
    expected = [uncached(llm, prompt, 6) for prompt in prompts]
    assert expected[2] != expected[3]  # the row matters
    for _ in range(2):  # the second time gives the same only if the first left no trace
        new = llm.generate([[9, 1], [2], [9], [9]], 6, cache=cache, clip_index=[1, 0, 1, 0])
        assert new == expected


def test_a_fork_continues_its_rows_padding_and_all():
    llm, cache = make(6), KVCache(3)
    positions, _ = make_positions(0, 4, torch.tensor([4, 2]))
    ids, more = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), torch.randint(50, (3, 2))
    llm(ids, positions=positions, cache=cache)
    logits = llm(more, cache=cache.fork([1, 0, 1], 2))
    for row, text in enumerate(([7, 8], [3, 4, 5, 6], [7, 8])):
        alone = llm(torch.cat([torch.tensor(text), more[row]])[None])
        assert torch.allclose(logits[row], alone[0, -2:], rtol=0, atol=1e-12)


def test_generation_stops_at_the_end_of_text():
    llm = make(7)
    free = llm.generate([5, 6], 12)
    end = free[3]
    assert llm.generate([5, 6], 12, eos_id=end) == free[:free.index(end)]
    never = min(set(range(50)) - set(free))
    for several in ([never, end], [end, never], (end,)):
        assert llm.generate([5, 6], 12, eos_id=several) == free[:free.index(end)]
    for none in (None, [], [never]):
        assert llm.generate([5, 6], 12, eos_id=none) == free
    seen = []
    llm.generate([[5, 6], [7, 8]], 12, eos_id=end, on_token=seen.append)
    assert [row[0] for row in seen if row[0] is not None] == free[:free.index(end)]


def test_rows_that_have_ended_are_no_longer_run():
    """Four questions; what ends two of the answers leaves the other two as they were."""
    llm, prompts = make(1), [[3, 4, 5, 6, 7], [9], [1, 2, 30], [8, 8, 8]]
    free = [llm.generate(p, 12) for p in prompts]
    ends = [next(t for t in answer if not any(t in free[k] for k in (0, 2)))
            for answer in (free[1], free[3])]
    want = [[t for t in answer[:min([answer.index(e) for e in ends if e in answer] or [12])]]
            for answer in free]
    rows, seen = [], []
    llm.model.register_forward_pre_hook(lambda model, inputs: rows.append(len(inputs[0])))
    assert llm.generate(prompts, 12, eos_id=ends, on_token=seen.append) == want
    assert rows[0] == 4 and rows[-1] == 2 and len(rows) == 12
    assert [[step[i] for step in seen if step[i] is not None] for i in range(4)] == want
    assert all(len(step) == 4 for step in seen)


def test_sampling():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    rng = torch.Generator().manual_seed(0)
    share = lambda t, p: sample_token(logits, t, p, rng).bincount(minlength=4) / 20000
    assert torch.allclose(share(1.0, 1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    assert torch.allclose(share(1.0, 0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(share(0.5, 1.0)[0], torch.tensor(0.25 / 0.365), atol=0.02)
    assert share(1.0, 1e-9)[0] == 1 and (sample_token(logits, 0, 1.0) == 0).all()
    llm = make(8)
    assert llm.generate([1], 8, 1.0, seed=3) == llm.generate([1], 8, 1.0, seed=3)


def test_nothing_to_continue_is_said():
    for nothing in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            make().generate(nothing, 3)


def record_kernel_calls(monkeypatch):
    """A list that gets (query heads, key heads, mask) of each call of the attention kernel."""
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        calls.append((q.shape[1], k.shape[1], attn_mask))
        return kernel(q, k, v, attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    return calls


def test_a_single_query_has_no_mask_and_its_heads_share_keys_as_rows(monkeypatch):
    llm, ids = make(9), torch.randint(50, (2, 5))
    cache = KVCache(3)
    llm(ids, cache=cache)
    calls = record_kernel_calls(monkeypatch)
    logits = llm(ids[:, :1], cache=cache)
    assert calls == [(2, 2, None)] * 3  # 2 key-value heads, with 2 of the 4 heads as rows of each
    monkeypatch.undo()
    whole = llm(torch.cat([ids, ids[:, :1]], dim=1))
    assert torch.allclose(logits[:, 0], whole[:, -1], rtol=0, atol=1e-12)


def test_on_cuda_an_explicit_mask_comes_with_a_key_for_each_query_head(monkeypatch):
    llm, ids = make(10), torch.randint(50, (2, 5))
    positions, _ = make_positions(0, 5, torch.tensor([5, 3]))
    expected = llm(ids, positions=positions)
    calls = record_kernel_calls(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert torch.allclose(llm(ids, positions=positions), expected, rtol=0, atol=1e-12)
    assert [(q, k) for q, k, _ in calls] == [(4, 4)] * 3
    assert all(type(mask) is torch.Tensor for *_, mask in calls)


def test_on_cuda_the_causal_mask_comes_with_shared_keys_in_half_precision(monkeypatch):
    calls = []

    def record(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((q.shape[1], k.shape[1], type(attn_mask), is_causal, enable_gqa))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    llm, ids = make(10), torch.randint(50, (2, 5))
    for dtype, heads in ((torch.bfloat16, 2), (torch.float32, 4)):
        calls.clear()
        cache = KVCache(3)
        llm.to(dtype)(ids, cache=cache)
        llm(ids, cache=cache)
        assert calls == [(4, heads, type(None), True, True)] * 3 + [
            (4, heads, CausalBias, False, True)] * 3


def test_the_loss_is_the_weighted_sum_over_the_tokens_to_be_learnt():
    llm, ids = make(11), torch.randint(50, (2, 6))
    hidden = llm.model(llm.embed(ids[:, :-1]))
    weights = torch.tensor([[9, 0, 0.5, 2, 0, 1], [9, 1, 0, 0, 0, 0.25]])  # the first is never used
    log_p = llm.head(hidden).log_softmax(-1)
    expected = -sum(weights[b, t] * log_p[b, t - 1, ids[b, t]]
                    for b in range(2) for t in range(1, 6))
    assert torch.allclose(llm.loss(hidden, ids, weights), expected, rtol=0, atol=1e-12)


def test_no_more_tokens_stay_than_reach_top_p_exactly():
    tokens = sample_token(torch.zeros(100, 2), 1.0, 0.5, torch.Generator().manual_seed(0))
    assert len(set(tokens.tolist())) == 1  # one of the two, of probability 1/2 each, is enough
