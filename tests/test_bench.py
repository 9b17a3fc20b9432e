"""The arithmetic of bench.py is what torch counts, to the last FLOP; its report says what it is."""
import json
import os
import random
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
from bench import LLM, LLMConfig, make_workload
from data.pretrain import BASE_FORMAT, load_base
from lib.plots import draw_learning
from lib.profiling import (attention_kernels, count_flops, count_saved_bytes, describe_machine,
                           print_table, time_in_turns)
from lib.weights import load_checkpoint, save_atomically

SMALL = LLMConfig(96, 48, 112, 3, 6, 2, 10)


def random_workload(seed, **fixed):
    """Sizes of an LLM and a Workload: all of them different each time."""
    rng = random.Random(seed)
    K, group, L = rng.randint(1, 3), rng.randint(2, 3), rng.randint(1, 4)
    c = LLMConfig(vocab_size=rng.randint(40, 99), hidden_size=4 * rng.randint(4, 12),
                  intermediate_size=rng.randint(20, 99), num_hidden_layers=L,
                  num_attention_heads=K * group, num_key_value_heads=K,
                  head_dim=2 * rng.randint(2, 6), tie_word_embeddings=rng.random() < 0.5,
                  qkv_bias=rng.random() < 0.3)
    sizes = {"B": rng.randint(1, 3), "Na": rng.randint(4, 40), "Nt": rng.randint(2, 20)}
    mode = rng.choice(bench.MODES)
    return c, make_workload(mode, share=rng.random(), **{**sizes, **fixed})


def make_llm(c, w, frozen=False):
    torch.manual_seed(0)
    llm = LLM(c).requires_grad_(not frozen)
    return llm, bench.random_inputs(llm, w)


def check_step_flops(c, w, frozen):
    llm, (ids, *audio) = make_llm(c, w, frozen)
    flops, loss = count_flops(lambda: bench.text_loss(llm, ids, *audio))
    assert flops == sum(bench.forward_flops(c, w).values())
    flops, _ = count_flops(loss.backward)
    assert flops == bench.backward_flops(c, w, frozen)
    assert all((p.grad is None) == frozen for p in llm.parameters())
    assert all(a is None or a.grad.abs().sum() > 0 for a in audio)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_the_flops_of_a_step_are_those_that_torch_counts(seed, frozen):
    check_step_flops(*random_workload(seed), frozen)


@pytest.mark.parametrize("seed", range(12))
def test_the_flops_and_the_cache_of_an_answer_are_those_that_torch_counts(seed):
    c, w = random_workload(seed)
    llm, (ids, *audio) = make_llm(c, w, frozen=True)  # or the counter trips over generate's tensors
    audio = [None if a is None else a.detach() for a in audio]
    flops, cache = count_flops(lambda: bench.write_cache(llm, *audio))
    assert flops == bench.hear_flops(c, w)
    stores = [t for t in cache.keys + cache.values if t is not None]
    assert sum(t.numel() * 4 for t in stores) == bench.cache_bytes(c, replace(w, text=0), 4)
    new = 5
    flops, answers = count_flops(lambda: llm.generate(ids, new, cache=cache))
    assert flops == bench.ask_flops(c, w, new) and all(len(a) == new for a in answers)
    longer = cache.fork(range(w.B), w.text + new)
    llm.model(llm.embed(ids), None, longer)
    stores = longer.keys + longer.values
    assert sum(t.untyped_storage().nbytes() for t in stores) == bench.cache_bytes(c, w, 4, new)


def test_causal_flops_are_the_pairs_that_see_each_other():
    for seed in range(20):
        _, w = random_workload(seed)
        tokens = "p" * w.prefix + "s" * w.side + "t" * w.text
        seen = sum(i >= j for i, query in enumerate(tokens) if query != "s"
                   for j in range(len(tokens)))
        assert bench.count_pairs(w.passes, causal=True) == seen
        # prefix and text are one run, unless the model writes side tokens between them
        unseen = w.prefix * (w.side + w.text) if w.side else 0
        pairs = (w.prefix + w.text) * len(tokens) - unseen
        assert bench.count_pairs(w.passes, causal=False) == pairs



@pytest.mark.parametrize("mode", ["plits", "pal"])
def test_a_causal_mask_spares_the_attention_of_the_pairs_that_it_hides(mode):
    c, w = SMALL, make_workload(mode, 3, 8, 6)
    runs = (w.prefix, w.text) if w.side else (w.prefix + w.text,)
    pair = w.B * c.num_hidden_layers * 4 * c.num_attention_heads * c.head_dim  # FLOPs, two products

    def spared(flops):
        return (flops(c, w) - flops(c, w, causal=True)) / pair

    def hidden(*runs):  # each query but the first hides as many keys as stand after it
        return sum(n * (n - 1) // 2 for n in runs)

    full, causal = bench.forward_flops(c, w), bench.forward_flops(c, w, causal=True)
    assert {name for name in full if full[name] != causal[name]} == {"attention"}
    assert full["attention"] - causal["attention"] == pair * hidden(*runs)
    assert spared(bench.hear_flops) == hidden(w.prefix)
    assert spared(partial(bench.ask_flops, new=5)) == hidden(w.text)
    # twice that in the backward pass, but for the last layer, whose run prefix nothing reads
    last = 2 * hidden(w.prefix) / c.num_hidden_layers if w.side else 0
    assert spared(bench.train_flops) == pytest.approx(3 * hidden(*runs) - last)


def check_saved_bytes(c, w):
    llm, (ids, *audio) = make_llm(c, w)
    loss = lambda: bench.text_loss(llm, ids, *audio)  # noqa: E731
    predicted = bench.saved_activation_bytes(c, w, 4, fused=False)
    predicted += 4 * w.B * w.text * c.vocab_size  # the softmax of the logits
    saved = count_saved_bytes(loss, [*llm.parameters(), ids])
    assert saved == pytest.approx(predicted, rel=0.001)


@pytest.mark.parametrize("seed", range(24))
def test_what_is_saved_for_backward_is_what_autograd_saves(seed):
    check_saved_bytes(*random_workload(seed, B=3, Na=60, Nt=30))


@pytest.mark.parametrize("mode", ["lal", "pal"])
def test_masks_are_saved_too(mode):
    c = LLMConfig(40, 16, 20, 2, 2, 1, 8)  # so narrow that masks count
    check_saved_bytes(c, make_workload(mode, 3, 60, 300))


def test_storages_that_share_memory_count_once_and_parameters_never():
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    saved = count_saved_bytes(lambda: (x.exp() * w).sin().sum(), [x, w])
    assert saved == 2 * 64  # exp(x), and the sine's argument
    saved = count_saved_bytes(lambda: (lambda y: (y * y[0]).sum())(x.exp()), [x, w])
    assert saved == 64


def test_what_nothing_will_read_is_not_saved():
    x = torch.randn(4, 4, requires_grad=True)

    def forward():
        y = x.exp()
        y.sin()  # its result, and with it what it saved, is dropped
        return y.sum()

    assert count_saved_bytes(forward, [x]) == 64


@pytest.mark.parametrize("c", [SMALL, replace(SMALL, qkv_bias=True, tie_word_embeddings=False)])
def test_parameters_are_counted(c):
    assert sum(p.numel() for p in LLM(c).parameters()) == bench.count_parameters(c)
    with torch.device("meta"):
        assert sum(p.numel() for p in LLM(bench.LLMS["llama-3.2-1b"]).parameters()) == (
            bench.count_parameters(bench.LLMS["llama-3.2-1b"])) == 1235814400


@pytest.mark.parametrize("mode", bench.MODES)
def test_the_attention_kernel_is_named(mode):
    w = make_workload(mode, 1, 6, 4)
    llm, inputs = make_llm(SMALL, w)
    for backend, names in ((SDPBackend.FLASH_ATTENTION, ["flash"]), (SDPBackend.MATH, ["math"])):
        with sdpa_kernel(backend):
            assert attention_kernels(lambda: bench.text_loss(llm, *inputs)) == names
            with torch.inference_mode():  # as `generate` runs
                assert attention_kernels(lambda: bench.text_loss(llm, *inputs)) == names


def test_the_limits_are_what_the_ratios_tend_to():
    c = LLMConfig(500, 64, 256, 4, 8, 2, 8)
    limits, Na = bench.limits(c, 20), 10 ** 9
    plits, lal = (make_workload(mode, 1, Na, 20) for mode in ("plits", "lal"))
    slope = bench.train_flops(c, plits) / bench.train_flops(c, lal) / Na
    assert slope == pytest.approx(limits["FLOPs, over Na"], rel=1e-5)
    saved = [bench.saved_activation_bytes(c, w, 2) for w in (plits, lal)]
    assert saved[0] / saved[1] == pytest.approx(limits["saved"], rel=1e-5)
    assert limits["cache"] == 1
    first = [bench.train_flops(c, make_workload(mode, 1, 1, 20))
             - bench.train_flops(c, make_workload(mode, 1, 0, 20)) for mode in ("plits", "lal")]
    assert limits["FLOPs, the first token"] == first[0] / first[1] > 1


COUNTS = list(bench.memory(SMALL, make_workload("lal", 1, 9, 9), 2))


@pytest.mark.parametrize("count", COUNTS)
def test_the_papers_figures_are_reached_where_the_search_says(count):
    c, B, Nt = bench.LLMS["llama-3.2-1b"], 8, 64

    def gains(Na, Nt):
        plits, lal = (make_workload(mode, B, Na, Nt) for mode in ("plits", "lal"))
        flops = [bench.train_flops(c, w, causal=True) for w in (plits, lal)]
        memory = [bench.memory(c, w, 2)[count] for w in (plits, lal)]
        return 1 - memory[1] / memory[0], flops[0] / flops[1] - 1

    for_memory, for_speed = bench.break_even(c, B, Nt, 2, count)
    assert gains(for_memory - 1, Nt)[0] < 0.641 <= gains(for_memory, Nt)[0]
    assert gains(for_speed - 1, Nt)[1] < 2.475 <= gains(for_speed, Nt)[1]


# ---------------------------------------------------------------------------------- the program

TINY = ("--na", "4,8", "--nt", "3", "--rounds", "1")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.LLMS, "small", SMALL)
    monkeypatch.setattr(bench, "NEW_TOKENS", 3)


def test_the_last_line_of_a_report_is_all_of_it_as_json(call, tiny):
    code, stdout, _ = call(bench, "--measure", "turns", *TINY)
    assert code == 0
    result = json.loads(stdout.splitlines()[-1])
    assert {"settings", "machine", "costs", "limits", "accounting", "in turns"} <= set(result)
    assert {row["step"] for row in result["in turns"]} == {*bench.MODES, *bench.VARIANTS}
    assert {row["mode"] for row in result["costs"]} == {*bench.MODES, *bench.VARIANTS}
    assert all(row["best s"] > 0 for row in result["in turns"])
    c, w = SMALL, make_workload("pal", 2, 8, 3)
    pal = result["costs"][2]
    assert pal["forward"] * 1e9 == pytest.approx(sum(bench.forward_flops(c, w).values()))
    assert w.prefix == w.side == 4


def test_a_sweep_has_a_line_for_each_mode_and_a_picture(call, tiny, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def measure_rows(o, phase, mode, rows, bar):  # here and now: no process to wait for
        return [bench.measure_row(o, phase, mode, Na, Nt) for Na, Nt in rows]

    monkeypatch.setattr(bench, "measure_rows", measure_rows)
    monkeypatch.setattr(bench, "limit_memory", lambda device, gigabytes: None)
    code, stdout, _ = call(bench, *TINY)
    result = json.loads(stdout.splitlines()[-1])
    assert code == 0 and (tmp_path / "out" / "bench-small.png").stat().st_size > 10_000
    for table in ("training", "inference"):
        assert [(line["mode"], line["Na"]) for line in result[table]] == [
            (mode, Na) for mode in bench.MODES for Na in (4, 8)]
        assert all(0 < line["utilisation %"] for line in result[table])


def test_what_fits_is_the_most_that_fits(call, tiny):
    def rows(gigabytes):
        code, stdout, _ = call(bench, "--fits", gigabytes, "--na", 64, "--nt", 3)
        assert code == 0
        return json.loads(stdout.splitlines()[-1])["fits"]

    for row in rows(0.01):
        batch, fixed, clip = list(row.values())[1:4]
        assert fixed + batch * clip <= 0.01 * (1 + 1e-3) and fixed + (batch + 2) * clip > 0.01
    one, two = (bench.saved_activation_bytes(SMALL, make_workload("plits", B, 64, 3), 2)
                for B in (1, 2))
    plits, lal, pal, summary = rows(0.01)
    assert 1e9 * plits["GB a clip"] == pytest.approx(two - one + 3 * SMALL.vocab_size * (4 + 4 + 4))
    assert plits["largest micro-batch"] < pal["largest micro-batch"] < lal["largest micro-batch"]
    assert plits["hours"] > summary["hours"] > lal["hours"]
    assert {row["largest micro-batch"] for row in rows(1e-6)} == {0}
    assert plits["GB at batch 2"] == pytest.approx(  # a batch shares its cos and sin
        plits["GB without a clip"] + 2 * plits["GB a clip"], rel=0.05)


def test_columns_of_a_table_are_aligned_and_may_be_missing_in_a_row(capsys):
    print_table("title", [{"a": 1, "long name": 0.123456}, {"a": None}, {"a": 2, "c": "x"}])
    assert capsys.readouterr().out.splitlines() == [
        "", "title", "  a  long name  c", "  1     0.1235  -", "  -          -  -",
        "  2          -  x"]


def test_without_git_the_commit_is_empty(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory", "git")

    assert describe_machine("cpu")["torch"] == torch.__version__
    monkeypatch.setattr("subprocess.run", no_git)
    assert describe_machine("cpu")["commit"] == ""


def test_functions_are_timed_in_turns_after_warming_up():
    calls = []

    def function(name):
        time.sleep(0.1 * (name not in calls))  # the first time takes longer
        calls.append(name)

    functions = {name: lambda name=name: function(name) for name in "ab"}
    times = time_in_turns(functions, torch.device("cpu"), 2)
    assert calls == list("ababab") and [len(times[name]) for name in "ab"] == [2, 2]
    assert max(times["a"] + times["b"]) < 0.1


def test_inference_is_measured_in_parts(tiny, capsys):
    o, _ = bench.resolve_options(bench.Options(nt="3", rounds=1))
    llm, device = bench.make_llm(o, "infer"), torch.device("cpu")
    rows = [{"mode": mode, "Na": 4, "Nt": 3, "rate": 1e9, "peak": peak,
             **bench.measure_inference(llm, bench.workload(o, mode, "infer", 4, 3), o, device)}
            for mode, peak in (("plits", 400), ("lal", 100), ("pal", None))]
    lines = bench.report(o, "infer", rows)
    assert all(0 < line["2nd question %"] < 100 and line["samples/s"] > 0 for line in lines)
    assert [line["less %"] for line in lines] == [0, 75, None]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system can limit memory")
def test_rows_of_a_process_stand_beside_their_prediction_and_one_may_be_too_large(capsys):
    o, _ = bench.resolve_options(bench.Options(batch=4, rounds=1, memory=1.5))
    rows = [(400_000, 3), (4, 3)]
    measured = bench.measure_rows(o, "train", "plits", rows, bench.tqdm(disable=True))
    assert [(r["mode"], r["Na"], r["Nt"]) for r in measured] == [("plits", *row) for row in rows]
    assert measured[0]["error"] == "out of memory"
    relabelled = [{**r, "mode": "lal"} for r in measured]
    too_large, line = bench.report(o, "train", measured + relabelled)[-2:]
    assert too_large["samples/s"] == "out of memory"
    assert line["saved MB predicted"] == pytest.approx(line["saved MB"], rel=0.001)
    assert line["x measured"] == 1 and line["x paper"] == "up to 3.475"


def kill_this_process(*row):
    os._exit(1)  # no clean-up, as when the system kills it


def test_a_process_that_is_killed_is_a_row_too(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_row", kill_this_process)
    o, rows = bench.resolve_options(bench.Options(na="4,8", nt="3"))
    measured = bench.measure_rows(o, "train", "pal", rows, bench.tqdm(disable=True))
    assert [(r["Na"], r["error"]) for r in measured] == [(4, "out of memory"), (8, "out of memory")]


@pytest.mark.parametrize("words, options", [
    (["gpt-5", "llama-3.2-1b", "qwen2.5-1.5b"], ["--llm", "gpt-5"]),
    (["--na", "whole numbers"], ["--na", "12,x"]),
    (["--arms", "lal-qformer"], ["--quality", "--arms", "lal,lol"]),
    (["--curves", "up to 5"], ["--quality", "--curves"]),
    (["llama-3.2-1b", "4.9 GB", "1 GB"],
     ["--device", "cpu", "--llm", "llama-3.2-1b", "--memory", "1"]),
    (["--hf-reference", "pip install transformers"],
     ["--measure", "turns", "--hf-reference", *TINY]),
])
def test_a_users_mistake_is_one_line(refuses, tiny, monkeypatch, words, options):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refuses(words, bench, *options)


def test_help_says_how_to_read_the_result(call):
    code, stdout, _ = call(bench, "--help")
    assert code == 0 and "How to read the result" in stdout and "64.1%" in stdout
    assert "%%" not in stdout


def test_the_reference_computes_the_same(tiny, capsys):
    pytest.importorskip("transformers")
    options = bench.Options(na="8", nt="3", rounds=1, hf_reference=True)
    o, rows = bench.resolve_options(options)
    assert [row["step"] for row in bench.compare_in_turns(o, *rows[-1])] == [
        "plits", "transformers", "lal", *bench.VARIANTS, "pal", "pal-summary"]
    w = make_workload("plits", 2, 8, 3)
    llm, (ids, audio, _) = make_llm(SMALL, w)
    gradients = []
    for step in (bench.hf_reference_step(llm, ids, audio, bench.cross_entropy),
                 lambda: bench.train_step(llm, ids, audio, None)):
        audio.grad = None
        step()
        gradients.append(audio.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


# -------------------------------------------------------------------------------------- quality

def test_arms_are_trained_scored_and_not_trained_again(call, base, brief, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CLIPS", {"clips": 5, "test_clips": 4})
    monkeypatch.setattr(bench, "QUESTIONS", 8)
    monkeypatch.setattr(bench.train, "VALIDATION_CLIPS", 1)
    options = "--quality", "--arms", "llp,lal-ffn-frozen", "--steps", "8", "--rounds", "1"
    code, stdout, _ = call(bench, *options, "--base", base, "--seeds", "1")
    assert code == 0
    first = json.loads(stdout.splitlines()[-1])["runs"]
    unfinished = tmp_path / "out" / "quality" / "lal-ffn-frozen-0-8" / "metrics.jsonl"
    lines = unfinished.read_text().splitlines()
    assert first[1] == {"arm": "lal-ffn-frozen", "seed": 0, **json.loads(lines[-1])}
    unfinished.write_text("\n".join(lines[:-1]) + "\n")  # broken off
    code, stdout, _ = call(bench, *options, "--base", base, "--seeds", "2")
    assert code == 0
    result = json.loads(stdout.splitlines()[-1])
    runs = {(run["arm"], run["seed"]): run for run in result["runs"]}
    assert len(runs) == 4
    assert runs["llp", 0] == first[0]  # its seconds too: it is that very line
    assert runs["lal-ffn-frozen", 0]["scores"] == first[1]["scores"]
    mixed, frozen = result["quality"]
    assert set(mixed) > {"all", "captioning", "classification"}
    assert mixed["GFLOPs"] > frozen["GFLOPs"] and mixed["saved MB"] > frozen["saved MB"]
    c = load_base(base, "lal").llm.config
    feed_forward = c.num_hidden_layers * 3 * c.hidden_size * c.intermediate_size
    assert mixed["trained"] - frozen["trained"] == feed_forward
    assert "±" in stdout and len(stdout.splitlines()) == 6
    features = list((tmp_path / "out" / "quality" / "features").iterdir())
    assert len(features) == 6  # training, validation and test clips of each seed: heard once


def test_curves_are_of_an_eighth_a_quarter_half_and_all_of_the_steps(call, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []

    def train_and_score(options):
        steps = options.steps1 + options.steps2 + options.steps3
        right = {"questions": 4, "model": steps / 100 + options.seed / 1000}
        return {"scores": {"all all": right, "sound reasoning": right}}

    monkeypatch.setattr(bench, "train_and_score", train_and_score)
    monkeypatch.setattr(bench, "step_cost", lambda options, *_: {"GFLOPs": 500.0, "ms": 50.0})
    monkeypatch.setattr(bench, "draw_learning", lambda path, arms: (
        drawn.append(arms), draw_learning(path, arms)))
    code, stdout, _ = call(bench, "--quality", "--curves", "--arms", "lal,pal", "--steps", "16",
                           "--seeds", "2", "--device", "cpu", "--out", "new")
    assert code == 0 and (tmp_path / "new" / "learning.png").stat().st_size > 10_000
    rows = json.loads(stdout.splitlines()[-1])["quality"]
    assert [(row["arm"], row["steps"]) for row in rows] == [
        (arm, steps) for arm in ("lal", "pal") for steps in (2, 4, 8, 16)]
    for points in drawn[0].values():
        assert [(x, y) for x, y, _ in points] == [(1, 0.1), (2, 0.2), (4, 0.4), (8, 0.8)]
        assert [shares for *_, shares in points] == [
            pytest.approx([steps, steps + 0.1]) for steps in (2, 4, 8, 16)]


def test_an_arm_is_trained_for_other_options_and_goes_on_where_stopped(monkeypatch, tmp_path):
    calls = []

    def main(o):
        calls.append(o)
        line = {"scores": {}, "seconds_per_step": 1, "options": asdict(o)}
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + json.dumps(line) + "\n")

    monkeypatch.setattr(bench.train, "main", main)
    options = bench.train.Options(out=str(tmp_path), steps3=5)
    stopped = tmp_path / "step-00000003.pt"
    stopped.touch()
    assert bench.train_and_score(options)["options"] == asdict(replace(options, resume=True))
    assert bench.train_and_score(options) and calls == [replace(options, resume=True)]
    stopped.unlink()
    longer = replace(options, steps3=6)
    assert bench.train_and_score(longer)["options"]["steps3"] == 6 and calls[1:] == [longer]


def test_shares_of_a_task_are_of_the_questions_in_all_domains():
    scores = {"all all": {"questions": 5, "model": 0.4},
              "sound all": {"questions": 4, "model": 0.5},
              "sound captioning": {"questions": 3, "model": 1 / 3},
              "music captioning": {"questions": 1, "model": 0},
              "sound reasoning": {"questions": 1, "model": 1}}
    assert bench.task_scores(scores) == {"all": 0.4, "captioning": 0.25, "reasoning": 1}


@pytest.fixture(scope="module")
def deep_base(base):
    """The tests' base with four layers, as assets/base.pt has and the names of arms suppose."""
    saved = load_checkpoint(base, BASE_FORMAT)
    saved["llm_config"]["num_hidden_layers"] = 4
    saved["state"]["llm"] |= {name.replace("layers.1.", f"layers.{layer}."): p for layer in (2, 3)
                              for name, p in saved["state"]["llm"].items() if "layers.1." in name}
    path = base.with_name("deep.pt")
    save_atomically(path, saved)
    return path


@pytest.mark.parametrize("arm", bench.ARMS)
def test_every_arm_of_the_comparison_can_be_made_and_counted(arm, deep_base):
    options = bench.arm_options(bench.Options(base=str(deep_base)), arm, 0, 8)
    model = bench.make_arm(options)
    assert model.mode == (options.routes or options.mode)
    features = [{kind: torch.randn(2 * e.grid[1], e.width) for kind, e in model.encoders.items()}]
    assert model(features, torch.tensor([[5, 6, 7]])).isfinite().all()
