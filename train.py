"""Train an audio LLM: encoders, connectors and an LLM, joined in one of integrate.py's modes.

The paper's curriculum (its version 1, section on training): three stages, from connectors alone on
classification to connectors and LLM on all tasks. Data: the listening world, or a list of yours.

    python train.py --mode lal                                             # minutes on a laptop
    python train.py --mode plits --data train.json --val-data val.json     # on your own sounds

--out gets model.pt, stage*.pt and metrics.jsonl. A training that was broken off goes on with
--resume from its newest step-*.pt, on a CPU with the same losses to the bit.
"""
import json
import math
import os
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data.world
from data.batches import ItemDataset, index_batches, load_batches
from data.features import extract_features, load_features
from data.lists import QuestionList, add_token_ids, count_answers, wrong_clips
from data.pretrain import load_base
from integrate import CONNECTORS, MODES, IntegrationConfig
from lib.checkpoints import load_training, restore_training, restore_weights
from lib.cli import command_line, option, pick_device
from lib.optim import cosine_schedule, peak_memory
from lib.processes import (catch_stop_signals, join_processes, leave_processes, rank_and_size,
                           sum_over_processes)
from lib.scores import print_examples
from lib.weights import copy_atomically
from model import pad_batch
from sample import answer_all

VALIDATION_CLIPS = 30  # of the listening world, for the line at the end of a stage
LOG_EVERY = 10         # steps between two lines of metrics.jsonl
STEP_FILES = 2         # how many of the newest step-*.pt stay
LORA_RANK = 8          # of --freeze lora
ENCODER_RATE = 0.1     # learning rate of encoders that are trained, relative to the LLM's


# ---------------------------------------------------------------------------------- the curriculum

@dataclass(frozen=True)
class Stage:
    name: str
    tasks: tuple                # ("all",) for all
    rates: dict                 # part of the model that is trained: its peak learning rate
    batch: int                  # questions a step
    steps: int = 0
    epochs: float = 0.0         # passes over the stage's questions, instead of steps
    feature_noise: float = 0.0  # relative to the features' standard deviation


# The paper's stages: in miniature, for the listening world,
CLOSED = ("classification", "reasoning", "checklist")
SMALL = (Stage("1", ("classification",), {"connectors": 3e-3}, 32, 100, feature_noise=0.3),
         Stage("2", CLOSED, {"connectors": 3e-3, "llm": 1e-3}, 32, 300, feature_noise=0.3),
         Stage("3", ("all",), {"connectors": 3e-3, "llm": 1e-3}, 32, 1600, feature_noise=0.3))
# and for a real LLM, which has much to forget, at the rates of LTU (Listen, Think and Understand).
REAL = (Stage("1", ("classification",), {"connectors": 1e-3}, 256, epochs=2),
        Stage("2", CLOSED, {"connectors": 1e-4, "llm": 1e-4}, 256, epochs=1),
        Stage("3", ("all",), {"connectors": 1e-4, "llm": 1e-4}, 256, epochs=1))


def curriculum(o):
    """The three stages, with what the options change in them."""
    stages = []
    for stage, steps in zip(REAL if o.llm else SMALL, (o.steps1, o.steps2, o.steps3)):
        scale = o.lr / stage.rates["llm"] if o.lr and "llm" in stage.rates else 1
        rates = {part: rate * scale for part, rate in stage.rates.items()}
        if o.train_encoders and "llm" in rates:
            rates["encoders"] = ENCODER_RATE * rates["llm"]
        if o.freeze == "llm":
            rates.pop("llm", None)
        if steps is not None:
            stage = replace(stage, steps=steps, epochs=0)
        stages.append(replace(
            stage, rates=rates, batch=o.batch or stage.batch,
            tasks=tuple(o.tasks.split(",")) if o.tasks else stage.tasks,
            feature_noise=stage.feature_noise if o.feature_noise is None else o.feature_noise))
    return stages


def select_items(stage, items):
    """The items that a stage learns from, as arrays: indices, sizes, and clips (None: unknown)."""
    clips = None
    if isinstance(items, QuestionList):
        tasks, numbers = list(items.tasks), items.task_numbers
        # a token is some four bytes of text, or in most encoders a tenth of a second
        sizes = np.asarray(items.sizes) / 4 + 10 * np.minimum(items.seconds, 30)
    else:
        tasks, numbers = np.unique([item["task"] for item in items], return_inverse=True)
        sizes = np.array([len(item["ids"]) for item in items])
        clips = np.array([item["clip"] for item in items])
    learnt = [n for n, task in enumerate(tasks) if task in stage.tasks or "all" in stage.tasks]
    index = np.flatnonzero(np.isin(numbers, learnt)).astype(np.int32)
    return index, sizes[index], None if clips is None else clips[index]


def plan_stages(items, o):
    """The stages to run: a list of each one, its number of steps, and its batches of indices."""
    plan = []
    for stage in curriculum(o):
        if o.stage not in ("all", stage.name):
            continue
        index, sizes, clips = select_items(stage, items)
        steps = math.ceil(stage.epochs * len(index) / stage.batch) or stage.steps
        if not len(index) or not steps:
            print(f"stage {stage.name}: {len(index):,} questions, {steps} steps: left out")
            continue
        print(f"stage {stage.name}: {len(index):,} questions, {steps} steps of {stage.batch}")
        rng = np.random.default_rng([o.seed, int(stage.name)])
        order = islice(index_batches(sizes, stage.batch, rng, clips), steps)
        plan.append((stage, steps, map(index.__getitem__, order)))  # map keeps this stage's index
    if not plan:
        raise ValueError("nothing to train: no stage has both steps and questions of its tasks")
    return plan


# -------------------------------------------------------------------------------------------- data

@dataclass
class Split:
    """The training, validation or test data."""
    clips: dict                   # {clip: function rate -> (samples,)}
    items: list | QuestionList    # questions about them
    fingerprint: str              # changes when the data do
    features: dict | None = None  # {clip: {kind: (n, De)}}; None: encoded when they are needed
    unreadable: set | None = None  # clips that were left out; None: such a clip is an error


def load_data(o, tokenizer, seconds=None):
    """The training, validation and test Split that the options name; some may be the same one.
    seconds: how much of a clip is heard."""
    if not o.data and (o.val_data or o.audio_root or o.skip_bad):
        raise ValueError("--val-data, --audio-root and --skip-bad go with --data, which is missing")
    if o.data and not o.keep_features and not o.val_data:
        raise ValueError("--no-keep-features with --data needs --val-data besides")
    splits, unreadable = [], set() if o.skip_bad else None
    for path in filter(None, (o.data, o.val_data)):
        questions = QuestionList(path, o.audio_root, o.skip_bad)
        # of a list of millions, whose features are not kept, not even the clips' names are
        clips = questions.clips(seconds) if o.keep_features or splits else {}
        splits.append(Split(clips, questions, questions.fingerprint, unreadable=unreadable))
    if not o.data:
        for name, size in (("train", o.clips), ("val", VALIDATION_CLIPS), ("test", o.test_clips)):
            world = data.world.load_world(name, size, o.seed, o.difficulty)
            splits.append(Split(*world, f"{name} {size} {o.seed} {o.difficulty}"))
        add_token_ids(tokenizer, splits[0].items)
    if len(splits) == 1:
        print("no --val-data: the scores below are on the training questions themselves")
    return splits[0], splits[1] if len(splits) > 1 else splits[0], splits[-1]


def load_scored(model, split):
    """The features of a split's clips, and the items about them, to score answers."""
    features = split.features or extract_features(model, split.clips, split.unreadable)
    return features, [item for item in split.items if item["clip"] in features]


# ---------------------------------------------------------------------------------------- training

def answer_loss(model, features, items, total=None):
    """Mean over answers of the cross-entropy of each one's n tokens, summed and divided by sqrt(n).

    features: {clip: {kind: (n, De)}}. total: the number of answers to divide by, if these items are
    a part of a larger batch.
    """
    ids, weights = (pad_batch([torch.tensor(item[key]) for item in items], model.device)[0]
                    for key in ("ids", "weights"))  # (B, T) each
    clips = list(dict.fromkeys(item["clip"] for item in items))  # each is heard once
    clip_index = [clips.index(item["clip"]) for item in items] if len(clips) < len(items) else None
    hidden = model([features[clip] for clip in clips], ids[:, :-1], clip_index)  # (B, T - 1, D)
    return model.llm.loss(hidden, ids, weights) / (total or sum(map(count_answers, items)))


def add_feature_noise(features, scale, step):
    """Features {clip: {kind: (n, De)}} with noise of `scale` times their standard deviation, or
    those that are kept would be learnt by heart. The noise is a function of step and clip."""
    if not scale:
        return features
    noisy = {}
    for clip, kinds in features.items():
        rng = torch.Generator().manual_seed(zlib.crc32(f"{step} {clip}".encode()))
        randn = partial(torch.randn, generator=rng)
        noisy[clip] = {kind: x + scale * x.detach().std() * randn(x.shape).to(x)
                       for kind, x in kinds.items()}
    return noisy


def compute_gradients(model, features, parts, stage, step, signals=(), precision="auto"):
    """Leave the gradient of one batch, clipped to norm 1, in the parameters.

    features: {clip: {kind: (n, De)}}, None to encode. parts: this process's Microbatches. step: of
    all. Returns the loss, the norm before clipping, and whether any process has received `signals`.
    """
    half = precision == "bfloat16" or precision == "auto" and model.device.type == "cuda"
    model.zero_grad()
    loss = 0.0
    for part in filter(lambda part: part.items, parts):
        with torch.autocast(model.device.type, torch.bfloat16, half):
            encoded = features or dict(zip(
                part.spectrograms, model.encode(list(part.spectrograms.values()))))
            used = {item["clip"]: encoded[item["clip"]] for item in part.items}
            used = add_feature_noise(used, stage.feature_noise, step)
            part_loss = answer_loss(model, used, part.items, part.answers)
        part_loss.backward()
        loss = loss + part_loss.detach()
    loss, stopping = sum_over_processes(model, float(loss), len(signals))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    return loss, norm, stopping > 0


def is_trained(name, rates, freeze):
    """Whether a stage with these rates trains the parameter of this name."""
    part = name.split(".")[0]
    frozen = {"none": False, "ffn": ".mlp." in name, "llm": True, "lora": "lora_" not in name}
    return part in rates and not (part == "llm" and frozen[freeze])


def make_optimizer(model, rates, freeze="none"):
    """AdamW for the parts in `rates` {part: peak learning rate}; all other parts are frozen, and
    what `freeze`, as in Options, says of the LLM's."""
    groups = {}
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, rates, freeze))
        if p.requires_grad:  # weight decay would pull gains, biases and gates to zero
            groups.setdefault((name.split(".")[0], 0.05 * (p.ndim > 1)), []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "lr": rates[part], "peak": rates[part], "weight_decay": decay}
         for (part, decay), params in sorted(groups.items(), key=lambda group: group[0])],
        betas=(0.9, 0.98), fused=True)


def train(model, plan, train_data, val_data, o, file, start):
    """Run the planned stages from where `start` left them. Returns the mean seconds of a step."""
    step, loss, seconds = start["step"], start["loss"], []
    for stage, steps, batches in plan:
        if stage.name < start["stage"]:
            continue
        first = start["at"] if stage.name == start["stage"] else 0
        optimizer = start_stage(model, stage, o, start)
        batches = load_batches(islice(batches, first, None), ItemDataset(train_data, model), o)
        bar = tqdm(batches, f"stage {stage.name}", steps, initial=first, leave=False, mininterval=1)
        with catch_stop_signals() as signals:
            for i, parts in enumerate(bar, first):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * cosine_schedule(i, steps)
                began = time.perf_counter()
                loss, norm, stopping = compute_gradients(
                    model, train_data.features, parts, stage, step, signals, o.precision)
                if not math.isfinite(loss + norm):  # before weights and files are spoilt
                    raise ValueError(f"stage {stage.name}, step {i + 1}: the loss is {loss:.3g} "
                                     f"and its gradient {norm:.3g}; try a lower --lr")
                optimizer.step()
                seconds.append(time.perf_counter() - began)
                step += 1
                if i % LOG_EVERY == 0:
                    bar.set_postfix(loss=f"{loss:.3f}")
                    log(file, step=step, stage=stage.name, loss=loss, norm=norm,
                        lr=optimizer.param_groups[0]["lr"])
                if stopping or (i + 1) % o.save_every == 0 or i + 1 == steps:
                    save_step(model, optimizer, o, stage=stage.name, at=i + 1, step=step, loss=loss,
                              logged=file.tell(), data=train_data.fingerprint)
                if stopping:
                    bar.close()
                    print(f"saved after step {step}; --resume goes on from there", file=sys.stderr)
                    raise KeyboardInterrupt
        finish_stage(model, val_data, o, file, stage, step, loss, np.mean(seconds or [0]))
    return float(np.mean(seconds or [0]))


def start_stage(model, stage, o, start):
    """Unfreeze what a stage trains; returns its optimizer, as `start` left it in mid-stage."""
    print(f"stage {stage.name}: trains "
          + " and ".join(f"{part} at {lr:g}" for part, lr in stage.rates.items()))
    optimizer = make_optimizer(model, stage.rates, o.freeze)
    if stage.name == start["stage"]:
        restore_training(optimizer, start)
    model.train()
    if "encoders" not in stage.rates:
        model.encoders.eval()
    return optimizer


def finish_stage(model, val_data, o, file, stage, step, loss, seconds):
    """Validate, and save where the next stage starts, which is also the model to ask."""
    features, items = load_scored(model, val_data)
    share = exact_match(model, features, items)
    print(f"stage {stage.name}: loss {loss:.3f}, validation {share:.1%} exact "
          f"({len(items)} questions), {1000 * seconds:.0f} ms a step")
    log(file, step=step, stage=stage.name, validation=share)
    if rank_and_size()[0] == 0:
        path = f"{o.out}/stage{stage.name}.pt"
        model.save(path, step=step, stage=stage.name, options=asdict(o))
        copy_atomically(path, f"{o.out}/model.pt")


def print_parameters(model, stages, freeze):
    """Print how many parameters each part has, and in which stages it is trained."""
    sizes, states = Counter(), {}
    for name, p in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        if name.startswith("llm."):
            part = "llm feed-forward" if ".mlp." in name else "llm, the rest"
        sizes[part] += p.numel()
        trained_in = ", ".join(s.name for s in stages if is_trained(name, s.rates, freeze))
        states[part] = f"trained in stage {trained_in}" if trained_in else "frozen"
    for part, size in sizes.items():
        print(f"{part:<20}{size:>14,} parameters, {states[part]}")


# ---------------------------------------------------------------------------- logs and checkpoints

def log(file, **line):
    try:
        print(json.dumps(line), file=file, flush=True)
    except OSError as error:  # a full disk
        raise OSError(error.errno, error.strerror, file.name) from None


def open_metrics(o, start):
    """metrics.jsonl to write to, for the first process; an earlier training's is renamed."""
    path = Path(o.out) / "metrics.jsonl"
    if rank_and_size()[0]:
        path = os.devnull
    elif o.resume and path.stat().st_size > start["logged"]:
        os.truncate(path, start["logged"])  # what came after will come again
    elif not start["step"] and path.exists():
        os.replace(path, path.with_name("metrics.old.jsonl"))
    return open(path, "a", encoding="utf-8")


def save_step(model, optimizer, o, **progress):
    """Write all that it takes to go on from here as if never broken off."""
    if rank_and_size()[0] == 0:
        model.save(f"{o.out}/step-{progress['step']:08d}.pt", optimizer=optimizer.state_dict(),
                   rng=torch.get_rng_state(), options=asdict(o), **progress)
        for path in list_steps(o.out)[:-STEP_FILES]:
            path.unlink()


def list_steps(folder):
    """The checkpoints of an unfinished training, oldest first."""
    return sorted(Path(folder).glob("step-*.pt"))


# The options that may change at --resume, as they alter sums by no more than their rounding, or,
# --skip-bad, leave out what could not be learnt.
RESUMABLE_CHANGES = {"resume", "out", "device", "save_every", "micro", "workers",
                     "keep_features", "feature_cache", "skip_bad"}


def load_start(model, o, fingerprint):
    """Where training starts, a dict, and the model with the weights of then: at nothing, after the
    stage before --stage, or, with --resume, where the newest checkpoint left it."""
    unfinished = list_steps(o.out)
    if o.resume and not unfinished:
        raise ValueError(f"{o.out} holds no step-*.pt: nothing to --resume there")
    if unfinished and not o.resume:
        raise ValueError(f"{unfinished[-1]} is of an unfinished training: go on with --resume, "
                         "delete it, or choose another --out")
    start = {"stage": "", "at": 0, "step": 0, "loss": math.nan}
    if not o.resume and o.stage in ("all", "1"):
        return start
    path = unfinished[-1] if o.resume else Path(o.out) / f"stage{int(o.stage) - 1}.pt"
    if not path.is_file():
        raise ValueError(f"{path} is missing: train with --stage {int(o.stage) - 1} first")
    saved = load_training(path, o.resume)
    restore_weights(model, path, saved)
    if not o.resume:
        return start | {"step": saved["step"]}
    for name, value in asdict(o).items():
        old = saved["options"].get(name)
        if name not in RESUMABLE_CHANGES and value != old:
            raise ValueError(f"{path}: was trained with --{name.replace('_', '-')} {old}, not "
                             f"{value}; --resume goes on as it began")
    if saved["data"] != fingerprint:
        raise ValueError(f"{o.data} has changed since {path} was saved: it had {saved['data']}, "
                         f"it has {fingerprint}; put it back as it was, and if a clip cannot be "
                         "read, leave its questions in and add --skip-bad")
    return saved


# -------------------------------------------------------------------------------------- evaluation

def predict(model, features, items, clip_of=lambda item: item["clip"]):
    """The model's answers to items, by the features {clip: {kind: (n, De)}} of their clips."""
    questions = [(clip_of(item), item["instruction"], ()) for item in items]
    answers = answer_all(model, lambda clips: [features[clip] for clip in clips], questions)
    return [text for text, _ in answers]


def exact_match(model, features, items):
    """The share of answers that are exactly right."""
    return np.mean([a == item["output"] for a, item in zip(predict(model, features, items), items)])


def evaluate(model, features, items, train_items):
    """Print the exact match by domain and task, beside three controls: the same model given silence
    or a wrong clip of the same domain, and the majority answer of training. Returns {"domain task":
    {"questions": their number, "model" or control: share}}; domain and task may be "all"."""
    silence = model.features([lambda rate: torch.zeros(int(data.world.SECONDS * rate))])
    other = wrong_clips({item["clip"]: item["domain"] for item in items})
    answers = {"model": predict(model, features, items),
               "silence": predict(model, silence, items, lambda item: 0)}
    if other:
        answers["wrong clip"] = predict(model, features, items, lambda item: other[item["clip"]])
    answers["majority"] = majority_answers(items, train_items)
    rows = {}
    for i, item in enumerate(items):
        # a set: a data set that is called "all" must not be counted twice
        for key in {(item["domain"], item["task"]), (item["domain"], "all"), ("all", "all")}:
            rows.setdefault(key, []).append([x[i] == item["output"] for x in answers.values()])
    width = max(map(len, ["domain", *(domain for domain, _ in rows)])) + 2
    print(f"\n{'domain':<{width}}{'task':<16}{'questions':>10}"
          + "".join(f"{x:>12}" for x in answers))
    scores = {}
    for (domain, task), right in sorted(rows.items()):
        shares = np.mean(right, axis=0).tolist()
        scores[f"{domain} {task}"] = {"questions": len(right), **dict(zip(answers, shares))}
        print(f"{domain:<{width}}{task:<16}{len(right):>10}"
              + "".join(f"{share:>12.1%}" for share in shares))
    print_examples(items, answers["model"])
    return scores


def majority_answers(items, train_items):
    """For each item the commonest answer to training questions of its domain and task."""
    counters = {}
    for i in range(0, len(train_items), 1 + len(train_items) // 100_000):  # of millions, a sample
        item = train_items[i]
        counter = counters.setdefault((item["domain"], item["task"]), Counter())
        counter[item.get("output")] += 1
    commonest = {key: counter.most_common(1)[0][0] for key, counter in counters.items()}
    return [commonest.get((item["domain"], item["task"]), "") for item in items]


# -------------------------------------------------------------------------------------------- main

@dataclass(frozen=True)
class Options:
    mode: str = option("lal", "how the audio enters the LLM", choices=tuple(MODES), group="model")
    routes: str = option(None, "in place of --mode, like whisper=plits,sslam=lal,clap=lal")
    connector: str = option(None, "auto: lfst for sslam with clap, else mlp; default: mlp for the "
                                  "miniatures, else auto", choices=("auto", *CONNECTORS))
    config: str = option(None, "audio_rope=off, or numbers of IntegrationConfig, like queries=16")
    lal_layers: str = option("all", "layers that LAL writes: all, 2: or ::2 or 0,1; or of each "
                                    "encoder, like sslam=2:,clap=:2")
    freeze: str = option("none", "LLM weights never to train. ffn: the feed-forward parts; llm: "
                                 "all; lora: all, but low-rank updates are learnt",
                         choices=("none", "ffn", "llm", "lora"))
    train_encoders: bool = option(False, "train the encoders too, in stages 2 and 3")
    encoders: str = option("all", "the miniatures to join, like whisper,sslam, or in their stead "
                                  "public checkpoints, like whisper=tiny.en.pt,sslam=sslam.pt")
    llm: str = option(None, "folder of a real Llama, Qwen2.5 or SmolLM2; else the small LLM")
    base: str = option("assets/base.pt", "the miniature encoders and LLM, of data/pretrain.py")
    data: str = option(None, "your own questions, a JSON list or JSONL; else the listening world",
                       group="data")
    val_data: str = option(None, "questions to score on, with --data")
    audio_root: str = option(None, "folder that audio_id is relative to; else the list's own")
    skip_bad: bool = option(False, "go on without the items of --data that cannot be used")
    clips: int = option(4000, "training clips of the listening world", low=1)
    test_clips: int = option(240, "test clips of it, with some eight questions each", low=1)
    difficulty: int = option(1, "of the listening world: more events, overlap and noise", high=2)
    keep_features: bool = option(True, "hear each training clip once, not whenever it is asked for")
    feature_cache: str = option(None, "folder where features are kept for later runs")
    workers: int = option(0, "processes that read and prepare data ahead", high=256)
    seed: int = option(0, "of the world, the connectors and the order of the questions",
                       group="training")
    batch: int = option(None, "questions a step; else the stage's own, 32 or with --llm 256", low=1)
    micro: int = option(32, "questions at once: a larger batch is added up, part by part", low=1)
    steps1: int = option(None, "steps of stage 1, connectors on classification; else its own")
    steps2: int = option(None, "steps of stage 2, connectors and LLM on closed questions")
    steps3: int = option(None, "steps of stage 3, connectors and LLM on all questions")
    lr: float = option(0.0, "peak rate of the LLM, the connectors' in proportion; 0: the stage's")
    tasks: str = option(None, "tasks to learn, with commas between, or all; else the stage's own")
    feature_noise: float = option(None, "in standard deviations; else 0.3, or with --llm 0")
    stage: str = option("all", "one stage, which starts from the one before, or all of them",
                        choices=("1", "2", "3", "all"))
    device: str = option("auto", "cpu, cuda, mps or auto")
    precision: str = option("auto", "of matrix products; auto: bfloat16 on cuda, else float32",
                            choices=("auto", "float32", "bfloat16"))
    out: str = option(None, "folder of checkpoints and metrics.jsonl; else out/MODE",
                      group="output")
    save_every: int = option(500, "steps between two checkpoints, step-*.pt", low=1)
    resume: bool = option(False, "go on from the newest step-*.pt in --out, with the same options")


def make_config(o):
    """The IntegrationConfig that the options name."""
    values = {"connector": o.connector or ("auto" if "=" in o.encoders else "mlp"),
              "lal_layers": o.lal_layers, "lora_rank": LORA_RANK if o.freeze == "lora" else 0}
    switch = "audio_rope"  # whether LAL's audio keys have positions
    names = [f.name for f in fields(IntegrationConfig) if f.name not in {*values, switch}]
    for setting in o.config.split(",") if o.config else ():
        name, _, text = setting.partition("=")
        is_number = name in names and text.isdecimal() and 1 <= int(text) <= 9999
        if not is_number and setting not in (f"{switch}=on", f"{switch}=off"):
            raise ValueError(f"--config {setting}: expected {switch}=on, {switch}=off, or a number "
                             "from 1 to 9999 for one of " + ", ".join(f"{n}=" for n in names))
        values[name] = int(text) if is_number else text
    return IntegrationConfig(**values)


def main(o):
    # where the loss is small, gradients are so small that a CPU would take twice the time for them
    torch.set_flush_denormal(True)
    o = replace(o, out=o.out or f"out/{o.routes or o.mode}")
    device = join_processes(o.device)
    torch.manual_seed(o.seed)
    model = load_base(o.base, o.routes or o.mode, make_config(o), o.encoders, o.llm)
    for encoder in model.encoders.values():
        encoder.frozen = not o.train_encoders
    model.llm.frozen = o.freeze in ("llm", "lora")
    train_data, val_data, test_data = splits = load_data(o, model.tokenizer, model.seconds)
    plan = plan_stages(train_data.items, o)
    Path(o.out).mkdir(parents=True, exist_ok=True)
    start = load_start(model, o, train_data.fingerprint)
    device = pick_device(device, o.precision)
    model.to(device)
    if not o.data and rank_and_size()[0] == 0:
        data.world.write_demo(test_data.clips, test_data.items)
        steps = sum(steps for _, steps, _ in plan)
        print(f"hears {o.clips:,} clips, trains {steps:,} steps, asks about {o.test_clips} clips "
              "(LAL by default, on 2 cores: 45 s, 2 min, 15 s)")
    for split in splits:  # some of them may be the same
        keep = not o.train_encoders and (o.keep_features or split is not train_data)
        if keep and split.features is None:
            split.features = load_features(model, split, o)
    with open_metrics(o, start) as file:
        print_parameters(model, [stage for stage, *_ in plan], o.freeze)
        seconds = train(model, plan, train_data, val_data, o, file, start)
        features, items = load_scored(model, test_data)
        scores = evaluate(model, features, items, train_data.items)
        print(f"{1000 * seconds:.0f} ms a step, peak memory {peak_memory(device):.0f} MiB; the "
              f"model is {o.out}/model.pt")
        if not o.data:
            print(f"ask it: python sample.py --ckpt {o.out}/model.pt --audio out/demo/0.wav")
        log(file, scores=scores, seconds_per_step=seconds, options=asdict(o))
    for path in list_steps(o.out) if rank_and_size()[0] == 0 else ():
        path.unlink()  # finished: nothing to resume
    leave_processes()


if __name__ == "__main__":
    command_line(Options, __doc__, main)
