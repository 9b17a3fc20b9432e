"""Lists of questions about sound files, JSON or JSON lines (JSONL), in the format of OpenAQA, the
data of LTU (Listen, Think and Understand, Gong et al. 2023).

    {"audio_id": "a.wav", "instruction": "What do you hear?", "output": "a siren"}

audio_id is a path relative to the list's folder. Optional fields: input (added to the instruction),
task, dataset, and choices (texts of which the output is one).

    python train.py --mode lal --data train.jsonl --val-data val.jsonl
"""
import json
import os
import random
import re
import sys
import tempfile
import weakref
import zlib
from array import array
from functools import lru_cache, partial
from pathlib import Path
from unicodedata import normalize

from tqdm import tqdm

from lib.audio import check_audio, load_audio
from lib.processes import rank_and_size

TEXT_FIELDS = ("audio_id", "instruction", "output", "input", "task", "dataset")
REQUIRED_FIELDS = ("audio_id", "instruction", "output")
MAX_MESSAGES = 10  # of the items that cannot be used, so many are named
MAX_CHARACTERS = 4000  # of a text: attention takes memory as the square of its length


class QuestionList:
    """The items of a list, each read from its file when it is asked for, in any process.

    All items are checked at once, and the headers of their clips. Those with a mistake are an
    error, or, with skip_bad, named and left out. In memory stay, for each item, where its line
    begins, the line's length and checksum, its clip's seconds and a number for its task: 24 bytes.
    audio_root: the folder that audio_id is relative to (None: the list's). fingerprint changes when
    the list does, not when a clip does. Raises ValueError, one line, that names the item.
    """

    def __init__(self, path, audio_root=None, skip_bad=False):
        self.path = path
        self.root = Path(audio_root or Path(path).parent)
        self.starts, self.sizes, self.task_numbers = array("q"), array("i"), array("i")
        self.checksums, self.seconds = array("I"), array("f")
        self.tasks = {}  # task: its number
        self.jsonl, unit, first = as_json_lines(path)
        if self.jsonl != path:
            weakref.finalize(self, remove_file, self.jsonl, os.getpid())
        count, problems = self.read_index(unit, first)
        if count == 1 and not skip_bad:
            raise ValueError(problems[0])
        if count:
            summary = f"{path}: {count} items cannot be used, the first {len(problems)} are above"
            tells = rank_and_size()[0] == 0  # one process for all
            if tells:
                print(*problems, sep="\n", file=sys.stderr)
            if not skip_bad:
                raise ValueError(f"{summary}; --skip-bad goes on without them")
            if tells:
                print(f"{summary}; {len(self)} stay", file=sys.stderr)
        if not self.starts:
            raise ValueError(f"{path}: empty: expected a list of questions")

    def read_index(self, unit, first):
        """Check all items; returns how many cannot be used, and what is wrong with the first."""
        count, problems = 0, []
        checksum, next_start = 0, 0
        check_clip = lru_cache(4096)(check_audio)  # items about one clip are often neighbours
        with open(self.jsonl, "rb") as file:
            for n, line in enumerate(tqdm(file, "questions", leave=False, delay=1), first):
                start, next_start = next_start, next_start + len(line)
                checksum = zlib.crc32(line, checksum)
                if not line.strip():
                    continue
                try:
                    item = self.parse_item(line)
                    seconds = check_clip(item["clip"])
                except ValueError as error:
                    count += 1
                    problems += [f"{self.path}: {unit} {n}: {error}"][:count <= MAX_MESSAGES]
                    continue
                self.starts.append(start)
                self.sizes.append(len(line))
                self.checksums.append(zlib.crc32(line))
                self.seconds.append(seconds)
                self.task_numbers.append(self.tasks.setdefault(item["task"], len(self.tasks)))
        self.fingerprint = f"{len(self) + count} items, checksum {checksum:08x}"
        return count, problems

    def parse_item(self, line):
        """The item in a line of JSON. ValueError: what is wrong with it, but for its clip."""
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({json_problem(error)})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{type(raw).__name__}, not an object")
        choices = raw.get("choices") or []
        if not isinstance(choices, list):
            raise ValueError("its field 'choices' is not a list of texts")
        texts = [(field, raw.get(field) or "") for field in TEXT_FIELDS]
        for field, text in texts + [("choices", choice) for choice in choices]:
            # half of a cut emoji is valid JSON, but no character
            if not isinstance(text, str) or re.search("[\0\ud800-\udfff]", text):
                raise ValueError(f"its field {field!r} is not text")
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"its field {field!r} has {len(text):,} characters; cut it to at "
                                 f"most {MAX_CHARACTERS:,}")
            if field in REQUIRED_FIELDS and not text.strip():
                raise ValueError(f"no text in its field {field!r}")
        output, *choices = [normalize("NFC", t).strip() for t in (raw["output"], *choices)]
        if choices and (output not in choices or not all(choices)):
            raise ValueError("its field 'choices' has an empty text, or not its output")
        return {"clip": self.root / raw["audio_id"], "audio_id": raw["audio_id"], "output": output,
                "instruction": f"{raw['instruction'].strip()} {raw.get('input') or ''}".strip(),
                "task": raw.get("task") or "question", "choices": choices,
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
        line = file.read(self.sizes[i])
        if zlib.crc32(line) != self.checksums[i]:
            raise ValueError(f"{self.path}: has been changed while it was in use; start again")
        return self.parse_item(line)

    def clips(self, seconds=None):
        """{clip: function rate -> (samples,)} of all items; of their first `seconds`, if given."""
        return {item["clip"]: partial(load_audio, item["clip"], seconds=seconds) for item in self}


def drop_unreadable(items, clips):
    """The items whose clips can be read, which is tried; the other clips are named and counted."""
    bad = set()
    for clip, read in tqdm(clips.items(), "clips", leave=False, delay=1):
        try:
            read(16000)
        except ValueError as error:
            bad.add(clip)
            print(f"{error} (left out: clip {len(bad)} of {len(clips)})", file=sys.stderr)
    if len(bad) == len(clips):
        raise ValueError("none of the clips can be read: give others")
    return [item for item in items if item["clip"] not in bad]


def json_problem(error):
    """What json.loads had to say, in a few words and without a place."""
    return "nested too deep" if isinstance(error, RecursionError) else getattr(error, "msg", error)


def as_json_lines(path):
    """The path of a list as JSON lines, what to call one of them, and the number of the first.

    A JSON list is copied, line by line, to a temporary file: so there is one way to read both, and
    data workers need not parse the whole list again. So is UTF-16, which Windows' shell writes.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: a directory, pipe or device; a list has to be a file")
    with open(path, "rb") as file:
        start = file.read(99)
    utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not utf16 and not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return path, "line", 1
    try:
        text = Path(path).read_text(encoding="utf-16" if utf16 else "utf-8-sig")
        is_list = text.lstrip().startswith("[")
        lines = [*map(json.dumps, json.loads(text))] if is_list else text.split("\n")
    except (ValueError, RecursionError) as error:  # JSONDecodeError has lineno
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}: line {line}: not JSON ({json_problem(error)})") from None
    handle, copy = tempfile.mkstemp(".jsonl")
    with open(handle, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
    return (copy, "item", 0) if is_list else (copy, "line", 1)


def remove_file(path, process):
    if os.getpid() == process:  # not in a data worker, where a list may end earlier
        Path(path).unlink(missing_ok=True)


def wrong_clips(domains):
    """For each clip of {clip: its domain} another one of the same domain, so that it is wrong in
    nothing but its content: the next one in an order drawn at random, as neighbours in a sorted
    list may be the same word. The only clip of a domain gets one of another, if any is."""
    other, rng = {}, random.Random(0)
    for domain in dict.fromkeys(domains.values()):
        clips = [clip for clip in domains if domains[clip] == domain]
        foreign = [clip for clip in domains if domains[clip] != domain][:1]
        rng.shuffle(clips)
        other |= dict(zip(clips, clips[1:] + clips[:1] if len(clips) > 1 else foreign))
    return other


def record_seconds(clips):
    """Clips {clip: function rate -> (samples,)} that note their lengths when they are read: such
    clips, and a dict that gets {clip: seconds}."""
    seconds = {}

    def read(clip, rate):
        wave = clips[clip](rate)
        # of a file no more may be read than is heard: its header says how long it is
        seconds[clip] = check_audio(clip) if isinstance(clip, Path) else len(wave) / rate
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
