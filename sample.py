"""Ask a trained model about a sound, or a whole list of questions, and score its answers.

    python sample.py --audio out/demo/0.wav --prompt "What do you hear?"
    python sample.py --audio out/demo/0.wav            # hears it once, answers many questions
    python sample.py --llm SmolLM2-135M-Instruct       # talks to an LLM that hears nothing
    python sample.py --audio out/demo/0.wav --prompt "What do you hear?" --listen out/listen.png
    python sample.py --data out/demo/questions.json --out predictions.json   # answers and scores

B rows, T text tokens, D the LLM's width, V vocabulary.
"""
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.features import warn_length_mismatch, warn_outside_world
from data.lists import (MAX_CHARACTERS, QuestionList, drop_unreadable, record_seconds,
                        wrong_clips)
from data.pretrain import parse_encoders
from encoders import ENCODERS
from integrate import AudioLLM, Segment, prefill
from lib.attention import LISTEN_SECONDS, RATE, draw_answer
from lib.audio import check_audio, load_audio
from lib.cli import command_line, option, pick_device
from lib.plots import import_figure
from lib.scores import print_scores, split_labels
from lib.tokenizers import load_tokenizer
from lib.weights import check_output, save_atomically
from model import LLM, pad_batch

ROWS = 4  # questions and choices, which are short, for each clip that is held in memory


def answer_all(model, features, questions, batch=64, **sampling):
    """Answers to a list of (clip, text, choices): for each a text, and the log-likelihoods of its
    choices.

    Each clip is heard once, then asked all of its questions, each of which is read once for its
    answer and its choices. No more than `batch` clips, and then ROWS times as many questions or
    choices, are held at a time. features: a function from a list of clips to their features, as
    AudioLLM.features gives them. sampling: as for LLM.generate.
    """
    model.eval()
    answers, by_clip = {}, {}
    for i, (clip, *_) in enumerate(questions):
        by_clip.setdefault(clip, []).append(i)
    clips = list(by_clip)
    for first in tqdm(range(0, len(clips), batch), desc="answers", leave=False, mininterval=1):
        group = clips[first:first + batch]
        cache = model.hear(features(group))
        rows = [(row, i) for row, clip in enumerate(group) for i in by_clip[clip]]
        for start in range(0, len(rows), ROWS * batch):
            clip_index, index = map(list, zip(*rows[start:start + ROWS * batch]))
            _, texts, choices = zip(*(questions[i] for i in index))
            answers |= zip(index, ask(model, cache, texts, choices, clip_index, ROWS * batch,
                                      **sampling))
    return [answers[i] for i in range(len(questions))]


def ask(model, cache, texts, choices, clip_index, batch, max_new_tokens=48, **sampling):
    """The answers of `answer_all` to questions about the clips in a cache; question i is about its
    row clip_index[i]. batch: choices scored at a time."""
    prompts = [model.tokenizer.chat(text)[1] for text in texts]
    asked = read_prompts(model, cache, prompts, clip_index)
    replies = model.llm.generate([prompt[-1:] for prompt in prompts], max_new_tokens, cache=asked,
                                 eos_id=model.tokenizer.eos_ids, **sampling)
    replies = [normalize("NFC", model.tokenizer.decode(ids).strip()) for ids in replies]
    return zip(replies, score_choices(model, asked, prompts, choices, batch))


@torch.no_grad()
def read_prompts(model, cache, prompts, clip_index):
    """A fork of the cache that has read each prompt, a list of ids, but for its last one. Prompt i
    is about row clip_index[i]; what follows it, an answer or a choice, begins with its last id."""
    ids, lengths = pad_batch([torch.tensor(prompt[:-1]) for prompt in prompts], model.device)
    asked = cache.fork(clip_index, ids.shape[1])
    prefill(model.llm, [Segment("plits", model.llm.embed(ids), lengths)], asked)
    return asked


@torch.no_grad()
def score_choices(model, asked, prompts, choices, batch):
    """The log-likelihood of each choice of each question as its whole answer: the sum of log
    p(token), the end of the answer included. asked: see read_prompts."""
    llm, likelihoods = model.llm, [[] for _ in prompts]
    pairs = [(i, model.tokenizer.reply(choice)) for i, own in enumerate(choices) for choice in own]
    for start in range(0, len(pairs), batch):
        index, replies = zip(*pairs[start:start + batch])
        rows = [torch.tensor(prompts[i][-1:] + reply[:-1]) for i, reply in zip(index, replies)]
        ids, lengths = pad_batch(rows, model.device)
        targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(reply) for reply in replies],
                                                  batch_first=True, padding_value=-100)  # left out
        segment = Segment("plits", llm.embed(ids), lengths)
        hidden = prefill(llm, [segment], asked.fork(index, ids.shape[1]))  # (B, T, D)
        logits = llm.head(hidden).transpose(1, 2)  # (B, V, T)
        loss = F.cross_entropy(logits, targets.to(model.device), reduction="none").sum(dim=1)
        for i, value in zip(index, loss.tolist()):
            likelihoods[i].append(-value)
    return likelihoods


def add_label_choices(items):
    """Give questions of classification and tagging that have no choices all labels of their
    dataset."""
    labels = {}
    graded = [item for item in items if item["task"] in ("classification", "tagging")]
    for item in graded:
        labels.setdefault((item["domain"], item["task"]), set()).update(split_labels(item))
    for item in graded:
        item["choices"] = item["choices"] or sorted(labels[item["domain"], item["task"]])


def score_list(model, o):
    """Ask all questions of a list, write the answers as LTU does, print how good they are."""
    questions = QuestionList(o.data, o.audio_root, o.skip_bad)
    clips, seconds = record_seconds(questions.clips(model.seconds))
    if o.out:
        parts = (*model.encoders.values(), model.llm)
        check_output(o.out, [o.data, o.ckpt, *clips, *(p.checkpoint_path or "" for p in parts)])
    items = drop_unreadable(questions, clips) if o.skip_bad else list(questions)
    add_label_choices(items)
    columns = {"model": clips}
    if o.controls:
        columns["silence"] = {clip: lambda rate, read=read: torch.zeros_like(read(rate))
                              for clip, read in clips.items()}
        if other := wrong_clips({item["clip"]: item["domain"] for item in items}):
            columns["wrong clip"] = {clip: clips[wrong] for clip, wrong in other.items()}
    prompts = [(column[item["clip"]], item["instruction"], item["choices"])
               for column in columns.values() for item in items]  # one call: a clip is heard once
    answers = answer_all(model, model.features, prompts, o.batch, max_new_tokens=o.max_new_tokens,
                         temperature=o.temperature, top_p=o.top_p, seed=o.seed)
    warn_length_mismatch(model, list(seconds.values()))
    n = len(items)
    print_scores(items, {name: answers[i * n:(i + 1) * n] for i, name in enumerate(columns)})
    if o.out:
        rows = [{"prompt": item["instruction"], "pred": text, "ref": item["output"],
                 "audio_id": item["audio_id"], "mode": model.mode, "task": item["task"]}
                for item, (text, _) in zip(items, answers)]
        content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
        save_atomically(o.out, content, lambda content, file: file.write(content))


@dataclass(frozen=True)
class Options:
    audio: str = option(None, "the sound file to ask about; without it, talk to the LLM alone",
                        group="what to ask")
    prompt: str = option(None, "one question; without it, ask on the terminal")
    data: str = option(None, "a list of questions to answer and score, JSON or JSONL")
    audio_root: str = option(None, "folder that audio_id is relative to; else the list's own")
    skip_bad: bool = option(False, "go on without the items of --data that cannot be used")
    ckpt: str = option(None, "checkpoint of train.py; else the newest under out/, or assets/lal.pt",
                       group="model")
    encoders: str = option(None, "where files that the checkpoint names lie now: llm=SmolLM2")
    llm: str = option(None, "folder of a real LLM to talk to, instead of a checkpoint's")
    device: str = option("auto", "cpu, cuda, mps or auto")
    max_new_tokens: int = option(48, "longest answer", low=1, high=4096, group="answers")
    temperature: float = option(0.0, "0 takes the likeliest token, above 0 samples", high=100)
    top_p: float = option(1.0, "sample among the likeliest tokens of this probability", 0.001, 1)
    seed: int = option(0, "of the sampling")
    batch: int = option(32, "with --data: clips heard at a time, and four times as many questions",
                        low=1)
    out: str = option(None, "with --data: where to write the answers, as JSON", group="output")
    controls: bool = option(False, "with --data: score it on silence and on a wrong clip too")
    listen: str = option(None, "draw where the attention of the answer fell, a .png")


def check_options(o):
    """Refuse options that do not go together, before anything slow."""
    if o.listen is not None and not o.audio:
        raise ValueError("--listen draws an answer about a sound: give --audio too")
    if o.listen is not None:
        import_figure()  # matplotlib may be missing
    if o.llm and (o.audio or o.ckpt or o.data):
        raise ValueError("--llm talks to an LLM that hears nothing: give it without --audio, "
                         "--ckpt and --data, or give it to train.py")
    if o.data and (o.audio or o.prompt):
        raise ValueError("--data has the questions and the sounds: leave out --audio and --prompt")
    if not o.data and (o.out or o.controls or o.audio_root):
        raise ValueError("--out, --controls and --audio-root go with --data, which is missing")
    if 0 < o.temperature < 1e-6:  # beyond what float32 can divide by
        raise ValueError(f"--temperature {o.temperature:g}: expected 0, or 1e-06 to 100")


def newest_checkpoint():
    """The newest that train.py left under out/, or the one that comes with the code."""
    checkpoints = sorted(Path("out").glob("*/model.pt"), key=lambda p: p.stat().st_mtime)
    return checkpoints[-1] if checkpoints else Path(__file__).parent / "assets" / "lal.pt"


def load_model(path, encoders=None):
    """The AudioLLM of a checkpoint. encoders: where files that it names lie now, as text."""
    paths = parse_encoders(encoders, kinds=(*ENCODERS, "llm")) if encoders else {}
    if not all(paths.values()):
        raise ValueError(f"--encoders {encoders}: name a file for each, like whisper=tiny.en.pt")
    model = AudioLLM.load(path, paths)
    print(f"{path}: mode {model.mode}, encoders {', '.join(model.encoders)}", file=sys.stderr)
    return model


def stream_answer(tokenizer, generate):
    """Print an answer while `generate(on_token=...)` makes it, and return its ids."""
    ids, printed = [], ""

    def on_token(step):
        nonlocal printed
        ids.extend(i for i in step if i is not None)
        # held back: the first bytes of a character, and white space that may be the last
        text = tokenizer.decode(ids).rstrip("\ufffd").strip()
        print(text[len(printed):], end="", flush=True)
        printed = text

    new = generate(on_token=on_token)
    print(tokenizer.decode(new).strip()[len(printed):])
    return new


def read_questions():
    """Questions from the terminal, up to an empty line."""
    print("ask; an empty line ends", file=sys.stderr)
    try:
        while question := input("> ").strip():
            yield question
    except (EOFError, RuntimeError):  # the end, or no terminal at all
        pass


def main(o):
    check_options(o)
    o = o if o.llm or o.ckpt else replace(o, ckpt=str(newest_checkpoint()))
    # first the sound, as it is quick to read and the likeliest to be mistaken
    wave = load_audio(o.audio, RATE, LISTEN_SECONDS) if o.audio else None
    model = (AudioLLM(LLM.from_pretrained(o.llm), load_tokenizer(o.llm), {}, "plits") if o.llm
             else load_model(o.ckpt, o.encoders))
    model.to(pick_device(o.device))
    if o.data:
        return score_list(model, o)
    if o.audio:
        warn_length_mismatch(model, [check_audio(o.audio)])
        warn_outside_world(model, o.audio)
    clip = partial(load_audio, o.audio, seconds=model.seconds)
    features, = model.features([clip]) if o.audio else [{}]
    tokenizer, cache = model.tokenizer, model.hear([features])
    past = []  # ids of the talk so far; about a sound each question stands alone, as in training
    for question in read_questions() if o.prompt is None else [o.prompt]:
        question = question.encode(errors="replace").decode()  # bytes that are no text become ?
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"a question can have {MAX_CHARACTERS:,} characters: shorten it")
        before, prompt = tokenizer.chat(question, continuing=bool(past))
        ids = past + before + prompt if past else prompt
        answer = stream_answer(tokenizer, partial(
            model.llm.generate, ids, o.max_new_tokens, o.temperature, o.top_p, cache=cache,
            eos_id=tokenizer.eos_ids, seed=o.seed))
        if not o.audio:
            past = ids + answer
        if o.listen is not None:
            draw_answer(model, features, wave, question, answer, o.listen)


if __name__ == "__main__":
    command_line(Options, __doc__, main)
