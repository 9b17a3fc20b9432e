"""Golden values for tests/test_scores.py, from the reference packages, on random sentences.

    pip install numpy jiwer && pip install --no-deps pycocoevalcap
    python tests/golden/make_scores.py

scores.npz: for every clip an answer and its captions (JSON: [[answer, [caption, ...]], ...]), the
CIDEr-D of each clip from pycocoevalcap; jiwer's word error rate of every answer given the first of
the captions, and of all together.
"""
import json
from pathlib import Path

import jiwer
import numpy as np
from pycocoevalcap.cider.cider import Cider

WORDS = "a dog barks and the dog's owner is shouting while hi-hat cymbals ring 3 times".split()


def sentence(dice, low):
    return " ".join(dice.choice(WORDS, dice.integers(low, 13)).tolist())


def near(dice, text):
    """The text with some words lost, doubled or changed: n-grams in common."""
    fates = dice.choice(["", "{0}", "{0}", "{0}", "{0} {0}", "ring"], len(text.split()))
    return " ".join(" ".join(f.format(w) for f, w in zip(fates, text.split())).split())


dice = np.random.default_rng(0)
clips = []
for _ in range(40):
    captions = [sentence(dice, 1)]
    captions += [near(dice, captions[0]) or "ring" for _ in range(dice.integers(0, 5))]
    clips.append([near(dice, captions[0]) if dice.random() < 0.8 else sentence(dice, 0), captions])
_, cider = Cider().compute_score({i: refs for i, (_, refs) in enumerate(clips)},
                                 {i: [said] for i, (said, _) in enumerate(clips)})
pairs = [(refs[0], said) for said, refs in clips]
np.savez_compressed(Path(__file__).with_name("scores.npz"), clips=json.dumps(clips), cider=cider,
                    wer=[jiwer.wer(*pair) for pair in pairs],
                    all_wer=jiwer.wer(*map(list, zip(*pairs))))
