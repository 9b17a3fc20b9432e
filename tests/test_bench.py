"""The arithmetic of bench.py is what torch counts, to the last FLOP; its report says what it is."""
import json
import os
import random
import signal
import time
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
    alone = {torch.ops.aten.mv: lambda matrix, vector, **kwargs: 2 * matrix[0] * matrix[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False,
                                                       custom_mapping=alone) as counter:
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


@pytest.mark.parametrize("seed", range(12))
def test_what_is_kept_for_backward_is_what_autograd_saves(seed):
    c, b = random_setting(seed, B=3, Na=60, Nt=30)
    llm, inputs = heard(c, b)
    saved = bench.saved_bytes(lambda: bench.loss(llm, b, *inputs), [*llm.parameters(), inputs[0]])
    told = bench.kept_bytes(c, b, 4, fused=False) + 4 * b.B * b.text * c.vocab_size
    assert saved == pytest.approx(told, rel=0.02)


def test_masks_are_kept_too_for_layers_with_audio_and_without():
    c = LLMConfig(40, 16, 20, 2, 2, 1, 8)  # so narrow that masks count
    for layers in ((1,), (0, 1)):
        b = batch(c, "lal", 3, 60, 300, layers=layers)
        llm, inputs = heard(c, b)
        saved = bench.saved_bytes(lambda: bench.loss(llm, b, *inputs), llm.parameters())
        told = bench.kept_bytes(c, b, 4, fused=False) + 4 * b.B * b.text * c.vocab_size
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


@pytest.mark.parametrize("mode", list(bench.SHARES))
def test_the_attention_kernel_is_named(mode):
    b = batch(SMALL, mode, 1, 6, 4)
    llm, inputs = heard(SMALL, b)
    for backend, names in ((SDPBackend.FLASH_ATTENTION, {"flash"}), (SDPBackend.MATH, set())):
        with sdpa_kernel(backend), bench.AttentionKernels() as kernels:
            bench.loss(llm, b, *inputs)
        assert kernels.names == names


def test_the_limits_are_what_the_ratios_tend_to():
    c = LLMConfig(500, 64, 256, 4, 8, 2, 8)
    told, Na = bench.limits(c, 20), 10 ** 9
    plits, lal = (batch(c, mode, 1, Na, 20) for mode in ("plits", "lal"))
    slope = bench.train_flops(c, plits) / bench.train_flops(c, lal) / Na
    assert slope == pytest.approx(told["FLOPs, over Na"], rel=1e-5)
    kept = bench.kept_bytes(c, plits, 2) / bench.kept_bytes(c, lal, 2)
    assert kept == pytest.approx(told["kept"], rel=1e-5)
    assert told["cache"] == 1
    first = [bench.train_flops(c, batch(c, mode, 1, 1, 20))
             - bench.train_flops(c, batch(c, mode, 1, 0, 20)) for mode in ("plits", "lal")]
    assert told["FLOPs, the first token"] == first[0] / first[1] > 1


@pytest.mark.parametrize("count", list(bench.memory(SMALL, batch(SMALL, "lal", 1, 9, 9), 2)))
def test_the_headlines_fall_out_where_the_search_says(count):
    c, B, Nt = bench.LLMS["llama-3.2-1b"], 8, 64

    def reached(Na, Nt):
        plits, lal = (batch(c, mode, B, Na, Nt) for mode in ("plits", "lal"))
        sped = bench.train_flops(c, plits, causal=True) / bench.train_flops(c, lal, causal=True)
        memory = [bench.memory(c, b, 2)[count] for b in (plits, lal)]
        return 1 - memory[1] / memory[0], sped - 1

    saved, sped = bench.headline(c, B, Nt, 2, count)
    assert reached(saved - 1, Nt)[0] < 0.641 <= reached(saved, Nt)[0]
    assert reached(sped - 1, Nt)[1] < 2.475 <= reached(sped, Nt)[1]
    assert reached(*bench.both(c, B, 2, count)) == pytest.approx((0.641, 2.475), rel=0.05)


# ---------------------------------------------------------------------------------- the program

TINY = ("--na", "4,8", "--nt", "3", "--new-tokens", "2", "--rounds", "1")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.LLMS, "small", SMALL)


def test_the_last_line_of_a_report_is_all_of_it_as_json(call, tiny):
    code, stdout, _ = call(bench, "--measure", "turns", *TINY)
    assert code == 0
    result = json.loads(stdout.splitlines()[-1])
    assert {"settings", "machine", "costs", "limits", "accounting", "in turn"} <= set(result)
    assert [row["step"] for row in result["in turn"]] == ["plits", "lal", "pal"]
    assert all(row["best s"] > 0 for row in result["in turn"])
    c, b = SMALL, batch(SMALL, "pal", 2, 8, 3)
    pal = result["costs"][2]
    assert pal["forward"] * 1e9 == pytest.approx(sum(bench.forward_flops(c, b).values()))
    assert b.prefix == b.side == 4


def test_functions_are_timed_in_turn_after_warming_up():
    ran = []

    def f(name):
        time.sleep(0.1 * (name not in ran))  # the first time takes longer
        ran.append(name)

    took = bench.timed({name: lambda name=name: f(name) for name in "ab"}, torch.device("cpu"), 2)
    assert ran == list("ababab") and [len(took[name]) for name in "ab"] == [2, 2]
    assert max(took["a"] + took["b"]) < 0.1


def test_rows_measured_in_a_process_stand_beside_their_prediction(capsys):
    o, rows = bench.settle(bench.Options(na="4,8", nt="3", new_tokens=2, rounds=1, batch=1))
    found = bench.in_own_process(o, "train", "lal", rows, bench.tqdm(disable=True))
    assert [(r["mode"], r["Na"], r["Nt"]) for r in found] == [("lal", 4, 3), ("lal", 8, 3)]
    line = bench.report(o, "train", [{**r, "mode": "plits"} for r in found] + found, 0.5)[-1]
    assert line["kept MB predicted"] == pytest.approx(line["measured "], rel=0.02)
    assert line["measured"] == 1 and line["paper"] == "up to 3.475"
    assert line["with encoders"] == pytest.approx(1 / (1 / line["samples/s"] + 0.5))


def test_inference_is_measured_in_parts(tiny, capsys):
    o, _ = bench.settle(bench.Options(nt="3", new_tokens=3, rounds=1))
    llm, device = bench.make_llm(o, torch.float32), torch.device("cpu")
    rows = [{"mode": mode, "Na": 4, "Nt": 3, "rate": 1e9, "peak": peak,
             **bench.measure_inference(llm, bench.setting(o, mode, "infer", 4, 3), o, device)}
            for mode, peak in (("plits", 400), ("lal", 100), ("pal", None))]
    lines = bench.report(o, "infer", rows, None)
    assert all(0 < line["measured "] < 100 and line["samples/s"] > 0 for line in lines)
    assert [line["saved %"] for line in lines] == [0, 75, None]


def test_out_of_memory_is_a_row_and_the_sweep_goes_on(capsys):
    o, _ = bench.settle(bench.Options(batch=4, rounds=1, memory=1.5))
    rows = [(20000, 3), (4, 3)]
    found = bench.in_own_process(o, "train", "plits", rows, bench.tqdm(disable=True))
    assert found[0]["error"] == "out of memory" and "seconds" in found[1]
    lines = bench.report(o, "train", found, None)
    assert lines[0]["samples/s"] == "out of memory" and lines[1]["samples/s"] > 0


def killed(*row):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_a_row_too(capsys, monkeypatch):
    monkeypatch.setattr(bench, "work", killed)
    o, rows = bench.settle(bench.Options(na="4,8", nt="3"))
    found = bench.in_own_process(o, "train", "pal", rows, bench.tqdm(disable=True))
    assert [(r["Na"], r["error"]) for r in found] == [(4, "out of memory"), (8, "out of memory")]


@pytest.mark.parametrize("words, options", [
    (["gpt-5", "llama-3.2-1b", "qwen2.5-1.5b"], ["--llm", "gpt-5"]),
    (["--na", "whole numbers"], ["--na", "12,x"]),
    (["--arms", "lal-qformer"], ["--quality", "--arms", "lal,lol"]),
    (["llama-3.2-1b", "4.9 GB", "1 GB"], ["--llm", "llama-3.2-1b", "--memory", "1"]),
    (["--peer", "pip install transformers"], ["--measure", "turns", "--peer", *TINY]),
])
def test_a_users_mistake_is_one_line(refuses, tiny, monkeypatch, words, options):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refuses(words, bench, *options)


def test_help_says_how_to_read_the_result(call):
    code, stdout, _ = call(bench, "--help")
    assert code == 0 and "How to read the result" in stdout and "64.1%" in stdout
    assert "%%" not in stdout


def test_the_peer_computes_the_same(tiny, capsys):
    pytest.importorskip("transformers")
    o, rows = bench.settle(bench.Options(na="8", nt="3", rounds=1, peer=True))
    assert [row["step"] for row in bench.in_turn(o, *rows[-1])] == ["plits", "peer", "lal", "pal"]
    b = batch(SMALL, "plits", 2, 8, 3)
    llm, (ids, audio, _) = heard(SMALL, b)
    gradients = []
    for step in (bench.peer_step(llm, ids, audio),
                 lambda: bench.train_step(llm, b, ids, audio, None)):
        audio.grad = None
        step()
        gradients.append(audio.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


# -------------------------------------------------------------------------------- what is learnt

def test_arms_are_trained_scored_and_not_trained_again(call, base, brief, tmp_path):
    options = ("--quality", "--arms", "plits,lal-ffn-frozen", "--steps", "5", "--clips", "5",
               "--test-clips", "4", "--base", base)
    code, stdout, _ = call(bench, *options, "--seeds", "1")
    assert code == 0
    first = json.loads(stdout.splitlines()[-1])["quality"]
    path = tmp_path / "out" / "quality.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == first
    path.write_text(lines[0] + "\n")  # broken off
    code, stdout, _ = call(bench, *options, "--seeds", "2")
    again = json.loads(stdout.splitlines()[-1])["quality"]
    assert [(r["arm"], r["seed"]) for r in again] == [
        ("plits", 0), ("plits", 1), ("lal-ffn-frozen", 0), ("lal-ffn-frozen", 1)]
    plits, _, frozen, _ = again
    assert plits == first[0]  # its seconds too: it is that very line
    assert frozen["right"] == first[1]["right"] and len(path.read_text().splitlines()) == 4
    assert set(plits["right"]) > {"all", "captioning", "classification"}
    assert plits["flops"] > 2 * frozen["flops"] and plits["kept"] > 2 * frozen["kept"]
    assert plits["trained"] - frozen["trained"] == 4 * 3 * 128 * 384  # the feed-forward weights
    assert "±" in stdout and len(stdout.splitlines()) == 6


@pytest.mark.parametrize("arm", bench.ARMS)
def test_every_arm_of_the_comparison_can_be_made_and_counted(arm, base):
    o = bench.Options(base=str(base), clips=2, steps=0)
    options, model = bench.arm_of(o, arm, 0)
    assert model.mode == options.mode
    features = [{kind: torch.randn(2 * e.grid[1], e.width) for kind, e in model.encoders.items()}]
    assert model(features, torch.tensor([[5, 6, 7]])).isfinite().all()
