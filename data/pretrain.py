"""Pretraining on the listening world: makes assets/base.pt, miniature encoders and a miniature LLM.

The paper joins models that have learnt much before. Here, in miniature, Whisper learns to tell
syllables apart, SSLAM who speaks, what sounds and which instrument plays, CLAP (contrastive
language-audio pretraining) which words go with a clip. The LLM (large language model) learns to
answer about scenes, of which it reads what flawless encoders would say.

    python -m data.pretrain --seed 1 --base out/base.pt      # half an hour on 2 cores, by estimate
"""
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, count, islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data.lists import tokenize_conversation
from data.world import (ATTRIBUTES, INSTRUMENTS, KINDS, SCALE, SECONDS, SYLLABLES, VOICES,
                        attributes, checklist, questions, render, scene)
from encoders import ENCODERS, load_encoder, make_encoder
from integrate import AudioLLM, IntegrationConfig, Segment, prefill
from lib.cli import command_line, option
from lib.optim import cosine_schedule
from lib.tokenizers import load_tokenizer, tokenizer_from_bytes, train_tokenizer
from lib.weights import (as_value_error, build_for, bytes_to_tensor, load_checkpoint,
                         load_weights, save_atomically, tensor_to_bytes)
from model import LLM, KVCache, LLMConfig, pad_batch

BASE_FORMAT = "prepared parts 1"
# Scenes of the training split, from this index on: an encoder would hear the clips that it learnt
# from more clearly than those of the test, so training has none of them.
PRETRAIN_INDEX_OFFSET = 10 ** 6
TOKENIZER_SCENES = 3000  # from whose texts the tokenizer is learnt
PARTS = ("sslam", "llm", "whisper", "clap")  # the one that takes longest first
# The domains whose clips an encoder learns from; of the others it gets a quarter.
ENCODER_DOMAINS = {"whisper": ("speech",), "sslam": ("sound", "music")}
TARGET_WORDS = {"whisper": [".", *SYLLABLES, "sound"],
                "sslam": [".", *KINDS, *VOICES, *INSTRUMENTS]}
STEP_COLUMNS = ("previous step", "step", "next step")  # of the notes of a melody


# --------------------------------------------------------------- what encoders and LLM learn from

def target_word(kind, scene, events):
    """The word for the first of some events to an encoder of this kind; a dot if there is none."""
    if not events:
        return "."
    if events[0].name in SYLLABLES:
        return events[0].name if kind == "whisper" else scene["voice"]
    return "sound" if kind == "whisper" else events[0].name


def target_columns(kind):
    """{column of frame_targets: how many values it has}. Value 0 always means none."""
    words = len(TARGET_WORDS[kind])
    columns = {"word": words, "previous word": words, "next word": words, "number": 7}
    if kind == "sslam":
        columns["second word"] = words  # of a sound that is overlapped
        columns |= {name: 1 + len(values) for name, values in ATTRIBUTES.items()}
        columns |= dict.fromkeys(STEP_COLUMNS, 1 + len(SCALE))
    return columns


def frame_targets(kind, scene, times):
    """What an encoder that attends to the whole clip can know of what sounds at each of the times:
    a list of rows of numbers, with the columns of `target_columns`.

    A word and the words around it, the number of the event or note, and for SSLAM a second sound,
    attributes, and steps of a melody. Silence is all zeros, or the LLM need not look at the sound.
    """
    columns = target_columns(kind)
    targets = [frame_target(kind, scene, t) for t in times]
    return [[target.get(column, 0) for column in columns] for target in targets]


def frame_target(kind, scene, t):
    """{column: value} at time t, {} if nothing sounds; of two sounds that overlap, of the later."""
    begun = [e for e in reversed(scene["events"]) if e.start <= t]
    sounding = [e for e in begun if t < e.end]
    if not sounding:
        return {}
    words = {"word": sounding, "previous word": [e for e in begun if t >= e.end],
             "next word": [e for e in scene["events"] if e.start > t],
             "second word": sounding[1:]}
    target = {column: TARGET_WORDS[kind].index(target_word(kind, scene, events))
              for column, events in words.items()}
    latest = sounding[0]
    number = sum(e.name in SYLLABLES or scene["domain"] != "speech" for e in begun)
    steps = [0, 0, 0]
    if latest.beat:
        number = min(len(latest.notes), 1 + int((t - latest.start) / latest.beat))
        steps = [0, *(1 + note for note in latest.notes), 0][number - 1:number + 2]
    target |= zip(("number", *STEP_COLUMNS), (number, *steps))
    return target | {name: ("", *ATTRIBUTES[name]).index(word)
                     for name, word in attributes(latest).items()}


# --------------------------------------------------------------------------------------- learning

def progress(items, part, activity):
    """A progress bar for one of PARTS, in a line of its own: several are made at once."""
    return tqdm(items, desc=f"{part} {activity}", position=PARTS.index(part), mininterval=1)


def fit(modules, compute_loss, steps, lr, part):
    """Minimise compute_loss(step) over the parameters of a list of modules, with AdamW."""
    model = nn.ModuleList(modules).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = progress(range(steps), part, "learns")
    for step in bar:
        loss = compute_loss(step)
        optimizer.param_groups[0]["lr"] = lr * cosine_schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def make_spectrograms(encoder, kind, scenes, dtype=torch.float32):
    """The spectrograms of all scenes, in one tensor of this dtype."""
    return torch.cat([encoder.front_end(torch.from_numpy(render(s))[None]).to(dtype)
                      for s in progress(scenes, kind, "gets clips")])


def pretrain_encoder(kind, steps, o):
    """A miniature Whisper or SSLAM that has learnt to tell what sounds when: see frame_targets."""
    encoder = make_encoder(kind)
    # these weights start larger, or the positions, whose size is fixed, would drown the sound
    scales = {"conv1.weight": 3, "conv2.weight": 3, "local_encoder.proj.weight": 8}
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            p *= scales.get(name, 1)
    T, bands = encoder.grid
    times = (np.arange(T) + 0.5) * SECONDS / T
    scenes = (scene("train", i, o.seed) for i in count(PRETRAIN_INDEX_OFFSET))
    scenes = (s for s in scenes
              if s["domain"] in ENCODER_DOMAINS[kind] or s["render_seed"] % 4 == 0)
    scenes = list(islice(scenes, o.encoder_clips))
    spectrograms = make_spectrograms(encoder, kind, scenes, torch.half)  # thousands of them
    targets = torch.tensor([frame_targets(kind, s, times) for s in scenes])  # (clips, T, columns)
    sizes = list(target_columns(kind).values())
    head = nn.Linear(encoder.width, sum(sizes))  # used here only

    def compute_loss(step):
        batch = torch.randint(len(spectrograms), (8,))
        tokens = encoder(spectrograms[batch].float())[:, encoder.num_prefix_tokens:]
        logits = head(tokens).unflatten(1, (T, -1, min(bands, encoder.pool_size)))
        # what a connector will average is to know what sounds at its time, in whichever band
        logits = logits.mean(3)  # (B, T, averaged bands, all values)
        target = targets[batch][:, :, None].expand(*logits.shape[:-1], len(sizes))
        return sum(F.cross_entropy(part.flatten(0, 2), target[..., i].flatten())
                   for i, part in enumerate(logits.split(sizes, dim=-1)))

    fit([encoder, head], compute_loss, steps, 1.5e-3, kind)
    return encoder


def pretrain_clap(steps, o):
    """A miniature CLAP that has learnt which clip goes with which words, in any order. The loss is
    contrastive (Radford et al. 2021); the text side, a bag of words, is used here only."""
    encoder = make_encoder("clap")
    scenes = [scene("train", PRETRAIN_INDEX_OFFSET + i, o.seed) for i in range(o.encoder_clips)]
    bags = [{word for e in s["events"]
             for word in (target_word("whisper", s, [e]), target_word("sslam", s, [e]),
                          *attributes(e).values())} for s in scenes]
    vocabulary = sorted(set().union(*bags))
    texts = torch.tensor([[float(word in bag) for word in vocabulary] for bag in bags])
    spectrograms = make_spectrograms(encoder, "clap", scenes)
    text_proj, audio_proj = nn.Linear(len(vocabulary), 64), nn.Linear(encoder.width, 64)
    log_scale = nn.Parameter(torch.tensor(2.5))

    def compute_loss(step):
        batch = torch.randint(len(spectrograms), (24,))
        audio = F.normalize(audio_proj(encoder(spectrograms[batch]).mean(1)), dim=-1)  # (B, 64)
        text = F.normalize(text_proj(texts[batch]), dim=-1)
        similarity = log_scale.exp() * audio @ text.T  # (B, B)
        own = torch.arange(len(batch))
        return F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)

    modules = [encoder, text_proj, audio_proj, nn.ParameterList([log_scale])]
    fit(modules, compute_loss, steps, 2e-3, "clap")
    return encoder


def draw_conversations(i, o, rng):
    """Scene i, and four conversations about it, of (prompt, answer): a checklist comes last."""
    s = scene("train", PRETRAIN_INDEX_OFFSET + i, o.seed)
    subset = rng.permutation(questions(s, rng))[:3]
    return s, [[(q["instruction"] + "\n", q["output"])] for q in subset] + [checklist(s, rng)]


def token_times(encoder):
    """The middle of what each token that AudioLLM.encode gives is about, in seconds (n,)."""
    steps, bands = encoder.grid
    times = (np.arange(steps * bands) // bands + 0.5) * SECONDS / steps
    return times.reshape(-1, encoder.pool_size).mean(axis=1)


def pretrain_llm(o):
    """A tokenizer, and a miniature LLM that has learnt to answer about training scenes. In place of
    an encoder's tokens it reads frame_targets of the same times, each number as an embedding; in
    place of CLAP's, which do not tell when, zeros."""
    rng, D = np.random.default_rng(o.seed), LLMConfig.hidden_size
    times = {kind: token_times(make_encoder(kind)) for kind in ENCODERS}
    texts = [text for i in range(TOKENIZER_SCENES) for pairs in draw_conversations(i, o, rng)[1]
             for pair in pairs for text in pair]
    tokenizer = train_tokenizer(texts, LLMConfig.vocab_size)
    llm = LLM(replace(LLMConfig(), vocab_size=tokenizer.vocab_size))
    tables = nn.ModuleDict({  # used here only
        kind: nn.ModuleList(nn.Embedding(n, D) for n in target_columns(kind).values())
        for kind in ENCODER_DOMAINS})
    for p in tables.parameters():
        nn.init.normal_(p, std=D ** -0.5)

    def embed_targets(kind, scenes):
        if kind not in tables:
            return torch.zeros(len(scenes), len(times[kind]), D)
        rows = torch.tensor([frame_targets(kind, s, times[kind]) for s in scenes])
        return sum(table(column) for table, column in zip(tables[kind], rows.unbind(2)))

    def compute_loss(step):
        scenes, conversations = zip(*(draw_conversations(i, o, rng)
                                      for i in range(16 * step, 16 * step + 16)))
        audio = torch.cat([embed_targets(kind, scenes) for kind in ENCODERS], 1)  # (B, N, D)
        clip_index = [i for i, own in enumerate(conversations) for _ in own]
        ids, weights = zip(*(tokenize_conversation(tokenizer, c) for c in chain(*conversations)))
        ids, weights = (pad_batch([torch.tensor(row) for row in rows])[0]
                        for rows in (ids, weights))
        # every other batch goes LAL's way, so that the LLM suits both
        before = Segment("plits", llm.embed(torch.tensor([[tokenizer.bos_id]])))
        cache = KVCache(llm.config.num_hidden_layers)
        prefill(llm, [before, Segment(("plits", "lal")[step % 2], audio)], cache)
        cache = cache.fork(clip_index, ids.shape[1])
        hidden = prefill(llm, [Segment("plits", llm.embed(ids[:, :-1]))], cache)
        return llm.loss(hidden, ids, weights) / sum(map(len, chain(*conversations)))

    fit([llm, tables], compute_loss, o.llm_steps, 2e-3, "llm")
    return tokenizer, llm


# ----------------------------------------------------------------------------------- assets/base.pt

def make_part(name, o):
    """One of PARTS, in a process of its own: its weights as arrays, and what else base.pt needs."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(o.seed)
    extra = {}
    if name == "llm":
        tokenizer, part = pretrain_llm(o)
        extra = {"llm_config": asdict(part.config), "tokenizer": tokenizer.serialized}
    elif name == "clap":
        clips = math.ceil(o.encoder_clips / 3)
        part = pretrain_clap(o.encoder_steps // 8, replace(o, encoder_clips=clips))
    else:  # SSLAM has by far the most to learn
        part = pretrain_encoder(name, o.encoder_steps * (3 if name == "sslam" else 1), o)
    config = {} if name == "llm" else {"config": asdict(part.config)}
    state = {key: p.half() if p.is_floating_point() else p for key, p in part.state_dict().items()}
    return {key: p.numpy() for key, p in state.items()}, extra | config


def pretrain(o):
    """Make the file o.base. No part needs another, and two cores make two parts sooner than one
    after the other, so each gets a process."""
    with ProcessPoolExecutor(min(len(PARTS), os.cpu_count())) as pool:
        try:
            parts = dict(zip(PARTS, pool.map(make_part, PARTS, repeat(o))))
        except BrokenProcessPool:
            raise ValueError("one of the processes was killed; if for want of memory, lower "
                             "--encoder-clips") from None
        except BaseException:  # a Ctrl-C, too: the other processes would go on
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    state = {name: {key: torch.from_numpy(p) for key, p in parts[name][0].items()}
             for name in ("llm", *ENCODERS) if name in parts}
    extra = parts["llm"][1]
    extra["tokenizer"] = bytes_to_tensor(extra["tokenizer"])
    sizes = {name: parts[name][1]["config"] for name in state if name != "llm"}
    save_atomically(o.base, {"format": BASE_FORMAT, "state": state, "encoders": sizes} | extra)
    print(f"wrote {o.base}, {Path(o.base).stat().st_size / 1e6:.1f} MB")


def parse_encoders(text, miniatures=tuple(ENCODERS), kinds=tuple(ENCODERS)):
    """{kind: path or None} of "all", "whisper,sslam" or "whisper=tiny.en.pt,sslam=sslam.pt".

    None stands for the miniature. ValueError for what is neither a miniature nor has a path.
    """
    if text == "all":
        return dict.fromkeys(miniatures)
    paths = {}
    for entry in text.split(","):
        kind, equals, path = entry.partition("=")
        if kind not in (kinds if path else miniatures) or equals and not path:
            raise ValueError(f"--encoders {text}: {entry!r} is not one of {', '.join(kinds)} with "
                             f"=PATH, or a miniature: {', '.join(miniatures) or 'there is none'}")
        paths[kind] = path or None
    return paths


def make_parts(saved):
    """{name: module} of a base.pt's contents, without their weights."""
    sizes = saved.get("encoders", {})  # files of earlier versions have the usual ones
    encoders = {kind: ENCODERS[kind](ENCODERS[kind].Config(**sizes[kind])) if kind in sizes
                else make_encoder(kind) for kind in saved["state"] if kind != "llm"}
    return {"llm": LLM(LLMConfig(**saved["llm_config"])), **encoders}


def load_base(path, mode, config=IntegrationConfig(), encoders="all", llm=None):
    """An AudioLLM of the parts in base.pt, with new connectors.

    mode, config: see AudioLLM. encoders: those to join, see parse_encoders. llm: the folder of a
    real LLM, which takes the place of the miniature. ValueError, one line, for what cannot be read.
    """
    saved = load_checkpoint(path, BASE_FORMAT)
    guard = partial(as_value_error, path, "base of this version of the code",
                    "make it anew with python -m data.pretrain")
    with guard():
        with build_for(sum(map(list, saved["state"].values()), [])):
            parts = make_parts(saved)
        for name, part in parts.items():
            load_weights(part, dict(saved["state"][name]), name, torch.float32)
        tokenizer = tokenizer_from_bytes(tensor_to_bytes(saved["tokenizer"]))
    paths = parse_encoders(encoders, [kind for kind in parts if kind != "llm"])
    selected = {kind: load_encoder(kind, paths[kind]) if paths[kind] else parts[kind]
                for kind in paths}
    if llm:
        parts["llm"], tokenizer = LLM.from_pretrained(llm), load_tokenizer(llm)
    return AudioLLM(parts["llm"], tokenizer, selected, mode, config)


@dataclass(frozen=True)
class Options:
    base: str = option("assets/base.pt", "the file to make")
    seed: int = option(0, "of the scenes and the weights")
    llm_steps: int = option(4500, "training steps of the LLM")
    encoder_clips: int = option(12000, "clips that Whisper and SSLAM learn from; CLAP learns from "
                                       "a third as many", low=1)
    encoder_steps: int = option(2400, "training steps of Whisper; SSLAM takes three times as many, "
                                      "CLAP an eighth")


main = pretrain  # as every program calls it

if __name__ == "__main__":
    command_line(Options, __doc__, main)
