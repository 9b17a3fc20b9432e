"""Training: what is trained and what is not, repeatable, safe to interrupt, fairly scored."""
import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from float64 import in_float64
from test_integrate import audio_llm
from test_lists import BAD_LISTS, BAD_SOUNDS, item, write_wav
from torch.optim.optimizer import register_optimizer_step_post_hook

import sample
import train
from data import features as features_module
from data.batches import ItemDataset, index_batches, load_batches, microbatches
from data.lists import QuestionList, add_token_ids
from data.world import load_world, render, scene
from encoders import ENCODERS
from integrate import MODES, AudioLLM, IntegrationConfig
from lib import weights
from lib.audio import check_audio, load_audio
from lib.checkpoints import CHECKPOINT_FORMAT
from lib.cli import command_line
from lib.optim import cosine_schedule
from lib.processes import catch_stop_signals

ROOT = Path(__file__).parents[1]
# those without weights of their own
ROUTED = [mode for mode in MODES if mode not in ("flamingo", "residual", "pal-summary")]


@pytest.fixture
def sounds(tmp_path):
    """Sound files of all sorts and a list of questions, q.json, with every task."""
    write_wav(tmp_path / "a.wav", 1.0, 8000, 1, seed=1)
    write_wav(tmp_path / "b.wav", 4.0, 44100, 2, seed=2)
    write_wav(tmp_path / "c.wav", 5.0, 22050, 1, seed=3)
    tasks = ("classification", "reasoning", "captioning")
    items = [item(f"{name}.wav", instruction=f"What is it, {task}?", output=f"{name} {name}",
                  task=task, dataset="music" if name == "a" else "noise")
             for name in "abc" for task in tasks]
    (tmp_path / "q.json").write_text(json.dumps(items))
    (tmp_path / "v.json").write_text(json.dumps(items[2:5]))
    return tmp_path


@pytest.fixture
def run_train(call, base, brief, monkeypatch):
    """run_train("--mode", "lal") takes a few steps: (stdout, stderr, lines of metrics.jsonl)."""
    monkeypatch.setattr(train, "VALIDATION_CLIPS", 3)

    def run(*options, data=("--data", "q.json", "--val-data", "v.json"), steps=(2, 0, 3)):
        steps = [word for i, n in enumerate(steps) for word in (f"--steps{i + 1}", n)]
        code, stdout, stderr = call(train, "--base", base, "--device", "cpu", "--batch", 2,
                                    *steps, *data, *options)
        assert code == 0, stderr
        mode = options[options.index("--mode") + 1] if "--mode" in options else "lal"
        lines = Path("out", mode, "metrics.jsonl").read_text().splitlines()
        return stdout, stderr, [json.loads(line) for line in lines]

    return run


WORLD = ("--clips", 4, "--test-clips", 3)
ALL = (3, 3, 3)  # steps of every stage; without that, the second one is left out


def losses(lines):
    return [(line["step"], line["loss"], line["norm"]) for line in lines if "loss" in line]


def the_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------- from end to end

def test_the_listening_world_from_training_to_an_answer(run_train, call, monkeypatch):
    evaluated, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluated.append(a) or evaluate(*a))
    stdout, stderr, lines = run_train(*WORLD, data=(), steps=ALL)
    for word in ("model", "silence", "wrong clip", "majority", "sound", "speech", "stage 3"):
        assert word in stdout
    assert "cropped" not in stderr and "silence" not in stderr
    *steps, last = lines
    assert [line["step"] for line in steps if "validation" in line] == [3, 6, 9]
    assert last["options"]["clips"] == 4 and last["seconds_per_step"] > 0
    assert {"all all", "sound all", "speech transcription"} <= last["scores"].keys()
    questions = list(QuestionList("out/demo/questions.json"))
    assert {i["clip"].name for i in questions} == {p.name for p in Path("out/demo").glob("*.wav")}
    assert len(questions) == last["scores"]["all all"]["questions"]
    wave = torch.from_numpy(render(scene("test", 1, 0)))
    assert torch.allclose(load_audio("out/demo/1.wav", 16000), wave, atol=1e-4)
    (model, features, *_), = evaluated
    fresh, = model.features([lambda rate: wave])
    assert all(torch.allclose(features[1][kind], fresh[kind], atol=1e-5) for kind in fresh)
    code, stdout, stderr = call(sample, "--audio", "out/demo/0.wav", "--prompt", "What is it?")
    assert code == 0 and stdout.endswith("\n") and "out/lal/model.pt: mode lal" in stderr


@pytest.mark.parametrize("mode", MODES)
def test_own_sounds_of_any_rate_and_length_from_training_to_the_table(mode, run_train, sounds):
    stdout, stderr, lines = run_train("--mode", mode)
    rows = lines[-1]["scores"]
    assert rows["all all"]["questions"] == 3
    assert {key.split()[0] for key in rows} == {"all", "music", "noise"}
    assert "music" in stdout and "wrong clip" in stdout
    assert "cropped from 1 of 3" in stderr and "silence is added to 1 of 3" in stderr
    assert AudioLLM.load(f"out/{mode}/model.pt").mode == mode
    saved = torch.load(f"out/{mode}/model.pt", weights_only=True)
    assert saved["options"] == lines[-1]["options"] and saved["options"]["mode"] == mode


def test_without_validation_questions_the_table_says_so(run_train, sounds):
    stdout, _, lines = run_train(data=("--data", "q.json"), steps=(0, 0, 1))
    assert "no --val-data" in stdout and lines[-1]["scores"]["all all"]["questions"] == 9


# ------------------------------------------------------------------------------------ repeatable

def test_the_seed_decides_every_loss(run_train, sounds, recorded):
    one, two, other = (run_train("--seed", seed)[2] for seed in (0, 0, 1))
    for line in (one[-1], two[-1]):
        del line["seconds_per_step"]
    assert one == two
    assert all(a != b for a, b in zip(losses(one), losses(other)))
    first, again, third = (recorded[step][0] for step in (0, 5, 10))  # each run has five steps
    assert the_same(first, again) and not the_same(first, third)
    items = QuestionList(sounds / "q.json")
    orders = {tuple(np.concatenate(list(islice(batches, 5)))) for seed in range(9)
              for _, _, batches in train.plan_stages(
                  items, train.Options(seed=seed, tasks="all", steps1=5, batch=2))}
    assert len(orders) > 20  # of 9 seeds and 3 stages


def test_evaluation_does_not_disturb_training(run_train, sounds, monkeypatch):
    plain = losses(run_train()[2])
    exact_match = train.exact_match  # twice as often, on other questions
    monkeypatch.setattr(train, "exact_match", lambda *a: (exact_match(*a), exact_match(*a))[1])
    assert losses(run_train(data=("--data", "q.json", "--val-data", "q.json"))[2]) == plain


@pytest.fixture
def recorded(monkeypatch):
    """[(tensors of the model, questions of the batch, names of what is trained), ...] by step."""
    steps, answer_loss = [], train.answer_loss

    def record(model, features, items, total):
        state = {name: p.clone() for name, p in model.state_dict().items()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if "encoders" not in {name.split(".")[0] for name in trained}:
            assert not any(part.training for part in model.encoders.modules())
        steps.append((state, [i["instruction"] + i["output"] for i in items], trained))
        return answer_loss(model, features, items, total)

    monkeypatch.setattr(train, "answer_loss", record)
    return steps


def test_the_mode_sets_the_routes_and_nothing_else(run_train, sounds, recorded):
    runs = {}
    for mode in ROUTED:
        recorded.clear()
        run_train("--mode", mode, "--lr", 1e-3)
        runs[mode] = list(recorded)
    one = runs["lal"]
    for run in runs.values():
        assert the_same(run[0][0], one[0][0])
        assert [questions for _, questions, _ in run] == [questions for _, questions, _ in one]
        assert [trained for _, _, trained in run] == [trained for _, _, trained in one]
    assert not the_same(runs["plits"][-1][0], runs["pal"][-1][0])


@pytest.mark.parametrize("size", [1, 4, 7, 200])
def test_every_question_comes_once_before_any_comes_again(size):
    lengths = np.random.default_rng(0).integers(5, 60, 150)
    batches, rounds = index_batches(lengths, size, np.random.default_rng(0)), []
    for _ in range(3):
        seen = []
        while sum(map(len, seen)) < len(lengths):
            seen.append(next(batches).tolist())
        assert sorted(sum(seen, [])) == list(range(150)) and max(map(len, seen)) <= size
        rounds.append(seen)
    assert rounds[0] != rounds[1] != rounds[2]
    if size == 4:  # and similar lengths come together: the spread would be 30 or so
        assert np.mean([np.ptp(lengths[batch]) for batch in sum(rounds, [])]) < 10


def test_questions_about_one_clip_come_by_fours():
    rng = np.random.default_rng(0)
    clips, lengths = rng.permutation(np.repeat(np.arange(20), 9)), rng.integers(5, 60, 180)
    batches, seen, clip_counts = index_batches(lengths, 16, rng, clips), [], []
    while sum(map(len, seen)) < 180:
        seen.append(next(batches).tolist())
        clip_counts.append(len(set(clips[seen[-1]])))
    assert sorted(sum(seen, [])) == list(range(180))
    # nine are four, four and one; a few groups are cut apart, a few meet
    assert 180 * (3 / 9 - 0.1) < sum(clip_counts) < 180 * (3 / 9 + 0.1)


def test_the_batches_of_the_example_are_those_of_the_docstring():
    sizes, clips = np.array([5, 3, 9, 4, 6, 2]), np.array([7, 7, 8, 7, 7, 7])
    batches = {tuple(batch) for seed in range(9) for batch in islice(
        index_batches(sizes, 4, np.random.default_rng(seed), clips), 2)}
    assert batches == {(5, 1, 3, 0), (4, 2)}
    for batch in batches:
        assert f"[{' '.join(map(str, batch))}]" in index_batches.__doc__


@pytest.mark.parametrize("mode", MODES)
def test_a_clip_heard_once_for_its_questions_is_as_if_heard_for_each(mode):
    model = audio_llm(mode).double()
    (one, two), items = batch_of(model)
    ids = torch.randint(300, (4, 6), generator=torch.Generator().manual_seed(0))
    results = []
    for features, clip_index in ([one, two], [0, 1, 1, 0]), ([one, two, two, one], None):
        model.zero_grad()
        hidden = model(features, ids, clip_index)
        hidden.square().sum().backward()
        results.append([hidden] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 20
    assert all((a - b).abs().max() < 1e-9 * (1 + b.abs().max()) for a, b in zip(*results))


# ---------------------------------------------------------------------------------- what is learnt

def changes(states, part):
    """The stages, 1 to 3, in which parameters of a part changed. states: before and after each."""
    names = [name for name in states[0] if name.startswith(part)]
    assert names
    return [n for n, (a, b) in enumerate(zip(states, states[1:]), 1)
            if any(not torch.equal(a[name], b[name]) for name in names)]


def test_frozen_is_frozen_and_the_rest_learns(run_train, sounds, recorded):
    run_train(steps=ALL)
    final = AudioLLM.load("out/lal/model.pt").state_dict()
    states = [recorded[0][0], recorded[3][0], recorded[6][0], final]  # after 0, 3, 6 and 9 steps
    assert changes(states, "encoders") == []
    assert changes(states, "connectors") == [1, 2, 3]
    assert changes(states, "llm") == [2, 3]
    assert all(name.startswith("connectors") for name in recorded[0][2])
    assert not any(name.startswith("encoders") for name in recorded[8][2])
    assert "llm.model.embed_tokens.weight" in recorded[8][2]


@pytest.mark.parametrize("freeze, pattern", [("ffn", r"\.mlp\."), ("llm", ""),
                                             ("lora", r"^(?!.*lora_)")])
def test_what_is_to_stay_frozen_does_to_the_bit(freeze, pattern, run_train, sounds, recorded):
    stdout, *_ = run_train("--freeze", freeze, steps=ALL)
    start, final = recorded[0][0], AudioLLM.load("out/lal/model.pt").state_dict()
    for name in start:
        if name.startswith("llm."):
            frozen = re.search(pattern, name) is not None
            assert torch.equal(start[name], final[name]) == frozen, name
    assert all("connectors" in name or not re.search(pattern, name) for name in recorded[8][2])
    assert any(name.startswith("connectors") for name in recorded[8][2])
    assert re.search("^llm feed-forward .* frozen$", stdout, re.M)


def test_decay_pulls_at_matrices_alone():
    model = audio_llm("flamingo")
    optimizer = train.make_optimizer(model, {"connectors": 0.1, "llm": 0.01})
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None  # what moves now is decay
    optimizer.step()
    lr = {"connectors": 0.1, "llm": 0.01, "encoders": 0}
    for name, p in model.named_parameters():
        factor = 1 - lr[name.split(".")[0]] * 0.05 * (p.ndim > 1)
        assert torch.allclose(p, before[name] * factor, rtol=1e-12, atol=0), name
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert {"llm.model.norm.weight", "connectors.flamingo.0.gates"} <= still


def test_the_stages_are_those_of_the_table_but_for_what_options_change():
    def stages(**options):
        return train.curriculum(train.Options(**options))

    assert stages() == list(train.SMALL) and stages(llm="x") == list(train.REAL)
    one, two, three = stages(lr=2e-3, steps1=0, steps2=7, batch=5, tasks="a,b")
    assert one.rates == train.SMALL[0].rates
    assert two.rates == three.rates == {"connectors": 6e-3, "llm": 2e-3}
    assert [stage.steps for stage in (one, two, three)] == [0, 7, train.SMALL[2].steps]
    assert {(s.batch, s.tasks) for s in (one, two, three)} == {(5, ("a", "b"))}
    assert [(s.steps, s.epochs) for s in stages(llm="x", steps2=7)] == [(0, 2), (7, 0), (0, 1)]
    assert [s.rates for s in stages(freeze="llm")] == [{"connectors": 3e-3}] * 3
    assert [s.tasks for s in stages(tasks="all")] == [("all",)] * 3
    one, two, three = stages(train_encoders=True, lr=2e-3)
    assert one.rates == train.SMALL[0].rates and two.rates == three.rates
    assert two.rates == {"connectors": 6e-3, "llm": 2e-3, "encoders": 2e-4}


def test_the_start_tells_what_is_trained_part_by_part(run_train, sounds):
    stdout, *_ = run_train("--mode", "flamingo", "--config", "flamingo_every=2", steps=(1, 0, 1))
    parts = re.findall(r"^(.*?) +([\d,]+) parameters, (frozen|trained .*)$", stdout, re.M)
    assert {part: state for part, _, state in parts} == {
        "encoders.whisper": "frozen", "encoders.sslam": "frozen", "encoders.clap": "frozen",
        "connectors.whisper": "trained in stage 1, 3", "connectors.sslam": "trained in stage 1, 3",
        "connectors.clap": "trained in stage 1, 3",
        "connectors.flamingo": "trained in stage 1, 3",
        "llm feed-forward": "trained in stage 3", "llm, the rest": "trained in stage 3"}
    count = {part: int(n.replace(",", "")) for part, n, _ in parts}
    model = AudioLLM.load("out/flamingo/model.pt")
    assert sum(count.values()) == sum(p.numel() for p in model.parameters())
    feed_forward = [p for block in model.llm.model.layers for p in block.mlp.parameters()]
    assert count["llm feed-forward"] == sum(p.numel() for p in feed_forward)


@pytest.mark.parametrize("options, config", [
    ("--connector lfst --config grid_steps=5,grid_bands=3,connector_layers=1",
     IntegrationConfig("lfst", grid_steps=5, grid_bands=3, connector_layers=1)),
    ("--connector qformer --config queries=3,audio_rope=off --lal-layers 1:",
     IntegrationConfig("qformer", queries=3, lal_layers="1:", audio_rope="off"))])
def test_options_choose_the_arm_and_the_checkpoint_keeps_it(options, config, run_train, sounds,
                                                            call):
    run_train(*options.split(), steps=(1, 0, 1))
    assert AudioLLM.load("out/lal/model.pt").config == config
    code, stdout, _ = call(sample, "--audio", "a.wav", "--prompt", "What is it?")
    assert code == 0 and stdout.endswith("\n")


def test_encoders_can_be_left_out_and_joined(run_train, sounds):
    for options, names in (("--encoders clap,whisper", ["whisper", "clap"]),
                           ("", ["whisper", "sslam", "clap"]),
                           ("--connector auto", ["whisper", "lfst"])):
        run_train(*options.split())
        assert list(AudioLLM.load("out/lal/model.pt").connectors) == names


def test_routes_are_a_mode_of_ones_own(run_train, refuses, sounds, base):
    pal = losses(run_train("--mode", "pal")[2])
    table = "whisper=plits,sslam=lal,clap=lal"
    assert losses(run_train("--routes", table, "--out", "out/lal")[2]) == pal
    model = AudioLLM.load("out/lal/model.pt")
    assert model.mode == table and model.routes == {
        "whisper": "plits", "sslam": "lal", "clap": "lal"}
    for wrong in ("whisper=plits", "whisper=x,sslam=lal,clap=lal", table + ",bat=lal"):
        refuses(["routes", "whisper, sslam, clap"], train, "--base", base, "--routes", wrong)
    refuses(["sslam and clap", "one route"], train, "--base", base, "--connector", "lfst",
            "--routes", "whisper=plits,sslam=plits,clap=lal")


def test_stages_teach_their_tasks(run_train, sounds, recorded):
    run_train(steps=(5, 5, 5))
    tasks = [{q.split(", ")[1].split("?")[0] for q in batch} for _, batch, _ in recorded]
    assert set.union(*tasks[:5]) == {"classification"}
    assert set.union(*tasks[5:10]) == {"classification", "reasoning"}
    assert set.union(*tasks[10:]) == {"classification", "reasoning", "captioning"}


@pytest.fixture
def exact():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(model):
    """Three items about two clips, everything of unequal length."""
    g = torch.Generator().manual_seed(0)
    features = [{kind: torch.randn(n, 64, generator=g, dtype=torch.float64) for kind in ENCODERS}
                for n in (3, 7)]
    items = [item(clip=0, instruction="what is 3", output="said"),
             item(clip=1, instruction="what", output="3 or heard or 17"),
             item(clip=0, instruction="what is 5 said or heard 6", output="7")]
    return features, add_token_ids(model.tokenizer, items)


@pytest.mark.parametrize("mode", ROUTED)
def test_the_loss_is_that_of_the_answers_tokens_and_padding_changes_nothing(mode, exact):
    model = audio_llm(mode).double()
    features, items = batch_of(model)
    means = []
    for i in items:
        prompt = model.tokenizer.encode(i["instruction"] + "\n")
        answer = model.tokenizer.encode(" " + i["output"]) + [model.tokenizer.eos_id]
        surprise = []
        for t, token in enumerate(answer):  # one at a time, after all that is before it
            hidden = model([features[i["clip"]]], torch.tensor([prompt + answer[:t]]))
            surprise.append(-model.llm.head(hidden)[0, -1].log_softmax(0)[token].item())
        means.append(sum(surprise) / len(answer) ** 0.5)
    loss = train.answer_loss(model, features, items).item()
    assert abs(loss - np.mean(means)) < 1e-12
    assert abs(train.answer_loss(model, features, items, 5).item() - sum(means) / 5) < 1e-12
    alone = [train.answer_loss(model, features, [i]).item() for i in items]
    assert np.allclose(alone, means, rtol=0, atol=1e-12)


def test_each_answer_of_a_checklist_counts_as_one(exact):
    model = audio_llm("lal").double()
    features, items = batch_of(model)
    pairs = [("a dog", "yes"), ("a cat", "no"), ("rain", "yes")]
    items += add_token_ids(model.tokenizer, [{"clip": 1, "pairs": pairs}])
    sums = [train.answer_loss(model, features, [i], 1).item() for i in items]
    loss = train.answer_loss(model, features, items).item()
    assert abs(loss - sum(sums) / (3 + 3)) < 1e-12


def test_feature_noise_is_of_its_size_and_step_and_clip_decide_it():
    g = torch.Generator().manual_seed(0)
    features = {clip: {kind: size * torch.randn(300, 64, generator=g) + 7
                       for kind, size in (("whisper", 1), ("sslam", 3))} for clip in ("a", "b")}
    first, again, later = (train.add_feature_noise(features, 0.2, step) for step in (1, 1, 2))
    for clip, kind in ((clip, kind) for clip in features for kind in features[clip]):
        noise = first[clip][kind] - features[clip][kind]
        assert abs(noise.std() / features[clip][kind].std() - 0.2) < 0.005
        assert abs(noise.mean()) < 0.01
        assert torch.equal(first[clip][kind], again[clip][kind])
        assert not torch.allclose(first[clip][kind], later[clip][kind])
    noise = [(first[clip]["sslam"] - features[clip]["sslam"]).flatten() for clip in features]
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1]) < 0.05
    assert train.add_feature_noise(features, 0, 1) is features


def test_only_the_small_curriculum_adds_noise_unless_asked(run_train, sounds):
    stages = train.curriculum(train.Options(llm="folder"))
    assert not any(stage.feature_noise for stage in stages)
    noisy, plain = losses(run_train()[2]), losses(run_train("--feature-noise", 0)[2])
    assert [x for _, x, _ in noisy] != [x for _, x, _ in plain]


def test_the_learning_rate_rises_once_and_falls_to_a_twentieth():
    for steps in (1, 2, 19, 400):
        rates = [cosine_schedule(i, steps) for i in range(steps)]
        peak = rates.index(1.0)
        assert peak <= steps // 20 and rates[:peak] == sorted(rates[:peak])
        assert rates[peak:] == sorted(rates[peak:], reverse=True) and min(rates) > 0.03
    assert rates[-1] < 0.051


# ------------------------------------------------------------------------------- trained encoders

def test_encoders_can_be_trained(run_train, sounds, recorded, monkeypatch):
    """In the stages of the LLM, and not before; what is scored are their features of then."""
    evaluated, exact_match = [], train.exact_match

    def record(model, features, items):
        evaluated.append(features)
        return exact_match(model, features, items)

    monkeypatch.setattr(train, "exact_match", record)
    stdout, *_ = run_train("--train-encoders", "--encoders", "whisper,clap", steps=ALL)
    stages = [AudioLLM.load(f"out/lal/stage{n}.pt") for n in (1, 2, 3)]
    states, final = [recorded[0][0], *(model.state_dict() for model in stages)], stages[-1]
    for kind in ("whisper", "clap"):
        assert changes(states, f"encoders.{kind}") == [2, 3]
        assert re.search(f"^encoders.{kind} .* trained in stage 2, 3$", stdout, re.M)
    assert not final.encoders["whisper"].frozen
    features, first = evaluated[-1], evaluated[0]
    for clip in features:
        fresh, = final.features([lambda rate, clip=clip: load_audio(clip, rate)])
        for kind in fresh:
            assert torch.allclose(features[clip][kind], fresh[kind], atol=1e-5)
            assert not torch.allclose(features[clip][kind], first[clip][kind], atol=1e-5)


def test_the_gradient_of_a_trained_encoder_is_the_slope_of_the_loss(base):
    model = train.load_base(base, "lal", IntegrationConfig("mlp"), "whisper").double()
    model.encoders["whisper"].frozen = False
    train.make_optimizer(model, {"encoders": 1e-4})
    items = add_token_ids(model.tokenizer, [item(clip=0)])
    spectrogram, seconds = model.spectrograms(lambda rate: torch.randn(2 * rate))["whisper"]

    def loss():
        features = model.encode([{"whisper": (spectrogram.double(), seconds)}])
        return train.answer_loss(model, dict(enumerate(features)), items)

    loss().backward()
    weight = model.encoders["whisper"].conv1.weight
    direction, step = weight.grad / weight.grad.norm(), 1e-3
    values = []
    for sign in (1, -2):
        weight.data += sign * step * direction
        values.append(loss().item())
    assert weight.grad.norm() > 0
    slope = (values[0] - values[1]) / (2 * step)  # features are rounded to float32
    assert abs(slope / weight.grad.norm() - 1) < 0.02


def test_a_trained_encoder_of_a_file_of_its_own_is_in_the_checkpoint(run_train, sounds,
                                                                    monkeypatch):
    load = train.load_base

    def loaded(*args):
        model = load(*args)
        model.encoders["whisper"].checkpoint_path = "whisper.pt"
        return model

    monkeypatch.setattr(train, "load_base", loaded)
    for options, is_saved in ((), False), (["--train-encoders"], True):
        run_train("--encoders", "whisper", *options, steps=(1, 1, 0))
        saved = torch.load("out/lal/model.pt", weights_only=True)["state"]
        assert any(name.startswith("encoders.whisper") for name in saved) == is_saved


# ----------------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("mode", ROUTED)
def test_answers_in_batches_are_those_of_each_question_alone(mode, brief):
    model = audio_llm(mode)
    model.connectors.double()
    g = torch.Generator().manual_seed(0)
    features = [{kind: torch.randn(1 + (n + len(kind)) % 5, 64, generator=g, dtype=torch.float64)
                 for kind in ENCODERS} for n in range(34)]  # two batches of clips
    items = [item(clip=n, instruction=text) for text in ("what is 3 said", "or")
             for n in np.random.default_rng(0).permutation(34)]
    answers = train.predict(model, features, items)
    for i, text in list(zip(items, answers))[::3]:
        assert [text] == model.ask(model.hear([features[i["clip"]]]), [i["instruction"]])
    assert len(set(answers)) > 34


class Parrot:
    """A model whose features are its answers."""
    def features(self, clips):
        self.silences = [clip(16000) for clip in clips]
        return ["silence"] * len(clips)


@pytest.fixture
def parrot(monkeypatch):
    def predict(model, features, items, clip_of=lambda item: item["clip"]):
        model.clips.append([clip_of(i) for i in items])
        return [features[clip_of(i)] for i in items]

    monkeypatch.setattr(train, "predict", predict)
    parrot = Parrot()
    parrot.clips = []
    return parrot


def question(clip, output, domain="x", task="t"):
    return {"clip": clip, "output": output, "domain": domain, "task": task, "instruction": "?"}


def test_the_table_is_a_count_by_hand(parrot, capsys):
    features = ["yes", "no", "yes", "silence"]  # what the model answers about clip 0, 1, 2, 3
    items = [question(0, "yes"), question(0, "no"), question(1, "no"), question(1, "silence"),
             question(2, "yes", "y"), question(3, "no", "y", "u"), question(3, "silence", "y")]
    learnt = [question(0, word) for word in ("no", "no", "yes")] + [question(0, "yes", "y")]
    rows = train.evaluate(parrot, features, items, learnt)
    # the wrong clip of 0 is 1, of 1 is 0, of 2 is 3, of 3 is 2
    assert rows == {
        "x t": {"questions": 4, "model": 1 / 2, "silence": 1 / 4, "wrong clip": 1 / 4,
                "majority": 1 / 2},
        "x all": {"questions": 4, "model": 1 / 2, "silence": 1 / 4, "wrong clip": 1 / 4,
                  "majority": 1 / 2},
        "y t": {"questions": 2, "model": 1.0, "silence": 0.5, "wrong clip": 0.0, "majority": 0.5},
        "y u": {"questions": 1, "model": 0.0, "silence": 0.0, "wrong clip": 0.0, "majority": 0.0},
        "y all": {"questions": 3, "model": 2 / 3, "silence": 1 / 3, "wrong clip": 0.0,
                  "majority": 1 / 3},
        "all all": {"questions": 7, "model": 4 / 7, "silence": 2 / 7, "wrong clip": 1 / 7,
                    "majority": 3 / 7}}
    printed = capsys.readouterr().out
    line, = (line.split() for line in printed.splitlines() if line.startswith("all"))
    assert line == ["all", "all", "7", "57.1%", "28.6%", "14.3%", "42.9%"]
    assert parrot.clips[1] == [0] * 7 and len(parrot.silences) == 1
    assert parrot.silences[0].shape == (4 * 16000,) and not parrot.silences[0].any()


def test_the_wrong_clip_is_another_one_of_the_same_domain_if_there_is_one(parrot):
    items = [question(c, "yes", domain) for c, domain in enumerate("xyxzzzx") for _ in range(2)]
    train.evaluate(parrot, ["yes"] * 7, items, items)
    domain = dict(enumerate("xyxzzzx"))
    wrong = {i["clip"]: clip for i, clip in zip(items, parrot.clips[2])}
    assert all(clip != other for clip, other in wrong.items())
    assert all(domain[clip] == domain[other] for clip, other in wrong.items() if clip != 1)
    for d in "xz":  # each clip is somebody's wrong clip
        clips = {c for c in domain if domain[c] == d}
        assert {wrong[c] for c in clips} == clips
    rows = train.evaluate(parrot, ["yes"], items[:2], items)
    assert rows["all all"] == {"questions": 2, "model": 1.0, "silence": 0.0, "majority": 1.0}


def test_a_data_set_called_all_is_counted_once(parrot):
    items = [question(0, "yes", "all"), question(1, "yes", "all", "all")]
    rows = train.evaluate(parrot, ["yes", "no"], items, items)
    assert {key: row["questions"] for key, row in rows.items()} == {"all t": 1, "all all": 2}


# ------------------------------------------------------------------------------------------ data

def test_jsonl_is_read_item_by_item_as_the_list_is(sounds):
    items = json.loads((sounds / "q.json").read_text())
    items[3]["instruction"] = "Wer spricht? \u00fc\u4f60"  # more bytes than characters
    text = "\n\n".join(json.dumps(i, ensure_ascii=n % 2 == 0) for n, i in enumerate(items))
    (sounds / "q.jsonl").write_text("\ufeff" + text, encoding="utf-8")  # as Windows has it
    (sounds / "q.json").write_text(json.dumps(items))
    lines, whole = (QuestionList(sounds / name) for name in ("q.jsonl", "q.json"))
    assert list(lines) == list(whole) and len(lines) == 9
    for tasks in (("captioning",), ("all",)):
        stage = train.Stage("", tasks, {}, 1, 1)
        (one, sizes, _), (two, *_) = (train.select_items(stage, x) for x in (lines, whole))
        assert one.tolist() == two.tolist() == [
            i for i, item in enumerate(items) if item["task"] in tasks or "all" in tasks]
        last = items[one[-1]]  # its bytes, and its clip's length
        seconds = check_audio(sounds / last["audio_id"])
        assert sizes[-1] == pytest.approx(len(json.dumps(last)) / 4 + 10 * seconds)


def test_many_bad_items_are_counted_and_can_be_left_out(sounds, refuses, run_train, base):
    items = json.loads((sounds / "q.json").read_text())
    bad = [{"audio_id": f"none{n}.wav", "instruction": "?", "output": "!"} for n in range(12)]
    (sounds / "bad.jsonl").write_text("\n".join(map(json.dumps, bad[:4] + items + bad[4:])))
    lines = refuses(["bad.jsonl", "12 items", "--skip-bad"], train, "--base", base, "--data",
                    "bad.jsonl")
    complaints = [line for line in lines if "none" in line]
    assert len(complaints) == 10 and "line 1:" in complaints[0] and "line 14" in complaints[4]
    lines = refuses(["v.json", "3 items"], train, "--base", base, "--data", "v.json",
                    "--audio-root", "none")
    assert "item 0" in lines[0] and str(Path("none/a.wav")) in lines[0]
    _, stderr, mended = run_train("--skip-bad",
                                  data=("--data", "bad.jsonl", "--val-data", "v.json"))
    assert "12 items cannot be used, the first 10 are above; 9 stay" in stderr
    (sounds / "good.jsonl").write_text("\n".join(map(json.dumps, items)))
    good = run_train(data=("--data", "good.jsonl", "--val-data", "v.json"))[2]
    assert losses(good) == losses(mended)


def test_what_is_said_of_a_list_needs_one(refuses, base):
    for option in (("--skip-bad",), ("--audio-root", "x"), ("--val-data", "x")):
        refuses(["--data, which is missing"], train, "--base", base, *option)


def test_one_list_to_learn_from_and_to_be_asked(sounds, run_train):
    lines = run_train("--no-keep-features", data=("--data", "v.json", "--val-data", "v.json"))[2]
    assert lines[-1]["scores"]["all all"]["questions"] == 3


def test_a_list_that_changed_cannot_be_resumed(unfinished, refuses, sounds):
    whole = (sounds / "q.json").read_text()
    (sounds / "q.json").write_text(whole.replace("b b", "B b"))
    refuses(["q.json has changed", "step-00000004.pt", "put it back", "--skip-bad"], train,
            *unfinished, "--resume")


@pytest.mark.parametrize("keys, value", [
    (("stage",), 3.5), (("at",), "x"), (("step",), -1), (("step",), None), (("loss",), "x"),
    (("logged",), "x"), (("data",), "del"), (("options",), None), (("options",), "del"),
    (("optimizer",), "x"), (("optimizer",), {}), (("optimizer", "param_groups"), []),
    (("optimizer", "param_groups", 0, "lr"), "x"), (("optimizer", "state", 0), {}),
    (("optimizer", "state", 0, "exp_avg"), torch.zeros(2)), (("rng",), torch.zeros(9)),
    (("rng",), "x"), (("rng",), "del")], ids=lambda x: str(x)[:40])
def test_an_unfinished_training_that_was_tampered_with_is_one_line(
        keys, value, unfinished, refuses, tmp_path):
    path = tmp_path / "out" / "lal" / "step-00000004.pt"
    saved = node = torch.load(path, weights_only=True)
    for key in keys[:-1]:
        node = node[key]
    if isinstance(value, str) and value == "del":
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    torch.save(saved, path)
    refuses(["step-00000004.pt", "another"], train, *unfinished, "--resume")


@pytest.fixture
def unreadable(sounds):
    """The lists q.json and v.json with two questions about bad.wav, whose header is good."""
    BAD_SOUNDS["nan"][0](sounds / "bad.wav")
    for name in ("q.json", "v.json"):
        items = json.loads((sounds / name).read_text())
        items[1:1] = [item("bad.wav", instruction="bad, captioning?", task="captioning")] * 2
        (sounds / name).write_text(json.dumps(items))
    return sounds


@pytest.mark.parametrize("options", ["", "--workers 2", "--no-keep-features",
                                     "--no-keep-features --workers 2", "--feature-cache cache",
                                     "--train-encoders --encoders clap"])
def test_a_clip_that_fails_when_it_is_read_is_told_of_once_and_left_out(
        options, unreadable, run_train, refuses, base, recorded):
    refuses(["bad.wav", "NaN"], train, "--base", base, "--device", "cpu", "--data", "q.json",
            "--val-data", "v.json", *options.split(), "--steps1", 1, "--out", "new")
    _, stderr, lines = run_train("--skip-bad", *options.split(), steps=(1, 0, 5))
    assert stderr.count("bad.wav") == 1 and "left out: clip 1 " in stderr
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[-1]["scores"]["all all"]["questions"] == 3
    learnt = Counter(question for _, batch, _ in recorded for question in batch)
    assert len(learnt) == 9 and not any("bad" in question for question in learnt)
    if "cache" in options:  # which tells how many it has, and is none for who must not skip any
        stdout, stderr, _ = run_train("--skip-bad", *options.split())
        assert re.findall(r"it has (\d) of (\d) clips", stdout) == [("3", "4"), ("2", "3")]
        assert "bad.wav" not in stderr
        refuses(["bad.wav"], train, "--base", base, "--data", "q.json", *options.split(),
                "--device", "cpu", "--out", "new")


@pytest.mark.parametrize("features", [None, "kept"])
def test_the_loss_is_divided_by_the_answers_that_are_left(features, unreadable):
    model, questions = audio_llm("lal"), QuestionList(unreadable / "q.json")
    clips = questions.clips(model.seconds)
    features = features and features_module.extract_features(model, clips, set())
    split = train.Split(clips, questions, "", features, set())
    batches = [np.array([0, 1, 2, 3]), np.array([1, 2]), np.array([3, 4])]
    loaded = list(load_batches(iter(batches), ItemDataset(split, model), train.Options(micro=3)))
    assert [[len(part.items) for part in parts] for parts in loaded] == [[1, 1], [0], [2]]
    assert [{part.answers for part in parts} for parts in loaded] == [{2}, {0}, {2}]
    assert [path.name for path in split.unreadable] == ["bad.wav"]


def test_nothing_but_unreadable_clips_is_one_line(unreadable, refuses, base):
    (unreadable / "q.json").write_text(json.dumps([item("bad.wav")]))
    refuses(["none of the clips"], train, "--base", base, "--data", "q.json", "--skip-bad",
            "--device", "cpu")


def test_a_training_that_an_unreadable_clip_ended_goes_on_without_it(unreadable, run_train, base,
                                                                    refuses, interrupt):
    (unreadable / "v.json").write_text(json.dumps([item("a.wav"), item("b.wav")]))
    options = "--no-keep-features", "--skip-bad"
    lines, state = outcome(run_train(*options, steps=ALL)[2])
    again, resumed = outcome(interrupt(7, "killed", *options))
    assert again == lines and the_same(state, resumed)
    # without --skip-bad stage 3 meets it
    brief = ["--base", base, "--device", "cpu", "--batch", 2, "--data", "q.json", "--val-data",
             "v.json", "--no-keep-features", "--save-every", 1, "--steps1", 3, "--steps2", 3,
             "--steps3", 3, "--batch", 9]
    refuses(["bad.wav", "NaN"], train, *brief)
    whole = (unreadable / "q.json").read_text()
    items = [i for i in json.loads(whole) if i["audio_id"] != "bad.wav"]
    (unreadable / "q.json").write_text(json.dumps(items))
    refuses(["put it back", "--skip-bad"], train, *brief, "--resume", "--skip-bad")
    (unreadable / "q.json").write_text(whole)
    refuses(["bad.wav", "NaN"], train, *brief, "--resume")
    run_train("--no-keep-features", "--skip-bad", "--batch", 9, "--resume", steps=ALL)


@pytest.mark.parametrize("data", ["own", "world"])
def test_the_feature_cache_gives_the_same_losses_without_hearing_again(data, run_train, sounds,
                                                                       monkeypatch):
    world = {"data": ()} if data == "world" else {}
    options = WORLD if data == "world" else ()
    plain = run_train(*options, **world, steps=(1, 1, 1))[2]
    first = run_train(*options, "--feature-cache", "cache", **world, steps=(1, 1, 1))[2]
    files = {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()}
    assert len(files) == (3 if data == "world" else 2)
    monkeypatch.setattr(features_module, "extract_features", None)
    stdout, _, second = run_train(*options, "--feature-cache", "cache", **world, steps=(1, 1, 1))
    assert stdout.count("features are read from") == len(files)
    assert {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()} == files
    assert losses(plain) == losses(first) == losses(second)
    assert plain[-1]["scores"] == first[-1]["scores"] == second[-1]["scores"]


def test_the_feature_cache_knows_what_features_depend_on(base, sounds, monkeypatch):
    """Another world, list, sound, connector's pool size, encoder or base has a file of its own."""
    hearings, base = [], Path(shutil.copy(base, sounds))
    monkeypatch.setattr(features_module, "extract_features", lambda model, clips, _:
                        hearings.append(clips) or {clip: {} for clip in clips})

    def load(**changes):
        options = train.Options(base=str(base), clips=2, test_clips=2,
                                feature_cache=str(sounds / "cache"), **changes)
        model = train.load_base(options.base, "lal", train.make_config(options), options.encoders)
        split, *_ = train.load_data(options, model.tokenizer)
        features_module.load_features(model, split, options)
        return len(hearings)

    worlds = [{}, {"seed": 1}, {"difficulty": 0}, {"connector": "lfst"}, {"encoders": "sslam,clap"},
              {"data": str(sounds / "q.json")}, {"data": str(sounds / "v.json")}]
    assert [load(**changes) for changes in worlds] == [1, 2, 3, 4, 5, 6, 7]
    # what they do not depend on
    assert [load(mode="pal", freeze="llm", lr=0.1, **changes) for changes in worlds] == [7] * 7
    write_wav(sounds / "a.wav", 1.0, 8000, 1, seed=9)
    assert load(data=str(sounds / "q.json")) == 8
    os.utime(base, (0, 0))  # as another file's would be
    assert load() == 9


# -------------------------------------------------------------------------- what cannot be trained

@pytest.fixture
def earlier(sounds):
    """What an earlier training left; after the test it must be there still, to the byte."""
    folder = sounds / "out" / "lal"
    folder.mkdir(parents=True)
    left = {folder / "model.pt": os.urandom(99), folder / "metrics.jsonl": b'{"step": 1}\n'}
    for path, data in left.items():
        path.write_bytes(data)
    yield
    assert {path: path.read_bytes() for path in folder.iterdir()} == left


@pytest.mark.parametrize("option", ["--data", "--val-data"])
@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_overwrites_nothing(name, option, refuses, sounds, earlier, base):
    text, words = BAD_LISTS[name]
    (sounds / "bad.json").write_text(text)
    other = ["--data", "q.json"] if option == "--val-data" else []
    lines = refuses(["bad.json", *words], train, "--base", base, option, "bad.json", *other)
    assert len(lines) == 1


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_a_bad_sound_in_a_list_overwrites_nothing(name, refuses, sounds, earlier, base):
    make, word = BAD_SOUNDS[name]
    make(sounds / "bad.wav")
    (sounds / "bad.json").write_text(json.dumps([item("a.wav"), item("bad.wav")]))
    refuses(["bad.wav"], train, "--base", base, "--data", "bad.json", "--device", "cpu")


def test_a_bad_base_is_one_line_and_overwrites_nothing(refuses, sounds, earlier, base, checkpoint):
    whole = base.read_bytes()
    (sounds / "cut.pt").write_bytes(whole[:len(whole) // 2])
    saved = torch.load(base, weights_only=True)
    saved["state"]["whisper"]["novel.weight"] = saved["state"]["whisper"].pop("conv1.weight")
    torch.save(saved, sounds / "older.pt")
    for path in ("cut.pt", "none.pt", ".", "q.json", "a.wav", checkpoint):
        assert len(refuses([str(path)], train, "--base", path)) == 1
    refuses(["older.pt", "novel.weight", "conv1.weight"], train, "--base", "older.pt")


@pytest.mark.parametrize("options, words", [
    ("--mode flits", ["--mode", "flits", "plits", "lal", "pal"]),
    ("--mod lal", ["--mod"]),
    ("--nonsense", ["--nonsense"]),
    ("--lal-layers 9", ["--lal-layers '9'", "0 to 1"]),
    ("--mode plits --config audio_rope=off", ["audio_rope", "plits"]),
    ("--config audio_rope=no", ["--config audio_rope=no", "audio_rope=off"]),
    ("--connector flst", ["--connector", "lfst"]),
    ("--freeze some", ["--freeze", "ffn"]),
    ("--config queries=0", ["--config queries=0", "from 1 to"]),
    ("--config queries=3,quarries=3", ["--config quarries=3", "queries="]),
    ("--config grid_steps", ["--config grid_steps", "number"]),
    ("--config queries=2.5", ["--config queries=2.5", "number"]),
    ("--config connector=mlp", ["--config connector=mlp"]),
    ("--encoders ears", ["--encoders ears", "whisper, sslam, clap"]),
    ("--difficulty 3", ["--difficulty 3", "0 to 2"]),
    ("--data=", ["--data is empty"]),
    ("--out=", ["--out is empty"]),
    ("--batch 0", ["--batch 0", "1 or more"]),
    ("--batch 1.5", ["--batch", "1.5"]),
    ("--steps1 -1", ["--steps1 -1", "0 or more"]),
    ("--clips 0", ["--clips 0"]),
    ("--test-clips 0", ["--test-clips 0"]),
    ("--seed -1", ["--seed -1"]),
    ("--lr nan", ["--lr nan"]),
    ("--lr -1", ["--lr -1"]),
    ("--device nonsense", ["--device nonsense"]),
    ("--val-data v.json", ["--val-data", "--data", "missing"]),
    ("--audio-root .", ["--audio-root", "--data", "missing"]),
    ("--data q.json --no-keep-features", ["--no-keep-features", "--val-data"]),
    ("--steps1 0 --steps2 0 --steps3 0", ["nothing to train"]),
    ("--out a.wav", ["a.wav", "exists"]),
    ("--out a.wav/x", ["a.wav", "irectory"]),
    ("--base b.pt", ["b.pt"])])
def test_bad_options_overwrite_nothing(options, words, refuses, sounds, earlier, base):
    brief = f"--base {base} --clips 2 --test-clips 2 --steps1 1 --steps2 1 --steps3 1"
    assert len(refuses(words, train, *brief.split(), *options.split())) == 1


def test_own_questions_without_tasks_of_a_stage_leave_it_out(run_train, refuses, sounds, base):
    (sounds / "plain.json").write_text(json.dumps([item()]))
    stdout, _, lines = run_train(data=("--data", "plain.json"))
    assert stdout.count("left out") == 2 and lines[-2]["step"] == 3
    refuses(["nothing to train"], train, "--base", base, "--data", "plain.json", "--steps3", 0)


def test_a_training_that_explodes_stops_before_it_saves(run_train, refuses, sounds, base,
                                                       monkeypatch):
    run_train()
    left, metrics = (Path("out/lal", name).read_bytes() for name in ("model.pt", "metrics.jsonl"))
    answer_loss = train.answer_loss
    monkeypatch.setattr(train, "answer_loss", lambda *a: answer_loss(*a) * float("inf"))
    refuses(["stage 1", "--lr"], train, "--base", base, "--data", "q.json", "--device", "cpu",
            "--steps1", 1, "--steps2", 0, "--steps3", 0)
    assert Path("out/lal/model.pt").read_bytes() == left
    assert Path("out/lal/metrics.old.jsonl").read_bytes() == metrics


# ------------------------------------------------------------------------------------ broken off

def test_a_save_that_is_broken_off_leaves_the_last_checkpoint(run_train, call, sounds, base,
                                                             monkeypatch):
    run_train()
    left = Path("out/lal/model.pt").read_bytes()

    def broken(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.os, "replace", broken)
    code, _, stderr = call(train, "--base", base, "--data", "q.json", "--steps1", 1, "--seed", 5,
                           "--device", "cpu")
    assert code == 130 and stderr.splitlines()[-1].startswith("stopped")
    assert Path("out/lal/model.pt").read_bytes() == left
    assert AudioLLM.load("out/lal/model.pt").mode == "lal"


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process alone")
def test_ctrl_c_leaves_the_last_checkpoint(sounds, base):
    command = [sys.executable, ROOT / "train.py", "--base", base, "--data", "q.json",
               "--val-data", "v.json", "--batch", "2", "--device", "cpu",
               "--steps1", "1", "--steps2", "1000000"]
    metrics = sounds / "out" / "lal" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=sounds, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 300
        while not (metrics.exists() and '"stage": "2"' in metrics.read_text()):
            if process.poll() is not None or time.time() > deadline:
                process.kill()
                pytest.fail(process.communicate()[1])
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("stopped") and "--resume goes on" in stderr
    saved = torch.load(sounds / "out" / "lal" / "model.pt", weights_only=True)
    assert saved["step"] == 1
    assert AudioLLM.load(sounds / "out" / "lal" / "model.pt").mode == "lal"
    assert json.loads(metrics.read_text().splitlines()[-1])["stage"] == "2"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    model = audio_llm("lal")
    model.save(tmp_path / "m.pt", step=1)
    whole = (tmp_path / "m.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, hard))  # as a full disk would
    try:
        with pytest.raises(OSError) as refusal:
            model.save(tmp_path / "m.pt", step=2)
        assert refusal.value.filename == str(tmp_path / "m.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "m.pt").read_bytes() == whole
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]  # and no half of one takes up room


def test_a_full_disk_is_told_of_with_the_path_of_the_metrics():
    class Full:
        name = "out/lal/metrics.jsonl"

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as refusal:
        train.log(Full(), step=1)
    assert refusal.value.filename == "out/lal/metrics.jsonl"


@pytest.fixture
def interrupt(run_train, call, base, monkeypatch):
    """interrupt(after, cause) is run_train(steps=ALL), broken off after so many steps, resumed."""
    def run(after, cause, *options):
        answer_loss, calls = train.answer_loss, []

        def broken(*args):
            calls.append(1)
            if len(calls) == after + 1 and cause == "killed":
                raise KeyboardInterrupt
            if len(calls) == after and cause == "signalled":
                signal.raise_signal(signal.SIGTERM)
            return answer_loss(*args)

        monkeypatch.setattr(train, "answer_loss", broken)
        code, _, stderr = call(train, "--base", base, "--device", "cpu", "--batch", 2, "--data",
                               "q.json", "--val-data", "v.json", *options,
                               *"--steps1 3 --steps2 3 --steps3 3 --save-every 2".split())
        assert code == 130 and "Traceback" not in stderr
        assert len(calls) == after + (cause == "killed")
        monkeypatch.setattr(train, "answer_loss", answer_loss)
        return run_train("--resume", *options, steps=ALL)[2]

    return run


UNBROKEN = {}  # options: the outcome of a training that was never broken off


def outcome(lines):
    """All that a training leaves behind, but for its speed."""
    for line in lines:
        line.pop("seconds_per_step", None), line.pop("options", None)
    return lines, torch.load("out/lal/model.pt", weights_only=True)["state"]


@pytest.mark.parametrize("after, cause, options", [
    (2, "killed", ""), (4, "killed", ""), (4, "signalled", ""), (9, "signalled", ""),
    (5, "killed", "--train-encoders --encoders clap"), (5, "signalled", "--no-keep-features")])
def test_a_training_broken_off_and_resumed_is_the_unbroken_one_to_the_bit(
        after, cause, options, interrupt, run_train, sounds):
    options = tuple(options.split())
    if options not in UNBROKEN:
        UNBROKEN[options] = outcome(run_train(*options, steps=ALL)[2])
    lines, state = UNBROKEN[options]
    again, resumed = outcome(interrupt(after, cause, *options))
    assert again == lines and the_same(state, resumed)
    assert not list(Path("out/lal").glob("step-*"))  # finished: nothing to resume


def test_the_first_signal_is_noted_and_the_second_one_acts():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as signals:
        assert not signals
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals == [signal.SIGTERM, signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    with catch_stop_signals():
        pass
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_stages_one_by_one_are_all_of_them_at_once(run_train, sounds):
    lines, state = outcome(run_train(steps=ALL)[2])
    parts = [run_train("--stage", stage, steps=ALL)[2] for stage in "123"][-1]
    parts, apart = outcome(parts)
    assert the_same(state, apart)
    assert [line for line in parts if "scores" not in line] == lines[:-1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder for what the training of `unfinished` leaves behind, which is the same each time."""
    return tmp_path_factory.mktemp("stopped") / "out"


@pytest.fixture
def unfinished(call, base, sounds, stopped, monkeypatch):
    """The options of a training that was asked to stop after four steps."""
    brief = ["--base", base, "--device", "cpu", "--data", "q.json", "--val-data", "v.json",
             "--batch", 2, *"--steps1 3 --steps2 300 --save-every 1".split()]
    if stopped.exists():
        shutil.copytree(stopped, "out")
        return brief
    answer_loss, calls = train.answer_loss, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return answer_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "answer_loss", broken)
        assert call(train, *brief)[0] == 130
    shutil.copytree("out", stopped)
    return brief


def test_what_cannot_be_gone_on_with_says_so_and_overwrites_nothing(unfinished, refuses, call):
    folder = Path("out/lal")
    left = {path: path.read_bytes() for path in folder.iterdir()}
    assert sorted(path.name for path in left) == [
        "metrics.jsonl", "model.pt", "stage1.pt", "step-00000003.pt", "step-00000004.pt"]
    newest = str(folder / "step-00000004.pt")
    refuses([newest, "--resume"], train, *unfinished)
    refuses([newest, "--lr", "0.5"], train, *unfinished, "--resume", "--lr", 0.5)
    refuses(["out/new", "--resume"], train, *unfinished, "--resume", "--out", "out/new")
    refuses([str(Path("out/new/stage1.pt")), "--stage 1"], train, *unfinished, "--stage", 2,
            "--out", "out/new")
    os.mkdir("out/pal")
    os.link("out/lal/stage1.pt", "out/pal/stage1.pt")
    refuses(["stage1.pt", "mode lal"], train, *unfinished, "--stage", 2, "--mode", "pal")
    Path("out/new/step-00000001.pt").write_bytes(left[Path(newest)][:-99])
    refuses(["step-00000001.pt"], train, *unfinished, "--resume", "--out", "out/new")
    assert {path: path.read_bytes() for path in folder.iterdir()} == left


def train_to_be_killed(folder, options):
    """What train.py does with these options, in a process that has imported all it needs."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv, sys.stdout, sys.stderr = ["train.py", *options], *[open(os.devnull, "w")] * 2
    command_line(train.Options, train.__doc__, train.main)


@pytest.mark.slow
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(),
                    reason="needs forkserver")
def test_killed_twenty_times_it_ends_with_the_very_losses(sounds, base):
    options = ["--base", str(base), "--data", "q.json", "--val-data", "v.json", "--batch", "2",
               "--device", "cpu", "--save-every", "1", *"--steps1 21 --steps2 21".split(),
               "--steps3", "100"]
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["test_train"])
    folder, rng, torn, exits = sounds / "out" / "lal", np.random.default_rng(0), 0, []

    def start(*more):
        resume = ["--resume"] if train.list_steps(folder) and not more else []
        process = fork.Process(target=train_to_be_killed,
                               args=(sounds, [*options, *resume, *more]))
        process.start()
        return process

    whole = start("--out", "whole")
    whole.join()
    for kill in range(20):
        process, before = start(), train.list_steps(folder)[-1:]
        while train.list_steps(folder)[-1:] == before and process.is_alive():
            time.sleep(0.001)  # let it save once, so that all twenty lives come to the end
        time.sleep(rng.uniform(0, 0.1))
        while kill % 2 and not list(folder.glob("*.tmp")) and process.is_alive():
            pass  # and of half of them wait for the next writing
        process.kill()
        process.join()
        exits.append(process.exitcode)
        torn += any(folder.glob("*.tmp"))
        newest = train.list_steps(folder)[-1]
        weights.load_checkpoint(newest, CHECKPOINT_FORMAT)
        assert newest > (before or [newest.parent])[0]
        for path in folder.glob("[!s]*.pt"):
            assert AudioLLM.load(path)
    assert exits == [-signal.SIGKILL] * 20 and torn >= 5
    last = start()
    last.join()
    assert whole.exitcode == last.exitcode == 0 and not list(folder.glob("*.tmp"))
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()][:-1]
             for path in (folder, sounds / "whole")]
    assert lines[0] == lines[1] and len(lines[0]) > 15
    assert the_same(*(torch.load(path / "model.pt", weights_only=True)["state"]
                      for path in (folder, sounds / "whole")))


# ------------------------------------------------------------------- in parts, and elsewhere

def close(lines, others, tolerance=1e-6):
    a, b = np.array(losses(lines)), np.array(losses(others))
    return a.shape == b.shape and np.allclose(a[:, :2], b[:, :2], rtol=0, atol=tolerance)


@pytest.mark.parametrize("data", ["own", "world"])
def test_a_batch_in_parts_is_the_batch_at_once(data, run_train, sounds, monkeypatch):
    in_float64(monkeypatch.setattr)
    options = () if data == "own" else ("--clips", 4, "--test-clips", 2)
    kind = {"data": ()} if data == "world" else {}
    whole = run_train(*options, "--batch", 5, steps=(0, 0, 11), **kind)[2]
    parts = run_train(*options, "--batch", 5, "--micro", 2, steps=(0, 0, 11), **kind)[2]
    assert len(losses(whole)) == 2 and close(whole, parts) and losses(whole) != losses(parts)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_parts_of_a_batch_are_all_of_it_and_its_answers_are_counted(workers):
    items = [{"clip": 0, "pairs": [(f"{i} ", "yes")] * (1 + i)} if i % 2 else
             {"clip": 0, "instruction": f"{i}", "output": "yes"} for i in range(6)]
    batches = [np.array([3, 0, 5, 1, 4]), np.array([2])]
    dataset = ItemDataset(train.Split({}, items, "", {0: {}}), audio_llm("lal"))
    options = train.Options(micro=2, workers=workers)
    loaded = list(load_batches(iter(batches), dataset, options))
    assert [{part.answers for part in parts} for parts in loaded] == [{4 + 1 + 6 + 2 + 1}, {1}]
    assert [[len(part.items) for part in parts] for parts in loaded] == [[2, 2, 1], [1]]
    add_token_ids(dataset.tokenizer, items)
    for batch, parts in zip(batches, loaded):
        assert [i["ids"] for part in parts for i in part.items] == [items[i]["ids"] for i in batch]


def test_processes_share_a_batch_and_each_has_parts_of_every_one():
    items = [{}] * 9
    batches = [np.array([4, 0, 8, 1, 3]), np.array([2])]
    shares = [list(microbatches(batches, items, 2, rank, 3)) for rank in range(3)]
    assert [[part.items for part in share] for share in shares] == [
        [[4, 0], [2]], [[8, 1], []], [[3], []]]
    for share in shares:
        assert [part.answers for part in share] == [5, 1] and all(part.last for part in share)
    parts = list(microbatches(batches, items, 2))
    assert [(part.items, part.last) for part in parts] == [
        ([4, 0], False), ([8, 1], False), ([3], True), ([2], True)]


def test_a_part_hears_each_of_its_clips_once_and_in_order(sounds):
    questions, model = QuestionList(sounds / "q.json"), audio_llm("lal")
    dataset = ItemDataset(train.Split({}, questions, ""), model)
    part, = microbatches([np.array([7, 1, 6, 0, 2])], questions, 9)
    hearings = []
    dataset.spectrograms = lambda clip: hearings.append(clip) or model.spectrograms(clip)
    loaded = dataset[part]
    assert [path.name for path in loaded.spectrograms] == ["c.wav", "a.wav"] and len(hearings) == 2
    spectrograms = model.spectrograms(lambda rate: load_audio(sounds / "a.wav", rate))
    for kind, (spectrogram, seconds) in spectrograms.items():
        mine, own_seconds = loaded.spectrograms[sounds / "a.wav"][kind]
        assert torch.equal(mine, spectrogram) and own_seconds == seconds


TWO = """import os, sys
sys.path[:0] = {path}
import float64, train
from lib.cli import command_line
float64.in_float64()
train.LOG_EVERY = 1
calls, answer_loss = [], train.answer_loss
train.answer_loss = lambda *a: calls.append(1) or answer_loss(*a)
command_line(train.Options, train.__doc__, train.main)
print(len(calls), file=open("calls" + os.environ["RANK"], "w"))
"""


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"


@pytest.fixture
def run_two(base, sounds):
    """run_two(options) trains in two processes: (stdout, stderr, lines of metrics.jsonl). They are
    started as torchrun does it, or by torchrun itself, which is a third one that imports torch."""
    if os.name == "nt":
        pytest.skip("torchrun needs libuv, which torch for Windows is built without")

    def run(*options, torchrun=False):
        (sounds / "two.py").write_text(TWO.format(path=[str(ROOT), str(ROOT / "tests")]))
        command = [sys.executable, *(TORCHRUN if torchrun else ()), "two.py", "--base", base,
                   *"--device cpu --data q.json --val-data v.json --batch 3 --micro 1".split(),
                   *"--steps1 1 --steps2 0 --steps3 11 --out two".split(), *options]
        with socket.create_server(("127.0.0.1", 0)) as server:
            _, port = server.getsockname()  # a free one
        shared = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(port)}
        environments = [{}] if torchrun else [shared | {"RANK": rank} for rank in "01"]
        processes = [subprocess.Popen(
            command, cwd=sounds, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
            for environment in environments]
        try:
            output = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        stdout, stderr = map("".join, zip(*output))
        assert not any(process.returncode for process in processes), stderr
        lines = (sounds / "two" / "metrics.jsonl").read_text().splitlines()
        return stdout, stderr, [json.loads(line) for line in lines]

    return run


def test_two_processes_are_one_with_twice_the_parts(run_train, run_two, sounds, monkeypatch):
    stdout, _, two = run_two()
    assert stdout.count("stage 3: trains") == 1  # the first speaks for both
    in_float64(monkeypatch.setattr)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    one = run_train("--batch", 3, "--micro", 1, steps=(1, 0, 11))[2]
    assert len(losses(one)) == 12 and close(one, two)
    # of the three parts of each of twelve steps one process has run two, the other one
    assert [int((sounds / f"calls{rank}").read_text()) for rank in (0, 1)] == [24, 12]
    assert {p.name for p in (sounds / "two").iterdir()} == {
        "metrics.jsonl", "model.pt", "stage1.pt", "stage3.pt"}


@pytest.mark.slow
def test_two_processes_tell_once_of_items_that_cannot_be_used(run_two, sounds):
    items = json.loads((sounds / "q.json").read_text())
    (sounds / "q.json").write_text(json.dumps([items[0], item("gone.wav"), *items[1:]]))
    _, stderr, _ = run_two("--skip-bad", torchrun=True)
    assert stderr.count("gone.wav") == 1 and stderr.count("items cannot be used") == 1


@pytest.mark.slow
def test_two_processes_tell_once_of_a_clip_that_cannot_be_read(run_train, run_two, unreadable,
                                                               monkeypatch):
    options = "--skip-bad", "--no-keep-features"
    (unreadable / "v.json").write_text(json.dumps([item("a.wav"), item("b.wav")]))
    _, stderr, two = run_two(*options, torchrun=True)
    assert stderr.count("bad.wav") == 1
    in_float64(monkeypatch.setattr)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    one = run_train(*options, "--batch", 3, "--micro", 1, steps=(1, 0, 11))[2]
    assert len(losses(one)) == 12 and close(one, two)


@pytest.mark.parametrize("data, workers", [("own", 0), ("own", 2), ("world", 0)])
def test_encoders_in_the_loop_give_what_kept_features_give(data, workers, run_train, sounds):
    world = {"data": ()} if data == "world" else {}
    options = WORLD if data == "world" else ()
    stored = run_train(*options, **world)[2]
    encoded = run_train(*options, "--workers", workers, "--no-keep-features", **world)[2]
    assert close(stored, encoded, 1e-5)


def test_for_mps_one_thread_hears(monkeypatch):
    """In more than one its command buffers come into each other's way."""
    model, threads = audio_llm("lal"), set()
    monkeypatch.setattr(AudioLLM, "device", torch.device("mps"))
    monkeypatch.setattr(features_module, "encode_clips", lambda model, clips, skip_bad: (
        threads.add(threading.get_ident()) or time.sleep(0.01) or dict.fromkeys(clips, {}), {}))
    features = features_module.extract_features(model, dict.fromkeys(range(99)))
    assert len(features) == 99 and len(threads) == 1


def test_clips_heard_side_by_side_are_each_heard_as_if_alone(base, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    model = train.load_base(base, "lal")
    clips, _ = load_world("train", 11, 0)
    features = features_module.extract_features(model, clips)
    assert list(features) == list(clips)
    for clip in (0, 3, 4, 10):
        alone, = model.features([clips[clip]])
        assert all(torch.allclose(features[clip][kind], alone[kind], atol=1e-5) for kind in alone)


def test_workers_change_nothing_and_a_bad_sound_in_one_is_one_line(run_train, sounds, refuses,
                                                                  base):
    plain, ahead = run_train()[2], run_train("--workers", 2)[2]
    assert losses(plain) == losses(ahead)
    BAD_SOUNDS["nan"][0](sounds / "c.wav")
    lines = refuses(["c.wav", "NaN"], train, "--base", base, "--data", "q.json", "--val-data",
                    "v.json", "--no-keep-features", "--workers", 1, "--out", "new")
    assert len([line for line in lines if "c.wav" in line]) == 1


def test_tasks_take_the_place_of_the_stages_own(run_train, sounds, recorded):
    run_train("--steps1", 6, "--tasks", "captioning,reasoning", "--stage", 1)
    assert len(recorded) == 6  # twice six questions, two a step
    assert Counter(sum((batch for _, batch, _ in recorded), [])) == {
        f"What is it, {task}?{name} {name}": 2
        for name in "abc" for task in ("captioning", "reasoning")}


def test_bfloat16_is_near_to_float32(run_train, sounds):
    plain, half = (losses(run_train("--precision", p)[2]) for p in ("float32", "bfloat16"))
    assert half != plain and np.allclose([x[1] for x in plain], [x[1] for x in half], rtol=0.05)


# ---------------------------------------------------------------------------------------- speed

@pytest.mark.slow
def test_a_step_of_lal_takes_half_the_time_of_one_of_plits_or_less(base):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    modes, best = ("plits", "lal"), {}
    clips, items = load_world("train", 32, 0)
    config = train.make_config(train.Options())
    models = {mode: train.load_base(base, mode, config) for mode in modes}
    features = models["lal"].features(clips.values())
    items = add_token_ids(models["lal"].tokenizer, items)
    by_clip = [[item for item in items if item["clip"] == clip] for clip in range(32)]
    rng = np.random.default_rng(0)
    # questions about 32 clips: none is heard for two
    batches = [[subset[rng.integers(len(subset))] for subset in by_clip] for _ in range(8)]
    optimizers = {}
    for mode, model in models.items():
        optimizers[mode] = train.make_optimizer(model, {"connectors": 1e-4, "llm": 1e-4})
    for batch in batches:
        for mode, model in models.items():
            began = time.perf_counter()
            loss = train.answer_loss(model, features, batch)
            optimizers[mode].zero_grad()
            loss.backward()
            optimizers[mode].step()
            best[mode] = min(best.get(mode, 9), time.perf_counter() - began)
    torch.set_num_threads(threads)
    print("best of 8, in seconds:", best)  # for the README: pytest -s shows it
    assert best["plits"] >= 2 * best["lal"], best


@pytest.mark.slow
def test_bookkeeping_takes_less_than_three_percent_of_a_step(run_train, monkeypatch):
    """That is all between one step of the optimiser and the next forward: data, logs, a save."""
    begun, ended, plain = [], [], train.compute_gradients
    monkeypatch.setattr(train, "compute_gradients",
                        lambda *a: begun.append(time.perf_counter()) or plain(*a))
    hook = register_optimizer_step_post_hook(lambda *_: ended.append(time.perf_counter()))
    run_train("--batch", 32, "--clips", 300, "--test-clips", 2, data=(), steps=(0, 0, 501))
    hook.remove()
    share = np.subtract(begun[1:], ended[:-1]).sum() / (ended[-1] - begun[0])
    print(f"{share:.2%} of {1000 * (ended[-1] - begun[0]) / len(begun):.0f} ms")  # pytest -s
    assert len(begun) == 501 and share < 0.03
