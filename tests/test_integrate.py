"""The facts that define PLITS, LAL and PAL, on the real classes, equalities in float64."""
import math
import re
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from encoders import CLAP, SSLAM, CLAPConfig, SSLAMConfig, Whisper, WhisperConfig
from integrate import (CONNECTORS, LFST, MODES, AudioLLM, IntegrationConfig, MLPConnector, QFormer,
                       Segment, hear, lal, mode_routes, nearest_parts, pal, plits, pool, prefill)
from lib import checkpoints
from lib.cli import parse_layers
from lib.tokenizers import train_tokenizer
from lib.variants import write_attention_only, write_feed_forward_only
from lib.weights import bytes_to_tensor
from model import Attention, KVCache, Linear, position_mask
from test_model import make

SEEDS = range(3)
T, N = 6, 9


def setting(seed, layers=3, B=2, **sizes):
    llm = make(seed, num_hidden_layers=layers, **sizes)
    return llm, torch.randint(50, (B, T)), torch.randn(B, N, 24, dtype=torch.float64) * 3


def same(a, b, atol=1e-12):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


# The routes of a speech encoder and of a general one in the modes that have no layers of their own,
# and what writes audio in these modes
ROUTES = {"plits": ("plits", "plits"), "lal": ("lal", "lal"), "pal": ("plits", "lal"),
          "attn": ("attn", "attn"), "ffn": ("ffn", "ffn")}
WRITE = {"attn": write_attention_only, "ffn": write_feed_forward_only}


def audio_segments(mode, first, second, lengths=(None, None), layers=None):
    return [Segment(*segment, layers)
            for segment in zip(ROUTES[mode], (first, second), lengths)]


def in_mode(mode, llm, ids, first, second, before=None):
    """Logits of ids after two encoders' tokens, routed as the mode routes whisper and sslam."""
    front = [] if before is None else [Segment("plits", llm.embed(before))]
    segments = front + audio_segments(mode, first, second) + [Segment("plits", llm.embed(ids))]
    hidden = prefill(llm, segments, write=WRITE.get(mode, hear))
    return llm.head(hidden[:, -ids.shape[1]:])


@pytest.mark.parametrize("qkv_bias", [False, True])  # Qwen2.5 has one
@pytest.mark.parametrize("seed", SEEDS)
def test_with_one_layer_all_modes_agree_with_more_they_differ(seed, qkv_bias):
    llm, ids, a = setting(seed, layers=1, qkv_bias=qkv_bias)
    assert same(plits(llm, ids, a), lal(llm, ids, a))
    assert same(plits(llm, ids, a), pal(llm, ids, a[:, :4], a[:, 4:]))
    llm, ids, a = setting(seed, layers=2)
    p, l, b = plits(llm, ids, a), lal(llm, ids, a), pal(llm, ids, a[:, :4], a[:, 4:])
    assert min((p - l).abs().max(), (p - b).abs().max(), (l - b).abs().max()) > 1e-2


@pytest.mark.parametrize("seed", SEEDS)
def test_without_audio_all_modes_are_the_text_model(seed):
    llm, ids, a = setting(seed)
    for nothing in (a[:, :0], None):
        assert same(plits(llm, ids, nothing), llm(ids))
        assert same(lal(llm, ids, nothing), llm(ids))
        assert same(pal(llm, ids, nothing, nothing), llm(ids))


@pytest.mark.parametrize("seed", SEEDS)
def test_pal_with_nothing_on_one_side_is_the_other_mode(seed):
    llm, ids, a = setting(seed)
    assert same(pal(llm, ids, a, a[:, :0]), plits(llm, ids, a))
    assert same(pal(llm, ids, a[:, :0], a), lal(llm, ids, a))


@pytest.mark.parametrize("seed", SEEDS)
def test_hearing_into_a_cache_first_gives_what_one_pass_gives(seed):
    llm, ids, a = setting(seed)
    for route, logits in (("plits", plits), ("lal", lal)):
        assert same(llm(ids, cache=hear(llm, a, route)), logits(llm, ids, a))
    cache = hear(llm, a[:, 4:], "lal", hear(llm, a[:, :4], "plits"))
    assert same(llm(ids, cache=cache), pal(llm, ids, a[:, :4], a[:, 4:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_lal_keys_and_values_are_those_of_each_layers_own_norm_and_weights(seed):
    llm, _, a = setting(seed, qkv_bias=True)
    cache = hear(llm, a, "lal")
    for i, block in enumerate(llm.model.layers):
        x = block.input_layernorm(a)
        assert same(cache.values[i], block.self_attn.split_heads(block.self_attn.v_proj(x)))
        k = block.self_attn.split_heads(block.self_attn.k_proj(x))
        assert same(cache.keys[i][:, 0], k[:, 0])  # position 0 is not turned
        assert same(cache.keys[i].norm(dim=-1), k.norm(dim=-1))
        assert not same(cache.keys[i][:, 1:], k[:, 1:], 1e-2)


class LoRA(torch.nn.Module):
    """W x + B A x around any linear layer: low-rank adaptation, as textbooks write it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.A = torch.nn.Parameter(torch.randn(rank, base.in_features, dtype=torch.float64))
        self.B = torch.nn.Parameter(torch.randn(base.out_features, rank, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T

    def delta(self):
        return self.B @ self.A


def lora_subclass(linear_class):
    """The same as a subclass of nn.Linear or of model.py's Linear, whose `weight` is W alone."""
    class LoRALinear(linear_class):
        def __init__(self, base):
            super().__init__(base.in_features, base.out_features, dtype=torch.float64)
            self.load_state_dict(base.state_dict())
            self.lora = LoRA(base)
            self.delta = self.lora.delta

        def forward(self, x):
            return super().forward(x) + x @ self.lora.A.T @ self.lora.B.T

    return LoRALinear


@pytest.mark.parametrize("wrap", [LoRA, lora_subclass(torch.nn.Linear), lora_subclass(Linear)])
@pytest.mark.parametrize("names", [("k_proj",), ("v_proj",), ("k_proj", "v_proj", "q_proj")])
def test_lal_hears_through_what_is_wrapped_around_its_weights(wrap, names):
    llm, ids, a = setting(1, qkv_bias=True)
    bare = lal(llm, ids, a)
    wrapped = []
    for block in llm.model.layers:
        for name in names:
            base = getattr(block.self_attn, name)
            setattr(block.self_attn, name, wrap(base))
            wrapped.append((block.self_attn, name, base, getattr(block.self_attn, name).delta()))
    adapted = lal(llm, ids, a)
    for attention, name, base, delta in wrapped:  # the same with W + BA as the weights
        base.weight.data += delta.detach()
        setattr(attention, name, base)
    assert same(adapted, lal(llm, ids, a)) and not same(adapted, bare, 1e-2)


@pytest.mark.parametrize("register, hook", [
    ("register_forward_hook", lambda module, inputs, output: 2 * output),
    ("register_forward_pre_hook", lambda module, inputs: (2 * inputs[0],))])
def test_lal_hears_through_hooks_on_its_weights(register, hook):
    llm, ids, a = setting(1)
    bare = lal(llm, ids, a)
    proj = llm.model.layers[0].self_attn.v_proj
    handle = getattr(proj, register)(hook)
    hooked = lal(llm, ids, a)
    handle.remove()
    proj.weight.data *= 2
    if proj.bias is not None:
        proj.bias.data *= 2
    assert same(hooked, lal(llm, ids, a)) and not same(hooked, bare, 1e-2)


@pytest.mark.parametrize("mode, counts", [
    ("plits", [T + N]), ("lal", [T]), ("pal", [4, T]), ("attn", [T]), ("ffn", [N, T])])
def test_which_tokens_a_feed_forward_module_sees(mode, counts):
    llm, ids, a = setting(0)
    seen = []
    for block in llm.model.layers:
        block.mlp.register_forward_hook(lambda m, x, y: seen.append(y.shape[1]))
    in_mode(mode, llm, ids, a[:, :4], a[:, 4:])
    assert seen == [n for n in counts for _ in llm.model.layers]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ROUTES)
def test_the_first_text_token_attends_to_the_last_audio_token_and_text_before_to_none(mode, seed):
    llm, ids, a = setting(seed)
    a.requires_grad_()
    segments = [Segment("plits", llm.embed(torch.tensor([[1, 2]]))),
                *audio_segments(mode, a[:, :4], a[:, 4:]), Segment("plits", llm.embed(ids))]
    cache = KVCache(3)
    hidden = prefill(llm, segments, cache, WRITE.get(mode, hear))
    grad, = torch.autograd.grad(hidden[:, -T].sum(), a, retain_graph=True)
    assert (grad.abs().amax(dim=-1) > 1e-6).all()  # every audio token, the last one too
    written = sum(x[:, :2].sum() for x in cache.keys + cache.values)  # by the text before
    grad, = torch.autograd.grad(written, a, allow_unused=True)
    assert grad is None or grad.abs().max() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_without_positions_lal_cannot_tell_before_from_after(seed):
    llm, ids, a = setting(seed)

    def logits(audio, rotate_keys):
        segments = [Segment("lal", audio), Segment("plits", llm.embed(ids))]
        return llm.head(prefill(llm, segments, write=partial(hear, rotate_keys=rotate_keys)))

    assert same(logits(a, False), logits(a.flip(1), False))
    assert not same(logits(a, True), logits(a.flip(1), True), 1e-2)
    assert same(logits(a, True), lal(llm, ids, a))
    assert same(logits(a[:, :1], False), lal(llm, ids, a[:, :1]))  # position 0 is not rotated


@pytest.mark.parametrize("text, want", [
    ("all", None), ("2:", [2, 3, 4, 5]), (":2", [0, 1]), ("::2", [0, 2, 4]), ("1::3", [1, 4]),
    ("-2:", [4, 5]), ("0,4,1", [0, 1, 4]), ("3", [3]), ("2,2", [2])])
def test_layers_are_picked_as_slices_or_lists(text, want):
    assert parse_layers(text, 6) == want


@pytest.mark.parametrize("text", ["6", "0,6", "-1", "6:", "x", "1,", "0,2:", "::0", "1:2:3:4", ""])
def test_layers_that_are_not_there_are_one_line(text):
    with pytest.raises(ValueError, match="lal-layers.*0 to 5"):
        parse_layers(text, 6)


@pytest.mark.parametrize("mode", ["lal", "pal"])
def test_each_encoders_cache_depends_on_its_clip_alone(mode):
    llm, ids, a = setting(1)
    b = torch.randn_like(a)

    def cached(first, second):
        cache = KVCache(3)
        prefill(llm, audio_segments(mode, first, second), cache)
        return list(zip(cache.keys, cache.values))

    both = cached(a[:, :4], a[:, 4:])
    for part, other in ((slice(0, 4), cached(a[:, :4], b[:, 4:])),
                        (slice(4, N), cached(b[:, :4], a[:, 4:]))):
        for (k, v), (k2, v2) in zip(both, other):
            assert torch.equal(k[:, part], k2[:, part]) and torch.equal(v[:, part], v2[:, part])


@pytest.mark.parametrize("mode", ROUTES)
def test_the_cache_is_in_order_of_position_in_every_mode(mode):
    llm, ids, a = setting(1)
    segments = [Segment("plits", llm.embed(ids[:, :1])), *audio_segments(mode, a[:, :4], a[:, 4:]),
                Segment("plits", llm.embed(ids))]
    cache = KVCache(3)
    prefill(llm, segments, cache, WRITE.get(mode, hear))
    for positions in cache.positions:
        assert positions.tolist() == [list(range(1 + N + T))]


def test_layers_left_out_hold_no_audio():
    llm, ids, a = setting(2)
    cache = hear(llm, a, "lal", layers=[1])
    assert cache.positions[0] is None and cache.keys[2] is None and cache.keys[1].shape[1] == N
    assert same(llm(ids, cache=cache), lal(llm, ids, a, layers=[1]))
    assert same(lal(llm, ids, a, layers=[]), llm(ids, positions=torch.arange(N, N + T)[None]))
    assert not same(lal(llm, ids, a, layers=[1]), lal(llm, ids, a), 1e-2)
    assert same(lal(llm, ids, a, layers=range(3)), lal(llm, ids, a))


@pytest.mark.parametrize("mode", ROUTES)
def test_padded_audio_changes_nothing(mode):
    llm, ids, a = setting(3)
    before = torch.tensor([[1]])
    lengths = (torch.tensor([4, 2]), torch.tensor([3, 5]))  # of 4 and of 5 tokens
    segments = [Segment("plits", llm.embed(before)),
                *audio_segments(mode, a[:, :4], a[:, 4:], lengths),
                Segment("plits", llm.embed(ids))]
    hidden = prefill(llm, segments, write=WRITE.get(mode, hear))
    for row in range(2):
        first, second = a[row:row + 1, :lengths[0][row]], a[row:row + 1, 4:4 + lengths[1][row]]
        alone = in_mode(mode, llm, ids[row:row + 1], first, second, before)
        assert same(llm.head(hidden[row:row + 1, -T:]), alone)


def test_one_token_after_a_padded_cache_does_not_see_the_padding():
    llm, ids, a = setting(3)
    cache, lengths = KVCache(3), torch.tensor([4, 2])
    prefill(llm, [Segment("lal", a[:, :4], lengths)], cache)
    logits = llm(ids[:, :1], cache=cache)
    for row, n in enumerate(lengths):
        assert same(logits[row:row + 1], lal(llm, ids[row:row + 1, :1], a[row:row + 1, :n]))


@pytest.mark.parametrize("mode, layers, padded, expected", [
    ("plits", None, False, ["causal"]), ("plits", None, True, ["positions"]),
    ("lal", None, False, ["none", "lower right"]), ("lal", None, True, ["none", "positions"]),
    ("lal", [1], False, ["none", "lower right"]), ("lal", [1], True, ["none", "positions"]),
    ("pal", None, False, ["causal", "lower right"]),
    ("pal", None, True, ["positions", "positions"])])
def test_the_kernel_gets_the_causal_mask_unless_there_is_padding(mode, layers, padded, expected,
                                                                 monkeypatch):
    """Which mask each decoder call hands to the attention kernel, as on CUDA. With the explicit
    mask of positions the result is the same."""
    llm, ids, a = setting(4)
    lengths = (torch.tensor([4, 2]), torch.tensor([3, 5])) if padded else (None, None)
    segments = [Segment("plits", llm.embed(torch.tensor([[1]]))),
                *audio_segments(mode, a[:, :4], a[:, 4:], lengths, layers),
                Segment("plits", llm.embed(ids))]
    masks = []

    def record(self, x, angles, mask, cache, layer):
        masks.append(mask)
        return attend(self, x, angles, mask, cache, layer)

    attend = Attention.forward
    monkeypatch.setattr(Attention, "forward", record)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        hidden = prefill(llm, segments)
    kinds = {torch.Tensor: "positions", CausalBias: "lower right"}
    names = ["causal" if mask.get("is_causal") else kinds.get(type(mask.get("attn_mask")), "none")
             for mask in masks]
    assert names == [name for name in expected for _ in range(3)]
    assert same(hidden, prefill(llm, segments))  # as on a CPU, which has no mask by name for T < S
    monkeypatch.setattr(model_module, "attention_mask", lambda queries, keys, in_order, dtype:
                        {"attn_mask": position_mask(queries, keys, dtype)})
    assert same(hidden, prefill(llm, segments))


def test_what_is_only_written_returns_no_hidden_states():
    llm, ids, a = setting(3)
    text = Segment("plits", llm.embed(ids))
    assert prefill(llm, [text, Segment("lal", a)]) is None
    assert prefill(llm, [text, Segment("plits", a)]).shape == (2, T + N, 24)
    assert prefill(llm, [text, Segment("lal", a), text]).shape == (2, T, 24)


@pytest.mark.parametrize("route", ["silent", ""])
def test_an_unknown_route_is_a_programmers_mistake(route):
    llm, _, a = setting(0)
    with pytest.raises(AssertionError, match="plits or lal"):
        hear(llm, a, route)


def test_pooling_averages_the_tail_too():
    x = torch.arange(10.0).view(5, 2)
    assert torch.equal(pool(x, 2), torch.stack([x[:2].mean(0), x[2:4].mean(0), x[4]]))
    assert torch.equal(pool(x, 1), x)


# ------------------------------------------------------------------------------------ connectors

def linear(m, x):
    return torch.stack([row @ x for row in m.weight]) + m.bias


def layer_norm(m, x):
    x = x - x.mean()
    return x / ((x * x).mean() + m.eps).sqrt() * m.weight + m.bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(net, x):
    return linear(net[2], gelu(linear(net[0], x)))


def cross_attention(layer, x, tokens, gates=(1, 1)):
    """One query x (W,) reads [(source, token (W,)), ...], one head and token at a time."""
    q, W = linear(layer.q, layer_norm(layer.norm1, x)), len(x)
    kv = [linear(layer.kv[source], token) for source, token in tokens]
    d, mixed = W // layer.heads, []
    for h in range(layer.heads):
        part = slice(h * d, h * d + d)
        weights = torch.stack([q[part] @ k[:W][part] / math.sqrt(d) for k in kv]).exp()
        mixed.append(sum(w * v[W:][part] for w, v in zip(weights / weights.sum(), kv)))
    x = x + gates[0] * linear(layer.out, torch.cat(mixed))
    inner = layer_norm(layer.norm2, x)
    return x + gates[1] * mlp(layer.mlp, inner)


def token_of(connector, query, features):
    """What becomes of a query that reads [(source, feature), ...]: layers, then projection."""
    tokens = [(i, layer_norm(connector.in_proj[i][3], mlp(connector.in_proj[i], x)))
              for i, x in features]
    for layer in connector.layers:
        query = cross_attention(layer, query, tokens)
    return mlp(connector.out, query)


def encoder_like(width, grid, seconds):
    return SimpleNamespace(width=width, grid=grid, seconds=seconds)


def randomized(connector, seed=0):
    torch.manual_seed(seed)
    connector.double()
    for p in connector.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return connector


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_the_mlp_connector_equals_a_straight_line_computation():
    torch.manual_seed(1)
    connector = randomized(MLPConnector([encoder_like(6, (9, 1), 1)], 10, IntegrationConfig()))
    x, lengths = random(2, 9, 6), torch.tensor([9, 4])
    got, same_lengths = connector([x], [lengths])
    assert got.shape == (2, 9, 10) and same_lengths is lengths
    W1, b1, W2, b2 = connector.parameters()
    want = [torch.stack([W2 @ gelu(W1 @ token + b1) + b2 for token in row]) for row in x]
    assert same(got, torch.stack(want))
    assert not same(connector([x + x], [None])[0] - got, got - connector([0 * x], [None])[0], 1e-2)


@pytest.mark.parametrize("queries, layers, width", [(5, 2, 6), (1, 1, 128)])
def test_qformer_equals_a_straight_line_computation(queries, layers, width):
    torch.manual_seed(1)
    config = IntegrationConfig(queries=queries, connector_layers=layers)
    connector = randomized(QFormer([encoder_like(width, (9, 1), 1)], 10, config))
    x, lengths = random(2, 9, width), torch.tensor([9, 4])
    got, none = connector([x], [lengths])
    assert got.shape == (2, queries, 10) and none is None
    for row, n in enumerate(lengths):
        tokens = [(0, token) for token in x[row, :n]]
        for query, token in zip(connector.queries, got[row]):
            assert same(token, token_of(connector, query, tokens))
    assert same(connector([x[1:, :4]], [None])[0], got[1:])


def test_qformer_does_not_care_for_the_order_of_its_features():
    connector = randomized(QFormer([encoder_like(6, (9, 1), 1)], 10, IntegrationConfig(queries=5)))
    x = random(2, 9, 6)
    assert same(connector([x], [None])[0], connector([x[:, torch.randperm(9)]], [None])[0])
    assert not same(connector([x], [None])[0], connector([x[:, :8]], [None])[0], 1e-3)


# SSLAM and CLAP as in their real sizes; as in ours; ragged, with cells where no centre falls; one
ENCODER_PAIRS = {
    "real": ([encoder_like(4, (64, 8), 10.24), encoder_like(6, (32, 2), 10.0)], (32, 2)),
    "ours": ([encoder_like(6, (25, 8), 4.0), encoder_like(6, (16, 4), 4.0)], (16, 2)),
    "ragged": ([encoder_like(4, (5, 3), 2.0), encoder_like(6, (7, 1), 3.0)], (4, 2)),
    "one": ([encoder_like(6, (7, 5), 2.8)], (3, 3))}


def cell_tokens(encoder, longest, grid, t, f, steps):
    """The tokens of an encoder, of so many steps, that belong to place (t, f): the definition."""
    half, (T, bands), (S, own) = Fraction(1, 2), grid, encoder.grid
    W, w = Fraction(str(longest)), Fraction(str(encoder.seconds))
    times = [(i + half) * w / S for i in range(steps)]
    own_bands = [(j + half) / own for j in range(own)]
    chosen = []
    for centres, start, size in ((times, t * W / T, W / T),
                                 (own_bands, Fraction(f, bands), Fraction(1, bands))):
        inside = [i for i, c in enumerate(centres) if start <= c < start + size]
        middle = start + size / 2
        chosen.append(inside or [min(range(len(centres)), key=lambda i: abs(centres[i] - middle))])
    return [i * own + j for i in chosen[0] for j in chosen[1]]


@pytest.fixture(params=ENCODER_PAIRS)
def grids(request):
    """An LFST, its encoders, its grid, and features of three clips: whole, short, shorter."""
    encoders, grid = ENCODER_PAIRS[request.param]
    config = IntegrationConfig(grid_steps=grid[0], grid_bands=grid[1], connector_layers=2)
    connector = randomized(LFST(encoders, 5, config), 2)
    longest = max(e.seconds for e in encoders)
    steps = [[min(e.grid[0], math.ceil(e.grid[0] * share * longest / e.seconds))
              for share in (1, 0.6, 0.1)] for e in encoders]
    features = [random(3, max(s) * e.grid[1], e.width) for s, e in zip(steps, encoders)]
    lengths = [torch.tensor(s) * e.grid[1] for s, e in zip(steps, encoders)]
    return connector, encoders, grid, longest, steps, features, lengths


def test_lfst_equals_a_straight_line_computation_over_its_places(grids):
    connector, encoders, (T, bands), longest, steps, features, lengths = grids
    got, sizes = connector(features, lengths)
    assert sizes[0] == T * (bands + 1) == got.shape[1]  # the grid alone says how long
    for row in range(3):
        ends = [Fraction(s[row], e.grid[0]) * Fraction(str(e.seconds)) / Fraction(str(longest))
                for s, e in zip(steps, encoders)]
        want = []
        for t in range(T):
            if Fraction(t, T) >= max(ends):  # it begins when the clip is over
                break
            for f in range(bands):
                tokens = [(i, features[i][row, n]) for i, e in enumerate(encoders)
                          for n in cell_tokens(e, longest, (T, bands), t, f, steps[i][row])]
                if t < 3 or t % 5 == 0:
                    want.append(token_of(connector, connector.queries[0], tokens))
                else:  # to be quick
                    want.append(got[row, t * (bands + 1) + f])
            want.append(connector.newline)
        assert sizes[row] == len(want)
        assert same(got[row, :len(want)], torch.stack(want))


def test_a_place_of_lfst_depends_on_its_own_window_and_on_nothing_else(grids):
    connector, encoders, (T, bands), longest, steps, features, lengths = grids
    features = [x.requires_grad_() for x in features]
    got, _ = connector(features, lengths)
    for t in (0, 1, T // 2, T - 1):
        for f in range(bands):
            grads = torch.autograd.grad(got[0, t * (bands + 1) + f].sum(), features,
                                        retain_graph=True)
            for grad, e, s in zip(grads, encoders, steps):
                used = grad.abs().amax(-1)
                assert used[1:].max() == 0
                own = cell_tokens(e, longest, (T, bands), t, f, s[0])
                assert used[0].nonzero()[:, 0].tolist() == own
        newline = torch.autograd.grad(got[0, t * (bands + 1) + bands].sum(), features,
                                      retain_graph=True, allow_unused=True)
        assert all(grad is None or grad.abs().max() == 0 for grad in newline)


@pytest.mark.parametrize("wanted, made", [(32, 32), (99, 32), (5, 5)])
def test_lfst_has_no_finer_steps_than_its_coarsest_encoder(wanted, made):
    config = IntegrationConfig(grid_steps=wanted, grid_bands=3)
    connector = LFST(ENCODER_PAIRS["real"][0], 5, config)
    tokens, _ = connector([torch.zeros(1, 512, 4), torch.zeros(1, 64, 6)], [None, None])
    assert tokens.shape[1] == made * 4


def test_lfst_of_a_batch_is_that_of_each_clip_alone(grids):
    connector, encoders, _, _, _, features, lengths = grids
    got, sizes = connector(features, lengths)
    for row in range(3):
        alone, none = connector([x[row:row + 1, :n[row]] for x, n in zip(features, lengths)],
                                [None] * len(features))
        assert none is None and same(alone, got[row:row + 1, :sizes[row]])


# ----------------------------------------------------------------------- the whole AudioLLM

def clip(seconds, seed=0):
    wave = torch.randn(int(seconds * 16000), generator=torch.Generator().manual_seed(seed))
    return lambda rate: wave


def audio_llm(mode, seed=0, config=IntegrationConfig(), clap=False):
    """Small, but of the real classes; float64 but for the encoders' front ends."""
    torch.manual_seed(seed)
    encoders = {"whisper": Whisper(WhisperConfig(width=64, layers=1, seconds=1.6)),
                "sslam": SSLAM(SSLAMConfig(width=64, layers=1, seconds=1.6))}
    if clap:
        encoders["clap"] = CLAP(CLAPConfig(
            width=16, depths=(1, 1, 1), heads=1, image=128, seconds=1.5, rate=16000, hop=256,
            high=8000.0, bank_rate=16000))
    tokenizer = train_tokenizer([f"what is {n} said or heard" for n in range(60)], 300)
    llm = make(seed, vocab_size=tokenizer.vocab_size)
    for kind, size in {"whisper": 8, "sslam": 4, "clap": 1}.items():
        if kind in encoders:
            encoders[kind].pool_size = size
    model = AudioLLM(llm, tokenizer, encoders, mode, config)
    if mode == "flamingo":
        for layer in model.connectors["flamingo"]:
            layer.gates.data += 1
    return model


def doubled(features):
    return [{kind: tokens.double() for kind, tokens in f.items()} for f in features]


def uncached_answer(model, features, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        hidden = model([features], torch.tensor([ids]))
        ids.append(model.llm.head(hidden)[0, -1].argmax().item())
    return ids[len(prompt):]


@pytest.fixture(params=MODES)
def model(request):
    model = audio_llm(request.param)
    model.connectors.double()
    return model


def test_cached_generation_is_uncached_generation(model):
    features = doubled(model.features([clip(1.6), clip(0.7, 1), clip(1.1, 2)]))
    prompts = [[5, 6, 7, 8], [9], [10, 11], [5, 6]]
    clip_index = [0, 1, 2, 1]
    want = [uncached_answer(model, features[r], p, 6) for r, p in zip(clip_index, prompts)]
    cache = model.hear(features)  # a ragged batch, its questions ragged too
    assert model.llm.generate(prompts, 6, cache=cache, clip_index=clip_index) == want
    for r, p, w in zip(clip_index, prompts, want):  # each alone: nothing is padding
        assert model.llm.generate([p], 6, cache=model.hear([features[r]])) == [w]


def test_features_of_a_batch_are_those_of_each_clip_alone(model):
    clips = [clip(1.6), clip(0.3, 1), clip(1.0, 2)]
    together = model.features(clips)
    for one, f in zip(clips, together):
        alone, = model.features([one])
        for kind in f:
            assert f[kind].shape == alone[kind].shape
            assert torch.allclose(f[kind], alone[kind], atol=1e-5)
    # 0.3 s are 15 of Whisper's tokens, in eights 2; and 2 of SSLAM's columns of 8, in fours 4
    assert len(together[1]["whisper"]) == 2 and len(together[1]["sslam"]) == 4


def test_encoders_stay_frozen_and_in_eval_mode(model):
    model.train()
    assert model.training and model.llm.training and not model.encoders["sslam"].training
    assert not any(p.requires_grad for p in model.encoders.parameters())


def test_save_and_load(model, tmp_path):
    model.connectors.float()
    model.llm.float()
    model.save(tmp_path / "m.pt")
    loaded = AudioLLM.load(tmp_path / "m.pt")
    features = model.features([clip(1.0)])
    assert loaded.mode == model.mode and not loaded.training
    assert loaded.ask(loaded.hear(features), ["what"]) == model.ask(model.hear(features), ["what"])
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("cut.pt", "other.pt", "none.pt"):
        with pytest.raises(ValueError, match=name):
            AudioLLM.load(tmp_path / name)


def test_features_that_are_kept_have_no_gradient_and_those_of_a_trained_encoder_do():
    model = audio_llm("lal")
    encoder = model.encoders["sslam"].requires_grad_(True)
    encoder.frozen = False
    kept, = model.features([clip(0.5)])
    encoded, = model.encode([model.spectrograms(clip(0.5))])
    assert not any(x.requires_grad for x in kept.values())
    assert encoded["sslam"].requires_grad and not encoded["whisper"].requires_grad


class Float64OnMeta(TorchDispatchMode):
    """Refuses tensors of float64 on device meta, as a device that has no float64 would."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in [result] if torch.is_tensor(result) else result:
            assert not (tensor.is_meta and tensor.dtype == torch.float64), operation
        return result


def test_the_places_of_lfst_need_no_float64_on_their_device():
    valid = torch.ones(1, 10, dtype=torch.bool, device="meta")
    with Float64OnMeta():
        assert nearest_parts(5, 10, 1.0, valid).shape == (1, 5, 10)


@pytest.mark.parametrize("mode", ["pall", "clap=lal", "clap=lal,sslam=flamingo",
                                  "clap=lal,sslam=lal,junk", "clap=lal,sslam=lal,clap=plits"])
def test_a_table_of_routes_names_each_encoder_once(mode):
    encoders = {"clap": None, "sslam": None}
    assert mode_routes("clap=lal,sslam=plits", encoders) == {"clap": "lal", "sslam": "plits"}
    with pytest.raises(ValueError, match=re.escape(mode)):
        mode_routes(mode, encoders)


def test_a_mode_is_nothing_but_the_routes():
    a, b = audio_llm("plits").state_dict(), audio_llm("lal").state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="plits, lal, pal"):
        audio_llm("flits")


# ------------------------------------------------------------------------- configurations, whole

CONFIGS = {"lfst": ("pal", IntegrationConfig(), True),
           "lfst of one": ("lal", IntegrationConfig("lfst"), False),
           "qformer": ("plits", IntegrationConfig("qformer", queries=3), True),
           "layers": ("pal", IntegrationConfig(lal_layers="0,2"), False),
           "no positions": ("lal", IntegrationConfig(audio_rope="off"), False),
           "flamingo": ("flamingo", IntegrationConfig(flamingo_every=2), True)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_hears_once_and_comes_back_from_its_checkpoint(name, tmp_path):
    mode, config, clap = CONFIGS[name]
    model = audio_llm(mode, 0, config, clap)
    model.connectors.double()
    clips = [clip(1.6), clip(0.7, 1)]
    features = doubled(model.features(clips))
    prompts = [[5, 6, 7, 8], [9]]
    want = [uncached_answer(model, f, p, 6) for f, p in zip(features, prompts)]
    assert model.llm.generate(prompts, 6, cache=model.hear(features)) == want
    model.float().save(tmp_path / "m.pt")
    loaded = AudioLLM.load(tmp_path / "m.pt")
    assert loaded.config == config and loaded.pool_sizes == model.pool_sizes
    features = model.features(clips)
    assert torch.equal(loaded(features, torch.tensor([[5, 6]])),
                       model(features, torch.tensor([[5, 6]])))


def test_an_encoder_file_of_another_size_is_refused(tmp_path, monkeypatch):
    audio_llm("lal").save(tmp_path / "m.pt")
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    saved["encoders"]["whisper"]["checkpoint_path"] = "tiny.en.pt"
    torch.save(saved, tmp_path / "m.pt")
    loaded = []

    def load_encoder(kind, path):
        loaded.append((kind, path))
        return Whisper(WhisperConfig(width=128, layers=1, seconds=1.6))

    monkeypatch.setattr(checkpoints, "load_encoder", load_encoder)
    for moved in ({}, {"whisper": "moved.pt"}):
        with pytest.raises(ValueError, match="trained with another whisper"):
            AudioLLM.load(tmp_path / "m.pt", moved)
    assert loaded == [("whisper", "tiny.en.pt"), ("whisper", "moved.pt")]


def test_lfst_is_the_default_for_sslam_and_clap_together():
    for mode in MODES:
        model = audio_llm(mode, clap=True)
        assert list(model.connectors)[:2] == ["whisper", "lfst"]
        assert isinstance(model.connectors["lfst"], LFST)
        assert list(audio_llm(mode).connectors)[:2] == ["whisper", "sslam"]
    model.connectors.double()
    features = doubled(model.features([clip(1.6), clip(0.4)]))
    # of 0.4 s in 1.6 CLAP makes four copies: three of SSLAM's columns of 0.16 s count, and five
    # of CLAP's of 0.094 s, and as many of LFST's steps, here SSLAM's, as begin before they end
    assert [len(features[1][kind]) for kind in ("sslam", "clap")] == [3 * 8, 5 * 4]
    (_, whisper, *_), (_, tokens, lengths, _) = model.segments(features)[1:]
    assert tokens.shape[1] == 3 * 10 and lengths.tolist() == [3 * 10, 3 * 3]
    assert len(audio_llm("lal", config=IntegrationConfig("mlp"), clap=True).connectors) == 3


@pytest.mark.parametrize("mode", ["lal", "pal"])
def test_layers_left_out_hold_no_audio_keys_and_values(mode):
    model = audio_llm(mode, config=IntegrationConfig(lal_layers="::2"))
    model.connectors.double()
    features = doubled(model.features([clip(1.6)]))
    lengths = {kind: len(tokens) for kind, tokens in features[0].items()}
    written = 1 + sum(lengths.values())  # and the beginning of the text
    left_out = 1 + (lengths["whisper"] if mode == "pal" else 0)
    assert [k.shape[1] for k in model.hear(features).keys] == [written, left_out, written]


def test_each_encoder_has_layers_of_its_own():
    """Two LAL encoders at layers of their own are heard there and nowhere else; at the same layers
    the model is that of one setting for both."""
    model = audio_llm("lal", config=IntegrationConfig(lal_layers="whisper=:1,sslam=0,2"))
    model.connectors.double()
    features = doubled(model.features([clip(1.6)]))
    whisper, sslam = (len(features[0][kind]) for kind in ("whisper", "sslam"))
    keys = model.hear(features).keys
    assert [k.shape[1] for k in keys] == [1 + whisper + sslam, 1, 1 + sslam]
    alike = [audio_llm("lal", config=IntegrationConfig(lal_layers=layers)).double()
             for layers in ("1:", "whisper=1:,sslam=1:")]
    ids = torch.tensor([[5, 6, 7]])
    assert same(*(m(features, ids) for m in alike))
    named = audio_llm("lal", config=IntegrationConfig(lal_layers="sslam=1:"))
    assert named.layers == {"whisper": None, "sslam": [1, 2]}


def test_without_positions_the_whole_model_cannot_tell_before_from_after():
    ids = torch.tensor([[5, 6, 7]])
    for audio_rope, alike in (("off", True), ("on", False)):
        model = audio_llm("lal", config=IntegrationConfig(audio_rope=audio_rope))
        model.connectors.double()
        f = {"whisper": random(9, 64), "sslam": random(7, 64)}
        backwards = {kind: x.flip(0) for kind, x in f.items()}
        assert same(model([f], ids), model([backwards], ids), 1e-12 if alike else 1e-3) == alike


@pytest.mark.parametrize("mode, config, word", [
    ("plits", {"lal_layers": "1:"}, "lal-layers"), ("attn", {"audio_rope": "off"}, "audio_rope"),
    ("flamingo", {"lal_layers": "0"}, "lal-layers"), ("lal", {"lal_layers": "7"}, "lal-layers '7'"),
    ("pal", {"lal_layers": "whisper=1:"}, "go LAL's way here are sslam"),
    ("lal", {"lal_layers": "sslam=1:,clap=1:"}, "go LAL's way here are whisper, sslam"),
    ("lal", {"lal_layers": "sslam=9"}, "lal-layers '9'"),
    ("lal", {"connector": "perceiver"}, "connector perceiver: choose auto, mlp")])
def test_configurations_that_do_not_go_together_are_one_line(mode, config, word):
    with pytest.raises(ValueError, match=word):
        audio_llm(mode, config=IntegrationConfig(**config))
    with pytest.raises(ValueError, match="lfst"):
        AudioLLM(make(0), None, {}, "lal", IntegrationConfig("lfst"))
    with pytest.raises(ValueError, match="sslam and clap share a connector"):
        audio_llm("lal", config=IntegrationConfig("lfst", lal_layers="sslam=1:"), clap=True)


# ------------------------------------------------------ checkpoints, older, newer, tampered with

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a checkpoint in mode PAL with all three encoders holds."""
    path = tmp_path_factory.mktemp("saved") / "m.pt"
    audio_llm("pal", clap=True).float().save(path)
    return torch.load(path, weights_only=True)


def load_changed(saved, path, keys, value):
    """Load the checkpoint with saved[key][key]... = value, or without it if value is `del`."""
    changed = node = dict(saved)
    for key in keys[:-1]:
        node[key] = dict(node[key])
        node = node[key]
    node[keys[-1]] = value
    if value == "del":
        del node[keys[-1]]
    torch.save(changed, path)
    return AudioLLM.load(path)


def text(string):
    return bytes_to_tensor(string if isinstance(string, bytes) else string.encode())


LFST_NEWLINE = ("state", "connectors.lfst.newline")
EMBEDDING = ("state", "llm.model.embed_tokens.weight")
LARGER_TOKENIZER = train_tokenizer([f"{n} zebras, {n * 7} quick jumps" for n in range(60)], 350)
TAMPERED = [  # keys, value, words of the message
    *[((key,), value, "") for key in ("mode", "config", "llm", "tokenizer", "encoders", "state")
      for value in (None, [], "x", 3, torch.ones(2), "del")],
    (("mode",), "x", "unknown mode 'x'"),
    (("llm", "num_hidden_layers"), 10 ** 7, "far more than its"),
    (("llm", "num_hidden_layers"), 10 ** 30, "num_hidden_layers is 1000"),
    (("llm", "num_hidden_layers"), -1, "num_hidden_layers is -1"),
    (("llm", "vocab_size"), 10 ** 12, "vocab_size is 1000"),
    (("llm", "vocab_size"), 10 ** 9, "(1000000000, 24)"),
    (("llm", "hidden_size"), "24", "hidden_size is '24'"),
    (("llm", "hidden_size"), 2 ** 31 - 2, "hidden_size is 2147483646: expected int above 0 and up"),
    (("llm", "hidden_size"), 2, "(300, 24), not (300, 2)"),
    (("llm", "intermediate_size"), True, "intermediate_size is True"),
    (("llm", "num_key_value_heads"), 0, "num_key_value_heads is 0"),
    (("llm", "num_key_value_heads"), 3, "4 heads cannot share 3"),
    (("llm", "head_dim"), 3, "head_dim 3"),
    (("llm", "rms_norm_eps"), "x", "rms_norm_eps is 'x'"),
    (("llm", "rope_theta"), float("nan"), "rope_theta is nan"),
    (("llm", "rope_scaling"), {"factor": 8.0}, "low_freq_factor"),
    (("llm", "rope_scaling"), 8.0, ""),
    (("llm", "new"), 1, "'new'"),
    (("config", "connector_layers"), 10 ** 7, "connector_layers is 1000"),
    (("config", "connector_layers"), 2000, "far more than its"),
    (("config", "connector"), "x", "connector x: choose auto"),
    (("config", "connector"), "qformer", "connectors.whisper.queries is missing"),
    (("config", "queries"), 10 ** 9, "queries is 1000"),
    (("config", "grid_steps"), 0, "grid_steps is 0"),
    (("config", "grid_bands"), 10 ** 9, "grid_bands is 1000"),
    (("config", "lal_layers"), 3, "lal_layers is 3"),
    (("config", "lal_layers"), "7", "lal-layers '7'"),
    (("config", "new"), 1, "'new'"),
    (("encoders", "new"), {"checkpoint_path": "x.pt", "frozen": True}, "no 'new'"),
    (("encoders", "clap"), "del", "missing"),
    (("encoders", "clap", "checkpoint_path"), 3, "3: cannot be read"),
    (("encoders", "clap", "checkpoint_path"), "none.pt", "none.pt: cannot be read"),
    (("encoders", "clap", "pool_size"), 0, "pool_size is 0"),
    (("encoders", "clap", "pool_size"), 10 ** 30, "pool_size is 1000"),
    (("encoders", "clap", "frozen"), "x", "frozen is 'x'"),
    (("encoders", "whisper", "config", "layers"), 10 ** 7, "layers is 1000"),
    (("encoders", "whisper", "config", "layers"), 3, "missing"),
    (("encoders", "whisper", "config", "mels"), 10 ** 6, "mels is 1000"),
    (("encoders", "whisper", "config", "seconds"), 1e5, "seconds is 1000"),
    (("encoders", "sslam", "config", "seconds"), 0.17, "0.17 s"),
    (("encoders", "sslam", "config", "seconds"), float("nan"), "seconds is nan"),
    (("encoders", "clap", "config", "depths"), (10 ** 7,), "far more than its"),
    (("encoders", "clap", "config", "depths"), (), ""),
    (("encoders", "clap", "config", "image"), 10 ** 6, "image is 1000"),
    (("encoders", "clap", "config", "image"), 100, ""),
    (("encoders", "clap", "config", "hop"), 0, "hop is 0"),
    (("encoders", "clap", "config", "rate"), 10 ** 9, "rate is 1000"),
    (("tokenizer",), text("{"), ""), (("tokenizer",), text(b"{\xff"), "utf-8"),
    (("tokenizer",), text('{"a":' * 10 ** 5), "recursion"), (("tokenizer",), text("junk"), ""),
    (("tokenizer",), text(LARGER_TOKENIZER.serialized), "expected int above 0 and up to"),
    (LFST_NEWLINE, "del", "connectors.lfst.newline is missing"),
    (LFST_NEWLINE, [1.0] * 24, "holds no numbers"),
    (LFST_NEWLINE, torch.ones(24, device="meta"), "connectors.lfst.newline claims"),
    (LFST_NEWLINE, torch.ones(24).to_sparse(), "connectors.lfst.newline claims"),
    (LFST_NEWLINE, torch.ones(24, dtype=torch.complex64), "complex64"),
    (LFST_NEWLINE, torch.ones(1).expand(24), "claims more numbers than it holds"),
    (("state", "more"), torch.ones(2), "more does not belong"),
    (("state", 3), torch.ones(2), "3 does not belong")]


@pytest.mark.parametrize("keys, value, words", TAMPERED, ids=[
    f"{'.'.join(map(str, keys))}={value!r:.15}" for keys, value, _ in TAMPERED])
def test_a_checkpoint_that_was_tampered_with_is_one_line(keys, value, words, saved, tmp_path):
    with pytest.raises(ValueError) as error:
        load_changed(saved, tmp_path / "x.pt", keys, value)
    message = str(error.value)
    assert "\n" not in message and words in message
    assert "x.pt" in message or "cannot be read" in message


def test_a_small_file_that_stands_for_a_large_tensor_is_refused(saved, tmp_path):
    changed = saved | {"llm": saved["llm"] | {"vocab_size": 10 ** 9}}
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="claims more numbers than it holds"):
        load_changed(changed, tmp_path / "x.pt", EMBEDDING, one.expand(10 ** 9, 24))


def test_numbers_of_any_precision_come_in_float32(saved, tmp_path):
    llm = "llm.model.layers.1.self_attn.q_proj.weight"
    states = [{llm: saved["state"][llm].double()},
              {name: t.bfloat16() for name, t in saved["state"].items() if t.is_floating_point()}]
    for changed in states:
        model = load_changed(saved, tmp_path / "x.pt", ("state",), saved["state"] | changed)
        assert {t.dtype for t in model.state_dict().values()} <= {torch.float32, torch.int64}
        assert model.ask(model.hear(model.features([clip(0.5)])), ["what"], max_new_tokens=2)


@pytest.mark.parametrize("field", ["audio_rope", "flamingo_every", "grid_bands"])
def test_a_checkpoint_from_before_a_field_gets_its_default(field, saved, tmp_path):
    model = load_changed(saved, tmp_path / "x.pt", ("config", field), "del")
    assert model.config == IntegrationConfig() and not any(p.is_meta for p in model.parameters())


def test_a_connector_may_hold_tensors_that_no_file_keeps(monkeypatch, tmp_path):
    class Scaled(MLPConnector):
        def __init__(self, encoders, llm_width, config):
            super().__init__(encoders, llm_width, config)
            self.scale = torch.full((llm_width,), 2.0)
            self.register_buffer("shift", torch.ones(llm_width), persistent=False)

        def forward(self, features, lengths):
            tokens, lengths = super().forward(features, lengths)
            return tokens * self.scale + self.shift, lengths

    monkeypatch.setitem(CONNECTORS, "scaled", Scaled)
    model = audio_llm("lal", config=IntegrationConfig("scaled")).float()
    model.save(tmp_path / "m.pt")
    features, ids = model.features([clip(0.5)]), torch.tensor([[5, 6]])
    assert torch.equal(AudioLLM.load(tmp_path / "m.pt")(features, ids), model(features, ids))
