"""How good answers are: exact match, choices, word error rate, CIDEr-D, with their intervals, and
mean average precision.

    python -c "from lib.scores import *; print(edit_distance('a b'.split(), 'a c'.split()))"

CIDEr-D and word error rate equal those of pycocoevalcap and jiwer on the same words, average
precision equals scikit-learn's.
"""
import math
import re
import statistics
from collections import Counter
from unicodedata import category, normalize

import numpy as np

MARK = "\uffff"  # stands for marks in WORD: no character of a text
WORD = re.compile(rf"\w[\w{MARK}]*(?:['’-]\w[\w{MARK}]*)*")


def normalize_words(text):
    """Lower-cased words, in NFC, without punctuation. What belongs to a word stays: an apostrophe
    or a hyphen inside it, marks (accents, vowels of Hindi, Thai, Arabic), joiners (U+200C, D)."""
    text = normalize("NFC", text.lower())
    is_mark = [category(c) in ("Mn", "Mc") or c in "\u200c\u200d" for c in text]
    marked = "".join(MARK if mark else c for mark, c in zip(is_mark, text))
    return [text[slice(*word.span())] for word in WORD.finditer(marked)]


def word_f1(a, b):
    """F1 of the words of two texts, as SQuAD has it (Rajpurkar et al. 2016), articles kept."""
    a, b = Counter(normalize_words(a)), Counter(normalize_words(b))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def edit_distance(answer, reference):
    """The fewest insertions, deletions and substitutions between lists of words (Levenshtein)."""
    row = list(range(len(reference) + 1))
    for i, word in enumerate(answer, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(reference, 1):
            substituted = diagonal + (word != other)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def count_ngrams(words):
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]


def cider_d(answers, references, clips):
    """CIDEr-D of each caption, given all references about the same clip: a list of numbers.

    answers, references: lists of words, one each for every item; clips: which clip each item is
    about. Vedantam, Zitnick and Parikh 2015, in the form of pycocoevalcap: n-grams up to 4,
    sigma 6, times 10. With a single clip all are 0.
    """
    by_clip = {}
    for words, clip in zip(references, clips):
        by_clip.setdefault(clip, []).append(words)
    clips_with = Counter(ngram for group in by_clip.values() for ngram in
                         {g for words in group for part in count_ngrams(words) for g in part})

    def weigh(words):  # tf idf; an n-gram of no reference is as rare as one of one reference
        return [{g: k * math.log(len(by_clip) / max(1, clips_with[g])) for g, k in part.items()}
                for part in count_ngrams(words)]

    scores = []
    for words, clip in zip(answers, clips):
        total = 0
        for reference in by_clip[clip]:
            length_penalty = math.exp(-(len(words) - len(reference)) ** 2 / (2 * 6 ** 2))
            for h, r in zip(weigh(words), weigh(reference)):
                norm = math.hypot(*h.values()) * math.hypot(*r.values())
                dot = sum(min(x, r[g]) * r[g] for g, x in h.items() if g in r)
                total += length_penalty * dot / norm if norm else 0
        scores.append(10 * total / 4 / len(by_clip[clip]))
    return scores


# A measure is three arrays with an entry for each item: values, weights and groups. Its score is
# the sum of values over that of weights in each group, averaged over the groups.

def weighted_mean(values, weights, groups):
    """The sum of values over that of weights in every group; of the groups, the mean."""
    values, weights = np.bincount(groups, values), np.bincount(groups, weights)
    return np.mean(values[weights > 0] / weights[weights > 0]) if weights.any() else np.nan


def bootstrap(clips, values, weights, groups, draws=1000):
    """weighted_mean, and its 95% interval (percentile bootstrap, Efron 1979): three numbers.

    All clips are drawn again, each with all its items, as these are not independent. All three
    are nan if there is nothing to weigh.
    """
    if not np.any(weights):
        return np.nan, np.nan, np.nan
    _, clip = np.unique(clips, return_inverse=True)
    n = clip.max() + 1
    rng, scores = np.random.default_rng(0), []
    for _ in range(draws):
        times = np.bincount(rng.integers(n, size=n), minlength=n)[clip]
        scores.append(weighted_mean(values * times, weights * times, groups))
    return weighted_mean(values, weights, groups), *np.nanpercentile(scores, [2.5, 97.5])


def split_labels(item):
    """The labels of an answer: one, but in tagging those between its commas."""
    return item["output"].split(", ") if item["task"] == "tagging" else [item["output"]]


def average_precision(positive, scores):
    """The sum over thresholds of the recall gained there times the precision there, as scikit-learn
    has it. positive (n,): which are sought; scores (n,): equal ones share a threshold."""
    order = np.argsort(-scores, kind="stable")
    is_last = np.append(np.diff(scores[order]) != 0, True)  # of those with the same score
    found = np.cumsum(positive[order])[is_last]
    precision = found / (1 + np.flatnonzero(is_last))
    return np.sum(np.diff(found, prepend=0) * precision) / found[-1]


def mean_average_precision(items, likelihoods):
    """The mean over labels, of those that some clip has and all questions have as choices, of the
    average precision of their likelihoods over clips; nan if there are none."""
    scores = []
    for label in sorted({label for item in items for label in split_labels(item)}):
        if all(label in item["choices"] for item in items):
            positive = np.array([label in split_labels(item) for item in items])
            scores.append(average_precision(positive, np.array(
                [own[item["choices"].index(label)] for item, own in zip(items, likelihoods)])))
    return np.mean(scores) if scores else np.nan


def task_measures(task, items, answers):
    """{name: (values, weights, groups)} for items of one task and dataset, or {name: score}.

    answers: for each item the answer's text and the log-likelihoods of its choices.
    """
    texts, likelihoods = zip(*answers)
    likeliest = [item["choices"][int(np.argmax(own))] if own else None
                 for item, own in zip(items, likelihoods)]
    texts = [normalize("NFC", text) for text in texts]
    references = [normalize("NFC", item["output"]) for item in items]
    words, reference_words = [*map(normalize_words, texts)], [*map(normalize_words, references)]
    ones, one_group = np.ones(len(items)), np.zeros(len(items), int)
    if task == "captioning":
        clips = [item["clip"] for item in items]
        captions = Counter(clips)  # a clip with many captions counts as often as one with one
        share = np.array([1 / captions[clip] for clip in clips])
        return {"CIDEr-D": (share * cider_d(words, reference_words, clips), share, one_group)}
    if task == "transcription":
        lengths = np.array([len(reference) for reference in reference_words])
        errors = np.array([*map(edit_distance, words, reference_words)])
        return {"word error rate": (errors, lengths, one_group)}
    if task == "tagging":
        return {"mean average precision": mean_average_precision(items, likelihoods)}
    exact = np.array([text == reference for text, reference in zip(texts, references)])
    measures = {"exact match": (exact, ones, one_group)}
    has_choices = np.array([len(item["choices"]) > 0 for item in items])
    if not has_choices.any():
        return measures
    nearest = [max(item["choices"], key=lambda c: (normalize("NFC", c) == text, word_f1(text, c)),
                   default=None) for text, item in zip(texts, items)]
    for name, chosen in (("words", nearest), ("likelihood", likeliest)):
        right = np.array([choice == item["output"] for choice, item in zip(chosen, items)])
        measures[f"choice by {name}"] = (right, has_choices, one_group)
        if task == "classification":
            label = np.unique(references, return_inverse=True)[1]
            measures[f"choice by {name}, macro"] = (right, has_choices, label)
    return measures


def print_scores(items, columns):
    """Print each measure by dataset and task. columns: {name: answers to all items}."""
    rows = {}
    for i, item in enumerate(items):
        rows.setdefault((item["domain"], item["task"]), []).append(i)
    width = max(map(len, ["dataset", *(dataset for dataset, _ in rows)])) + 2
    print(f"{'dataset':<{width}}{'task':<16}{'questions':>9}  {'measure':<29}"
          + "".join(f"{column:<24}" for column in columns))
    for (dataset, task), index in sorted(rows.items()):
        subset = [items[i] for i in index]
        measures = [task_measures(task, subset, [answers[i] for i in index])
                    for answers in columns.values()]
        for name in measures[0]:
            clips = [str(item["clip"]) for item in subset]
            cells = [show_score(clips, column[name]) for column in measures]
            print(f"{dataset:<{width}}{task:<16}{len(index):>9}  {name:<29}"
                  + "".join(f"{cell:<24}" for cell in cells))


def print_examples(items, answers):
    """Print three right answers and two wrong ones, drawn at random."""
    rng = np.random.default_rng(0)
    for label, is_right, count in (("right", True, 3), ("wrong", False, 2)):
        index = [i for i, item in enumerate(items) if (answers[i] == item["output"]) == is_right]
        for i in rng.permutation(index)[:count].tolist():
            correction = "" if is_right else f"   (it was: {items[i]['output']})"
            print(f"{label}: {items[i]['instruction']} -> {answers[i]}{correction}")


def show_score(clips, measure):
    """A measure of task_measures as text, with its interval if it has one."""
    score, *interval = bootstrap(clips, *measure) if isinstance(measure, tuple) else [measure]
    if np.isnan(score):
        return "-"
    return f"{score:.3f}" + (" [{:.3f}, {:.3f}]".format(*interval) if interval else "")


def task_scores(scores):
    """The model's share of exactly right answers by task, in all domains together."""
    shares = {"all": scores["all all"]["model"]}
    for task in sorted({name.split()[1] for name in scores} - {"all"}):
        rows = [row for name, row in scores.items() if name.split()[1] == task]
        right = sum(row["questions"] * row["model"] for row in rows)
        shares[task] = right / sum(row["questions"] for row in rows)
    return shares


def mean_and_deviation(values):
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"
