"""The listening world: clips can be made again, sounds told apart, and the answers are right."""
import collections
import functools
import re

import numpy as np
import pytest

import train

COUNTS = "zero one two three four five".split()
PLACES = "first second third fourth fifth".split()


@functools.cache
def scenes(split, count, seed=0, difficulty=1):
    return [train.scene(split, index, seed, difficulty) for index in range(count)]


@functools.cache
def asked(split, count=2500):
    """[(scene, question), ...] of the first `count` clips."""
    rng = np.random.default_rng(1)
    return [(s, q) for s in scenes(split, count) for q in train.questions(s, rng)]


def names_of(scene):
    return tuple(e.name for e in scene["events"])


def sequence(scene):
    """What must not be the same in training and test."""
    return tuple((e.name, e.notes) for e in scene["events"])


# ----------------------------------------------------------------------------- clips
@pytest.mark.parametrize("index", [0, 1, 2, 3, 10, 11])
def test_a_clip_is_a_function_of_seed_split_and_index(index):
    scene = train.scene("train", index, 3)
    wave = train.render(scene)
    assert scene == train.scene("train", index, 3)
    assert np.array_equal(wave, train.render(train.scene("train", index, 3)))
    for other in [("train", index, 4), ("val", index, 3), ("train", index + 2, 3)]:
        assert not np.array_equal(wave, train.render(train.scene(*other)))


@pytest.mark.parametrize("difficulty", [0, 1, 2])
def test_waves_are_well_formed(difficulty):
    for scene in scenes("train", 60, difficulty=difficulty):
        wave = train.render(scene)
        assert wave.shape == (64000,) and wave.dtype == np.float32
        assert np.isfinite(wave).all()
        quiet = scene["domain"] == "sound"  # the volume stays, or a lone sound would not be soft
        assert (0.01 if quiet else 0.2) < np.abs(wave).max() <= 1
        assert abs(wave.mean()) < 1e-4


@pytest.mark.parametrize("difficulty", [0, 1, 2])
def test_scenes_keep_their_promises(difficulty):
    level = train.DIFFICULTIES[difficulty]
    for index, scene in enumerate(scenes("train", 1000, difficulty=difficulty)):
        domain, events = train.DOMAINS[index % 3], scene["events"]
        assert scene["domain"] == domain and ("voice" in scene) == (domain == "speech")
        assert 0 <= events[0].start and max(e.end for e in events) <= train.SECONDS
        said = [e for e in events if e.name in train.SYLLABLES]
        if domain == "sound":
            assert level.sounds[0] <= len(events) <= level.sounds[1]
            assert all(e.name in train.KINDS and e.level for e in events)
        elif domain == "speech":
            assert level.syllables[0] <= len(said) <= level.syllables[1]
            assert [e.name for e in events if e not in said] in [[], *([k] for k in train.KINDS)]
            assert all(0.34 < e.end - e.start < 0.61 for e in said)
        else:
            assert 1 <= len(events) <= 2 and all(e.name in train.INSTRUMENTS for e in events)
            for e in events:
                assert set(e.notes) <= set(range(8)) and len(set(e.notes)) == len(e.notes)
                low, high = level.notes if e.beat else (3, 3)
                assert low <= len(e.notes) <= high
        for one, two in zip(events, events[1:]):
            assert one.start < two.start and one.end < two.end
            assert one.name != two.name or domain == "music"
            assert two.start - one.end > 0 or domain == "sound" and level.overlap
        for a, b, c in zip(events, events[1:], events[2:]):  # never three at once or in a chain
            assert a.end < c.start and (a.end < b.start or b.end < c.start)


def test_what_makes_clips_harder_is_more_of_everything():
    def measures(difficulty):
        made = scenes("train", 1500, difficulty=difficulty)
        pairs = [pair for s in made for pair in zip(s["events"], s["events"][1:])]
        return [np.mean([len(s["events"]) for s in made]), np.mean([s["noise"] for s in made]),
                np.mean([b.start < a.end for a, b in pairs])]

    easy, middle, hard = map(measures, range(3))
    assert all(a < b < c for a, b, c in zip(easy, middle, hard)), (easy, middle, hard)


def test_test_sequences_are_never_trained_on():
    seen = {}
    for split in train.SPLITS:
        seen[split] = {sequence(s) for s in scenes(split, 3000)
                       if len(s["events"]) > 1 or s["domain"] == "music"}
    assert not seen["test"] & (seen["train"] | seen["val"])
    # the share that is held out, over all pairs of kinds and all pairs of syllables
    for names in (train.KINDS, train.SYLLABLES):
        pairs = [train.held_out([a, b]) for a in names for b in names if a != b]
        assert 0.12 < np.mean(pairs) < 0.28
    # but every part of what is tested is trained
    for split in train.SPLITS:
        parts = {name for s in scenes(split, 3000) for name in names_of(s)}
        assert parts == {*train.KINDS, *train.SYLLABLES, *train.INSTRUMENTS}


# ----------------------------------------------------------------------------- sounds
def test_events_are_heard_where_they_are_said_to_be():
    for scene in scenes("train", 120):
        power = train.render(scene).astype(np.float64) ** 2
        outside = np.ones(len(power), bool)
        inside = []
        for e in scene["events"]:
            span = slice(int(e.start * train.RATE), int(e.end * train.RATE))
            outside[span] = False
            inside.append(10 * np.log10(power[span].mean()) - e.level)
        # the loudest background is 10 dB below the mean level, loud and soft are 3 dB from it
        margin = np.array(inside) - 10 * np.log10(power[outside].mean())
        assert margin.min() > 6, (scene, margin)
        assert abs(margin.mean() + scene["noise"]) < 8, (scene, margin)


def test_a_loud_sound_is_louder_than_a_soft_one():
    found, levels = [], {-train.LOUD: [], train.LOUD: []}
    for scene in scenes("train", 900)[::3]:
        wave = train.render(scene)
        events = [e for e in scene["events"] if all(
            e is o or e.end <= o.start or o.end <= e.start for o in scene["events"])]
        spans = [slice(int(e.start * train.RATE), int(e.end * train.RATE)) for e in events]
        power = [10 * np.log10((wave[span] ** 2).mean()) for span in spans]
        found += [(p - q) * (a.level - b.level) for (a, p), (b, q) in zip(
            zip(events, power), zip(events[1:], power[1:])) if a.level != b.level]
        for e, p in zip(events, power):
            levels[e.level].append(p)
    assert len(found) > 80 and min(found) > 0
    assert max(levels[-train.LOUD]) < min(levels[train.LOUD])  # of different clips, too


def test_a_melody_goes_where_it_is_said_to_go():
    """The strongest frequency of every note, or its octave, is that of its step."""
    ways = collections.Counter()
    for scene in scenes("train", 300)[2::3]:
        wave = train.render(scene)
        for e in scene["events"]:
            ways[e.way] += 1
            for i, note in enumerate(e.notes if e.beat else ()):
                start = e.start + i * e.beat
                piece = wave[int((start + 0.03) * train.RATE):int((start + 0.2) * train.RATE)]
                power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 15)) ** 2
                peak = power[400:].argmax() + 400  # above 200 Hz, where a loud noise may lie
                ratio = peak * train.RATE / (1 << 15) / train.SCALE[note]
                assert abs(ratio - round(ratio)) < 0.04 * ratio, (e, i, ratio)
    assert set(ways) == set(train.GROUPS[1]) and min(ways.values()) > 10


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
    return [(wave[int(e.start * rate):int(e.end * rate)], e.name) for e in scene["events"]]


def test_kinds_differ_in_their_spectra():
    examples = [example for scene in scenes("train", 540, difficulty=0)[::3]
                for example in cut(scene)]
    assert linear_accuracy(examples, 1) > 0.9


def test_instruments_differ_in_their_spectra():
    examples = [example for scene in scenes("train", 600, difficulty=0)[2::3]
                for example in cut(scene)]
    assert linear_accuracy(examples, 1) > 0.9


def test_syllables_and_voices_differ_in_their_spectra():
    spoken = [s for s in scenes("train", 600)[1::3] if {*names_of(s)} <= {*train.SYLLABLES}]
    pieces = [cut(scene) for scene in spoken]
    assert linear_accuracy([example for piece in pieces for example in piece], 3) > 0.96
    voices = [(piece[0][0], scene["voice"]) for piece, scene in zip(pieces, spoken)]
    assert linear_accuracy(voices, 1) > 0.8


def test_a_new_kind_of_sound_is_heard_and_asked_about(monkeypatch):
    monkeypatch.setitem(train.KINDS, "owl", lambda rng, t: train.tone(350 + 0 * t, 1, 0.2))
    made = [train.scene("train", index) for index in range(0, 600, 3)]
    owls = [scene for scene in made if names_of(scene) == ("owl",)]
    assert owls and np.isfinite(train.render(owls[0])).all()
    answers = {q["output"] for q in train.questions(owls[0], np.random.default_rng(0))}
    assert "an owl" in answers


# ----------------------------------------------------------------------------- questions
def an(noun):
    return ("an " if noun[0] in "ao" else "a ") + noun


def sentence(scene):
    """The caption, part by part."""
    parts = []
    for e in scene["events"]:
        if e.name in train.SYLLABLES and parts and parts[-1].startswith(an(scene["voice"])):
            parts[-1] += " " + e.name
        elif e.name in train.SYLLABLES:
            parts.append(f"{an(scene['voice'])} says {e.name}")
        elif e.notes:
            what = f"{COUNTS[len(e.notes)]} notes {way(e)}" if e.beat else "a chord"
            parts.append(f"{an(e.name)} plays {what}")
        else:
            parts.append(an(e.name))
    text = ", then ".join(parts) + "."
    return text[0].upper() + text[1:]


def way(e):
    top, low = e.notes.index(max(e.notes)), e.notes.index(min(e.notes))
    ends = (0, len(e.notes) - 1)
    if top in ends and low in ends:
        return "up" if top > low else "down"
    return "up and down" if low in ends else "down and up"


def right_answer(scene, instruction):
    """The answer, from the events alone: an ear that knows nothing of how questions are made."""
    text, events, domain = instruction.lower(), scene["events"], scene["domain"]
    words = re.findall("[a-z]+", text)
    pieces = {"sound": train.KINDS, "speech": train.SYLLABLES, "music": train.INSTRUMENTS}[domain]
    own = [e for e in events if e.name in pieces]  # those that the domain is about
    names = [e.name for e in own]
    call = (lambda n: n) if domain == "speech" else an
    about = [w for w in words if w in {*train.KINDS, *train.SYLLABLES, *train.INSTRUMENTS}]
    named = [e for w in about for e in events if e.name == w]

    if re.search("said (after|before|once|until)|words (follow|precede)", text):
        (other,) = named
        after = re.search("after|once|follow", text)
        return " ".join(e.name for e in own if (e.start > other.start) == bool(after))
    if "besides" in words or "with the speech" in text or "what else" in text:
        (other,) = [e for e in events if e.name not in pieces]
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
            return "the " + PLACES[e.notes.index(max(e.notes))]
        return way(e) if "notes" not in words else COUNTS[len(e.notes)]
    if "many times" in text or "often" in words:
        return COUNTS[names.count(about[0])]
    if about:
        return "yes" if about[0] in names else "no"
    if "melody" in words:
        assert own[0].beat != own[1].beat
        return "faster" if own[1].beat < own[0].beat else "slower"
    if "same" in words:
        return "same" if names[0] == names[1] else "different"
    for place, which in (("first", 0), ("last", -1), ("second", 1), ("two", 1)):
        if place in words:
            return call(names[which])
    if "many" in words or "count" in words:
        return COUNTS[len(names)]
    assert "what" in words
    if domain == "speech":
        names = [f"{scene['voice']} speaking"] + [e.name for e in events if e not in own]
    before = ", ".join(map(an, names[:-1]))
    return (before and before + " and ") + an(names[-1])


@pytest.mark.parametrize("split", train.SPLITS)
def test_every_answer_is_right(split):
    for scene, question in asked(split):
        expected = right_answer(scene, question["instruction"])
        assert question["output"] == expected, (scene, question)
        assert question["domain"] == scene["domain"]
        assert not re.search(r"\ban [^aeiou]|\ba [aeiou]", question["instruction"])


def test_every_question_that_can_be_asked_is_asked():
    # one sound: what, describe, present, count; two: first, last, after besides, and sometimes
    # louder and overlap; three: middle besides, order, and sometimes times
    bounds = {1: (4, 4), 2: (7, 9), 3: (9, 12)}
    rng = np.random.default_rng(2)
    for scene in scenes("train", 1000):
        names, made = names_of(scene), train.questions(scene, rng)
        tasks = {q["task"] for q in made}
        wanted = {"classification", "captioning", "reasoning"}
        assert tasks == wanted | ({"transcription"} if scene["domain"] == "speech" else set())
        if scene["domain"] == "sound" and len(set(names)) == len(names):
            low, high = bounds[len(names)]
            assert low <= len(made) <= high
    seen = {key for _, q in asked("train", 600) for key, text in train.PHRASINGS.items()
            for phrasing in text.split("|")
            if re.fullmatch(re.sub(r"\\{.*?\\}", ".+", re.escape(phrasing)), q["instruction"])}
    assert seen == set(train.PHRASINGS)


WHOLE = {"middle": "Which sound comes second?", "times": "How often do you hear {}?",
         "order": "Put {} in order.", "louder": "Which is louder, {}?",
         "overlap": "Do {} overlap?",
         "same": "Same instrument twice, or different?", "tempo": "How fast is the second melody?"}


def test_a_checklist_tells_the_truth():
    rng, seen, related = np.random.default_rng(3), collections.Counter(), set()
    for scene in scenes("train", 600):
        events = scene["events"]
        for asked, answer in train.checklist(scene, rng):
            words = asked.split()
            if words[0] == "after":
                names = names_of(scene)
                assert names[names.index(words[1]) + 1] == answer
                continue
            if words[0] in train.RELATIONS:  # a question's bare bones: what the question answers
                assert answer == right_answer(scene, WHOLE[words[0]].format(" ".join(words[1:])))
                related.add(words[0])
                continue
            found = [e for e in events if e.name in re.findall("[a-z]+", asked.lower())]
            trait = " ".join(words[1:]) if not asked.endswith("\n") else ""
            true = any(trait in ("", *train.traits(e)) for e in found)
            assert answer == ("yes" if true else "no"), (scene, asked)
            seen[bool(trait), answer] += 1
    assert min(seen.values()) > 0.35 * sum(seen.values()) / 2 / 2
    assert related == set(train.RELATIONS)


def test_a_checklist_of_a_scene_in_which_every_trait_is_true():
    scene = train.scene("train", 0) | {"domain": "sound", "events": [
        train.Event("drum", 0, 1, 4.5), train.Event("bell", 1, 2, 4.5),
        train.Event("drum", 2, 3, -4.5), train.Event("bell", 3, 4, -4.5)]}
    checks = train.checklist(scene, np.random.default_rng(0))
    assert len(checks) == 6 and not {" drum loud", " bell soft"} & {asked for asked, _ in checks}


def test_what_comes_after_is_not_asked_across_another_sound():
    rng, seen = np.random.default_rng(0), 0
    for scene in scenes("test", 900)[1::3]:
        names = names_of(scene)
        for q in train.questions(scene, rng):
            found = re.search(r"right after (\w+)\?|(\w+)\?$", q["instruction"])
            if re.search("right after|syllable follows|is next", q["instruction"]):
                x = found[1] or found[2]
                assert names[names.index(x) + 1] == q["output"], (names, q)
                seen += 1
    assert seen > 200


def test_notes_of_what_sounds_say_what_a_scene_says():
    times = np.arange(0, train.SECONDS, 0.04)
    melodies = overlaps = 0
    for scene in scenes("train", 300):
        events = scene["events"]
        for kind in train.LESSONS:
            rows, sizes = train.context(kind, scene, times)
            assert all(len(row) == len(sizes) for row in rows)
            assert (np.array(rows) < sizes).all() and np.min(rows) >= 0
            for t, row in zip(times, rows):
                sounding = [e for e in events if e.start <= t < e.end]
                if not sounding:
                    assert not any(row)
                    continue
                e = sounding[-1]
                i = events.index(e)
                earlier = [o for o in events[:i] if o.end <= t]
                near = [train.WORDS[kind].index(train.word(kind, scene, some))
                        for some in ([e], earlier[-1:], events[i + 1:])]
                assert row[:3] == near
                if kind == "whisper":
                    continue
                others = [o.name for o in sounding[:-1]]
                assert train.WORDS[kind][row[4]] == (others or ["."])[-1]
                overlaps += bool(others)
                if e.beat:
                    n = min(int((t - e.start) / e.beat), len(e.notes) - 1)
                    notes = [0, *(1 + note for note in e.notes), 0]
                    assert row[3] == n + 1 and row[-3:] == notes[n:n + 3]
                    melodies += 1
                elif scene["domain"] != "speech":
                    assert row[3] == i + 1 and row[-3:] == [0, 0, 0]
                told = [("", *group)[n] for group, n in zip(train.GROUPS, row[5:10])]
                assert told == train.traits(e)
    assert melodies > 1000 and overlaps > 50


def test_preparation_learns_from_clips_that_training_and_tests_never_use(monkeypatch):
    used = []

    def watched(split, index, *rest):
        used.append((split, index))
        return scene(split, index, *rest)

    def stop(texts, size):
        raise StopIteration

    scene = train.scene
    monkeypatch.setattr(train, "scene", watched)
    monkeypatch.setattr(train, "train_tokenizer", stop)
    o = train.Options(hear_clips=3)
    train.teach("sslam", 1, o)
    train.match(1, o)
    with pytest.raises(StopIteration):
        train.read_world(o)
    assert len(used) > 3000 and all(split == "train" and i >= train.APART for split, i in used)
    assert o.clips < train.APART


def test_guessing_does_not_pay():
    answers = collections.defaultdict(collections.Counter)
    said_yes = collections.defaultdict(list)
    for scene, question in asked("train", 6000):
        answers[question["domain"], question["task"]][question["output"]] += 1
        if question["output"] in ("yes", "no"):
            said_yes[question["domain"]].append(question["output"] == "yes")
    for key, counter in answers.items():
        assert max(counter.values()) / sum(counter.values()) < 0.3, key
    assert len(said_yes) == 3
    for key, yes in said_yes.items():
        assert 0.45 < np.mean(yes) < 0.55, (key, np.mean(yes))
    counts = collections.defaultdict(collections.Counter)
    for scene in scenes("train", 6000):  # what is asked for: how many sounds, syllables, notes
        said, events = scene["domain"] == "speech", scene["events"]
        if scene["domain"] == "music":
            counts["notes"].update(len(e.notes) for e in events if e.beat)
        else:
            counts[scene["domain"]][sum(e.name in train.SYLLABLES or not said
                                        for e in events)] += 1
    for counter in counts.values():
        assert max(counter.values()) / min(counter.values()) < 1.2, counter


def test_training_has_every_word_and_phrasing_of_the_test():
    names = "|".join([f'(?:the |an? )(?:{"|".join([*train.KINDS, *train.INSTRUMENTS])})',
                      *train.SYLLABLES])
    words, phrasings = {}, {}
    for split in ("train", "test"):
        lines = [(q["instruction"], q["output"]) for _, q in asked(split)]
        words[split] = {word for pair in lines for word in re.findall(r"\w+", " ".join(pair))}
        phrasings[split] = {re.sub(rf"\b(?:{names})\b", "X", text) for text, _ in lines}
    assert words["test"] == words["train"] and len(words["train"]) < 200
    assert phrasings["test"] == phrasings["train"]
