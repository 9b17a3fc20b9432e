"""Ask a trained model about a sound.

    python sample.py --audio out/demo/0.wav --prompt "What do you hear?"
    python sample.py --audio out/demo/0.wav            # hears it once, answers many questions
    python sample.py --llm SmolLM2-135M-Instruct       # talks to an LLM that hears nothing

Also here, because train.py and bench.py need them too: LTU-style lists of questions, and
command-line options made from the fields of a dataclass.
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from encoders import load_audio
from integrate import AudioLLM
from model import LLM, load_tokenizer


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
    parser = Parser(description=doc.split("\n")[0], allow_abbrev=False,
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
        parser.fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; what was saved stays as it was\n")


def pick_device(name):
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
    print(f"device {device}, float32, {torch.get_num_threads()} threads", file=sys.stderr)
    return device


# -------------------------------------------------------------------------- lists of questions

def read_items(path, audio_root=None):
    """Read an LTU-style JSON list, or JSONL, of {audio_id, instruction, output, ...}.

    audio_id is a path relative to audio_root (default: the file's own folder). An `input`, if there
    is one, is added to the instruction. Returns dicts with audio (Path), instruction, output, task
    and dataset. ValueError names the item and what is wrong with it. Format: LTU's OpenAQA.
    """
    root = Path(audio_root) if audio_root else Path(path).parent
    return [as_item(raw, path, f"item {i}", root) for i, raw in enumerate(read_json(path))]


def as_item(raw, path, name, root):
    """One item of the list in `path`, checked; `name` is what a complaint calls it."""
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {name} is {type(raw).__name__}, not an object")
    for field_name in ("audio_id", "instruction", "output"):
        if not isinstance(raw.get(field_name), str) or not raw[field_name].strip():
            raise ValueError(f"{path}: {name} has no text in its field {field_name!r}")
    for field_name in ("audio_id", "instruction", "output", "input", "task", "dataset"):
        text = raw.get(field_name) or ""
        # half of a cut emoji is valid JSON, but no character
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{path}: the field {field_name!r} of {name} is not text")
    audio = root / raw["audio_id"]
    if not audio.is_file():
        raise ValueError(f"{path}: {name}: no such audio file: {audio}")
    question = f"{raw['instruction'].strip()} {raw.get('input') or ''}".strip()
    return {"audio": audio, "instruction": question, "output": raw["output"].strip(),
            "task": raw.get("task") or "question", "dataset": raw.get("dataset") or Path(path).stem}


def read_json(path):
    """The list in a JSON file, or the lines of a JSONL file. ValueError if neither, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows puts a mark in front
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    if text.lstrip().startswith("["):
        lines = [(1, text)]
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for n, line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as e:
            line_number = n + e.lineno - 1
            raise ValueError(f"{path}: line {line_number} is not JSON ({e.msg})") from None
    items = found[0] if text.lstrip().startswith("[") else found
    if not items:
        raise ValueError(f"{path}: empty: expected a list of questions")
    return items


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
            print(f"{kind} hears {window:g} s: silence is added to {shorter} of {len(seconds)} "
                  f"clips (the shortest has {min(seconds):.2f} s)", file=sys.stderr)


def newest_checkpoint():
    found = sorted(Path("out").glob("*/model.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError("no checkpoint under out/: train one (python train.py) or give --ckpt")
    return found[-1]


@dataclass(frozen=True)
class Options:
    audio: str = option(None, "the sound file to ask about; without it, talk to the LLM alone")
    prompt: str = option(None, "one question; without it, ask on the terminal")
    llm: str = option(None, "folder of a real LLM to talk to, instead of a checkpoint's")
    ckpt: str = option(None, "checkpoint of train.py; without it, the newest under out/")
    whisper: str = option(None, "where the Whisper checkpoint that it was trained with is now")
    sslam: str = option(None, "the same for SSLAM")
    clap: str = option(None, "the same for CLAP")
    max_new_tokens: int = option(48, "longest answer", low=1, high=4096)
    temperature: float = option(0.0, "0 takes the likeliest token, above 0 samples", high=100)
    top_p: float = option(1.0, "sample among the likeliest tokens of this total probability",
                          low=0.001, high=1)
    seed: int = option(0, "of the sampling")
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
    if o.llm and (o.audio or o.ckpt):
        raise ValueError("--llm talks to an LLM that hears nothing: give it without --audio and "
                         "--ckpt, or give it to train.py")
    if o.audio:
        wave = load_audio(o.audio, 16000)  # first, as it is quick and the likeliest to be mistaken
    if o.llm:
        model = AudioLLM(LLM.from_pretrained(o.llm), load_tokenizer(o.llm), {}, "plits", {})
    else:
        path = o.ckpt or newest_checkpoint()
        model = AudioLLM.load(path, {"whisper": o.whisper, "sslam": o.sslam, "clap": o.clap})
        print(f"{path}: mode {model.mode}, encoders {', '.join(model.encoders)}", file=sys.stderr)
    model.to(pick_device(o.device))
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
