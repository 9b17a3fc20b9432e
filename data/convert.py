"""A public data set's folder, as it is unpacked, to a list of questions in data/lists.py's format.

    python -m data.convert fsdd free-spoken-digit-dataset --split train > train.jsonl
    python -m data.convert esc50 ESC-50-master --split test --fold 5 > test.jsonl
    python -m data.convert fsdd free-spoken-digit-dataset --sequence 3:6 --out digits

The third command writes recordings of three to six digits by one speaker, with pauses between
them, and their lists, digits/train.jsonl and digits/test.jsonl. Each data set is a function that
yields a Row for each question; a new one is such a function, entered in DATASETS.
"""
import csv
import json
import sys
import zlib
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.audio import load_audio, save_wav
from lib.cli import Parser, one_line_errors

PHRASINGS = {
    "sound": ("classification", ("What do you hear?", "What is in the audio?", "What is it?")),
    "word": ("classification", ("Which word is said?", "What word do you hear?")),
    "speaker": ("classification", ("Who is speaking?", "Who speaks?", "Whose voice is it?")),
    "transcript": ("transcription", ("Write down what is said.", "Transcribe the speech.")),
    "caption": ("captioning", ("Describe the audio.", "Write a caption for the clip.")),
    "tags": ("tagging", ("Which sounds are there?", "Name all sounds that you hear."))}
DIGITS = "zero one two three four five six seven eight nine".split()
SEQUENCE_RATE = 8000        # Hz, FSDD's own
SEQUENCE_PAUSE = 0.1, 0.4   # seconds between two digits, drawn between these
SEQUENCES = {"test": 20, "train": 200}  # recordings of each speaker


class Row(NamedTuple):
    """A question about a recording: its file, its split, what is asked (PHRASINGS), the answer."""
    audio: Path
    split: str
    topic: str
    output: str


def require(folder, pattern):
    """The files or folders that match a pattern, sorted; ValueError if the layout is another."""
    matches = sorted(Path(folder).glob(pattern))
    if not matches:
        raise ValueError(f"{folder}: expected {pattern} in it, as the data set is unpacked")
    return matches


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def plain_label(label):
    return label.replace("_", " ").lower()


# ----------------------------------------------------------------------------------- the data sets

def fsdd(folder, o):
    """Free Spoken Digit Dataset: recordings/{digit}_{speaker}_{index}.wav; test is index 0 to 4."""
    for path in require(folder, "recordings/*_*_*.wav"):
        digit, speaker, index = path.stem.split("_")
        split = "test" if int(index) < 5 else "train"
        for topic, output in (("word", DIGITS[int(digit)]), ("transcript", DIGITS[int(digit)]),
                              ("speaker", speaker)):
            yield Row(path, split, topic, output)


def esc50(folder, o):
    """ESC-50: meta/esc50.csv and audio/; the test is one fold of five."""
    table, = require(folder, "meta/esc50.csv")
    for line in read_csv(table):
        split = "test" if int(line["fold"]) == (o.fold or 5) else "train"
        yield Row(folder / "audio" / line["filename"], split, "sound",
                  plain_label(line["category"]))


def esc10(folder, o):
    """ESC-10 in its old layout: `NNN - Name/{fold}-{id}-{take}.ogg`; the test is one fold."""
    for path in require(folder, "[0-9][0-9][0-9] - */*-*-*.ogg"):
        split = "test" if int(path.name.split("-")[0]) == (o.fold or 5) else "train"
        yield Row(path, split, "sound", plain_label(path.parent.name.split(" - ")[1]))


def speech_commands(folder, o):
    """Speech Commands 0.02: word/*_nohash_*.wav; validation_list.txt and testing_list.txt."""
    splits = {}
    for split, name in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
        path, = require(folder, name)
        splits |= dict.fromkeys(path.read_text(encoding="utf-8").split(), split)
    for path in require(folder, "*/*_nohash_*.wav"):
        if path.parent.name != "_background_noise_":
            split = splits.get(f"{path.parent.name}/{path.name}", "train")
            yield Row(path, split, "word", path.parent.name)


def urbansound8k(folder, o):
    """UrbanSound8K: metadata/UrbanSound8K.csv and audio/foldN/; the test is one fold of ten."""
    table, = require(folder, "metadata/UrbanSound8K.csv")
    for line in read_csv(table):
        split = "test" if int(line["fold"]) == (o.fold or 10) else "train"
        audio = folder / "audio" / f"fold{line['fold']}" / line["slice_file_name"]
        yield Row(audio, split, "sound", plain_label(line["class"]))


def fsd50k(folder, o):
    """FSD50K: FSD50K.ground_truth/dev.csv and eval.csv, several labels to a clip."""
    for name in ("dev", "eval"):
        table, = require(folder, f"FSD50K.ground_truth/{name}.csv")
        for line in read_csv(table):
            audio = folder / f"FSD50K.{name}_audio" / f"{line['fname']}.wav"
            yield Row(audio, line.get("split") or "test", "tags",
                      ", ".join(map(plain_label, line["labels"].split(","))))


def clotho(folder, o):
    """Clotho 2.1: clotho_captions_{development,validation,evaluation}.csv, five captions a clip."""
    for name, split in (("development", "train"), ("validation", "val"), ("evaluation", "test")):
        table, = require(folder, f"clotho_captions_{name}.csv")
        for line in read_csv(table):
            for n in range(1, 6):
                yield Row(folder / name / line["file_name"], split, "caption", line[f"caption_{n}"])


def audiocaps(folder, o):
    """AudioCaps: train.csv, val.csv and test.csv. Its recordings are to be had elsewhere:
    --audio-name says what they are called."""
    for split in ("train", "val", "test"):
        table, = require(folder, f"{split}.csv")
        for line in read_csv(table):
            yield Row(folder / o.audio_name.format(**line), split, "caption", line["caption"])


def librispeech(folder, o):
    """LibriSpeech, also the mini one: {subset}/{speaker}/{chapter}/*.flac and *.trans.txt."""
    for path in require(folder, "*/*/*/*.trans.txt"):
        subset = path.relative_to(folder).parts[0].split("-")[0]
        split = {"dev": "val"}.get(subset, subset)
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield Row(path.with_name(f"{name}.flac"), split, "transcript", text.lower())


DATASETS = {f.__name__: f for f in (fsdd, esc50, esc10, speech_commands, urbansound8k, fsd50k,
                                    clotho, audiocaps, librispeech)}


# ------------------------------------------------------------------------------------------ writing

def write_items(rows, dataset, file):
    """Rows as JSON lines, each question in one of its phrasings, chosen by its file and topic."""
    for row in rows:
        task, phrasings = PHRASINGS[row.topic]
        choice = zlib.crc32(f"{row.audio.name} {row.topic}".encode()) % len(phrasings)
        item = {"audio_id": str(row.audio.resolve()), "instruction": phrasings[choice],
                "output": row.output, "task": task, "dataset": f"{dataset} {row.topic}"}
        print(json.dumps(item, ensure_ascii=False), file=file)


def write_sequences(folder, lengths, out):
    """Write sequences of digits by one speaker to `out`, and out/train.jsonl and out/test.jsonl.

    lengths: the fewest and most digits. Test sequences are of test recordings, and their order of
    digits is in no training sequence.
    """
    rng, used = np.random.default_rng(0), set()
    by_speaker = sorted((row.audio.stem.split("_")[1], row.split, row.audio)
                        for row in fsdd(folder, None) if row.topic == "word")
    Path(out).mkdir(parents=True, exist_ok=True)
    rows = {"train": [], "test": []}
    for split, count in SEQUENCES.items():  # the test first, for training leaves its orders out
        for speaker, group in groupby(by_speaker, key=lambda row: row[0]):
            paths = [path for _, own, path in group if own == split]
            for n in range(count if paths else 0):
                chosen = [paths[i] for i in rng.integers(len(paths), size=rng.integers(
                    lengths[0], lengths[1] + 1))]
                digits = " ".join(DIGITS[int(path.stem.split("_")[0])] for path in chosen)
                if split == "train" and digits in used:
                    continue
                used |= {digits} if split == "test" else set()
                audio = Path(out) / f"{split}_{speaker}_{n}.wav"
                save_wav(audio, join_waves(chosen, rng), SEQUENCE_RATE)
                rows[split].append(Row(audio, split, "transcript", digits))
        with open(Path(out) / f"{split}.jsonl", "w", encoding="utf-8") as file:
            write_items(rows[split], "digits", file)
        print(f"wrote {len(rows[split])} recordings and {out}/{split}.jsonl", file=sys.stderr)


def join_waves(paths, rng):
    """Recordings one after another, with pauses drawn from rng between them: (samples,)."""
    parts = []
    for path in paths:
        pause = torch.zeros(int(rng.uniform(*SEQUENCE_PAUSE) * SEQUENCE_RATE))
        parts += [load_audio(path, SEQUENCE_RATE), pause]
    return torch.cat(parts[:-1])


def parse_lengths(text):
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and 1 <= int(low) <= int(high) <= 20):
        raise ValueError(f"--sequence {text}: expected the fewest and most digits, like 3:6")
    return int(low), int(high)


def convert(o):
    folder = Path(o.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the one that {o.dataset} was unpacked to")
    if o.sequence:
        if o.dataset != "fsdd" or not o.out:
            raise ValueError("--sequence is for fsdd, and needs --out, a folder to write to")
        return write_sequences(folder, parse_lengths(o.sequence), o.out)
    rows = list(DATASETS[o.dataset](folder, o))
    splits = sorted({row.split for row in rows})
    if o.split and o.split not in splits:
        raise ValueError(f"--split {o.split}: {o.dataset} has {', '.join(splits)} there")
    write_items([row for row in rows if o.split in (None, row.split)], o.dataset, sys.stdout)


def main(arguments=None):
    parser = Parser(prog="python -m data.convert", description=__doc__.split("\n\n")[0],
                    allow_abbrev=False)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("folder", help="where it was unpacked to")
    parser.add_argument("--split", choices=("train", "val", "test"), help="one split; else all")
    parser.add_argument("--fold", type=int, help="the fold that is the test (esc50, esc10: 5, "
                                                 "urbansound8k: 10)")
    parser.add_argument("--audio-name", default="{youtube_id}_{start_time}.wav",
                        help="audiocaps: how its recordings are called, by columns of its tables")
    parser.add_argument("--sequence", help="fsdd: write recordings of several digits, like 3:6")
    parser.add_argument("--out", help="with --sequence: the folder to write to")
    o = parser.parse_args(arguments)
    with one_line_errors(parser):
        convert(o)


if __name__ == "__main__":
    main()
