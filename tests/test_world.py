"""The listening world: clips can be made again, sounds told apart, and the answers are right."""
import functools
import itertools
import re
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from data import world
from data.world import (ATTRIBUTES, DIFFICULTY, DOMAINS, INSTRUMENTS, KINDS, PHRASINGS, RATE,
                        SPLITS, SYLLABLES, Event, attributes, checklist, held_out, questions,
                        render, scene)

COUNTS = "zero one two three four five".split()
ORDINALS = "first second third fourth fifth".split()


kept_scene = functools.cache(scene)


def scenes(split, count, seed=0, difficulty=1):
    return [kept_scene(split, index, seed, difficulty) for index in range(count)]


@functools.cache
def scene_questions(split, count=2500):
    """[(scene, question), ...] of the first `count` clips."""
    rng = np.random.default_rng(1)
    return [(s, q) for s in scenes(split, count) for q in questions(s, rng)]


def names_of(scene):
    return tuple(e.name for e in scene["events"])


def sequence(scene):
    """What must not be the same in training and test."""
    return tuple((e.name, e.notes) for e in scene["events"])


def span(e):
    """The samples of an event."""
    return slice(int(e.start * RATE), int(e.end * RATE))


# ----------------------------------------------------------------------------------------- clips

@pytest.mark.parametrize("index", [0, 1, 2, 3, 10, 11])
def test_a_clip_is_a_function_of_seed_split_and_index(index):
    first = scene("train", index, 3)
    wave = render(first)
    assert first == scene("train", index, 3)
    assert np.array_equal(wave, render(scene("train", index, 3)))
    for other in [("train", index, 4), ("val", index, 3), ("train", index + 2, 3)]:
        assert not np.array_equal(wave, render(scene(*other)))


def test_the_world_is_the_one_that_the_shipped_models_learnt_from():
    """Scenes, questions and checklists; not waves, whose last bits differ between machines."""
    rng, checksum = np.random.default_rng(0), 0
    for split, difficulty in itertools.product(SPLITS, (0, 1, 2)):
        for index in range(30):
            s = scene(split, index, 0, difficulty)
            times = [(e.start, e.end) for e in s["events"]]
            texts = [q["instruction"] + q["output"] for q in questions(s, rng)]
            content = times, world.caption(s), texts, checklist(s, rng)
            checksum = zlib.crc32(repr(content).encode(), checksum)
    assert checksum == 0xf54a5a67


@pytest.mark.parametrize("difficulty", [0, 1, 2])
def test_waves_are_well_formed(difficulty):
    for s in scenes("train", 60, difficulty=difficulty):
        wave = render(s)
        assert wave.shape == (64000,) and wave.dtype == np.float32
        assert np.isfinite(wave).all()
        quiet = s["domain"] == "sound"  # the volume stays, or a single sound would not be soft
        assert (0.01 if quiet else 0.2) < np.abs(wave).max() <= 1
        assert abs(wave.mean()) < 1e-4


@pytest.mark.parametrize("difficulty", [0, 1, 2])
def test_scenes_are_within_the_bounds_of_their_difficulty(difficulty):
    level = {name: values[difficulty] for name, values in DIFFICULTY.items()}
    for index, s in enumerate(scenes("train", 1000, difficulty=difficulty)):
        domain, events = DOMAINS[index % 3], s["events"]
        assert s["domain"] == domain and ("voice" in s) == (domain == "speech")
        assert 0 <= events[0].start and max(e.end for e in events) <= world.SECONDS
        said = [e for e in events if e.name in SYLLABLES]
        if domain == "sound":
            assert level["sounds"][0] <= len(events) <= level["sounds"][1]
            assert all(e.name in KINDS and e.level for e in events)
        elif domain == "speech":
            assert level["syllables"][0] <= len(said) <= level["syllables"][1]
            assert [e.name for e in events if e not in said] in [[], *([k] for k in KINDS)]
            assert all(0.34 < e.end - e.start < 0.61 for e in said)
        else:
            assert 1 <= len(events) <= 2 and all(e.name in INSTRUMENTS for e in events)
            for e in events:
                assert set(e.notes) <= set(range(8)) and len(set(e.notes)) == len(e.notes)
                low, high = level["notes"] if e.beat else (3, 3)
                assert low <= len(e.notes) <= high
        for one, two in zip(events, events[1:]):
            assert one.start < two.start and one.end < two.end
            assert one.name != two.name or domain == "music"
            assert two.start - one.end > 0 or domain == "sound" and level["overlap"]
        for a, b, c in zip(events, events[1:], events[2:]):  # never three at once or in a chain
            assert a.end < c.start and (a.end < b.start or b.end < c.start)


def test_harder_clips_have_more_of_everything():
    def means(difficulty):
        clips = scenes("train", 1500, difficulty=difficulty)
        pairs = [pair for s in clips for pair in zip(s["events"], s["events"][1:])]
        return [np.mean([len(s["events"]) for s in clips]),
                np.mean([s["noise_level"] for s in clips]),
                np.mean([b.start < a.end for a, b in pairs])]

    easy, middle, hard = map(means, range(3))
    assert all(a < b < c for a, b, c in zip(easy, middle, hard)), (easy, middle, hard)


def test_test_sequences_are_never_trained_on():
    sequences = {}
    for split in SPLITS:
        sequences[split] = {sequence(s) for s in scenes(split, 3000)
                            if len(s["events"]) > 1 or s["domain"] == "music"}
    assert not sequences["test"] & (sequences["train"] | sequences["val"])
    # the share that is held out, over all pairs of kinds and all pairs of syllables
    for names in (KINDS, SYLLABLES):
        pairs = [held_out([a, b]) for a in names for b in names if a != b]
        assert 0.12 < np.mean(pairs) < 0.28
    # but every part of what is tested is trained
    for split in SPLITS:
        parts = {name for s in scenes(split, 3000) for name in names_of(s)}
        assert parts == {*KINDS, *SYLLABLES, *INSTRUMENTS}


# ---------------------------------------------------------------------------------------- sounds

def test_events_are_heard_where_they_are_said_to_be():
    for s in scenes("train", 120):
        power = render(s).astype(np.float64) ** 2
        outside = np.ones(len(power), bool)
        inside = []
        for e in s["events"]:
            outside[span(e)] = False
            inside.append(10 * np.log10(power[span(e)].mean()) - e.level)
        # the loudest background is 10 dB below the mean level, loud and soft are 3 dB from it
        margin = np.array(inside) - 10 * np.log10(power[outside].mean())
        assert margin.min() > 6, (s, margin)
        assert abs(margin.mean() + s["noise_level"]) < 8, (s, margin)


def test_a_loud_sound_is_louder_than_a_soft_one():
    differences, powers = [], {-world.LOUD: [], world.LOUD: []}
    for s in scenes("train", 900)[::3]:
        wave = render(s)
        events = [e for e in s["events"] if all(
            e is o or e.end <= o.start or o.end <= e.start for o in s["events"])]
        power = [10 * np.log10((wave[span(e)] ** 2).mean()) for e in events]
        differences += [(p - q) * (a.level - b.level) for (a, p), (b, q) in zip(
            zip(events, power), zip(events[1:], power[1:])) if a.level != b.level]
        for e, p in zip(events, power):
            powers[e.level].append(p)
    assert len(differences) > 80 and min(differences) > 0
    assert max(powers[-world.LOUD]) < min(powers[world.LOUD])  # of different clips, too


def test_a_melody_goes_where_it_is_said_to_go():
    """The strongest frequency of every note, or its octave, is that of its step."""
    contours = Counter()
    for s in scenes("train", 300)[2::3]:
        wave = render(s)
        for e in s["events"]:
            contours[e.contour] += 1
            for i, note in enumerate(e.notes if e.beat else ()):
                start = e.start + i * e.beat
                piece = wave[int((start + 0.03) * RATE):int((start + 0.2) * RATE)]
                power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 15)) ** 2
                peak = power[400:].argmax() + 400  # above 200 Hz, where a loud noise may lie
                ratio = peak * RATE / (1 << 15) / world.SCALE[note]
                assert abs(ratio - round(ratio)) < 0.04 * ratio, (e, i, ratio)
    assert set(contours) == set(ATTRIBUTES["contour"]) and min(contours.values()) > 10


def spectrum(wave, parts):
    """Mean and spread over time of the log power in 30 bands or so, `parts` times per wave."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::128]
    power = np.abs(np.fft.rfft(frames * np.hanning(512))) ** 2
    edges = np.unique(np.geomspace(2, 257, 33).astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-4 * power.sum(1).mean())
    return np.concatenate([np.r_[b.mean(0), b.std(0)] for b in np.array_split(bands, parts)])


def linear_accuracy(examples, parts):
    """[(wave, label), ...]: a linear map is fitted to two thirds and tried on the others."""
    spectra = np.array([spectrum(wave, parts) for wave, _ in examples])
    spectra = np.c_[(spectra - spectra.mean(0)) / spectra.std(0), np.ones(len(spectra))]
    classes, labels = np.unique([label for _, label in examples], return_inverse=True)
    fit = np.arange(len(examples)) < len(examples) * 2 // 3
    # ridge regression onto one-hot labels
    x, y = spectra[fit], np.eye(len(classes))[labels[fit]]
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    return np.mean((spectra[~fit] @ weights).argmax(1) == labels[~fit])


def cut(scene):
    """The wave of each event of a scene, with its name."""
    wave = render(scene)
    return [(wave[span(e)], e.name) for e in scene["events"]]


def test_kinds_differ_in_their_spectra():
    examples = [example for s in scenes("train", 540, difficulty=0)[::3] for example in cut(s)]
    assert linear_accuracy(examples, 1) > 0.9


def test_instruments_differ_in_their_spectra():
    examples = [example for s in scenes("train", 600, difficulty=0)[2::3] for example in cut(s)]
    assert linear_accuracy(examples, 1) > 0.9


def test_syllables_and_voices_differ_in_their_spectra():
    spoken = [s for s in scenes("train", 600)[1::3] if {*names_of(s)} <= {*SYLLABLES}]
    pieces = [cut(s) for s in spoken]
    assert linear_accuracy([example for piece in pieces for example in piece], 3) > 0.96
    voices = [(piece[0][0], s["voice"]) for piece, s in zip(pieces, spoken)]
    assert linear_accuracy(voices, 1) > 0.8


def test_a_new_kind_of_sound_is_heard_and_asked_about(monkeypatch):
    monkeypatch.setitem(KINDS, "owl", lambda rng, t: world.tone(350 + 0 * t, 1, 0.2))
    clips = [scene("train", index) for index in range(0, 600, 3)]
    owls = [s for s in clips if names_of(s) == ("owl",)]
    assert owls and np.isfinite(render(owls[0])).all()
    answers = {q["output"] for q in questions(owls[0], np.random.default_rng(0))}
    assert "an owl" in answers


# ------------------------------------------------------------------------------------- questions

def an(noun):
    return ("an " if noun[0] in "ao" else "a ") + noun


def sentence(scene):
    """The caption, part by part."""
    parts = []
    for e in scene["events"]:
        if e.name in SYLLABLES and parts and parts[-1].startswith(an(scene["voice"])):
            parts[-1] += " " + e.name
        elif e.name in SYLLABLES:
            parts.append(f"{an(scene['voice'])} says {e.name}")
        elif e.notes:
            what = f"{COUNTS[len(e.notes)]} notes {contour(e)}" if e.beat else "a chord"
            parts.append(f"{an(e.name)} plays {what}")
        else:
            parts.append(an(e.name))
    text = ", then ".join(parts) + "."
    return text[0].upper() + text[1:]


def contour(e):
    top, low = e.notes.index(max(e.notes)), e.notes.index(min(e.notes))
    ends = (0, len(e.notes) - 1)
    if top in ends and low in ends:
        return "up" if top > low else "down"
    return "up and down" if low in ends else "down and up"


def right_answer(scene, instruction):
    """The answer, from the events alone: by a listener who does not know how questions are made."""
    text, events, domain = instruction.lower(), scene["events"], scene["domain"]
    words = re.findall("[a-z]+", text)
    parts = {"sound": KINDS, "speech": SYLLABLES, "music": INSTRUMENTS}[domain]
    own = [e for e in events if e.name in parts]  # those that the domain is about
    names = [e.name for e in own]
    call = (lambda n: n) if domain == "speech" else an
    about = [w for w in words if w in {*KINDS, *SYLLABLES, *INSTRUMENTS}]
    named = [e for w in about for e in events if e.name == w]

    if re.search("said (after|before|once|until)|words (follow|precede)", text):
        (other,) = named
        after = re.search("after|once|follow", text)
        return " ".join(e.name for e in own if (e.start > other.start) == bool(after))
    if "besides" in words or "with the speech" in text or "what else" in text:
        (other,) = [e for e in events if e.name not in parts]
        return an(other.name)
    if re.search("who|whose", text):
        return an(scene["voice"])
    if re.search("describe|caption|what happens", text):
        return sentence(scene)
    if re.search("what is said|transcribe|write down", text):
        return " ".join(names)
    if len(about) >= 2:
        if "louder" in words:
            return "the " + max(named, key=lambda e: e.level).name
        if re.search("overlap|together|same time", text):
            one, two = sorted(named, key=lambda e: e.start)
            return "yes" if two.start < one.end else "no"
        assert "order" in words and len(about) == len(named) == len(own)
        return ", ".join("the " + n for n in names)
    if re.search("after|which (sound|syllable) follows", text):
        assert names.count(about[0]) == 1 and about[0] != names[-1]
        return call(names[names.index(about[0]) + 1])
    if domain == "music" and about and not re.search("hear|contain|audio", text):
        (e,) = named
        if "chord" in words or "together" in words:
            return "no" if e.beat else "yes"
        assert e.beat
        if "top" in words or "highest" in words:
            return "the " + ORDINALS[e.notes.index(max(e.notes))]
        return contour(e) if "notes" not in words else COUNTS[len(e.notes)]
    if "many times" in text or "often" in words:
        return COUNTS[names.count(about[0])]
    if about:
        return "yes" if about[0] in names else "no"
    if "melody" in words:
        assert own[0].beat != own[1].beat
        return "faster" if own[1].beat < own[0].beat else "slower"
    if "same" in words:
        return "same" if names[0] == names[1] else "different"
    for word, index in (("first", 0), ("last", -1), ("second", 1), ("two", 1)):
        if word in words:
            return call(names[index])
    if "many" in words or "count" in words:
        return COUNTS[len(names)]
    assert "what" in words
    if domain == "speech":
        names = [f"{scene['voice']} speaking"] + [e.name for e in events if e not in own]
    before = ", ".join(map(an, names[:-1]))
    return (before and before + " and ") + an(names[-1])


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(split):
    for s, question in scene_questions(split):
        expected = right_answer(s, question["instruction"])
        assert question["output"] == expected, (s, question)
        assert question["domain"] == s["domain"]
        assert not re.search(r"\ban [^aeiou]|\ba [aeiou]", question["instruction"])


def test_every_question_that_can_be_asked_is_asked():
    # one sound: what, describe, present, count; two: first, last, after besides, and sometimes
    # louder and overlap; three: middle besides, order, and sometimes times
    bounds = {1: (4, 4), 2: (7, 9), 3: (9, 12)}
    rng = np.random.default_rng(2)
    for s in scenes("train", 1000):
        names, items = names_of(s), questions(s, rng)
        tasks = {q["task"] for q in items}
        expected = {"classification", "captioning", "reasoning"}
        assert tasks == expected | ({"transcription"} if s["domain"] == "speech" else set())
        if s["domain"] == "sound" and len(set(names)) == len(names):
            low, high = bounds[len(names)]
            assert low <= len(items) <= high
    used = {topic for _, q in scene_questions("train", 600) for topic, text in PHRASINGS.items()
            for phrasing in text.split("|")
            if re.fullmatch(re.sub(r"\\{.*?\\}", ".+", re.escape(phrasing)), q["instruction"])}
    assert used == set(PHRASINGS)


SENTENCES = {"middle": "Which sound comes second?", "times": "How often do you hear {}?",
             "order": "Put {} in order.", "louder": "Which is louder, {}?",
             "overlap": "Do {} overlap?", "same": "Same instrument twice, or different?",
             "tempo": "How fast is the second melody?"}


def test_a_checklist_tells_the_truth():
    rng, counts, relations = np.random.default_rng(3), Counter(), set()
    for s in scenes("train", 600):
        for prompt, answer in checklist(s, rng):
            first, *others = prompt.split()
            if first == "after":
                names = names_of(s)
                assert names[names.index(others[0]) + 1] == answer
                continue
            if first in world.RELATIONS:  # a question in few words: what the question answers
                assert answer == right_answer(s, SENTENCES[first].format(" ".join(others)))
                relations.add(first)
                continue
            named = [e for e in s["events"] if e.name in re.findall("[a-z]+", prompt.lower())]
            attribute = " ".join(others) if not prompt.endswith("\n") else ""
            true = any(attribute in ("", *attributes(e).values()) for e in named)
            assert answer == ("yes" if true else "no"), (s, prompt)
            counts[bool(attribute), answer] += 1
    assert min(counts.values()) > 0.35 * sum(counts.values()) / 2 / 2
    assert relations == set(world.RELATIONS)


def test_a_checklist_of_a_scene_in_which_every_attribute_is_true():
    s = scene("train", 0) | {"domain": "sound", "events": [
        Event("drum", 0, 1, 4.5), Event("bell", 1, 2, 4.5),
        Event("drum", 2, 3, -4.5), Event("bell", 3, 4, -4.5)]}
    checks = checklist(s, np.random.default_rng(0))
    assert len(checks) == 6 and not {" drum loud", " bell soft"} & {prompt for prompt, _ in checks}


def test_what_comes_after_is_not_asked_across_another_sound():
    rng, count = np.random.default_rng(0), 0
    for s in scenes("test", 900)[1::3]:
        names = names_of(s)
        for q in questions(s, rng):
            match = re.search(r"right after (\w+)\?|(\w+)\?$", q["instruction"])
            if re.search("right after|syllable follows|is next", q["instruction"]):
                x = match[1] or match[2]
                assert names[names.index(x) + 1] == q["output"], (names, q)
                count += 1
    assert count > 200


def test_guessing_does_not_pay():
    answers = defaultdict(Counter)
    said_yes = defaultdict(list)
    for s, question in scene_questions("train", 6000):
        answers[question["domain"], question["task"]][question["output"]] += 1
        if question["output"] in ("yes", "no"):
            said_yes[question["domain"]].append(question["output"] == "yes")
    for key, counter in answers.items():
        assert max(counter.values()) / sum(counter.values()) < 0.3, key
    assert len(said_yes) == 3
    for key, yes in said_yes.items():
        assert 0.45 < np.mean(yes) < 0.55, (key, np.mean(yes))
    counts = defaultdict(Counter)
    for s in scenes("train", 6000):  # what is asked for: how many sounds, syllables, notes
        if s["domain"] == "music":
            counts["notes"].update(len(e.notes) for e in s["events"] if e.beat)
        else:
            counts[s["domain"]][sum(e.name in SYLLABLES or s["domain"] == "sound"
                                    for e in s["events"])] += 1
    for counter in counts.values():
        assert max(counter.values()) / min(counter.values()) < 1.2, counter


def test_training_has_every_word_and_phrasing_of_the_test():
    names = "|".join([f'(?:the |an? )(?:{"|".join([*KINDS, *INSTRUMENTS])})', *SYLLABLES])
    words, phrasings = {}, {}
    for split in ("train", "test"):
        lines = [(q["instruction"], q["output"]) for _, q in scene_questions(split)]
        words[split] = {word for pair in lines for word in re.findall(r"\w+", " ".join(pair))}
        phrasings[split] = {re.sub(rf"\b(?:{names})\b", "X", text) for text, _ in lines}
    assert words["test"] == words["train"] and len(words["train"]) < 200
    assert phrasings["test"] == phrasings["train"]
