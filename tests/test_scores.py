"""Scores, held to those of the reference packages."""
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from lib.scores import (average_precision, bootstrap, cider_d, normalize_words, print_scores,
                        task_measures, weighted_mean, word_f1)

GOLDEN = Path(__file__).parent / "golden" / "scores.npz"


def test_captions_and_transcripts_are_scored_as_the_reference_packages_do():
    golden = np.load(GOLDEN)
    clips = json.loads(str(golden["clips"]))
    pairs = [(i, answer.split(), ref.split())
             for i, (answer, refs) in enumerate(clips) for ref in refs]
    index, answers, references = zip(*pairs)
    scores = dict(zip(index, cider_d(answers, references, index)))
    assert np.abs(np.array([scores[i] for i in range(len(clips))]) - golden["cider"]).max() < 1e-9
    items = [{"clip": i, "output": ref} for i, (_, refs) in enumerate(clips) for ref in refs]
    answers = [(answer, []) for answer, refs in clips for _ in refs]
    value, = task_measures("captioning", items, answers).values()
    assert abs(weighted_mean(*value) - golden["cider"].mean()) < 1e-9
    first = [{"clip": i, "output": refs[0]} for i, (_, refs) in enumerate(clips)]
    answers = [(answer, []) for answer, _ in clips]
    value, = task_measures("transcription", first, answers).values()
    assert abs(weighted_mean(*value) - golden["all_wer"]) < 1e-12
    for item, answer, want in zip(first, answers, golden["wer"]):
        value, = task_measures("transcription", [item], [answer]).values()
        assert abs(weighted_mean(*value) - want) < 1e-12


def test_words_are_lower_case_and_without_punctuation():
    assert normalize_words('"Don\'t!" - SAID a hi-hat...') == ["don't", "said", "a", "hi-hat"]


# Answers, references, and the word error rate that jiwer 4.0.0 gives on their words: Hindi, Tamil,
# Thai, Arabic with its vowels, Persian with a joiner, and Latin in the other normal form.
TRANSCRIPTS = [
    ("मारी नीम का", "मेरा नाम की", 1.0), ("मेरा नाम का है", "मेरा नाम की है।", 1 / 4),
    ("தமழ் மொழி", "தமிழ் மொழி", 1 / 2), ("ฉันชิบ แมว", "ฉันชอบ แมว", 1 / 2),
    ("كُتِبَ الوَلَدُ", "كَتَبَ الوَلَدُ؟", 1 / 2), ("می خواهم بروم", "می‌خواهم بروم", 1.0),
    ("cafe\u0301 creme", "Café, crème!", 1 / 2), ("我喜欢猫", "我喜欢狗", 1.0)]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("answer, reference, rate", TRANSCRIPTS)
def test_words_of_all_scripts_keep_their_marks(answer, reference, rate, form):
    item = {"clip": 0, "output": unicodedata.normalize(form, reference)}
    value, = task_measures("transcription", [item], [(answer, [])]).values()
    assert weighted_mean(*value) == rate
    assert (word_f1(answer, reference) == 1) == (rate == 0)
    value, = task_measures("transcription", [item], [(reference, [])]).values()
    assert weighted_mean(*value) == 0
    assert weighted_mean(*task_measures("x", [item | {"choices": []}], [(reference, [])])[
        "exact match"]) == 1
    try:
        import jiwer
    except ImportError:
        return
    assert jiwer.wer(*(" ".join(normalize_words(text)) for text in (reference, answer))) == rate


@pytest.mark.parametrize("text, others", [
    ("की", ["का", "की", "के"]), ("แม่", ["แม", "แม่"]), ("كَتَبَ", ["كُتِبَ", "كَتَبَ"]),
    ("C#", ["C", "C++", "C#"]), ("?!", ["...", "?!"]), ("cafe\u0301", ["cafe", "caf\u00e9"])])
def test_an_exact_answer_is_scored_as_no_other_choice(text, others):
    reference = unicodedata.normalize("NFC", text)
    item = {"clip": 0, "output": reference, "choices": others}
    scores = task_measures("reasoning", [item], [(text, [0.0] + [-1.0] * (len(others) - 1))])
    assert weighted_mean(*scores["choice by words"]) == 1
    assert weighted_mean(*scores["choice by likelihood"]) == (others[0] == reference)


def test_a_reference_of_punctuation_alone_gives_a_dash(capsys, recwarn):
    item = {"clip": 0, "output": "...", "choices": [], "domain": "d", "task": "transcription"}
    print_scores([item], {"model": [("a", [])], "silence": [("", [])]})
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["d", "transcription", "1", "word", "error", "rate", "-", "-"]
    print_scores([item, item | {"clip": 1, "output": "a b"}], {"model": [("", []), ("a", [])]})
    assert "0.500 [0.500, 0.500]" in capsys.readouterr().out
    print_scores([item | {"task": "captioning"}], {"model": [("a", [])]})
    assert "nan" not in capsys.readouterr().out and not list(recwarn)


def test_labels_count_alike_in_the_macro_average_however_rare():
    labels = ["a dog", "a cat"]
    items = [{"clip": i, "output": o, "choices": labels} for i, o in enumerate(
        ["a dog", "a dog", "a dog", "a cat"])]
    answers = [(text, [-1.0, -2.0]) for text in ("a dog", "big dog.", "a cat", "owl")]
    scores = {name: weighted_mean(*parts)
              for name, parts in task_measures("classification", items, answers).items()}
    assert scores == {"exact match": 1 / 4, "choice by words": 2 / 4, "choice by likelihood": 3 / 4,
                      "choice by words, macro": (2 / 3 + 0) / 2,
                      "choice by likelihood, macro": 1 / 2}
    # a question without choices does not count where there are some
    answers[3], items[3]["choices"] = ("owl", []), []
    measures = task_measures("reasoning", items, answers)
    assert weighted_mean(*measures["choice by words"]) == 2 / 3 and len(measures) == 3


@pytest.mark.parametrize("positive, scores, want", [  # by scikit-learn's average_precision_score
    ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.8333333333333333),
    ([1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0],  # many equal scores
     [0.75, 0.5, 0.25, 0, 0.75, 0.75, 0, 0, 0.5, 0.25, 1, 0.5], 0.41666666666666663)])
def test_average_precision_is_scikit_learns(positive, scores, want):
    assert average_precision(np.array(positive), np.array(scores)) == pytest.approx(want, abs=1e-12)


def test_tags_are_scored_by_the_mean_over_labels_of_their_likelihood(capsys):
    labels = ["bark", "rain", "siren", "wind"]
    items = [{"clip": i, "output": output, "choices": labels, "task": "tagging", "domain": "d"}
             for i, output in enumerate(["bark, rain", "rain", "siren"])]
    answers = [("", [-1.0, -9.0, -3.0, 0.0]), ("", [-2.0, -8.0, -2.0, 0.0]),
               ("", [-3.0, -7.0, -4.0, 0.0])]
    # bark comes first; rain second and third of three; siren third; wind is in no clip
    want = np.mean([1, (1 / 2 + 2 / 3) / 2, 1 / 3])
    measures = task_measures("tagging", items, answers)
    assert measures == {"mean average precision": pytest.approx(want)}
    print_scores(items, {"model": answers})
    assert capsys.readouterr().out.splitlines()[1].split()[-4:] == [
        "mean", "average", "precision", f"{want:.3f}"]


def test_the_interval_is_that_of_independent_clips_not_of_their_questions():
    right = np.random.default_rng(0).random(400) < 0.5
    ones, same = np.ones(1600), np.zeros(1600, int)
    mean, low, high = bootstrap(np.arange(400).repeat(4), right.repeat(4), ones, same)
    assert mean == right.mean() and low < mean < high
    assert abs((high - low) / (2 * 1.96 * (mean * (1 - mean) / 400) ** 0.5) - 1) < 0.1
