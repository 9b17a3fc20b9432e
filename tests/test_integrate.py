"""The facts that define PLITS, LAL and PAL, on the real classes, equalities in float64."""
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import integrate
from encoders import CLAP, SSLAM, CLAPConfig, SSLAMConfig, Whisper, WhisperConfig
from integrate import (LFST, MODES, ROUTES, Arm, AudioLLM, Cross, QFormer, hear, lal, pal,
                       pick_layers, plits, pool, run)
from model import KVCache, train_tokenizer
from test_model import make

SEEDS = range(3)
T, N = 6, 9


def setting(seed, layers=3, B=2):
    llm = make(seed, num_hidden_layers=layers)
    return llm, torch.randint(50, (B, T)), torch.randn(B, N, 24, dtype=torch.float64) * 3


def same(a, b, atol=1e-12):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


def in_mode(mode, llm, ids, first, second, before=None):
    """Logits of ids after two encoders' tokens, routed as the mode routes whisper and sslam."""
    routes = list(ROUTES[mode].values())[:2]
    audio = [(how, a, None) for how, a in zip(routes, (first, second))]
    front = [] if before is None else [("plits", llm.embed(before), None)]
    hidden = run(llm, front + audio + [("plits", llm.embed(ids), None)])
    return llm.head(hidden[:, -ids.shape[1]:])


@pytest.mark.parametrize("seed", SEEDS)
def test_with_one_layer_all_modes_agree_with_more_they_differ(seed):
    llm, ids, a = setting(seed, layers=1)
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
    for how, mode in (("plits", plits), ("lal", lal)):
        assert same(llm(ids, cache=hear(llm, a, how)), mode(llm, ids, a))
    cache = hear(llm, a[:, 4:], "lal", hear(llm, a[:, :4], "plits"))
    assert same(llm(ids, cache=cache), pal(llm, ids, a[:, :4], a[:, 4:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_lal_keys_and_values_are_those_of_each_layers_own_norm_and_weights(seed):
    llm, _, a = setting(seed)
    cache = hear(llm, a, "lal")
    for i, block in enumerate(llm.model.layers):
        x = block.input_layernorm(a)
        assert same(cache.values[i], block.self_attn.heads(block.self_attn.v_proj(x)))
        k = block.self_attn.heads(block.self_attn.k_proj(x))
        assert same(cache.keys[i][:, 0], k[:, 0])  # position 0 is not turned
        assert same(cache.keys[i].norm(dim=-1), k.norm(dim=-1))
        assert not same(cache.keys[i][:, 1:], k[:, 1:], 1e-2)


@pytest.mark.parametrize("mode, seen", [("plits", T + N), ("lal", T), ("pal", T + 4), ("attn", T)])
def test_which_tokens_a_feed_forward_module_sees(mode, seen):
    llm, ids, a = setting(0)
    counts = []
    for block in llm.model.layers:
        block.mlp.register_forward_hook(lambda m, x, y: counts.append(y.shape[1]))
    in_mode(mode, llm, ids, a[:, :4], a[:, 4:])
    assert max(counts) == min(counts) == seen


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ROUTES)
def test_the_first_text_token_attends_to_the_last_audio_token_and_text_before_to_none(mode, seed):
    llm, ids, a = setting(seed)
    a.requires_grad_()
    front = ("plits", llm.embed(torch.tensor([[1, 2]])), None)
    audio = [(how, x, None) for how, x in zip(ROUTES[mode].values(), (a[:, :4], a[:, 4:]))]
    hidden = run(llm, [front, *audio, ("plits", llm.embed(ids), None)])
    grad, = torch.autograd.grad(hidden[:, -T].sum(), a, retain_graph=True)
    assert (grad.abs().amax(dim=-1) > 1e-6).all()  # every audio token, the last one too
    grad, = torch.autograd.grad(hidden[:, :2].sum(), a)
    assert grad.abs().max() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_attn_and_ffn_are_the_two_halves_between_plits_and_lal(seed):
    """Where feed-forward adds nothing attn writes what PLITS writes, and ffn what LAL writes; where
    attention adds nothing it is the other way round."""
    hows = ("plits", "attn", "ffn", "lal")
    for part, pairs in (("mlp.down_proj", {("plits", "attn"), ("ffn", "lal")}), ("none", set()),
                        ("self_attn.o_proj", {("plits", "ffn"), ("attn", "lal")})):
        llm, ids, a = setting(seed)
        for name, p in llm.named_parameters():
            if part in name:
                p.data.zero_()
        wrote = {}
        for how in hows:
            cache = KVCache(3)
            run(llm, [("plits", llm.embed(ids), None), (how, a[:, :4], None),
                      (how, a[:, 4:], torch.tensor([5, 3]))], cache)
            order = cache.positions[0].argsort()[:, :T + 7]  # the longer row, the shorter's padding
            wrote[how] = torch.stack([torch.stack([x[r, order[r]] for r in range(2)])[:, :T + 7]
                                      for x in cache.keys + cache.values])
        for i, one in enumerate(hows):
            for other in hows[i + 1:]:
                alike = (one, other) in pairs
                assert same(wrote[one], wrote[other], 1e-12 if alike else 1e-2) == alike


def test_hearing_by_halves_into_a_cache_first_gives_what_one_pass_gives():
    llm, ids, a = setting(0)
    for how in ("attn", "ffn"):
        cache = hear(llm, a[:, 4:], how, hear(llm, a[:, :4], how))
        assert same(llm(ids, cache=cache), in_mode(how, llm, ids, a[:, :4], a[:, 4:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_without_positions_lal_cannot_tell_before_from_after(seed):
    llm, ids, a = setting(seed)
    text = ("plits", llm.embed(ids), None)

    def logits(audio, rope):
        return llm.head(run(llm, [("lal", audio, None), text], rope=rope))

    assert same(logits(a, False), logits(a.flip(1), False))
    assert not same(logits(a, True), logits(a.flip(1), True), 1e-2)
    assert same(logits(a, True), lal(llm, ids, a))
    assert same(logits(a[:, :1], False), lal(llm, ids, a[:, :1]))  # position 0 is not turned


@pytest.mark.parametrize("text, want", [
    ("all", None), ("2:", [2, 3, 4, 5]), (":2", [0, 1]), ("::2", [0, 2, 4]), ("1::3", [1, 4]),
    ("-2:", [4, 5]), ("0,4,1", [0, 1, 4]), ("3", [3]), ("2,2", [2])])
def test_layers_are_picked_as_slices_or_lists(text, want):
    assert pick_layers(text, 6) == want


@pytest.mark.parametrize("text", ["6", "0,6", "-1", "6:", "x", "1,", "0,2:", "::0", "1:2:3:4", ""])
def test_layers_that_are_not_there_are_one_line(text):
    with pytest.raises(ValueError, match="lal-layers.*0 to 5"):
        pick_layers(text, 6)


@pytest.mark.parametrize("mode", ["lal", "pal"])
def test_each_encoders_cache_depends_on_its_clip_alone(mode):
    llm, ids, a = setting(1)
    b = torch.randn_like(a)

    def cached(first, second):
        cache = KVCache(3)
        run(llm, [(how, x, None) for how, x in zip(ROUTES[mode].values(), (first, second))], cache)
        order = cache.positions[0][0].argsort()
        return [(k[:, order], v[:, order]) for k, v in zip(cache.keys, cache.values)]

    plain = cached(a[:, :4], a[:, 4:])
    for part, other in ((slice(0, 4), cached(a[:, :4], b[:, 4:])),
                        (slice(4, N), cached(b[:, :4], a[:, 4:]))):
        for (k, v), (k2, v2) in zip(plain, other):
            assert torch.equal(k[:, part], k2[:, part]) and torch.equal(v[:, part], v2[:, part])


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
    keep = (torch.tensor([4, 2]), torch.tensor([3, 5]))  # of 4 and of 5 tokens
    text = ("plits", llm.embed(ids), None)
    audio = [(how, x, n) for how, x, n in zip(ROUTES[mode].values(), (a[:, :4], a[:, 4:]), keep)]
    hidden = run(llm, [("plits", llm.embed(before), None), *audio, text])
    for row in range(2):
        first, second = a[row:row + 1, :keep[0][row]], a[row:row + 1, 4:4 + keep[1][row]]
        alone = in_mode(mode, llm, ids[row:row + 1], first, second, before)
        assert same(llm.head(hidden[row:row + 1, -T:]), alone)


def test_one_token_after_a_padded_cache_does_not_see_the_padding():
    llm, ids, a = setting(3)
    cache, keep = KVCache(3), torch.tensor([4, 2])
    run(llm, [("lal", a[:, :4], keep)], cache)
    got = llm(ids[:, :1], cache=cache)
    for row, n in enumerate(keep):
        assert same(got[row:row + 1], lal(llm, ids[row:row + 1, :1], a[row:row + 1, :n]))


@pytest.mark.parametrize("how", ["deaf", ""])
def test_unknown_ways_are_a_programmers_mistake(how):
    llm, _, a = setting(0)
    with pytest.raises(AssertionError, match="plits or lal"):
        hear(llm, a, how)


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


def two(net, x):
    return linear(net[2], gelu(linear(net[0], x)))


def listening(layer, x, heard, gates=(1, 1)):
    """One place x (W,) listens to [(source, token (W,)), ...], one head and token at a time."""
    q, W = linear(layer.q, layer_norm(layer.norm1, x)), len(x)
    kv = [linear(layer.kv[source], token) for source, token in heard]
    d, mixed = W // layer.heads, []
    for h in range(layer.heads):
        part = slice(h * d, h * d + d)
        weights = torch.stack([q[part] @ k[:W][part] / math.sqrt(d) for k in kv]).exp()
        mixed.append(sum(w * v[W:][part] for w, v in zip(weights / weights.sum(), kv)))
    x = x + gates[0] * linear(layer.out, torch.cat(mixed))
    inner = layer_norm(layer.norm2, x)
    return x + gates[1] * two(layer.mlp, inner)


def token_of(connector, query, heard):
    """What becomes of a query that listens to [(source, feature), ...]: layers, then projector."""
    heard = [(i, layer_norm(connector.enter[i][3], two(connector.enter[i], x))) for i, x in heard]
    for layer in connector.layers:
        query = listening(layer, query, heard)
    return two(connector.out, query)


def ears(width, grid, seconds):
    return SimpleNamespace(width=width, grid=grid, seconds=seconds)


def drawn(connector, seed=0):
    torch.manual_seed(seed)
    connector.double()
    for p in connector.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return connector


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("queries, layers, width", [(5, 2, 6), (1, 1, 128)])
def test_qformer_equals_a_straight_line_computation(queries, layers, width):
    torch.manual_seed(1)
    arm = Arm(queries=queries, connector_layers=layers)
    connector = drawn(QFormer([ears(width, (9, 1), 1)], 10, arm))
    x, lengths = random(2, 9, width), torch.tensor([9, 4])
    got, none = connector([x], [lengths])
    assert got.shape == (2, queries, 10) and none is None
    for row, n in enumerate(lengths):
        heard = [(0, token) for token in x[row, :n]]
        for query, token in zip(connector.queries, got[row]):
            assert same(token, token_of(connector, query, heard))
    assert same(connector([x[1:, :4]], [None])[0], got[1:])


def test_qformer_does_not_care_for_the_order_of_its_features():
    connector, x = drawn(QFormer([ears(6, (9, 1), 1)], 10, Arm(queries=5))), random(2, 9, 6)
    assert same(connector([x], [None])[0], connector([x[:, torch.randperm(9)]], [None])[0])
    assert not same(connector([x], [None])[0], connector([x[:, :8]], [None])[0], 1e-3)


# SSLAM and CLAP as in their real sizes; as in ours; ragged, with places where no centre falls; one
EARS = {"real": ([ears(4, (64, 8), 10.24), ears(6, (32, 2), 10.0)], (32, 2)),
        "ours": ([ears(6, (25, 8), 4.0), ears(6, (16, 4), 4.0)], (16, 2)),
        "ragged": ([ears(4, (5, 3), 2.0), ears(6, (7, 1), 3.0)], (4, 2)),
        "one": ([ears(6, (7, 5), 2.8)], (3, 3))}


def window(encoder, longest, grid, t, f, steps):
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


@pytest.fixture(params=EARS)
def grids(request):
    """An LFST, its encoders, its grid, and features of three clips: whole, short, shorter."""
    encoders, grid = EARS[request.param]
    arm = Arm(grid_steps=grid[0], grid_bands=grid[1], connector_layers=2)
    connector = drawn(LFST(encoders, 5, arm), 2)
    longest = max(e.seconds for e in encoders)
    steps = [[min(e.grid[0], math.ceil(e.grid[0] * share * longest / e.seconds))
              for share in (1, 0.6, 0.1)] for e in encoders]
    features = [random(3, max(s) * e.grid[1], e.width) for s, e in zip(steps, encoders)]
    lengths = [torch.tensor(s) * e.grid[1] for s, e in zip(steps, encoders)]
    return connector, encoders, grid, longest, steps, features, lengths


def test_lfst_equals_a_straight_line_computation_over_its_places(grids):
    connector, encoders, (T, bands), longest, steps, features, lengths = grids
    got, kept = connector(features, lengths)
    assert kept[0] == T * (bands + 1) == got.shape[1]  # the grid alone says how long
    for row in range(3):
        ends = [Fraction(s[row], e.grid[0]) * Fraction(str(e.seconds)) / Fraction(str(longest))
                for s, e in zip(steps, encoders)]
        want = []
        for t in range(T):
            if Fraction(t, T) >= max(ends):  # it begins when the clip is over
                break
            for f in range(bands):
                heard = [(i, features[i][row, n]) for i, e in enumerate(encoders)
                         for n in window(e, longest, (T, bands), t, f, steps[i][row])]
                if t < 3 or t % 5 == 0:
                    want.append(token_of(connector, connector.queries[0], heard))
                else:  # to be quick
                    want.append(got[row, t * (bands + 1) + f])
            want.append(connector.newline)
        assert kept[row] == len(want)
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
                felt = grad.abs().amax(-1)
                assert felt[1:].max() == 0
                own = window(e, longest, (T, bands), t, f, s[0])
                assert felt[0].nonzero()[:, 0].tolist() == own
        newline = torch.autograd.grad(got[0, t * (bands + 1) + bands].sum(), features,
                                      retain_graph=True, allow_unused=True)
        assert all(grad is None or grad.abs().max() == 0 for grad in newline)


@pytest.mark.parametrize("asked, made", [(32, 32), (99, 32), (5, 5)])
def test_lfst_has_no_finer_steps_than_its_coarsest_encoder(asked, made):
    connector = LFST(EARS["real"][0], 5, Arm(grid_steps=asked, grid_bands=3))
    tokens, _ = connector([torch.zeros(1, 512, 4), torch.zeros(1, 64, 6)], [None, None])
    assert tokens.shape[1] == made * 4


def test_lfst_of_a_batch_is_that_of_each_clip_alone(grids):
    connector, encoders, _, _, _, features, lengths = grids
    got, kept = connector(features, lengths)
    for row in range(3):
        alone, none = connector([x[row:row + 1, :n[row]] for x, n in zip(features, lengths)],
                                [None] * len(features))
        assert none is None and same(alone, got[row:row + 1, :kept[row]])


def test_gated_layers_let_through_what_the_tanh_of_their_gates_says():
    layer = drawn(Cross(6, 1, 2, gated=True))
    assert layer.mlp[0].out_features == 24 and Cross(6, 1, 2).mlp[0].out_features == 6
    x, heard = random(2, 3, 6), random(2, 4, 6)
    mask = torch.tensor([4, 2])[:, None, None, None] > torch.arange(4)
    got = layer(x, *layer.remember([heard]), mask)
    for row, n in enumerate((4, 2)):
        for place in range(3):
            want = listening(layer, x[row, place], [(0, token) for token in heard[row, :n]],
                             layer.gates.tanh())
            assert same(got[row, place], want)


# ----------------------------------------------------------------------- the whole AudioLLM

def clip(seconds, seed=0):
    wave = torch.randn(int(seconds * 16000), generator=torch.Generator().manual_seed(seed))
    return lambda rate: wave


def audio_llm(mode, seed=0, arm=Arm(), clap=False):
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
    windows = {"whisper": 8, "sslam": 4, "clap": 1}
    model = AudioLLM(llm, tokenizer, encoders, mode, windows, arm)
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
    rows = [0, 1, 2, 1]
    want = [uncached_answer(model, features[r], p, 6) for r, p in zip(rows, prompts)]
    cache = model.hear(features)  # a ragged batch, its questions ragged too
    assert model.llm.generate(prompts, 6, cache=cache, rows=rows) == want
    for r, p, w in zip(rows, prompts, want):  # each alone: nothing is padding
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


def test_a_mode_is_nothing_but_the_routes():
    a, b = audio_llm("plits").state_dict(), audio_llm("lal").state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="plits, lal, pal"):
        audio_llm("flits")


# ------------------------------------------------------------------------------ the arms, whole

ARMS = {"lfst": ("pal", Arm(), True), "lfst of one": ("lal", Arm("lfst"), False),
        "qformer": ("plits", Arm("qformer", queries=3), True),
        "layers": ("pal", Arm(lal_layers="0,2"), False),
        "no positions": ("lal", Arm(audio_rope="off"), False),
        "flamingo": ("flamingo", Arm(flamingo_every=2), True)}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_hears_once_and_comes_back_from_its_checkpoint(name, tmp_path):
    mode, arm, clap = ARMS[name]
    model = audio_llm(mode, 0, arm, clap)
    model.connectors.double()
    clips = [clip(1.6), clip(0.7, 1)]
    features = doubled(model.features(clips))
    prompts = [[5, 6, 7, 8], [9]]
    want = [uncached_answer(model, f, p, 6) for f, p in zip(features, prompts)]
    assert model.llm.generate(prompts, 6, cache=model.hear(features)) == want
    model.float().save(tmp_path / "m.pt")
    loaded = AudioLLM.load(tmp_path / "m.pt")
    assert loaded.arm == arm and loaded.windows == model.windows
    features = model.features(clips)
    assert torch.equal(loaded(features, torch.tensor([[5, 6]])),
                       model(features, torch.tensor([[5, 6]])))


def test_an_encoder_file_of_another_size_is_refused(tmp_path, monkeypatch):
    audio_llm("lal").save(tmp_path / "m.pt")
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    saved["sources"]["whisper"] = "tiny.en.pt"
    torch.save(saved, tmp_path / "m.pt")
    asked = []

    def load_encoder(kind, path):
        asked.append((kind, path))
        return Whisper(WhisperConfig(width=128, layers=1, seconds=1.6))

    monkeypatch.setattr(integrate, "load_encoder", load_encoder)
    for moved in ({}, {"whisper": "moved.pt"}):
        with pytest.raises(ValueError, match="trained with another whisper"):
            AudioLLM.load(tmp_path / "m.pt", moved)
    assert asked == [("whisper", "tiny.en.pt"), ("whisper", "moved.pt")]


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
    (_, whisper, _), (_, tokens, lengths) = model.segments(features)[1:]
    assert tokens.shape[1] == 3 * 10 and lengths.tolist() == [3 * 10, 3 * 3]
    assert len(audio_llm("lal", arm=Arm("mlp"), clap=True).connectors) == 3


@pytest.mark.parametrize("mode", ["lal", "pal"])
def test_layers_left_out_hold_no_audio_keys_and_values(mode):
    model = audio_llm(mode, arm=Arm(lal_layers="::2"))
    model.connectors.double()
    features = doubled(model.features([clip(1.6)]))
    lengths = {kind: len(tokens) for kind, tokens in features[0].items()}
    here = 1 + sum(lengths.values())  # and the beginning of the text
    there = 1 + (lengths["whisper"] if mode == "pal" else 0)
    assert [k.shape[1] for k in model.hear(features).keys] == [here, there, here]


def test_without_positions_the_whole_model_cannot_tell_before_from_after():
    ids = torch.tensor([[5, 6, 7]])
    for rope, alike in (("off", True), ("on", False)):
        model = audio_llm("lal", arm=Arm(audio_rope=rope))
        model.connectors.double()
        f = {"whisper": random(9, 64), "sslam": random(7, 64)}
        backwards = {kind: x.flip(0) for kind, x in f.items()}
        assert same(model([f], ids), model([backwards], ids), 1e-12 if alike else 1e-3) == alike


def test_flamingo_starts_as_the_text_model_and_then_hears():
    model = audio_llm("flamingo", arm=Arm(flamingo_every=2))
    model.connectors.double()
    assert len(model.connectors["flamingo"]) == 2  # before layers 0 and 2
    features = [{kind: random(n, 64).requires_grad_() for kind in ("whisper", "sslam")}
                for n in (4, 7)]
    ids = torch.randint(50, (2, 5))
    heard = model(features, ids)
    assert not same(heard, model([{}, {}], ids), 1e-2)
    for row in range(2):  # each listens to all of its clip and to nothing else
        for i, f in enumerate(features):
            for grad in torch.autograd.grad(heard[row, 0].sum(), f.values(), retain_graph=True):
                felt = grad.abs().amax(dim=1) > 0
                assert felt.all() if i == row else not felt.any()
        assert same(model(features[row:row + 1], ids[row:row + 1]), heard[row:row + 1])
    for layer in model.connectors["flamingo"]:
        layer.gates.data -= 1  # as they were before audio_llm opened them
    assert torch.equal(model(features, ids), model([{}, {}], ids))
    alone = model.llm(torch.cat([torch.tensor([[model.tokenizer.bos_id]] * 2), ids], dim=1))
    assert same(model.llm.head(model(features, ids)), alone[:, 1:])


@pytest.mark.parametrize("mode, arm, word", [
    ("plits", Arm(lal_layers="1:"), "lal-layers"), ("attn", Arm(audio_rope="off"), "audio-rope"),
    ("flamingo", Arm(lal_layers="0"), "lal-layers"), ("lal", Arm(lal_layers="7"), "lal-layers 7")])
def test_arms_that_do_not_go_together_are_one_line(mode, arm, word):
    with pytest.raises(ValueError, match=word):
        audio_llm(mode, arm=arm)
    with pytest.raises(ValueError, match="lfst"):
        AudioLLM(make(0), None, {}, "lal", {}, Arm("lfst"))
