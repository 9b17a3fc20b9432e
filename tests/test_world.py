"""The listening world: clips can be made again, sounds told apart, and the answers are right."""
import collections
import functools
import re

import numpy as np
import pytest

import train

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@functools.cache
def scenes(split, count, seed=0):
    return [train.scene(split, index, seed) for index in range(count)]


@functools.cache
def asked(split, count=2500):
    """[(scene, question), ...] of the first `count` clips."""
    rng = np.random.default_rng(1)
    return [(s, q) for s in scenes(split, count) for q in train.questions(s, rng)]


def names_of(scene):
    return tuple(name for name, _, _ in scene["events"])


# ----------------------------------------------------------------------------- clips
@pytest.mark.parametrize("index", [0, 1, 2, 3, 10, 11])
def test_a_clip_is_a_function_of_seed_split_and_index(index):
    scene = train.scene("train", index, 3)
    wave = train.render(scene)
    assert scene == train.scene("train", index, 3)
    assert np.array_equal(wave, train.render(train.scene("train", index, 3)))
    for other in [("train", index, 4), ("val", index, 3), ("train", index + 2, 3)]:
        assert not np.array_equal(wave, train.render(train.scene(*other)))


def test_waves_are_well_formed():
    for scene in scenes("train", 60):
        wave = train.render(scene)
        assert wave.shape == (64000,) and wave.dtype == np.float32
        assert np.isfinite(wave).all()
        assert 0.2 < np.abs(wave).max() <= 1
        assert abs(wave.mean()) < 1e-4


def test_scenes_keep_their_promises():
    for index, scene in enumerate(scenes("train", 1000)):
        speech = index % 2 == 1
        events = scene["events"]
        assert scene["domain"] == ("speech" if speech else "sound")
        assert (2 <= len(events) <= 5) if speech else (1 <= len(events) <= 3)
        assert 0 <= events[0][1] and events[-1][2] <= train.SECONDS
        assert ("voice" in scene) == speech
        for name, start, end in events:
            assert name in (train.SYLLABLES if speech else train.KINDS)
            assert (0.34 if speech else 0.345) < end - start < (0.61 if speech else 1.105)
        for (one, _, end), (two, start, _) in zip(events, events[1:]):
            assert one != two
            assert start - end > (0.0 if speech else 0.148)


def test_test_sequences_are_never_trained_on():
    seen = {}
    for split in train.SPLITS:
        seen[split] = {names_of(s) for s in scenes(split, 2500) if len(s["events"]) > 1}
    assert not seen["test"] & (seen["train"] | seen["val"])
    # the share that is held out, over all pairs of kinds and all pairs of syllables
    for names in (train.KINDS, train.SYLLABLES):
        pairs = [train.held_out([a, b]) for a in names for b in names if a != b]
        assert 0.12 < np.mean(pairs) < 0.28
    # but every part of what is tested is trained
    for split in train.SPLITS:
        parts = {name for names in seen[split] for name in names}
        assert parts == {*train.KINDS, *train.SYLLABLES}


# ----------------------------------------------------------------------------- sounds
def test_events_are_heard_where_they_are_said_to_be():
    for scene in scenes("train", 80):
        power = train.render(scene).astype(np.float64) ** 2
        outside = np.ones(len(power), bool)
        inside = []
        for _, start, end in scene["events"]:
            span = slice(int(start * train.RATE), int(end * train.RATE))
            outside[span] = False
            inside.append(power[span].mean())
        # the loudest background is 8 dB below the events, and events differ by up to 4 dB
        margin = 10 * np.log10(np.array(inside) / power[outside].mean())
        assert margin.min() > 4, (scene, margin)
        assert abs(margin.mean() + scene["noise"]) < 8, (scene, margin)


def test_loud_noise_is_louder_than_faint_noise():
    levels = np.array([scene["noise"] for scene in scenes("train", 2000)])
    loud = levels > train.LOUD_NOISE
    assert 0.45 < loud.mean() < 0.55
    assert levels[loud].min() - levels[~loud].max() > 8


def spectrum(wave, parts):
    """Mean and spread over time of the log power in 30 bands or so, `parts` times per wave."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::128]
    power = np.abs(np.fft.rfft(frames * np.hanning(512))) ** 2
    edges = np.unique(np.geomspace(2, 257, 33).astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-4 * power.sum(1).mean())
    return np.concatenate([np.r_[b.mean(0), b.std(0)] for b in np.array_split(bands, parts)])


def linear_accuracy(examples, parts):
    """[(wave, label), ...]: a linear map is fitted to two thirds and tried on the others."""
    features = np.array([spectrum(wave, parts) for wave, _ in examples])
    features = np.c_[(features - features.mean(0)) / features.std(0), np.ones(len(features))]
    classes, labels = np.unique([label for _, label in examples], return_inverse=True)
    fit = np.arange(len(examples)) < len(examples) * 2 // 3
    # ridge regression onto one-hot labels
    x, y = features[fit], np.eye(len(classes))[labels[fit]]
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    return np.mean((features[~fit] @ weights).argmax(1) == labels[~fit])


def cut(scene):
    """Each event of a scene with its name."""
    wave, rate = train.render(scene), train.RATE
    return [(wave[int(a * rate):int(b * rate)], name) for name, a, b in scene["events"]]


def test_kinds_differ_in_their_spectra():
    examples = [example for scene in scenes("train", 360)[::2] for example in cut(scene)]
    assert linear_accuracy(examples, 1) > 0.93


def test_syllables_and_voices_differ_in_their_spectra():
    spoken = scenes("train", 240)[1::2]
    pieces = [cut(scene) for scene in spoken]
    assert linear_accuracy([example for piece in pieces for example in piece], 3) > 0.96
    voices = [(piece[0][0], scene["voice"]) for piece, scene in zip(pieces, spoken)]
    assert linear_accuracy(voices, 1) > 0.8


def test_a_new_kind_of_sound_is_heard_and_asked_about(monkeypatch):
    monkeypatch.setitem(train.KINDS, "owl", lambda rng, t: train.tone(350 + 0 * t, 1, 0.2))
    made = [train.scene("train", index) for index in range(0, 400, 2)]
    owls = [scene for scene in made if names_of(scene) == ("owl",)]
    assert owls and np.isfinite(train.render(owls[0])).all()
    answers = {q["output"] for q in train.questions(owls[0], np.random.default_rng(0))}
    assert "an owl" in answers


# ----------------------------------------------------------------------------- questions
def right_answer(scene, instruction):
    """The answer, from the events alone: an ear that knows nothing of how questions are made."""
    names = [name for name, _, _ in scene["events"]]
    speech = scene["domain"] == "speech"
    a = (lambda n: n) if speech else (lambda n: ("an " if n == "alarm" else "a ") + n)
    words = re.findall("[a-z]+", instruction.lower())
    known = [w for w in words if w in train.SYLLABLES + list(train.KINDS)]
    assert all(speech == (w in train.SYLLABLES) for w in known)
    if known:
        if {"after", "follows"} & set(words):
            assert names.count(known[0]) == 1 and known[0] != names[-1]
            return a(names[names.index(known[0]) + 1])
        return "yes" if known[0] in names else "no"
    if "first" in words or "last" in words:
        return a(names[0] if "first" in words else names[-1])
    if "many" in words or "count" in words:
        return {n: word for word, n in COUNTS.items()}[len(names)]
    if "who" in words or "whose" in words:
        return "a " + scene["voice"]
    if {"describe", "caption", "happens"} & set(words):
        if speech:
            return f"A {scene['voice']} says {' '.join(names)}."
        text = ", then ".join(a(n) for n in names)
        return text[0].upper() + text[1:] + "."
    if {"said", "transcribe"} & set(words):
        return " ".join(names)
    assert "what" in words
    if speech:
        return f"a {scene['voice']} speaking"
    before = ", ".join(map(a, names[:-1]))
    return (before and before + " and ") + a(names[-1])


@pytest.mark.parametrize("split", train.SPLITS)
def test_every_answer_is_right(split):
    for scene, question in asked(split):
        expected = right_answer(scene, question["instruction"])
        assert question["output"] == expected, (scene, question)
        assert question["domain"] == scene["domain"]
        assert not re.search(r"\ban [^aeiou]|\ba [aeiou]", question["instruction"])


def test_every_question_that_can_be_asked_is_asked():
    # two sounds: what, describe, count, present, first, last, after
    by_length = {1: 4, 2: 7, 3: 7}
    rng = np.random.default_rng(2)
    for scene in scenes("train", 1000):
        names, made = names_of(scene), train.questions(scene, rng)
        tasks = {q["task"] for q in made}
        if scene["domain"] == "speech":
            assert tasks == {"classification", "captioning", "reasoning", "transcription"}
        else:
            assert tasks == {"classification", "captioning", "reasoning"}
            if len(set(names)) == len(names):
                assert len(made) == by_length[len(names)]


def test_guessing_does_not_pay():
    answers = collections.defaultdict(collections.Counter)
    said_yes = collections.defaultdict(list)
    for scene, question in asked("train", 6000):
        answers[question["domain"], question["task"]][question["output"]] += 1
        if question["output"] in ("yes", "no"):
            said_yes[question["domain"]].append(question["output"] == "yes")
    for key, counter in answers.items():
        assert max(counter.values()) / sum(counter.values()) < 0.45, key
    assert len(said_yes) == 2
    for key, yes in said_yes.items():
        assert 0.47 < np.mean(yes) < 0.53, key
    counts = collections.defaultdict(collections.Counter)
    for scene in scenes("train", 6000):
        counts[scene["domain"]][len(scene["events"])] += 1
    for counter in counts.values():
        assert max(counter.values()) / min(counter.values()) < 1.15, counter


def test_training_has_every_word_and_phrasing_of_the_test():
    names = "|".join([f'(?:the |an? )(?:{"|".join(train.KINDS)})', *train.SYLLABLES])
    words, phrasings = {}, {}
    for split in ("train", "test"):
        lines = [(q["instruction"], q["output"]) for _, q in asked(split)]
        words[split] = {word for pair in lines for word in re.findall(r"\w+", " ".join(pair))}
        phrasings[split] = {re.sub(rf"\b(?:{names})\b", "X", text) for text, _ in lines}
    assert words["test"] == words["train"] and len(words["train"]) < 150
    assert phrasings["test"] == phrasings["train"]
