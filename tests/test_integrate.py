"""The facts that define PLITS, LAL and PAL, on the real classes, equalities in float64."""
import pytest
import torch

from encoders import SSLAM, SSLAMConfig, Whisper, WhisperConfig
from integrate import ROUTES, AudioLLM, hear, lal, pal, plits, pool, run
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


@pytest.mark.parametrize("mode, seen", [("plits", T + N), ("lal", T), ("pal", T + 4)])
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


@pytest.mark.parametrize("how", ["deaf", ""])
def test_unknown_ways_are_a_programmers_mistake(how):
    llm, _, a = setting(0)
    with pytest.raises(AssertionError, match="plits or lal"):
        hear(llm, a, how)


def test_pooling_averages_the_tail_too():
    x = torch.arange(10.0).view(5, 2)
    assert torch.equal(pool(x, 2), torch.stack([x[:2].mean(0), x[2:4].mean(0), x[4]]))
    assert torch.equal(pool(x, 1), x)


# ----------------------------------------------------------------------- the whole AudioLLM

def clip(seconds, seed=0):
    wave = torch.randn(int(seconds * 16000), generator=torch.Generator().manual_seed(seed))
    return lambda rate: wave


def audio_llm(mode, seed=0):
    """Small, but of the real classes; float64 but for the encoders' front ends."""
    torch.manual_seed(seed)
    encoders = {"whisper": Whisper(WhisperConfig(width=64, layers=1, seconds=1.6)),
                "sslam": SSLAM(SSLAMConfig(width=64, layers=1, seconds=1.6))}
    tokenizer = train_tokenizer([f"what is {n} said or heard" for n in range(60)], 300)
    llm = make(seed, vocab_size=tokenizer.vocab_size)
    return AudioLLM(llm, tokenizer, encoders, mode, {"whisper": 8, "sslam": 4})


def doubled(features):
    return [{kind: tokens.double() for kind, tokens in f.items()} for f in features]


def uncached_answer(model, features, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        hidden = model([features], torch.tensor([ids]))
        ids.append(model.llm.head(hidden)[0, -1].argmax().item())
    return ids[len(prompt):]


@pytest.fixture(params=ROUTES)
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
