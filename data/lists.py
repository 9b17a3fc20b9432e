"""Lists of questions about sound files, JSON or JSON lines (JSONL), in the format of OpenAQA, the
data of LTU (Listen, Think and Understand, Gong et al. 2023).

    {"audio_id": "a.wav", "instruction": "What do you hear?", "output": "a siren"}

audio_id is a path relative to the list's folder. Optional fields: input (added to the instruction),
task, dataset, and choices (texts of which the output is one).

    python train.py --mode lal --data train.jsonl --val-data val.jsonl
"""
import json
import os
import re
import sys
import tempfile
import weakref
import zlib
from array import array
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lib.audio import load_audio

TEXT_FIELDS = ("audio_id", "instruction", "output", "input", "task", "dataset")
REQUIRED_FIELDS = ("audio_id", "instruction", "output")
MAX_MESSAGES = 10  # of the items that cannot be used, so many are named


class QuestionList:
    """The items of a list, each read from its file when it is asked for, in any process.

    All items are checked at once. Those with a mistake are an error, or, with skip_bad, named and
    left out. In memory stay, for each item, where its line begins, the line's length, and a number
    for its task: 14 bytes. audio_root: the folder that audio_id is relative to (None: the list's).
    fingerprint changes when the list does. Raises ValueError, one line, that names the item.
    """

    def __init__(self, path, audio_root=None, skip_bad=False):
        self.path = path
        self.root = Path(audio_root or Path(path).parent)
        self.starts, self.sizes, self.task_numbers = array("q"), array("i"), array("H")
        self.tasks = {}  # task: its number
        self.jsonl, unit, first = as_json_lines(path)
        if self.jsonl != path:
            weakref.finalize(self, remove_file, self.jsonl, os.getpid())
        count, problems = self.read_index(unit, first)
        if count == 1 and not skip_bad:
            raise ValueError(problems[0])
        if count:
            summary = f"{path}: {count} items cannot be used, the first {len(problems)} are above"
            print(*problems, sep="\n", file=sys.stderr)
            if not skip_bad:
                raise ValueError(f"{summary}; --skip-bad goes on without them")
            print(f"{summary}; {len(self)} stay", file=sys.stderr)
        if not self.starts:
            raise ValueError(f"{path}: empty: expected a list of questions")

    def read_index(self, unit, first):
        """Check all items; returns how many cannot be used, and what is wrong with the first."""
        count, problems = 0, []
        checksum, next_start = 0, 0
        with open(self.jsonl, "rb") as file:
            for n, line in enumerate(tqdm(file, "questions", leave=False, delay=1), first):
                start, next_start = next_start, next_start + len(line)
                checksum = zlib.crc32(line, checksum)
                if not line.strip():
                    continue
                try:
                    task = self.parse_item(line, f"{unit} {n}")["task"]
                except ValueError as error:
                    count += 1
                    problems += [str(error)] if count <= MAX_MESSAGES else []
                    continue
                self.starts.append(start)
                self.sizes.append(len(line))
                self.task_numbers.append(self.tasks.setdefault(task, len(self.tasks)))
        self.fingerprint = f"{len(self)} items, checksum {checksum:08x}"
        return count, problems

    def parse_item(self, line, name):
        """The item in a line of JSON, checked; `name` is what an error calls it."""
        source = f"{self.path}: {name}"
        try:
            raw = json.loads(line)
        except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
            reason = getattr(error, "msg", "not text")
            raise ValueError(f"{source} is not JSON ({reason})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{source} is {type(raw).__name__}, not an object")
        for field in TEXT_FIELDS:
            text = raw.get(field) or ""
            # half of a cut emoji is valid JSON, but no character
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
                raise ValueError(f"{source}: its field {field!r} is not text")
            if field in REQUIRED_FIELDS and not text.strip():
                raise ValueError(f"{source} has no text in its field {field!r}")
        choices = raw.get("choices") or []
        if choices and (not isinstance(choices, list) or raw["output"] not in choices
                        or not all(isinstance(c, str) and c.strip() for c in choices)):
            raise ValueError(f"{source}: its field 'choices' is not a list of texts that has its "
                             "output among them")
        audio = self.root / raw["audio_id"]
        if not audio.is_file():
            raise ValueError(f"{source}: no such audio file: {audio}")
        return {"clip": audio, "audio_id": raw["audio_id"], "output": raw["output"].strip(),
                "instruction": f"{raw['instruction'].strip()} {raw.get('input') or ''}".strip(),
                "task": raw.get("task") or "question", "choices": [c.strip() for c in choices],
                "domain": raw.get("dataset") or Path(self.path).stem}

    def __len__(self):
        return len(self.starts)

    def __iter__(self):
        with open(self.jsonl, "rb") as file:
            for i in range(len(self)):
                yield self.read_item(file, i)

    def __getitem__(self, i):
        # opened each time: data workers, forked or spawned, must not share a position in the file
        with open(self.jsonl, "rb") as file:
            return self.read_item(file, i)

    def read_item(self, file, i):
        file.seek(self.starts[i])
        return self.parse_item(file.read(self.sizes[i]), f"item {i}")

    def clips(self):
        """{clip: function rate -> (samples,)} of all items."""
        return {item["clip"]: partial(load_audio, item["clip"]) for item in self}


def as_json_lines(path):
    """The path of a list as JSON lines, what to call one of them, and the number of the first.

    A JSON list is copied, line by line, to a temporary file: so there is one way to read both, and
    data workers need not parse the whole list again.
    """
    with open(path, "rb") as file:
        if not file.read(99).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return path, "line", 1
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows puts a mark there
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None
    handle, copy = tempfile.mkstemp(".jsonl")
    with open(handle, "wb") as file:
        file.writelines(json.dumps(raw).encode() + b"\n" for raw in items)
    return copy, "item", 0


def remove_file(path, process):
    if os.getpid() == process:  # not in a data worker, where a list may end earlier
        Path(path).unlink(missing_ok=True)


def wrong_clips(domains):
    """For each clip of {clip: its domain} another one: the next of the same domain, so that it is
    wrong in nothing but its content. The only clip of a domain gets one of another, if any is."""
    other = {}
    for domain in set(domains.values()):
        clips = [clip for clip in domains if domains[clip] == domain]
        foreign = [clip for clip in domains if domains[clip] != domain][:1]
        other |= dict(zip(clips, clips[1:] + clips[:1] if len(clips) > 1 else foreign))
    return other


def record_seconds(clips):
    """Clips {clip: function rate -> (samples,)} that note their lengths when they are read: such
    clips, and a dict that gets {clip: seconds}."""
    seconds = {}

    def read(clip, rate):
        wave = clips[clip](rate)
        seconds[clip] = len(wave) / rate
        return wave

    return {clip: partial(read, clip) for clip in clips}, seconds


# ------------------------------------------------------------------------------ items as token ids

def count_answers(item):
    """How many answers an item has: one, but for the checklists of the listening world."""
    return len(item["pairs"]) if "pairs" in item else 1


def add_token_ids(tokenizer, items):
    """Add to every item its token ids and their weights: see tokenize_conversation."""
    for item in items:
        if "ids" not in item:
            pairs = item.get("pairs") or [(item["instruction"].strip() + "\n", item["output"])]
            item["ids"], item["weights"] = tokenize_conversation(tokenizer, pairs)
    return items


def tokenize_conversation(tokenizer, pairs):
    """Token ids of prompts and answers in turn, and the weight of each in the loss, two lists.

    An answer's n tokens weigh 1 / sqrt(n) each, so that a caption counts more than a "yes", but not
    as much more as it is longer. A prompt's weigh 0: it is not for the model to say. A prompt that
    ends its line is a question of a chat; any other is continued by its answer.
    """
    ids, weights = [], []
    for prompt, answer in pairs:
        if prompt.endswith("\n"):
            prompt, answer = tokenizer.chat(prompt)[1], tokenizer.reply(answer)
        else:
            prompt, answer = tokenizer.encode(prompt), tokenizer.encode(" " + answer.strip())
        ids += prompt + answer
        weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
    return ids, weights
