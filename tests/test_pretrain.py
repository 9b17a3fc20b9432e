"""Pretraining: what is learnt from, what a killed process leaves, and what base.pt is read as."""
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_world import scenes

from data import pretrain, world
from data.pretrain import (ENCODER_DOMAINS, TARGET_WORDS, frame_targets, load_base, parse_encoders,
                           token_times)
from integrate import IntegrationConfig
from model import pad_batch

ROOT = Path(__file__).parents[1]
TIMES = np.arange(0, world.SECONDS, 0.04)


def test_a_base_of_absurd_sizes_takes_no_memory(base, tmp_path):
    saved = torch.load(base, weights_only=True)
    absurd = {"num_hidden_layers": 10 ** 7, "hidden_size": 10 ** 6, "vocab_size": 10 ** 9}
    for name, size in absurd.items():
        torch.save(saved | {"llm_config": saved["llm_config"] | {name: size}}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="x.pt.*(far more|, not )"):
            load_base(tmp_path / "x.pt", "lal")


# --------------------------------------------------------------------------- what is learnt from

def check_word_targets(kind, scene, t, target):
    """The words of a frame in which something sounds; returns what sounds, the latest first."""
    events = scene["events"]
    sounding = [e for e in reversed(events) if e.start <= t < e.end]
    i = events.index(sounding[0])
    earlier = [o for o in events[:i] if o.end <= t]
    for column, neighbours in (("word", sounding), ("previous word", earlier[-1:]),
                               ("next word", events[i + 1:])):
        word = pretrain.target_word(kind, scene, neighbours[:1])
        assert TARGET_WORDS[kind][target[column]] == word, (column, scene, t)
    return sounding


def check_attribute_targets(scene, t, target, sounding):
    """What SSLAM's targets tell of a sound beside its words."""
    e, *others = sounding
    assert TARGET_WORDS["sslam"][target["second word"]] == [*(o.name for o in others), "."][0]
    n, steps = 0, [0, 0, 0]
    if e.beat:
        n = min(int((t - e.start) / e.beat), len(e.notes) - 1)
        steps = [0, *(1 + note for note in e.notes), 0][n:n + 3]
    if scene["domain"] != "speech":
        assert target["number"] == 1 + (n if e.beat else scene["events"].index(e))
    assert [target[column] for column in ("previous step", "step", "next step")] == steps
    words = {name: ("", *values)[target[name]] for name, values in world.ATTRIBUTES.items()}
    assert words == world.attributes(e)


@pytest.mark.parametrize("kind", ENCODER_DOMAINS)
def test_frame_targets_tell_of_what_sounds_what_the_scene_says(kind):
    columns = pretrain.target_columns(kind)
    melodies = overlaps = 0
    for scene in scenes("train", 300):
        rows = frame_targets(kind, scene, TIMES)
        assert all(len(row) == len(columns) for row in rows)
        assert (np.array(rows) < list(columns.values())).all() and np.min(rows) >= 0
        for t, row in zip(TIMES, rows):
            if not any(e.start <= t < e.end for e in scene["events"]):
                assert not any(row)
                continue
            target = dict(zip(columns, row))
            sounding = check_word_targets(kind, scene, t, target)
            if kind == "sslam":
                check_attribute_targets(scene, t, target, sounding)
                melodies += bool(sounding[0].beat)
                overlaps += len(sounding) > 1
    assert kind == "whisper" or melodies > 1000 and overlaps > 50


def test_pretraining_learns_from_clips_that_training_and_tests_never_use(monkeypatch):
    import train
    used = []

    def record(split, index, *options):
        used.append((split, index))
        return world.scene(split, index, *options)

    def stop(texts, size):
        raise StopIteration

    monkeypatch.setattr(pretrain, "scene", record)
    monkeypatch.setattr(pretrain, "train_tokenizer", stop)
    o = pretrain.Options(encoder_clips=3)
    pretrain.pretrain_encoder("sslam", 1, o)
    pretrain.pretrain_clap(1, o)
    with pytest.raises(StopIteration):
        pretrain.pretrain_llm(o)
    first = pretrain.PRETRAIN_INDEX_OFFSET
    assert len(used) > 3000 and all(split == "train" and i >= first for split, i in used)
    assert train.Options().clips < first


@pytest.mark.parametrize("kind, times, bands", [("whisper", 50, 1), ("sslam", 25, 2),
                                                ("clap", 16, 2)])
def test_the_llm_reads_where_it_will_hear(kind, times, bands, base):
    model = load_base(base, "lal", IntegrationConfig(connector="mlp"))
    features, = model.features([lambda rate: torch.zeros(int(rate * world.SECONDS))])
    middles = (np.arange(times) + 0.5) * world.SECONDS / times
    assert np.allclose(token_times(model.encoders[kind]), middles.repeat(bands))
    assert len(features[kind]) == times * bands


def test_rows_are_padded_with_zeros_at_their_ends():
    padded, _ = pad_batch([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])])
    assert padded.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]


# --------------------------------------------------------------------------- a process that dies

class DeadlyOptions(pretrain.Options):
    """Options that end a process that unpickles them, as the kernel would if memory ran out.

    A patch of this process would not reach workers that are spawned, only those that are forked.
    """

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.parametrize("method", [
    pytest.param(method, marks=() if method == multiprocessing.get_start_method() else
                 pytest.mark.slow) for method in multiprocessing.get_all_start_methods()])
def test_a_pretraining_whose_process_is_killed_says_so_and_base_stays(method, refuses):
    Path("base.pt").write_text("precious")
    program = SimpleNamespace(__name__="data.pretrain", __doc__=pretrain.__doc__,
                              Options=DeadlyOptions, main=pretrain.main)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        refuses(["killed", "--encoder-clips"], program, "--base", "base.pt", "--llm-steps", 1,
                "--encoder-clips", 1, "--encoder-steps", 1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert Path("base.pt").read_text() == "precious"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("options, words", [
    ("--encoder-clips 0", ["--encoder-clips 0", "1 or more"]),
    ("--base=", ["--base is empty"]),
    ("--llm-steps -1", ["--llm-steps -1"]),
    ("--prepare", ["--prepare"])])
def test_bad_options_are_one_line(options, words, refuses):
    assert len(refuses(words, pretrain, *options.split())) == 1


# ----------------------------------------------------------------------------- what base.pt holds

def test_the_base_that_comes_with_the_code_loads_and_hears():
    model = load_base(ROOT / "assets" / "base.pt", "pal")
    clip = world.load_world("test", 1, 0)[0][0]
    features, = model.features([clip])
    assert all(tokens.isfinite().all() and tokens.std() > 0 for tokens in features.values())
    assert isinstance(model.ask(model.hear([features]), ["What do you hear?"])[0], str)


def test_encoders_are_named_alone_or_with_a_path():
    assert parse_encoders("all") == {"whisper": None, "sslam": None, "clap": None}
    assert parse_encoders("clap,whisper") == {"clap": None, "whisper": None}
    assert parse_encoders("whisper=tiny.en.pt,sslam=a=b.pt,clap") == {
        "whisper": "tiny.en.pt", "sslam": "a=b.pt", "clap": None}
    assert parse_encoders("all", ["whisper"]) == {"whisper": None}
    for wrong in ("ears", "whisper,ears", "ears=ears.pt", "whisper=", "whisper,", "", "all,clap"):
        with pytest.raises(ValueError, match="--encoders .*whisper, sslam, clap"):
            parse_encoders(wrong)
    with pytest.raises(ValueError, match="'clap' is not one of whisper,"):
        parse_encoders("clap", ["whisper"])  # a kind of which base.pt has no miniature


def test_miniatures_and_public_checkpoints_can_be_joined(base, tmp_path):
    torch.save(torch.load(base, weights_only=True)["state"]["whisper"], tmp_path / "w.pt")
    model = load_base(base, "lal", encoders=f"whisper={tmp_path / 'w.pt'},clap")
    assert list(model.encoders) == ["whisper", "clap"]
    whisper, clap = model.encoders.values()
    assert whisper.checkpoint_path == str(tmp_path / "w.pt") and clap.checkpoint_path is None


def test_a_base_of_another_version_is_one_line(base, tmp_path):
    saved = torch.load(base, weights_only=True)
    saved["state"]["whisper"]["novel.weight"] = saved["state"]["whisper"].pop("conv1.weight")
    torch.save(saved, tmp_path / "older.pt")
    with pytest.raises(ValueError, match="older.pt: no base of this version.*data.pretrain"):
        load_base(tmp_path / "older.pt", "pal")
