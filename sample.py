"""Ask a trained model about a sound.

    python sample.py --audio out/demo/0.wav --prompt "What do you hear?"
    python sample.py --audio out/demo/0.wav            # hears it once, answers many questions
    python sample.py --llm SmolLM2-135M-Instruct       # talks to an LLM that hears nothing
    python sample.py --audio out/demo/0.wav --prompt "What do you hear?" --listen out/listen.png
    python sample.py --data out/demo/questions.json --out predictions.json   # answers and scores

Also here, because train.py and bench.py need them too: LTU-style lists of questions, and
command-line options made from the fields of a dataclass.
"""
import argparse
import json
import math
import os
import re
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from encoders import load_audio, mel_bank, power_spectrum
from integrate import LFST, ROUTES, AudioLLM, MLPConnector, run, save_atomically, stack
from model import LLM, load_tokenizer, rotate, visibility


# ------------------------------------------------------------------------------ command line

HUGE = 2 ** 63 - 1  # the largest seed


def option(default, help, low=0, high=HUGE, **kwargs):
    """A field of a configuration dataclass that is a command-line option too. Its value, if it is
    a number, lies within low..high."""
    return field(default=default, metadata={"help": help, "range": (low, high), **kwargs})


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one clear line instead of argparse's usage and error
        self.fail(f"{message} (--help lists every option)")

    def fail(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def command_line(config, doc, main):
    """Fill the dataclass `config` from the command line and call main(config).

    A field `top_p: float = option(1.0, "help")` becomes --top-p. A user's mistake, which is a
    ValueError anywhere below, or a file that cannot be written, ends the program with one line and
    exit code 2.
    """
    parser = Parser(description=doc.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ranges = {}
    for f in fields(config):
        meta = dict(f.metadata)
        ranges[f.name] = meta.pop("range")
        if f.type is bool:
            meta["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            meta["type"] = f.type
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **meta)
    given = vars(parser.parse_args())
    for name, value in given.items():
        flag, (low, high) = "--" + name.replace("_", "-"), ranges[name]
        if isinstance(value, str) and not value.strip():  # or "$FORGOTTEN" would be the default
            parser.error(f"{flag} is empty")
        if isinstance(value, (int, float)) and not low <= value <= high:  # nan is nowhere
            limit = "or more, and finite" if high == HUGE else f"to {high:g}"
            parser.error(f"{flag} {value}: expected {low:g} {limit}")
    try:
        main(config(**given))
    except ValueError as e:
        parser.fail(str(e))
    except OSError as e:
        parser.fail(f"{e.filename}: {e.strerror}" if e.filename else e.strerror or str(e))
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; what was saved stays as it was\n")


def pick_device(name, dtype="float32"):
    """The torch device called `name` (auto: cuda if there is one, else cpu), said aloud once."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: choose cpu, cuda, mps or auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used: {why}") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    print(f"device {device}, {dtype}, {torch.get_num_threads()} threads", file=sys.stderr)
    return device


# -------------------------------------------------------------------------- lists of questions

class Questions:
    """The items of an LTU-style list, JSONL or JSON, each read from its file when asked for.

    An item is an object with audio_id, a path relative to audio_root (default: the file's own
    folder), instruction, output, and if you like input, which is added to the instruction, task,
    dataset, and choices, texts that the output is one of. Format: LTU's OpenAQA. Every item is
    checked at once; those with a mistake are told of, or, with skip_bad, told of and left out. In
    memory stay, for each item, where its line begins, its length, and a number for its task: 14
    bytes. `mark` changes when the list does.
    """

    def __init__(self, path, audio_root=None, skip_bad=False):
        self.path, self.root = path, Path(audio_root or Path(path).parent)
        self.starts, self.sizes, self.numbers = array("q"), array("i"), array("H")
        self.tasks, problems, bad, crc, end = {}, [], 0, 0, 0
        self.file, name, first = open(path, "rb"), "line", 1
        if self.file.read(99).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            self.file, name, first = as_lines(path), "item", 0
        self.file.seek(0)
        for n, line in enumerate(tqdm(self.file, "questions", leave=False, delay=1), first):
            start, end, crc = end, end + len(line), zlib.crc32(line, crc)
            if not line.strip():
                continue
            try:
                task = self.item(line, f"{name} {n}")["task"]
            except ValueError as e:
                bad += 1
                if bad <= 10:
                    problems.append(str(e))
                continue
            self.starts.append(start)
            self.sizes.append(len(line))
            self.numbers.append(self.tasks.setdefault(task, len(self.tasks)))
        if bad == 1 and not skip_bad:
            raise ValueError(problems[0])
        if bad:
            told = f"{path}: {bad} items cannot be used, the first {len(problems)} are above"
            print(*problems, sep="\n", file=sys.stderr)
            if not skip_bad:
                raise ValueError(f"{told}; --skip-bad goes on without them")
            print(f"{told}; {len(self)} stay", file=sys.stderr)
        if not self.starts:
            raise ValueError(f"{path}: empty: expected a list of questions")
        self.mark = f"{len(self)} items, checksum {crc:08x}"

    def item(self, line, name):
        """The item in a line of JSON, checked; `name` is what a complaint calls it."""
        where = f"{self.path}: {name}"
        try:
            raw = json.loads(line)
        except ValueError as e:  # JSONDecodeError or UnicodeDecodeError
            raise ValueError(f"{where} is not JSON ({getattr(e, 'msg', 'not text')})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is {type(raw).__name__}, not an object")
        for field_name in ("audio_id", "instruction", "output", "input", "task", "dataset"):
            text = raw.get(field_name) or ""
            # half of a cut emoji is valid JSON, but no character
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
                raise ValueError(f"{where}: its field {field_name!r} is not text")
            if field_name in ("audio_id", "instruction", "output") and not text.strip():
                raise ValueError(f"{where} has no text in its field {field_name!r}")
        choices = raw.get("choices") or []
        if choices and (not isinstance(choices, list) or raw["output"] not in choices
                        or not all(isinstance(c, str) and c.strip() for c in choices)):
            raise ValueError(f"{where}: its field 'choices' is not a list of texts that has its "
                             "output among them")
        audio = self.root / raw["audio_id"]
        if not audio.is_file():
            raise ValueError(f"{where}: no such audio file: {audio}")
        return {"clip": audio, "audio_id": raw["audio_id"], "output": raw["output"].strip(),
                "instruction": f"{raw['instruction'].strip()} {raw.get('input') or ''}".strip(),
                "task": raw.get("task") or "question", "choices": [c.strip() for c in choices],
                "domain": raw.get("dataset") or Path(self.path).stem}

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):  # pread: data workers share the file, so it must have no position
        return self.item(os.pread(self.file.fileno(), self.sizes[i], self.starts[i]), f"item {i}")

    def clips(self):
        """{clip: function rate -> (samples,)} of all items."""
        return {item["clip"]: partial(load_audio, item["clip"]) for item in self}


def as_lines(path):
    """A JSON list as a nameless temporary file of JSONL, so that there is one way to read both."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows puts a mark there
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: line {e.lineno} is not JSON ({e.msg})") from None
    file = tempfile.TemporaryFile()
    file.writelines(json.dumps(raw).encode() + b"\n" for raw in found)
    return file


def timed(clips):
    """Clips as of Questions.clips, and a dict that gets the seconds of each when it is read."""
    seconds = {}

    def read(name, rate):
        wave = clips[name](rate)
        seconds[name] = len(wave) / rate
        return wave

    return {name: partial(read, name) for name in clips}, seconds


# --------------------------------------------------------------------------------------- asking

def tell_fit(model, seconds):
    """Say aloud which clips, of so many seconds each, are longer or shorter than what is heard."""
    for kind, encoder in model.encoders.items():
        window = encoder.seconds
        longer = sum(s > window for s in seconds)
        shorter = sum(s < window for s in seconds)
        if longer:
            print(f"{kind} hears the first {window:g} s: the rest is cropped from {longer} of "
                  f"{len(seconds)} clips (the longest has {max(seconds):.1f} s)", file=sys.stderr)
        if shorter:
            filling = "its own repetition" if kind == "clap" else "silence"
            print(f"{kind} hears {window:g} s: {filling} is added to {shorter} of {len(seconds)} "
                  f"clips (the shortest has {min(seconds):.2f} s)", file=sys.stderr)


def ask_all(model, features, asked, batch=256, **sampling):
    """The answers to a list of (clip, question, choices): pairs of a text and the likeliest of the
    choices, None if there are none. Each clip is heard once, then asked all of its questions; no
    more than `batch` clips, and then questions or choices, are held at a time.

    features: a function from a list of clips to theirs, as AudioLLM.features gives them.
    """
    model.eval()
    found, by_clip = [None] * len(asked), {}
    for i, (clip, *_) in enumerate(asked):
        by_clip.setdefault(clip, []).append(i)
    clips = list(by_clip)
    for at in tqdm(range(0, len(clips), batch), desc="answers", leave=False, mininterval=1):
        cache = model.hear(features(clips[at:at + batch]))
        rows = [(r, i) for r, clip in enumerate(clips[at:at + batch]) for i in by_clip[clip]]
        for start in range(0, len(rows), batch):
            some, which = map(list, zip(*rows[start:start + batch]))
            _, questions, choices = zip(*(asked[i] for i in which))
            texts = model.ask(cache, questions, some, **sampling)
            likely = likeliest(model, cache, questions, choices, some, batch)
            for i, text, choice in zip(which, texts, likely):
                found[i] = text, choice
    return found


@torch.no_grad()
def likeliest(model, cache, questions, choices, rows, batch):
    """For each question about clip rows[i] of the cache the choice (None: it has none) that is the
    likeliest as the whole answer: the largest sum of log p(token), the end of the answer included.
    """
    llm, scores = model.llm, [[] for _ in questions]
    pairs = [(i, model.tokenizer.reply(c)) for i, some in enumerate(choices) for c in some]
    if not pairs:
        return [None] * len(questions)
    prompts = [model.tokenizer.chat(q)[1] for q in questions]
    ids, lengths = stack([torch.tensor(p[:-1], device=model.device) for p in prompts])
    cache = cache.fork(rows, ids.shape[1])  # reads every question once, for all of its choices
    run(llm, [("plits", llm.embed(ids), lengths)], cache)
    for at in range(0, len(pairs), batch):
        some = pairs[at:at + batch]
        ids, lengths = stack([torch.tensor(prompts[i][-1:] + reply[:-1], device=model.device)
                              for i, reply in some])
        targets = nn.utils.rnn.pad_sequence([torch.tensor(reply) for _, reply in some],
                                            batch_first=True, padding_value=-100)  # left out
        hidden = run(llm, [("plits", llm.embed(ids), lengths)],
                     cache.fork([i for i, _ in some], ids.shape[1]))
        losses = F.cross_entropy(llm.head(hidden).transpose(1, 2), targets.to(model.device),
                                 reduction="none").sum(dim=1)  # (B, T) -> (B,)
        for (i, _), loss in zip(some, losses.tolist()):
            scores[i].append(loss)
    return [c[np.argmin(loss)] if c else None for c, loss in zip(choices, scores)]


def wrong_clips(domain):
    """For each clip of {clip: its domain} another one: the next of the same domain, so that it is
    wrong in nothing but its content. The only clip of a domain gets one of another, if any is."""
    other = {}
    for d in set(domain.values()):
        clips = [c for c in domain if domain[c] == d]
        strange = [c for c in domain if domain[c] != d][:1]
        other |= dict(zip(clips, clips[1:] + clips[:1] if len(clips) > 1 else strange))
    return other


# -------------------------------------------------------------------------------------- scores

def plain(text):
    """Lower-cased words without punctuation; an apostrophe or a hyphen inside a word stays."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def overlap(a, b):
    """F1 of the words of two texts, as SQuAD has it (Rajpurkar et al. 2016), articles kept."""
    a, b = Counter(plain(a)), Counter(plain(b))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def edits(said, written):
    """The fewest insertions, deletions and substitutions between lists of words (Levenshtein)."""
    row = list(range(len(written) + 1))
    for i, word in enumerate(said, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(written, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != other))
    return row[-1]


def cider_d(said, written, clips):
    """CIDEr-D of each caption said, given all that were written about the same clip. Lists of
    words; clips says which clip each is about. Vedantam, Zitnick and Parikh 2015, in the form of
    pycocoevalcap: n-grams up to 4, sigma 6, times 10. With a single clip all are 0."""
    def counts(words):
        return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]

    def vectors(words):  # tf idf; a word of no reference is as rare as a word of one
        return [{g: k * math.log(len(references) / max(1, clips_with[g])) for g, k in part.items()}
                for part in counts(words)]

    references = {}
    for words, clip in zip(written, clips):
        references.setdefault(clip, []).append(words)
    clips_with = Counter(g for refs in references.values()
                         for g in {g for words in refs for part in counts(words) for g in part})
    scores = []
    for words, clip in zip(said, clips):
        total = 0
        for ref in references[clip]:
            near = math.exp(-(len(words) - len(ref)) ** 2 / (2 * 6 ** 2))
            for h, r in zip(vectors(words), vectors(ref)):
                norm = math.hypot(*h.values()) * math.hypot(*r.values())
                dot = sum(min(x, r[g]) * r[g] for g, x in h.items() if g in r)
                total += near * dot / norm if norm else 0
        scores.append(10 * total / 4 / len(references[clip]))
    return scores


def measures(task, items, found):
    """{measure: (values, weights, groups)}, an entry of each for every item; see `score`.

    items: of one task and dataset. found: (answer, likeliest choice) for each.
    """
    answers, likely = zip(*found)
    truth = [item["output"] for item in items]
    said, written = [plain(a) for a in answers], [plain(t) for t in truth]
    ones, together = np.ones(len(items)), np.zeros(len(items), int)
    if task == "captioning":
        clips = [item["clip"] for item in items]
        times = Counter(clips)  # a clip with many captions counts as often as one with one
        share = np.array([1 / times[clip] for clip in clips])
        return {"CIDEr-D": (share * cider_d(said, written, clips), share, together)}
    if task == "transcription":
        lengths = np.array([len(words) for words in written])
        return {"word error rate": (np.array([*map(edits, said, written)]), lengths, together)}
    out = {"exact match": (np.array([a == t for a, t in zip(answers, truth)]), ones, together)}
    asked = np.array([len(item["choices"]) > 0 for item in items])
    by_words = [max(item["choices"], key=partial(overlap, a), default=None)
                for a, item in zip(answers, items)]
    for name, chosen in (("words", by_words), ("likelihood", likely)):
        right = np.array([c == t for c, t in zip(chosen, truth)])
        if asked.any():
            out[f"choice by {name}"] = (right, asked, together)
        if task == "classification":
            label = np.unique(truth, return_inverse=True)[1]
            out[f"choice by {name}, macro"] = (right, asked, label)
    return out


def score(values, weights, groups):
    """The sum of values over that of weights in every group; of the groups, the mean."""
    values, weights = np.bincount(groups, values), np.bincount(groups, weights)
    return np.mean(values[weights > 0] / weights[weights > 0]) if weights.any() else np.nan


def bootstrap(clips, values, weights, groups, draws=1000):
    """score, and its 95% interval (percentile bootstrap, Efron 1979): all clips are drawn again,
    each with all its questions, which share its fate."""
    _, clip = np.unique(clips, return_inverse=True)
    dice, n, scores = np.random.default_rng(0), clip.max() + 1, []
    for _ in range(draws):
        times = np.bincount(dice.integers(n, size=n), minlength=n)[clip]
        scores.append(score(values * times, weights * times, groups))
    return score(values, weights, groups), *np.nanpercentile(scores, [2.5, 97.5])


def print_scores(items, given):
    """Print each measure by dataset and task. given: {column: `found` of all items}."""
    print(f"{'dataset':<16}{'task':<16}{'questions':>9}  {'measure':<29}"
          + "".join(f"{column:<24}" for column in given))
    rows = {}
    for i, item in enumerate(items):
        rows.setdefault((item["domain"], item["task"]), []).append(i)
    for (dataset, task), which in sorted(rows.items()):
        some = [items[i] for i in which]
        columns = [measures(task, some, [found[i] for i in which]) for found in given.values()]
        for name in columns[0]:
            cells = [bootstrap([str(item["clip"]) for item in some], *column[name])
                     for column in columns]
            print(f"{dataset:<16}{task:<16}{len(which):>9}  {name:<29}" + "".join(
                f"{f'{s:.3f} [{low:.3f}, {high:.3f}]':<24}" for s, low, high in cells))


def score_list(model, o):
    """Ask all questions of a list, write the answers as LTU does, print how good they are."""
    if o.out and (Path(o.out).is_dir() or Path(o.out).resolve() == Path(o.data).resolve()):
        raise ValueError(f"--out {o.out}: is a folder, or the list itself: name a new file")
    questions = Questions(o.data, o.audio_root, o.skip_bad)
    items, (clips, seconds), labels = list(questions), timed(questions.clips()), {}
    graded = [item for item in items if item["task"] == "classification"]
    for item in graded:  # whose choices are by default all labels of its dataset
        labels.setdefault(item["domain"], {})[item["output"]] = None
    for item in graded:
        item["choices"] = item["choices"] or sorted(labels[item["domain"]])
    columns = {"model": clips}
    if o.controls:
        other = wrong_clips({item["clip"]: item["domain"] for item in items})
        # silence of the same length; a list about one clip alone has no wrong clip
        columns["deaf"] = {path: lambda rate, clip=clip: torch.zeros_like(clip(rate))
                           for path, clip in clips.items()}
        if other:
            columns["wrong clip"] = {path: clips[other[path]] for path in clips}
    asked = [(column[item["clip"]], item["instruction"], item["choices"])
             for column in columns.values() for item in items]
    found = ask_all(model, model.features, asked, o.batch, max_new_tokens=o.max_new_tokens,
                    temperature=o.temperature, top_p=o.top_p, seed=o.seed)
    tell_fit(model, list(seconds.values()))
    starts = range(0, len(found), len(items))
    print_scores(items, {name: found[at:at + len(items)] for name, at in zip(columns, starts)})
    if o.out:
        told = [{"prompt": item["instruction"], "pred": answer, "ref": item["output"],
                 "audio_id": item["audio_id"], "mode": model.mode, "task": item["task"]}
                for item, (answer, _) in zip(items, found)]
        save_atomically(o.out, json.dumps(told, indent=1, ensure_ascii=False).encode(),
                        lambda text, file: file.write(text))


# ------------------------------------------------------------------------------ what it heeds

def attention(llm, read):
    """The weights behind read(), whatever the LLM reads there with a cache: of each layer in turn
    (B, H, T, S), and the positions (1 or B, S) of all that it has.

    They are computed again, beside the model, from its own queries and keys: softmax(q k^T /
    sqrt(d)) over every key that is not after its query. The T queries are the last of the S tokens.
    """
    seen = []

    def look(module, given, _):
        x, rope, _, cache, layer = given
        positions = cache.positions[layer]
        T, S = x.shape[1], positions.shape[1]
        q, k = rotate(module.heads(module.q_proj(x)), rope), cache.keys[layer][:, :S]
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (B, S, K, d) -> (B, S, H, d)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / module.head_dim ** 0.5
        scores = scores + visibility(positions[:, S - T:], positions, scores.dtype)
        seen.append((scores.softmax(dim=-1), positions))

    hooks = [block.self_attn.register_forward_hook(look) for block in llm.model.layers]
    try:
        read()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def listen(model, features, question, answer):
    """What had the LLM's attention as it said each token of an answer (ids) about one clip.

    A token is said by the position before it, whose logits chose it. Returns {part: (layers,
    tokens, n)}, averaged over heads: a weight for each of the n tokens of the part, which is
    "start", a connector, or "text" (question and answer). All parts together sum to one.
    """
    if not all(isinstance(c, (MLPConnector, LFST)) for c in model.connectors.values()):
        raise ValueError("only with the connectors mlp and lfst, and not in mode flamingo, is each "
                         "token that the LLM attends to of one time")
    ids = torch.tensor([model.tokenizer.chat(question)[1] + answer[:-1]], device=model.device)
    cache = model.hear([features])
    seen = attention(model.llm, lambda: model.llm(ids, cache=cache))
    sizes = [tokens.shape[1] for _, tokens, _ in model.segments([features])] + [ids.shape[1]]
    found = seen[0][0].new_zeros(len(seen), len(answer), sum(sizes))
    for rows, (weights, positions) in zip(found, seen):  # LAL's keys lie in the cache out of order
        rows[:, positions[0]] = weights[0].mean(dim=0)[-len(answer):]
    return dict(zip(("start", *model.connectors, "text"), found.cpu().split(sizes, dim=-1)))


def on_grid(model, part, weights, seconds):
    """Weights (..., n) of a connector's tokens about a clip -> (..., steps, bands) of their grid,
    and the seconds that a step takes. Encoder tokens that were averaged into one share its weight;
    what fell on LFST's newlines, which are of no band, is left out."""
    connector, encoders = model.connectors[part], [model.encoders[k] for k in model.joins[part]]
    window = max(encoder.seconds for encoder in encoders)
    if isinstance(connector, LFST):
        steps, bands = connector.shape
        return weights.unflatten(-1, (-1, bands + 1))[..., :bands], window / steps
    encoder, = encoders
    steps, bands = encoder.steps(seconds), encoder.grid[1]
    pooled = torch.arange(steps * bands) // model.windows[part]  # the token each one went into
    shared = weights[..., pooled] / pooled.bincount()[pooled]
    return shared.unflatten(-1, (steps, bands)), window / encoder.grid[0]


def words(tokenizer, ids):
    """The words that ids spell: a list of (word, which of the ids)."""
    if not ids:
        raise ValueError("the answer is empty: there is no word to look at")
    text, groups = tokenizer.decode(ids), []
    ends = [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids) + 1)]
    for i in range(len(ids)):
        if not groups or text[ends[i]:ends[i + 1]][:1].isspace():
            groups.append([])
        groups[-1].append(i)
    return [(text[ends[group[0]]:ends[group[-1] + 1]].strip(), group) for group in groups]


# -------------------------------------------------------------------------------------- pictures

# The colour-blind can tell these apart (Okabe and Ito).
COLOURS = {"start": "#777777", "whisper": "#e69f00", "sslam": "#0072b2", "clap": "#cc79a7",
           "text": "#009e73"}


def canvas(*args, **kwargs):
    """matplotlib's figure and axes, and a function that writes the figure to a path."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("agg")  # needs no screen
    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                            "text.parse_math": False})
    figure, axes = pyplot.subplots(*args, layout="constrained", **kwargs)

    def save(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        print(f"wrote {path}", file=sys.stderr)

    return axes, save


def draw_listening(model, features, wave, question, answer, path):
    """The clip's spectrogram, and below, for each word of an answer (ids), where in time and in
    frequency each connector's tokens had its attention, on average over heads and layers."""
    said, seconds = words(model.tokenizer, answer), len(wave) / 16000
    heard = listen(model, features, question, answer)
    heights = [1.6] + [0.3 + 0.3 * len(said)] * len(model.connectors)
    (top, *axes), save = canvas(len(heights), sharex=True, figsize=(8, 0.9 + sum(heights)),
                                height_ratios=heights)
    bank = mel_bank(128, 257, 16000, 20, 8000, "kaldi")  # SSLAM's: 16 rows are one of its bands
    power = power_spectrum(F.pad(wave, (0, 512))[None], torch.hann_window(512), 160)[0]
    mel = (power @ bank).clamp(1e-10).log10()  # (frames, 128)
    top.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", vmin=mel.max() - 5,
               extent=(0, len(mel) / 100, 0, 128))
    rows = [16, 48, 80, 112]
    top.set(ylabel="kHz", yticks=rows,
            yticklabels=[f"{bank[:, row].argmax() * 16 / 512:.1f}" for row in rows])
    top.set_title(f"{question}  \u2192  {model.tokenizer.decode(answer).strip()}", wrap=True)
    for ax, (part, kinds) in zip(axes, model.joins.items()):
        weights = heard[part].mean(dim=0)  # (tokens, n)
        weights = torch.stack([weights[which].mean(0) for _, which in said])  # (words, n)
        grids, step = on_grid(model, part, weights, seconds)  # (words, steps, bands)
        for i, (grid, share) in enumerate(zip(grids, weights.sum(1))):
            ax.imshow(grid.T, origin="lower", aspect="auto", cmap="Blues", vmin=0,
                      vmax=grids.max(), extent=(0, len(grid) * step, i + 0.4, i - 0.4))
            ax.text(1.01, i, f"{share:.0%}", va="center", transform=ax.get_yaxis_transform())
        ax.set(title=f"{' and '.join(kinds)}: where a word's attention fell, and how much of it",
               xlim=(0, seconds), ylim=(len(said) - 0.4, -0.6), yticks=range(len(said)),
               yticklabels=[word for word, _ in said])
    axes[-1].set_xlabel("seconds")
    save(path)


def draw_masks(path):
    """What sees what in each mode, by the rule of model.py, on a few tokens of each kind."""
    sizes = dict(zip(COLOURS, (1, 4, 4, 2, 5)))
    kinds = [kind for kind, n in sizes.items() for _ in range(n)]
    places = torch.arange(len(kinds))
    seen = visibility(places[None], places[None], torch.float32)[0, 0] == 0  # (queries, keys)
    axes, save = canvas(1, 3, sharey=True, figsize=(10, 3.8))
    for ax, mode in zip(axes, ("plits", "lal", "pal")):
        for i, query in enumerate(kinds):
            if ROUTES[mode].get(query) != "lal":  # which is keys and values only
                ax.bar(places, 0.9, 0.9, bottom=i - 0.45, color=[
                    COLOURS[key] if see else "#eeeeee" for key, see in zip(kinds, seen[i])])
        middles = [kinds.index(kind) + (n - 1) / 2 for kind, n in sizes.items()]
        ax.set(title=mode.upper(), xlabel="keys", xticks=middles, yticks=middles, yticklabels=sizes,
               ylim=(len(kinds) - 0.4, -0.6))
        ax.set_xticklabels(sizes, rotation=45)
    axes[0].set_ylabel("queries (white: asks nothing)")
    save(path)


def draw_curves(folder):
    """Loss and accuracy of a run of train.py, from its metrics.jsonl, as FOLDER/curves.png."""
    lines = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation" in line]
    (left, right), save = canvas(1, 2, figsize=(10, 3.5))
    for stage, colour in zip(dict.fromkeys(line["stage"] for line in steps), COLOURS.values()):
        points = [(line["step"], line["loss"]) for line in steps if line["stage"] == stage]
        left.plot(*zip(*points), ".", color=colour, label=f"stage {stage}")
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.legend()
    right.plot([line["step"] for line in checks], [line["validation"] for line in checks], "o-",
               color=COLOURS["sslam"], label="validation")
    for scores in [line["scores"]["all all"] for line in lines if "scores" in line]:
        for (name, share), style in zip(list(scores.items())[1:], ["-", "--", "-.", ":"]):
            right.axhline(share, color=COLOURS["start"], linestyle=style, label=f"test: {name}")
    right.set(xlabel="step", ylabel="exactly right", ylim=(0, 1))
    right.yaxis.set_major_formatter("{x:.0%}")
    right.legend()
    save(f"{folder}/curves.png")


def newest_checkpoint():
    """The newest that train.py left under out/, or the one that comes with the code."""
    found = sorted(Path("out").glob("*/model.pt"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else Path(__file__).parent / "assets" / "lal.pt"


@dataclass(frozen=True)
class Options:
    audio: str = option(None, "the sound file to ask about; without it, talk to the LLM alone")
    prompt: str = option(None, "one question; without it, ask on the terminal")
    data: str = option(None, "a list of questions to answer and score, JSON or JSONL")
    audio_root: str = option(None, "folder that audio_id is relative to; else the list's own")
    skip_bad: bool = option(False, "go on without the items of --data that cannot be used")
    out: str = option(None, "with --data: where to write the answers, as JSON")
    controls: bool = option(False, "with --data: also score it deaf, and hearing a wrong clip")
    batch: int = option(32, "with --data: clips heard, and questions asked, at a time", low=1)
    llm: str = option(None, "folder of a real LLM to talk to, instead of a checkpoint's")
    ckpt: str = option(None, "checkpoint of train.py; without it, the newest under "
                            "out/, or assets/lal.pt")
    whisper: str = option(None, "where the Whisper checkpoint that it was trained with is now")
    sslam: str = option(None, "the same for SSLAM")
    clap: str = option(None, "the same for CLAP")
    max_new_tokens: int = option(48, "longest answer", low=1, high=4096)
    temperature: float = option(0.0, "0 takes the likeliest token, above 0 samples", high=100)
    top_p: float = option(1.0, "sample among the likeliest tokens of this total probability",
                          low=0.001, high=1)
    seed: int = option(0, "of the sampling")
    listen: str = option(None, "draw where the attention of the answer fell, a .png")
    curves: str = option(None, "draw loss and accuracy of a run, given its folder, and stop")
    masks: str = option(None, "draw what sees what in each mode, a .png, and stop")
    device: str = option("auto", "cpu, cuda, mps or auto")


def say(tokenizer, generate):
    """Print an answer while `generate(on_token=...)` makes it, and return its ids."""
    ids, said = [], ""

    def on_token(step):
        nonlocal said
        ids.extend(i for i in step if i is not None)
        # held back: the first bytes of a character, and white space that may be the last
        text = tokenizer.decode(ids).rstrip("\ufffd").strip()
        print(text[len(said):], end="", flush=True)
        said = text

    new = generate(on_token=on_token)
    print(tokenizer.decode(new).strip()[len(said):])
    return new


def main(o):
    if o.masks or o.curves:
        return draw_masks(o.masks) if o.masks else draw_curves(o.curves)
    if o.listen and not o.audio:
        raise ValueError("--listen draws an answer about a sound: give --audio too")
    if o.listen:
        canvas()  # before anything slow, as matplotlib may be missing
    if o.llm and (o.audio or o.ckpt or o.data):
        raise ValueError("--llm talks to an LLM that hears nothing: give it without --audio, "
                         "--ckpt and --data, or give it to train.py")
    if o.data and (o.audio or o.prompt):
        raise ValueError("--data has the questions and the sounds: leave out --audio and --prompt")
    if not o.data and (o.out or o.controls or o.audio_root):
        raise ValueError("--out, --controls and --audio-root go with --data, which is missing")
    if o.audio:
        wave = load_audio(o.audio, 16000)  # first, as it is quick and the likeliest to be mistaken
    if o.llm:
        model = AudioLLM(LLM.from_pretrained(o.llm), load_tokenizer(o.llm), {}, "plits", {})
    else:
        path = o.ckpt or newest_checkpoint()
        model = AudioLLM.load(path, {"whisper": o.whisper, "sslam": o.sslam, "clap": o.clap})
        print(f"{path}: mode {model.mode}, encoders {', '.join(model.encoders)}", file=sys.stderr)
    model.to(pick_device(o.device))
    if o.data:
        return score_list(model, o)
    features = [{}]
    if o.audio:
        tell_fit(model, [len(wave) / 16000])
        features = model.features([lambda rate: load_audio(o.audio, rate)])
    cache = model.hear(features)
    past = []  # of a talk; about a sound every question stands alone, as in training

    def answer(question):
        question = question.encode(errors="replace").decode()  # bytes that are no text, become ?
        before, prompt = model.tokenizer.chat(question, later=bool(past))
        ids = past + before + prompt if past else prompt
        new = say(model.tokenizer, partial(
            model.llm.generate, ids, o.max_new_tokens, o.temperature, o.top_p, cache=cache,
            eos_id=model.tokenizer.eos_id, seed=o.seed))
        if not o.audio:
            past[:] = ids + new
        if o.listen:
            draw_listening(model, features[0], wave, question, new, o.listen)

    if o.prompt is not None:
        return answer(o.prompt)
    print("ask; an empty line ends", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        answer(question)


if __name__ == "__main__":
    command_line(Options, __doc__, main)
