"""Train an audio LLM: frozen encoders, connectors, and an LLM, joined in PLITS, LAL or PAL.

    python train.py --mode lal                                # on the listening world, minutes
    python train.py --mode plits --data train.json --val-data val.json       # on your own sounds
    python train.py --prepare                                 # make assets/base.pt anew
    python train.py --watch out/lal/model.pt                  # does it look at what it names?

The listening world stands in for the paper's data (OpenAQA, millions of clips): clips of four
seconds, and questions whose answers are known because we put the sounds there. Nothing is stored:
a clip is a function of (split, index, seed, difficulty), so every machine makes the same ones.
"""
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, partialmethod
from itertools import chain, combinations, count, islice, repeat, tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from encoders import load_audio, load_encoder, make_encoder, resample, save_wav
from integrate import (FORMAT, MODES, Arm, AudioLLM, from_bytes, load_checkpoint, run,
                       save_atomically, to_bytes)
from model import LLM, KVCache, LLMConfig, load_tokenizer, read_tokenizer, train_tokenizer
from sample import (Questions, ask_all, command_line, listen, on_grid, option, pick_device,
                    tell_fit, timed, words, wrong_clips)

# ---------------------------------------------------------------------------------- the curriculum

@dataclass(frozen=True)
class Stage:
    name: str
    tasks: tuple | None  # None: all
    rates: dict  # part of the model that is trained: its peak learning rate
    batch: int  # questions a step
    steps: int = 0
    epochs: float = 0.0  # passes over the stage's questions, instead of steps
    blur: float = 0.0  # noise on frozen features, relative to their spread


# The paper's three stages (version 1, section on training): for the listening world, in miniature,
CLOSED = ("classification", "reasoning", "checklist")
SMALL = (Stage("1", ("classification",), {"connectors": 3e-3}, 32, 100, blur=0.3),
         Stage("2", CLOSED, {"connectors": 3e-3, "llm": 1e-3}, 32, 300, blur=0.3),
         Stage("3", None, {"connectors": 3e-3, "llm": 1e-3}, 32, 2200, blur=0.3))
# and for a real LLM, which has much to forget, at LTU's rates.
REAL = (Stage("1", ("classification",), {"connectors": 1e-3}, 256, epochs=2),
        Stage("2", CLOSED, {"connectors": 1e-4, "llm": 1e-4}, 256, epochs=1),
        Stage("3", None, {"connectors": 1e-4, "llm": 1e-4}, 256, epochs=1))
LEARNING_RATES = dict.fromkeys(MODES, 1e-3)  # of the small LLM, the best of 5e-4, 1e-3 and 2e-3


def curriculum(o):
    """The stages, with what the options change in them."""
    stages, lr = [], o.lr or (0 if o.llm else LEARNING_RATES[o.mode])
    for stage, steps in zip(REAL if o.llm else SMALL, (o.steps1, o.steps2, o.steps3)):
        rates = dict(stage.rates)
        if lr and "llm" in rates:  # the connectors' rate keeps its ratio to it
            rates = {part: rate * lr / rates["llm"] for part, rate in rates.items()}
        if o.connector_lr:
            rates["connectors"] = o.connector_lr
        if o.freeze == "llm":
            rates.pop("llm", None)
        change = {"rates": rates, "batch": o.batch or stage.batch}
        if steps is not None:
            change |= {"steps": steps, "epochs": 0}
        if o.blur is not None:
            change["blur"] = o.blur
        if o.epochs and steps != 0:
            change["epochs"] = o.epochs
        if o.tasks:
            change["tasks"] = None if o.tasks == "all" else tuple(o.tasks.split(","))
        stages.append(replace(stage, **change))
    return stages


# ----------------------------------------------------------------------------- the listening world
RATE = 16000                                   # samples per second
SECONDS = 4.0                                  # length of every clip
SPLITS = ("train", "val", "test")
DOMAINS = ("sound", "speech", "music")
LOUD = 4.0                                     # dB above the mean; soft is as much below it


def noise(rng, n, tint):
    """n samples of noise, rms 1; `tint` maps frequencies in Hz to the amplitudes they have."""
    # powers of two are the FFT's quickest; after two seconds it repeats, which no ear notices
    size = min(1 << (n - 1).bit_length(), 32768)
    f = np.fft.rfftfreq(size, 1 / RATE).astype(np.float32)
    gain = (f >= 20) * tint(np.maximum(f, 20))             # nothing below hearing, so no DC
    bins = rng.standard_normal((len(f), 2), np.float32).view(np.complex64)[:, 0]
    wave = np.resize(np.fft.irfft(bins * gain), n)
    return wave / np.sqrt(np.mean(wave ** 2))


def band(low, high):
    """The tint that keeps low..high Hz."""
    return lambda f: ((f > low) & (f < high)).astype(np.float32)


def tone(pitch, *amplitudes):
    """A pitch track (n,) in Hz and the amplitudes of its harmonics 1, 2, 3... -> wave (n,)."""
    bins = np.zeros(2049, np.complex64)
    bins[1:len(amplitudes) + 1] = amplitudes
    # one period of the sum of sines (4096,), then read as fast as the pitch says
    period = np.fft.irfft(bins * -2048j).astype(np.float32)
    turns = np.cumsum(pitch, dtype=np.float64) / RATE % 1  # phase is the integral of frequency
    return period[(turns * 4096).astype(np.int32)]


# A new kind of sound takes three lines: a function of (rng, t) named by a simple noun, the wave it
# returns, its name in KINDS (then --prepare anew, for the parts to meet it). t (n,) is the time in
# seconds since the sound began; render() sees to loudness and fades. Kinds should differ in band,
# in texture (steady, gliding, pulsed) or in both.
def siren(rng, t):                             # a note that wails up and down
    swing = np.sin(2 * np.pi * (rng.uniform(1.5, 3) * t + rng.random()))
    return tone(rng.uniform(700, 1000) * 2 ** (0.5 * swing), 1, 0.5, 0.25)


def alarm(rng, t):                             # one note, on and off
    gate = np.clip(0.5 + 5 * np.sin(2 * np.pi * rng.uniform(5, 8) * t), 0, 1)
    return gate * tone(rng.uniform(1200, 1700) + 0 * t, 1, 0, 0.4)


def whistle(rng, t):                           # one pure high note with a little vibrato
    return tone(rng.uniform(2200, 3200) * (1 + 0.01 * np.sin(2 * np.pi * 6 * t)), 1)


def bird(rng, t):                              # quick upward sweeps, very high
    u = t * rng.uniform(6, 10) % 1             # 0..1 within each sweep
    return np.sin(np.pi * u) * tone(rng.uniform(3500, 4800) * 2 ** (0.6 * u), 1)


def bell(rng, t):                              # no simple ratios, the high ones die first
    base = 2 * np.pi * rng.uniform(500, 900) * t
    return sum(np.exp(-(1.5 + r) * t) * np.sin(r * base) for r in (1, 2.1, 2.9, 4.2, 5.4))


def guitar(rng, t):                            # plucked again and again, bright then mellow
    u = t % (1 / rng.uniform(3, 4.5))
    base = rng.uniform(110, 220) + 0 * t
    return np.exp(-4 * u) * tone(base, 1, 0.6, 0.4) + np.exp(-15 * u) * tone(base, *[0.3] * 16)


def drum(rng, t):                              # thuds whose pitch falls, each with a slap
    u = t % (1 / rng.uniform(3.5, 6))
    turns = rng.uniform(60, 100) * u - 2 * np.exp(-30 * u)
    slap = np.exp(-80 * u) * noise(rng, len(t), band(200, 5000))
    return np.exp(-16 * u) * np.sin(2 * np.pi * turns) + 0.3 * slap


def clock(rng, t):                             # ticks: all high frequencies at once, then nothing
    u = t % (1 / rng.uniform(6, 10))
    return np.exp(-150 * u) * noise(rng, len(t), band(1000, 7900))


def horn(rng, t):                              # two steady brassy notes
    low = rng.uniform(220, 330) + 0 * t
    return sum(tone(note, 1, 0.9, 0.7, 0.5, 0.3, 0.2) for note in (low, 1.26 * low))


def buzzer(rng, t):                            # a low note that is nearly all overtones
    return tone(rng.uniform(90, 130) + 0 * t, *np.linspace(0.5, 1, 40))


def hiss(rng, t):                              # steady noise, high
    return noise(rng, len(t), band(rng.uniform(3000, 4500), rng.uniform(7000, 8000)))


def rumble(rng, t):                            # rolling noise, low
    return (1 + 0.5 * np.sin(20 * t)) * noise(rng, len(t), band(30, rng.uniform(120, 180)))


KINDS = {make.__name__: make for make in (siren, alarm, whistle, bird, bell, guitar, drum, clock,
                                          horn, buzzer, hiss, rumble)}


# An instrument is the same with a pitch: a function of (pitch track (n,) in Hz, t).
def piano(pitch, t):                           # struck, then dying away
    return np.exp(-4 * t) * tone(pitch, 1, 0.5, 0.35, 0.2, 0.1)


def flute(pitch, t):                           # nearly pure, and it wavers
    return np.minimum(1, 15 * t) * tone(pitch * (1 + 0.01 * np.sin(35 * t)), 1, 0.15)


def organ(pitch, t):                           # steady; octaves
    return tone(pitch, 1, 0.9, 0, 0.8, 0, 0, 0, 0.7)


def violin(pitch, t):                          # it swells; all overtones
    return np.minimum(1, 5 * t) * tone(pitch * (1 + 0.006 * np.sin(38 * t)), *1 / np.arange(1, 13))


INSTRUMENTS = {make.__name__: make for make in (piano, flute, organ, violin)}
SCALE = 220 * 2 ** (np.array([0, 4, 7, 12, 16, 19, 24, 28]) / 12)  # Hz: a major chord, up and up


# Speech is a source through a filter: the throat's pulses, or noise, coloured by the mouth's
# resonances, the formants. A vowel is a place of the formants; a consonant is a way to get there.
# A voice: its pitch is drawn between two, in Hz; its formants are a man's times a factor.
VOICES = {"man": (95, 135, 1.0), "woman": (180, 230, 1.17), "child": (270, 340, 1.35)}
# The first three formants, in Hz.
VOWELS = {"a": (730, 1090, 2440), "e": (500, 1840, 2480), "i": (270, 2290, 3010),
          "o": (500, 880, 2540), "u": (300, 700, 2240)}
# Seconds, loudness of the voice, formants; then of the noise: loudness, seconds, from Hz, to Hz.
CONSONANTS = {
    "b": (0.07, 0.15, (250, 700, 2200), 0.3, 0.016, 300, 1500),
    "d": (0.07, 0.15, (250, 1900, 2800), 0.5, 0.020, 3000, 5000),
    "k": (0.09, 0.00, (300, 1200, 2000), 1.0, 0.040, 1200, 2600),
    "t": (0.10, 0.00, (300, 1900, 2800), 1.0, 0.050, 3500, 7000),
    "f": (0.13, 0.00, (350, 900, 2200), 0.4, 0.130, 1000, 7900),
    "s": (0.14, 0.00, (300, 1700, 2600), 0.9, 0.140, 4800, 7800),
    "sh": (0.14, 0.00, (300, 1800, 2400), 1.0, 0.140, 2200, 5000),
    "m": (0.11, 0.40, (250, 900, 2200), 0.0, 0.020, 0, 0),
    "n": (0.11, 0.40, (250, 1700, 2600), 0.0, 0.020, 0, 0),
    "l": (0.09, 0.50, (360, 1200, 2900), 0.0, 0.020, 0, 0),
    "r": (0.10, 0.60, (330, 1060, 1400), 0.0, 0.020, 0, 0),
    "w": (0.10, 0.60, (290, 610, 2150), 0.0, 0.020, 0, 0)}
SYLLABLES = "ba di ku so ma ne ti lo sha fu ra we".split()


def speak(rng, voice, syllables, t):
    """Events of one utterance -> wave (n,), t seconds after the first one's start."""
    low, high, factor = VOICES[voice]
    hop, n = 128, len(t)
    now = np.arange(n // hop + 2) * hop / RATE             # (frames,) one each 8 ms
    f = np.fft.rfftfreq(2 * hop, 1 / RATE).astype(np.float32)          # (bins,)
    places, voiced, hush = [], [], 0
    for e in syllables:
        length, hum, begin, loud, burst, *edges = CONSONANTS[e.name[:-1]]
        goal = VOWELS[e.name[-1]]
        start, end = e.start - syllables[0].start, e.end - syllables[0].start
        vowel = start + length
        # the formants wait at the consonant's place, then glide to the vowel's within 60 ms
        places += [(start, *begin), (vowel, *begin), (vowel + 0.06, *goal), (end, *goal)]
        voiced += [(start, 0), (start + 0.015, hum), (vowel, hum)]
        voiced += [(vowel + 0.025, 1), (end - 0.08, 0.8), (end, 0)]
        puff = [vowel - burst - 0.008, vowel - burst, vowel, vowel + 0.012]
        hush = hush + np.outer(np.interp(now, puff, [0, loud, loud, 0]), band(*edges)(f))
    # the source: a pulse each time the phase of a pitch that sinks and wavers passes an integer
    base = rng.uniform(low, high)
    waver = np.interp(now, np.arange(0, 5, 0.2), rng.uniform(0.95, 1.05, 25))
    turns = np.cumsum(base * waver * (1.05 - 0.05 * now)) * hop / RATE
    beats = np.interp(np.arange(1, turns[-1]), turns, now)             # (pulses,) in seconds
    source = np.zeros((2, n + 3 * hop), np.float32)
    source[0, (beats * RATE).astype(int)] = np.sqrt(RATE / base)
    source[1] = 0.3 * rng.standard_normal(n + 3 * hop, np.float32)     # and breath: white noise
    # the filter for the pulses, (frames, bins): a peak at each formant, the higher the fainter
    when, *tracks = zip(*places)
    peaks = 0.01
    for track, gain, width in zip(tracks, (1, 0.6, 0.35), (80, 100, 140)):
        centre = factor * np.interp(now, when, track)[:, None]
        peaks = peaks + gain / (1 + ((f - centre) / width) ** 2)
    mouth = np.interp(now, *zip(*voiced))[:, None] * peaks * (f > 60)
    # cut into windows that overlap by half, filter each one's spectrum, add them up again
    window = np.sin(np.pi * (np.arange(2 * hop, dtype=np.float32) + 0.5) / (2 * hop))
    cut = np.lib.stride_tricks.sliding_window_view(source, 2 * hop, axis=1)[:, ::hop]
    spectra = np.fft.rfft(cut[:, :len(now)] * window)                  # (2, frames, bins)
    pieces = np.fft.irfft(spectra[0] * np.float32(mouth) + spectra[1] * np.float32(hush)) * window
    return (pieces[1:, :hop] + pieces[:-1, hop:]).ravel()[:n]


class Event(NamedTuple):
    """A sound, a syllable, or what an instrument plays: notes one after another, or a chord."""
    name: str
    start: float                               # seconds
    end: float
    level: float = 0.0                         # dB
    notes: tuple = ()                          # steps of SCALE
    beat: float = 0.0                          # seconds from note to note; 0: all at once

    @property
    def way(self):
        """Which way a melody goes, as an answer says it."""
        rises = np.diff(self.notes) > 0
        if self.notes and not self.beat:
            return "a chord"
        return (("down", "down and up"), ("up and down", "up"))[int(rises[0])][int(rises[-1])]


@dataclass(frozen=True)
class Difficulty:
    """How hard clips are: what is drawn between which bounds, and how often."""
    sounds: tuple                              # fewest and most in a clip
    syllables: tuple
    notes: tuple                               # in a melody
    mixed: float                               # share of speech with a sound beside or within it
    overlap: float                             # share of sounds that begin before the last one ends
    phrases: float                             # share of music where two play, one after the other
    noise: tuple                               # dB relative to the events: of half the clips, loud


DIFFICULTIES = (Difficulty((1, 2), (2, 4), (3, 3), 0.0, 0.0, 0.0, (-24, -18)),
                Difficulty((1, 3), (2, 5), (3, 4), 0.4, 0.2, 0.5, (-18, -12)),
                Difficulty((2, 5), (3, 6), (3, 5), 0.6, 0.5, 0.7, (-12, -4)))


def held_out(names):
    """Whether this sequence of sounds or syllables is kept for the test, as a fifth are."""
    return zlib.crc32(" ".join(names).encode()) % 5 == 0


def compose(rng, domain, count, level):
    """Events of a clip, all of them at second 0 yet, and the pause after each, in seconds."""
    def draw(names):
        return list(names)[rng.integers(len(names))]

    if domain == "sound":
        names = [draw(KINDS) for _ in range(count)]
        if count > 2 and rng.random() < 0.3:   # or one would hardly ever come twice
            names[2] = names[0]
        events = [Event(name, 0, rng.uniform(0.35, min(0.8, 3 / count)), draw((-LOUD, LOUD)))
                  for name in names]
        pauses = []
        for i, (one, two) in enumerate(zip(events, events[1:])):
            # none is hidden by both of its neighbours, or by one that is louder
            over = rng.random() < level.overlap and min(pauses[-1:], default=0) >= 0
            pauses.append(-0.45 * min(one.end, two.end) if over else 0.15)
            if over:
                events[i + 1] = two._replace(level=events[i].level)
        pauses.append(0)
    elif domain == "speech":
        tempo = rng.uniform(0.38, 0.55 if count < 6 else 0.45)
        events = [Event(draw(SYLLABLES), 0, tempo * rng.uniform(0.93, 1.07)) for _ in range(count)]
        pauses = [0.02] * count
        if rng.random() < level.mixed:         # a sound before, within or after what is said
            at = rng.integers(count + 1)
            events.insert(at, Event(draw(KINDS), 0, rng.uniform(0.35, 0.6)))
            pauses = [0.02 if i + 1 != at and i != at else 0.15 for i in range(count + 1)]
    else:
        slow = bool(rng.integers(2))           # of two melodies one is slow, the other fast
        events = []
        for i in range(count):
            n = int(rng.integers(level.notes[0], level.notes[1] + 1))
            beat = rng.uniform(0.51, 0.54) if slow == (i == 0) else rng.uniform(0.33, 0.36)
            beat *= min(1, 4 / n)              # or five notes twice would not fit in
            notes = draw_melody(rng, n)
            if rng.random() < 0.25:
                notes, beat = tuple(sorted(rng.choice(8, 3, replace=False).tolist())), 0.0
            events.append(Event(draw(INSTRUMENTS), 0, beat * n or 0.8, 0.0, notes, beat))
        pauses = [0.25] * count
    return events, pauses


def draw_melody(rng, n):
    """n different steps of the scale that rise, fall, or do one and then the other."""
    turn, up = rng.choice([n - 1, rng.integers(1, n - 1)]), rng.random() < 0.5
    notes = np.sort(rng.choice(8, n, replace=False))
    peak, rest = notes[-1], rng.permutation(notes[:-1])
    notes = np.r_[np.sort(rest[:turn]), peak, -np.sort(-rest[turn:])]
    return tuple((notes if up else 7 - notes).tolist())


def scene(split, index, seed=0, difficulty=1):
    """What happens in clip `index` of a split, in words and seconds: sound, speech, music in turn.

    A test clip of two or more events, or of music, is a sequence that train and val never contain:
    to answer, a model must have learnt the parts, not the whole. 'noise' is in dB relative to the
    events.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    domain, level = DOMAINS[index % 3], DIFFICULTIES[difficulty]
    phrases = 1 + (rng.random() < level.phrases)
    fewest, most = {"sound": level.sounds, "speech": level.syllables,
                    "music": (phrases, phrases)}[domain]
    count = int(rng.integers(fewest, most + 1))
    while True:                                # counts come first, so that they are uniform
        events, pauses = compose(rng, domain, count, level)
        names = [e.name for e in events]
        stutter = any(a == b for a, b in zip(names, names[1:])) and domain != "music"
        if domain == "music":
            names = [f"{e.name} {e.notes}" for e in events]
        alone = len(names) == 1 and domain == "sound"
        if not stutter and (alone or held_out(names) == (split == "test")):
            break
    # what is left of the time goes at random before, between and after the events
    ahead = np.cumsum([0] + [e.end + pause for e, pause in zip(events, pauses)])[:-1]
    spare = SECONDS - ahead[-1] - events[-1].end
    joined = domain == "speech"
    shifts = np.sort(rng.uniform(0, spare, 1 if joined else len(events)))
    for i, pause in enumerate(pauses[:-1]):    # what overlaps stays together
        if pause < 0:
            shifts[i + 1] = shifts[i]
    starts = (ahead + shifts).round(3).tolist()
    events = [e._replace(start=t, end=round(t + e.end, 3)) for e, t in zip(events, starts)]
    low, high = level.noise
    made = {"domain": domain, "events": events,
            "noise": float(rng.uniform(low, high) if rng.random() < 0.5 else rng.uniform(-30, -24)),
            "key": int(rng.integers(1 << 62))}             # the seed of all that render() draws
    return made | ({"voice": list(VOICES)[rng.integers(len(VOICES))]} if joined else {})


def pieces(events):
    """Events in order, in lists: what is said in one go together, all else alone."""
    found = []
    for e in events:
        if found and e.name in SYLLABLES and found[-1][-1].name in SYLLABLES:
            found[-1].append(e)
        else:
            found.append([e])
    return found


def play(e, t):
    """What an instrument plays -> wave (n,)."""
    make = INSTRUMENTS[e.name]
    if not e.beat:
        return sum(make(SCALE[note] + 0 * t, t) for note in e.notes)
    which = np.minimum(t / e.beat, len(e.notes) - 1).astype(int)
    u = t - which * e.beat                                 # time since the note began
    fade = np.minimum(1, 100 * np.minimum(u, np.maximum(0, e.beat - u)))
    return fade * make(SCALE[np.array(e.notes)[which]], u)


def render(scene):
    """A scene -> its wave (samples,), float32 within [-1, 1], the same each time."""
    rng = np.random.default_rng(scene["key"])
    wave = np.zeros(int(SECONDS * RATE), np.float32)
    for part in pieces(scene["events"]):
        first, last = int(part[0].start * RATE), int(part[-1].end * RATE)
        t = np.arange(last - first, dtype=np.float32) / RATE
        if part[0].name in SYLLABLES:
            sound = speak(rng, scene["voice"], part, t)
        else:
            sound = play(part[0], t) if part[0].notes else KINDS[part[0].name](rng, t)
        sound = sound * np.minimum(1, 100 * np.minimum(t, t[::-1]))    # 10 ms fades: no clicks
        loud = 10 ** ((part[0].level + rng.uniform(-1, 1)) / 20) / np.sqrt(np.mean(sound ** 2))
        wave[first:last] += loud * sound                   # rms 1, but for its level
    # the background is white, pink or brown: its power falls with 1, 1/f or 1/f^2
    colour = -int(rng.integers(3)) / 2
    tint = lambda f: np.maximum(f, 60) ** colour
    wave += 10 ** (scene["noise"] / 20) * noise(rng, len(wave), tint)
    wave -= wave.mean()
    if scene["domain"] == "sound":             # one volume for all, or a lone one were not soft:
        return np.clip(0.022 * wave, -1, 1)    # the peaks of a loud clock just fit
    return wave * np.float32(rng.uniform(0.3, 0.95) / np.abs(wave).max())


# What an answer may say of an event, in groups of which one word is true, or none.
NUMBERS = "zero one two three four five six".split()
ORDINALS = "first second third fourth fifth".split()
GROUPS = (("loud", "soft"), ("up", "down", "up and down", "down and up", "a chord"),
          tuple(NUMBERS[3:6]), tuple(ORDINALS), ("fast", "slow"))


def traits(e):
    """Of each of GROUPS the words that are true of an event, or ""."""
    loud = ("loud" if e.level > 0 else "soft") if e.level else ""
    if not e.beat:
        return [loud, "a chord" if e.notes else "", "", "", ""]
    return [loud, e.way, NUMBERS[len(e.notes)], ORDINALS[int(np.argmax(e.notes))],
            "fast" if e.beat * max(1, len(e.notes) / 4) < 0.43 else "slow"]


# Each question has a few phrasings and one right answer. {x} is "the siren", "a siren" or "di",
# two of them, or what else is asked about. 'after' asks for the neighbour.
PHRASINGS = {
    "what": "What do you hear?|What is in the audio?|What is in the clip?",
    "who": "Who is speaking?|Who is talking?|Whose voice is it?",
    "describe": "Describe the audio.|What happens in the audio?|Write a caption for the clip.",
    "words": "What is said?|Write down what is said.|Transcribe the speech.",
    "count": "How many {unit}s are there?|How many {unit}s do you hear?|Count the {unit}s.",
    "times": "How often do you hear {x}?|How many times is there {x}?|How often is there {x}?",
    "first": "Which {unit} comes first?|What is the first {unit}?|Which {unit} do you hear first?",
    "last": "Which {unit} comes last?|What is the last {unit}?|Which {unit} do you hear last?",
    "middle": "Which {unit} comes second?|What is the second {unit}?|Which {unit} is number two?",
    "order": "In which order do {x} come?|Put {x} in order.|What is the order of {x}?",
    "after": "What comes right after {x}?|Which {unit} follows {x}?|What is next after {x}?",
    "present": "Do you hear {x}?|Does the clip contain {x}?|Is {x} in the audio?",
    "louder": "Which is louder, {x}?|Which one is louder, {x}?|What is louder, {x}?",
    "overlap": "Do {x} overlap?|Are {x} heard together?|Do {x} sound at the same time?",
    "besides": "What is there besides speech?|Which sound is with the speech?|What else sounds?",
    "said after": "What is said after {x}?|Which words follow {x}?|What is said once {x} is over?",
    "said before": "What is said before {x}?|Which words precede {x}?|What is said until {x}?",
    "notes": "How many notes does {x} play?|Count the notes of {x}.|How many notes are by {x}?",
    "way": "Which way does {x} go?|In which direction does {x} move?|How does {x} move?",
    "top": "Which note of {x} is the highest?|Where is {x} highest?|Which is the top note of {x}?",
    "chord": "Does {x} play a chord?|Do the notes of {x} sound together?|Is there a chord by {x}?",
    "tempo": "Is the second melody faster or slower?|How fast is the second melody?",
    "same": "Is the second instrument the same or different?|Same instrument twice, or different?"}
TASKS = {"what": "classification", "who": "classification", "describe": "captioning",
         "words": "transcription"}             # all others are reasoning
RELATIONS = "middle times order louder overlap same tempo".split()  # see checklist


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def the(noun):
    return "the " + noun


def listed(names, last):
    """"the siren, the drum or the bell"."""
    return f" {last} ".join(", ".join(names).rsplit(", ", 1))


def questions(scene, rng):
    """Every question that has one right answer here, each in a phrasing drawn from rng.

    Returns dicts of kind and x, see PHRASINGS, and task, instruction, output, domain. A list names
    every event in order of time: "a drum, a bell and a drum". Of yes and no the rarer is asked for
    more often.
    """
    domain, events, asked = scene["domain"], scene["events"], []
    unit, words = {"sound": ("sound", KINDS), "speech": ("syllable", SYLLABLES),
                   "music": ("instrument", INSTRUMENTS)}[domain]
    names = [e.name for e in events if e.name in words]
    # a sound is "a siren", or "the siren" when the question takes it as known; a syllable is "di"
    some, known = (names, names) if domain == "speech" else ([*map(a, names)], [*map(the, names)])

    def draw(choices):
        return choices[rng.integers(len(choices))]

    def ask(which, output, x=""):
        text = draw(PHRASINGS[which].split("|")).format(x=x, unit=unit)
        asked.append({"kind": which, "x": x, "task": TASKS.get(which, "reasoning"),
                      "instruction": text, "output": output, "domain": domain})

    if domain == "speech":
        who, others = a(scene["voice"]), [(i, e) for i, e in enumerate(events) if e.name in KINDS]
        ask("what", " and ".join([who + " speaking"] + [a(e.name) for _, e in others]))
        ask("who", who)
        ask("words", " ".join(names))
        for i, e in others:
            ask("besides", a(e.name))
            for which, said in (("said before", names[:i]), ("said after", names[i:])):
                if said:
                    ask(which, " ".join(said), the(e.name))
    else:
        ask("what", listed(some, "and"))
    ask("describe", caption(scene))
    absent = draw([name for name in words if name not in names])
    answer = draw(["yes", "no"])
    ask("present", answer,
        draw(some) if answer == "yes" else absent if domain == "speech" else a(absent))
    if domain != "music":
        ask("count", NUMBERS[len(names)])
    if len(names) > 1:
        ask("first", some[0])
        ask("last", some[-1])
    # what points at an event by its name must be the only one of that name
    once = [i for i, name in enumerate(names) if names.count(name) == 1]
    if domain == "music":
        for i in once:
            if events[i].beat:
                _, way, number, top, _ = traits(events[i])
                ask("notes", number, known[i])
                ask("way", way, known[i])
                ask("top", the(top), known[i])
            if not events[i].beat or rng.random() < 0.4:
                ask("chord", "no" if events[i].beat else "yes", known[i])
        if len(names) == 2 and (not once or rng.random() < 0.4):
            ask("same", "different" if once else "same")
        if len(names) == 2 and all(e.beat for e in events):
            ask("tempo", "slower" if events[0].beat < events[1].beat else "faster")
        return asked
    heard = [e.name for e in events]
    follows = [i for i in once if names[i + 1:]  # and no sound comes between
               and heard[heard.index(names[i]) + 1] == names[i + 1]]
    if follows:
        i = draw(follows)
        ask("after", some[i + 1], known[i])
    if domain == "speech" or len(names) == 1:
        return asked
    if len(names) > 2:
        ask("middle", some[1])
        name = max(names, key=names.count)
        if names.count(name) > 1 or rng.random() < 0.4:
            ask("times", NUMBERS[names.count(name)], a(name))
        if len(once) == len(names):
            ask("order", ", ".join(known), listed(rng.permutation(known).tolist(), "and"))
    pairs = [(i, j) for i, j in combinations(once, 2) if events[i].level != events[j].level]
    if pairs:
        loud, soft = sorted(draw(pairs), key=lambda i: -events[i].level)
        ask("louder", known[loud], listed(rng.permutation([known[loud], known[soft]]), "or"))
    pairs = [(i, i + 1) for i in once if i + 1 in once]
    together = [(i, j) for i, j in pairs if events[j].start < events[i].end]
    if together or pairs and rng.random() < 0.4:
        ask("overlap", "yes" if together else "no",
            listed([known[i] for i in draw(together or pairs)], "and"))
    return asked


def caption(scene):
    """A scene in one sentence, everything in order of time."""
    parts = []
    for piece in pieces(scene["events"]):
        e = piece[0]
        if e.name in SYLLABLES:
            parts.append(f"{a(scene['voice'])} says {' '.join(e.name for e in piece)}")
        elif e.beat:
            parts.append(f"{a(e.name)} plays {NUMBERS[len(e.notes)]} notes {e.way}")
        else:
            parts.append(a(e.name) + " plays a chord" * bool(e.notes))
    return ", then ".join(parts).capitalize() + "."


def checklist(s, dice):
    """Was it there, what came after it: pairs of what some questions ask and the answer.

    Most are asked in the fewest words, as a word that is answered on the spot teaches to look back
    for it; from whole sentences, with the answer at their end, a small LLM would learn that only
    after hours. The few whole sentences teach to carry the answer to their end. Last come the bare
    bones of two questions about several events.
    """
    events, checks = s["events"], []
    names = [e.name for e in events]
    words = {"sound": [*KINDS], "speech": [*SYLLABLES, *KINDS], "music": [*INSTRUMENTS]}
    true = [f"{e.name} {trait}" for e in events for trait in traits(e) if trait]
    false = [f"{e.name} {word}" for e in events for trait, group in zip(traits(e), GROUPS) if trait
             for word in group]
    false = [text for text in false if text not in true]
    absent = [word for word in words[s["domain"]] if word not in names]
    for n in range(4):
        yes = dice.random() < 0.5
        about = n % 2 == 0 and bool(true and false)
        right, wrong = (true, false) if about else (names, absent)
        x = dice.choice(right if yes else wrong)
        whole = not about and dice.random() < 0.25
        noun = x if x in SYLLABLES else a(x)
        asked = dice.choice(PHRASINGS["present"].split("|")).format(x=noun) + "\n"
        checks.append((asked if whole else f" {x}", "yes" if yes else "no"))
    once = [i for i, name in enumerate(names[:-1]) if names.count(name) == 1]
    for i in dice.permutation(once)[:2]:
        checks.append((f" after {names[i]}", names[i + 1]))
    several = [q for q in questions(s, dice) if q["kind"] in RELATIONS]
    for q in dice.permutation(several)[:2]:
        checks.append((f" {q['kind']} {q['x']}".rstrip(), q["output"]))
    return checks


# ------------------------------------------------------------------------------------- data

def world(split, clips, seed, difficulty=1):
    """Clips of the listening world, see Questions.clips, and their questions: (clips, items)."""
    scenes = [scene(split, i, seed, difficulty) for i in range(clips)]
    items = []
    for i, s in enumerate(scenes):
        rng = np.random.default_rng([seed, SPLITS.index(split), i, 1])
        items += [q | {"clip": i} for q in questions(s, rng)]
        if split == "train":
            items += [{"pairs": checklist(s, rng), "task": "checklist", "domain": s["domain"],
                       "clip": i} for _ in range(2)]
    return {i: partial(clip_of_scene, s) for i, s in enumerate(scenes)}, items


def clip_of_scene(s, rate):
    return resample(torch.from_numpy(render(s)), RATE, rate)


def hear_all(model, clips):
    """Frozen features of every clip, once: {clip: {kind: (n, De)}}. clips: see Questions.clips."""
    clips, seconds = timed(clips)
    # a thread for each core with batches of its own: sooner than all cores at one batch at a time;
    # of a GPU's two, one reads while the other waits for it. At most 16 clips or so are at work
    threads = torch.get_num_threads() if model.device.type == "cpu" else 2
    names, size = list(clips), math.ceil(16 / threads)
    groups = [names[at:at + size] for at in range(0, len(names), size)]

    def listen_to(group):
        heard = model.encode([model.fronts(clips[name]) for name in group])
        return [{kind: tokens.cpu() for kind, tokens in features.items()} for features in heard]

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        heard = tqdm(pool.map(listen_to, groups), "features", len(groups), leave=False,
                     mininterval=1)
        features = dict(zip(names, chain.from_iterable(heard)))
    tell_fit(model, list(seconds.values()))
    return features


class Ready:
    """Items made ready for a step, which is what data workers do: with their token ids and, if
    `fronts` is a function from a clip to what the front ends make of it, with that."""

    def __init__(self, items, tokenizer, fronts=None):
        self.items, self.tokenizer, self.fronts = items, tokenizer, fronts

    def __getitem__(self, i):
        try:
            item, = with_ids(self.tokenizer, [self.items[i]])
            if not self.fronts:
                return item
            return item | {"fronts": self.fronts(partial(load_audio, item["clip"]))}
        except ValueError as e:  # raised in a worker it would come with a page of its traceback
            return e

    def answers(self, i):
        """How many answers item i has: one, but for the checklists of the listening world."""
        return answers_in(self.items[i]) if isinstance(self.items, list) else 1


def answers_in(item):
    return len(item["pairs"]) if "pairs" in item else 1


def with_ids(tokenizer, items):
    """Add to every item its token ids and their weights: see `conversation`."""
    for item in items:
        if "ids" not in item:
            pairs = item.get("pairs") or [(item["instruction"].strip() + "\n", item["output"])]
            item["ids"], item["weights"] = conversation(tokenizer, pairs)
    return items


def conversation(tokenizer, pairs):
    """Token ids of prompts and answers in turn, and the weight of each: one over the root of an
    answer's length, so that a caption counts more than a yes, but not as much more as it is longer;
    a prompt's are zero, as it is not for the model to say. A prompt that is a whole line is a
    question of a chat; others are answered on the spot."""
    ids, weights = [], []
    for prompt, answer in pairs:
        if prompt.endswith("\n"):
            prompt, answer = tokenizer.chat(prompt)[1], tokenizer.reply(answer)
        else:
            prompt, answer = tokenizer.encode(prompt), tokenizer.encode(" " + answer.strip())
        ids += prompt + answer
        weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
    return ids, weights


# --------------------------------------------------------------------------------- training

def answer_loss(net, features, items, total=None):
    """Mean over answers of the cross-entropy of each one's n tokens, summed and divided by
    sqrt(n), for a batch of items.

    net: the model, or DistributedDataParallel around it. total: the number of answers to divide
    by, if these items are a part of a larger batch.
    """
    model = getattr(net, "module", net)
    ids = pad([torch.tensor(item["ids"]) for item in items]).to(model.device)
    weights = pad([torch.tensor(item["weights"]) for item in items])
    clips = list(dict.fromkeys(item["clip"] for item in items))  # a clip is heard once
    rows = [clips.index(item["clip"]) for item in items] if len(clips) < len(items) else None
    hidden = net([features[clip] for clip in clips], ids[:, :-1], rows)
    total = total or sum(map(answers_in, items))
    return weighted_loss(model.llm, hidden, ids, weights.to(model.device)) / total


def blur(heard, amount, step):
    """Features of clips, {clip: {kind: (n, De)}}, with noise of `amount` times their standard
    deviation: what was heard once and kept would else sound the same each time, and be learnt by
    heart. The noise is a function of step and clip."""
    if not amount:
        return heard

    def noisy(clip, features):
        dice = torch.Generator().manual_seed(zlib.crc32(f"{step} {clip}".encode()))
        return {kind: x + amount * x.std() * torch.randn(x.shape, generator=dice).to(x)
                for kind, x in features.items()}

    return {clip: noisy(clip, features) for clip, features in heard.items()}


def weighted_loss(llm, hidden, ids, weights):
    """Cross-entropy of ids (B, T) given hidden states (B, T-1, D), summed by weights (B, T)."""
    chosen = weights[:, 1:] > 0  # only positions whose next token belongs to an answer need logits
    losses = F.cross_entropy(llm.head(hidden[chosen]), ids[:, 1:][chosen], reduction="none")
    return (losses * weights[:, 1:][chosen].to(losses.dtype)).sum()


def pad(rows):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T), with zeros


def batches(sizes, size, dice, clips=None):
    """Batches without end, as arrays of indices: every item once before any comes again, those of
    similar size together, and those about one clip by fours, for which it is heard but once.
    sizes (n,): of each item's text. clips (n,): what each is about; None: each about its own."""
    n = np.arange(len(sizes), dtype=np.int32)
    order = n if clips is None else np.lexsort((sizes, clips)).astype(np.int32)
    clips = n if clips is None else clips[order]
    begins = np.maximum.accumulate(np.where(np.r_[True, clips[1:] != clips[:-1]], n, 0))
    first = n[(n - begins) % 4 == 0]  # where each group of up to four begins in `order`
    last = np.append(first[1:], len(n)) - 1
    while True:
        shuffled = dice.permutation(np.arange(len(first), dtype=np.int32))
        for pool in np.array_split(shuffled, 1 + len(n) // (16 * size)):
            pool = pool[np.argsort(sizes[order[last[pool]]], kind="stable")]
            pool = np.concatenate([order[first[i]:last[i] + 1] for i in pool])
            groups = [pool[i:i + size] for i in range(0, len(pool), size)]
            for i in dice.permutation(len(groups)):
                yield groups[i]


def in_parts(supply, ready, o):
    """For each batch of indices that `supply` gives: the number of its answers, and what of it this
    process runs, a list of (ready items, whether they count).

    That is parts of o.micro items or fewer, equally many for each process; one for which there are
    no items runs something that does not count.
    """
    rank, ranks = processes()

    def parts(batch):
        rounds = math.ceil(len(batch) / (ranks * o.micro))
        return np.array_split(batch, rounds * ranks)[rank::ranks]

    supply, ahead = tee(supply)  # of one copy, worker processes make items ready ahead of the loop
    groups = (part if len(part) else batch[:1] for batch in ahead for part in parts(batch))
    # in a session of their own, for a Ctrl-C at the terminal is for the first process to act on
    loader = iter(DataLoader(ready, batch_sampler=groups, num_workers=o.workers, collate_fn=list,
                             worker_init_fn=lambda n: os.setsid(),
                             multiprocessing_context="fork" if o.workers else None))
    for batch in supply:
        made = [(next(loader), len(part) > 0) for part in parts(batch)]
        for item in chain.from_iterable(items for items, _ in made):
            if isinstance(item, ValueError):
                raise item
        yield sum(ready.answers(i) for i in batch), made


def schedule(step, steps):
    """Share of the peak learning rate: linear warm-up over the first 5%, then a cosine to 5%."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def is_trained(name, rates, freeze):
    """Whether a stage with these rates trains the parameter of this name."""
    kept = freeze == "ffn" and name.startswith("llm.") and ".mlp." in name
    return name.split(".")[0] in rates and not kept


def optimizer_of(model, rates, freeze="none"):
    """AdamW for the parts in `rates` (part: peak learning rate); all other parts stay frozen, and
    with freeze "ffn" the LLM's feed-forward weights too."""
    groups = []
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, rates, freeze))
    for part, lr in rates.items():
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        for matrices in (True, False):  # gains, biases and gates are not pulled to zero
            groups.append({"params": [p for p in trained if (p.ndim > 1) == matrices],
                           "lr": lr, "peak": lr, "weight_decay": 0.05 * matrices})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def tell_parts(model, stages, freeze):
    """Say aloud how many parameters each part has and in which stages it is trained."""
    sizes, when = Counter(), {}
    for name, p in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        if name.startswith("llm."):
            part = "llm feed-forward" if ".mlp." in name else "llm, the rest"
        sizes[part] += p.numel()
        when[part] = ", ".join(s.name for s in stages if is_trained(name, s.rates, freeze))
    for part, size in sizes.items():
        print(f"{part:<20}{size:>14,} parameters, "
              + (f"trained in stage {when[part]}" if when[part] else "frozen"))


def lessons(stage, items):
    """Which items a stage learns from, their sizes, and their clips if known: arrays."""
    clips = None
    if isinstance(items, Questions):
        tasks, numbers, sizes = items.tasks, np.asarray(items.numbers), np.asarray(items.sizes)
    else:
        clips = np.array([item["clip"] for item in items])
        tasks, numbers = np.unique([item["task"] for item in items], return_inverse=True)
        sizes = np.array([len(item["ids"]) for item in items])
    taught = [n for n, task in enumerate(tasks) if stage.tasks is None or task in stage.tasks]
    asked = stage.steps > 0 or stage.epochs > 0
    which = np.flatnonzero(np.isin(numbers, taught) & asked).astype(np.int32)
    return which, sizes[which], None if clips is None else clips[which]


def train(model, train_set, val_set, o, file, start):
    """The curriculum, from where the checkpoint `start` left it; lines go to `file`.

    train_set, val_set: (features, items). Features, {clip: {kind: (n, De)}}, may be empty for the
    first: then each clip is heard when it is asked about. Returns seconds per step, data and
    evaluation left out.
    """
    (features, items), (rank, ranks) = train_set, processes()
    dice, seconds, done = np.random.default_rng(o.seed), 0.0, 0
    step, loss = start["step"], start["loss"]
    for stage in curriculum(o):
        which, sizes, clips = lessons(stage, items)
        wanted = o.stage in ("all", stage.name) and stage.name >= start["stage"]
        if not len(which):
            if wanted:
                print(f"stage {stage.name}: nothing to learn from, left out")
            continue
        steps = math.ceil(stage.epochs * len(which) / stage.batch) or stage.steps
        resumed = stage.name == start["stage"]
        first = start["at"] if resumed else 0 if wanted else steps
        order = batches(sizes, stage.batch, dice, clips)
        for _ in range(first):  # the order is a function of the seed: be where the dice were
            next(order)
        if not wanted:
            continue
        optimizer = optimizer_of(model, stage.rates, o.freeze)
        if resumed:
            optimizer.load_state_dict(start.pop("optimizer"))
            torch.set_rng_state(start["rng"])
        rates = " and ".join(f"{part} at {lr:g}" for part, lr in stage.rates.items())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"stage {stage.name}: trains {rates}, {trained:,} parameters, {len(which):,} "
              f"questions, {steps} steps of {stage.batch}")

        model.train()
        net = DistributedDataParallel(model, broadcast_buffers=False) if ranks > 1 else model
        ready = Ready(items, model.tokenizer, None if features else model.fronts)
        supply = in_parts((which[next(order)] for _ in range(first, steps)), ready, o)
        bar = tqdm(range(first, steps), desc=f"stage {stage.name}", leave=False, mininterval=1,
                   initial=first, total=steps)
        with asked_to_stop() as stop:
            for i in bar:
                answers, parts = next(supply)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(i, steps)
                began = time.perf_counter()
                loss, norm, ended = learn(net, features, parts, answers, stop, step, stage, o)
                if not math.isfinite(loss + norm):  # while the weights and what is saved are whole
                    raise ValueError(f"stage {stage.name}, step {i + 1}: the loss is {loss:.3g} "
                                     f"and its gradient {norm:.3g}; try a lower --lr")
                optimizer.step()
                seconds, done, step = seconds + time.perf_counter() - began, done + 1, step + 1
                if i % 10 == 0:
                    bar.set_postfix(loss=f"{loss:.3f}")
                    log(file, step=step, stage=stage.name, loss=loss, norm=norm,
                        lr=optimizer.param_groups[0]["lr"])
                if rank == 0 and (ended or (i + 1) % o.save_every == 0 or i + 1 == steps):
                    keep(model, optimizer, o, stage=stage.name, at=i + 1, step=step, loss=loss,
                         logged=file.tell(), data=items.mark if o.data else None)
                if ended:
                    bar.close()
                    print(f"stage {stage.name}: saved after step {i + 1}; --resume goes on from "
                          "there", file=sys.stderr)
                    raise KeyboardInterrupt
        share = score(model, *val_set)
        print(f"stage {stage.name}: loss {loss:.3f}, validation {share:.1%} exact "
              f"({len(val_set[1])} questions), {1000 * seconds / max(1, done):.0f} ms a step")
        log(file, step=step, stage=stage.name, validation=share)
        # where the next stage starts, and whom to ask
        if rank == 0:
            for name in (f"stage{stage.name}", "model"):
                model.save(f"{o.out}/{name}.pt", step=step, stage=stage.name)
    return seconds / max(1, done)


def learn(net, features, parts, answers, stop, step, stage, o):
    """Leave the gradient of one batch, clipped to norm 1, in the parameters.

    net: the model, or DistributedDataParallel around it. parts: of in_parts, what this process has
    of the batch, which has so many answers in all. step: of the whole training, from 0. Returns
    loss, norm before clipping, and whether any process has been asked to stop.
    """
    model, (_, ranks) = getattr(net, "module", net), processes()
    halved = o.dtype == "bfloat16" or o.dtype == "auto" and model.device.type == "cuda"
    net.zero_grad()
    told = 0.0
    for n, (items, count) in enumerate(parts):
        # processes share their gradients once, after their last parts
        with nullcontext() if ranks == 1 or n == len(parts) - 1 else net.no_sync():
            with torch.autocast(model.device.type, torch.bfloat16, halved):
                clips = [item["clip"] for item in items]
                heard = (map(features.get, clips) if features
                         else model.encode([item["fronts"] for item in items]))
                heard = blur(dict(zip(clips, heard)), stage.blur, step)
                loss = answer_loss(net, heard, items, answers) * count
            (loss * ranks).backward()  # for what they share is the mean
        told = told + loss.detach()
    told = torch.stack([told, torch.tensor(float(bool(stop))).to(told)])
    if ranks > 1:  # all are to say the same, and to stop after the same step
        dist.all_reduce(told)
    loss, ended = told.tolist()
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0).item()
    return loss, norm, ended > 0


def keep(model, optimizer, o, **now):
    """Write all that it takes to go on from now as if never broken off; the last few files stay."""
    model.save(f"{o.out}/step-{now['step']:08d}.pt", optimizer=optimizer.state_dict(),
               rng=torch.get_rng_state(), options=asdict(o), **now)
    for old in kept(o.out)[:-o.keep]:
        old.unlink()


def log(file, **line):
    print(json.dumps(line), file=file, flush=True)


def processes():
    """Which of the processes that train together this is, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(o):
    """Under torchrun, be one of several processes that train one model: the first one speaks and
    saves for all. Returns the name of this process's device."""
    if not dist.is_torchelastic_launched():
        return o.device
    on_gpus = o.device in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpus else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else o.device


@contextmanager
def asked_to_stop():
    """A list that SIGTERM or Ctrl-C adds to, instead of ending us. A second Ctrl-C ends at once."""
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kept(folder):
    """The checkpoints of an unfinished training, oldest first."""
    return sorted(Path(folder).glob("step-*.pt"))


# What may change between a checkpoint and --resume, as it alters sums only by their rounding.
FREE = {"resume", "out", "device", "save_every", "keep", "micro", "workers", "dtype",
        "recompute", "compile", "keep_features"}


def beginning(model, o, mark):
    """Where training starts, a dict: at nothing, after the stage before --stage, or, with --resume,
    where the newest checkpoint left it. The model gets the weights of then. mark: of the data."""
    unfinished = kept(o.out)
    nothing = {"stage": "", "at": 0, "step": 0, "loss": math.nan}
    if o.resume:
        if not unfinished:
            raise ValueError(f"{o.out} holds no step-*.pt: nothing to --resume there")
        saved = load_checkpoint(unfinished[-1], FORMAT)
        model.fill(unfinished[-1], saved)
        for name, value in asdict(o).items():
            if name not in FREE and value != saved["options"].get(name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{unfinished[-1]}: was trained with {flag} "
                                 f"{saved['options'].get(name)}, not {value}; --resume goes on as "
                                 "it began")
        if saved["data"] != mark:
            raise ValueError(f"{o.data} has changed since {unfinished[-1]} was saved: it had "
                             f"{saved['data']}, it has {mark}")
        return saved
    if unfinished:
        raise ValueError(f"{unfinished[-1]} is of an unfinished training: go on with --resume, "
                         "delete it, or choose another --out")
    if o.stage in ("all", "1"):
        return nothing
    path = Path(o.out) / f"stage{int(o.stage) - 1}.pt"
    if not path.is_file():
        raise ValueError(f"{path} is not there, and stage {o.stage} starts from it: train with "
                         f"--stage {int(o.stage) - 1} first")
    saved = load_checkpoint(path, FORMAT)
    model.fill(path, saved)
    return nothing | {"step": saved["step"]}


# ------------------------------------------------------------------------------------ scoring

def answers(model, features, items, clip_of=lambda item: item["clip"]):
    """The model's answer to every item, by the features of its clip."""
    asked = [(clip_of(item), item["instruction"], ()) for item in items]
    found = ask_all(model, lambda clips: [features[c] for c in clips], asked)
    return [text for text, _ in found]


def score(model, features, items):
    """Share of the answers that are exactly right."""
    return np.mean([a == item["output"] for a, item in zip(answers(model, features, items), items)])


def table(model, features, items, train_items):
    """Exact match by domain and task, beside three controls that a listening model must beat."""
    silence = model.features([lambda rate: torch.zeros(int(SECONDS * rate))])
    other = wrong_clips({item["clip"]: item["domain"] for item in items})
    seen = {}  # of very many training questions, an even sample tells the commonest answers
    for i in range(0, len(train_items), 1 + len(train_items) // 100_000):
        item = train_items[i]
        seen.setdefault((item["domain"], item["task"]), Counter())[item.get("output")] += 1
    common = {key: counter.most_common(1)[0][0] for key, counter in seen.items()}
    given = {"model": answers(model, features, items),
             "deaf": answers(model, silence, items, lambda item: 0)}
    if other:
        given["wrong clip"] = answers(model, features, items, lambda item: other[item["clip"]])
    given["commonest"] = [common.get((item["domain"], item["task"]), "") for item in items]
    rows = {}
    for i, item in enumerate(items):
        # a set: a list called all.json has a domain "all", not to be counted twice
        for key in {(item["domain"], item["task"]), (item["domain"], "all"), ("all", "all")}:
            rows.setdefault(key, []).append([given[c][i] == item["output"] for c in given])
    rows = {key: (len(r), *np.mean(r, axis=0).tolist()) for key, r in sorted(rows.items())}
    print(f"\n{'domain':<10}{'task':<16}{'questions':>10}" + "".join(f"{c:>12}" for c in given))
    for (d, t), (n, *shares) in rows.items():
        print(f"{d:<10}{t:<16}{n:>10}" + "".join(f"{100 * s:>11.1f}%" for s in shares))
    dice = np.random.default_rng(0)
    for label, hit, some in (("right", True, 3), ("wrong", False, 2)):
        which = [i for i, a in enumerate(given["model"]) if (a == items[i]["output"]) == hit]
        for i in dice.permutation(which)[:some].tolist():
            print(f"{label}: {items[i]['instruction']} -> {given['model'][i]}"
                  + ("" if hit else f"   (it was: {items[i]['output']})"))
    return {f"{d} {t}": dict(zip(("questions", *given), row)) for (d, t), row in rows.items()}


def watch(o):
    """Does a model look at what it names? How much of the attention that the last word of its
    answer ("a siren") gives to SSLAM's tokens, or LFST's, falls on the sound's time, and how much
    before and after, over test clips of one sound; beside it chance, the part of the clip that each
    fills."""
    model = AudioLLM.load(o.watch, sources_of(o))
    part = next((part for part, kinds in model.joins.items() if "sslam" in kinds), None)
    if not part:
        raise ValueError(f"{o.watch}: has no SSLAM to look at")
    model.to(pick_device(o.device))
    question, falls, chances, right = "What do you hear?", [], [], 0
    ones = (s for s in (scene("test", i, o.seed, o.difficulty) for i in count(0, 3))
            if len(s["events"]) == 1)
    for s in tqdm(islice(ones, o.test_clips), total=o.test_clips, desc="clips", mininterval=1):
        sound, = s["events"]
        features, = model.features([partial(clip_of_scene, s)])
        ids = model.llm.generate(model.tokenizer.chat(question)[1], 48,
                                 cache=model.hear([features]), eos_id=model.tokenizer.eos_id)
        name, which = words(model.tokenizer, ids)[-1]
        right += name == sound.name
        weights = listen(model, features, question, ids)[part][:, which].mean(1)  # (layers, n)
        fall, step = on_grid(model, part, weights, SECONDS)
        fall = fall.sum(-1)  # (layers, steps)
        edges = torch.arange(fall.shape[1] + 1) * step
        # what part of each step lies before, in and after the sound (3, steps)
        spans = (0, sound.start), (sound.start, sound.end), (sound.end, SECONDS)
        parts = torch.stack([edges.clamp(a, b).diff() for a, b in spans]) / step
        falls.append(fall @ parts.T / fall.sum(1, keepdim=True))
        chances.append(parts.mean(1))
    falls, chances = torch.stack(falls), torch.stack(chances)  # (clips, layers, 3), (clips, 3)
    rows = {"chance": chances.mean(0), "attention": falls.mean((0, 1))}
    rows |= {f"in layer {i}": row for i, row in enumerate(falls.mean(0), 1)}
    print(f"{len(falls)} clips, {right} sounds named right\n"
          f"{'':<12}{'before':>9}{'on it':>9}{'after':>9}")
    for label, row in rows.items():
        print(f"{label:<12}" + "".join(f"{share:>9.1%}" for share in row))
    more = (falls.mean(1) > chances)[:, 1].sum()
    print(f"on it more than by chance in {more} of {len(falls)} clips")


def peak_memory(device):
    """MiB: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # there is none on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------- what is known before the joining

# What is known before comes from training scenes of its own, from this one on: clips that an
# encoder has learnt from would sound clearer to it than those that the test will bring.
APART = 10 ** 6
PARTS = ("sslam", "llm", "whisper", "clap")  # the one that takes longest first
WINDOWS = {"whisper": 4, "sslam": 4, "clap": 2}  # tokens that a connector averages into one
WORDS = {"whisper": [".", *SYLLABLES, "sound"], "sslam": [".", *KINDS, *VOICES, *INSTRUMENTS]}
LESSONS = {"whisper": ("speech",), "sslam": ("sound", "music")}  # of the rest they hear a quarter


def word(kind, s, events):
    """The word for the first of some events of scene s to this kind of encoder; a dot for none.

    Whisper tells syllables apart, SSLAM who speaks, what sounds, which instrument plays.
    """
    if not events:
        return "."
    if events[0].name in SYLLABLES:
        return events[0].name if kind == "whisper" else s["voice"]
    return "sound" if kind == "whisper" else events[0].name


def context(kind, s, times):
    """What an encoder that attends to the whole clip knows of what sounds at each time, as numbers,
    and how many there are of each: its word, that of what was and will be heard next to it, and how
    many events or notes have begun; for SSLAM also a second sound, its traits, and its note, with
    the ones before and after. Of silence it knows nothing, so that who asks has to look at the
    sound itself."""
    sizes = [len(WORDS[kind])] * 3 + [7]
    if kind == "sslam":
        sizes += [len(WORDS[kind]), *(1 + len(group) for group in GROUPS), 9, 9, 9]

    def row(t):
        begun = [e for e in s["events"] if e.start <= t]
        sounding = [e for e in reversed(begun) if t < e.end]
        if not sounding:
            return [0] * len(sizes)
        last, past = sounding[0], [e for e in reversed(begun) if t >= e.end]
        future = [e for e in s["events"] if e.start > t]
        number = sum(e.name in SYLLABLES or s["domain"] != "speech" for e in begun)
        steps = [0, 0, 0]
        if last.beat:
            number = min(len(last.notes), 1 + int((t - last.start) / last.beat))
            steps = [0, *(1 + note for note in last.notes), 0][number - 1:number + 2]
        near = [WORDS[kind].index(word(kind, s, some))
                for some in (sounding, past, future, sounding[1:])]
        if kind == "whisper":
            return near[:3] + [number]
        known = [("", *group).index(trait) for group, trait in zip(GROUPS, traits(last))]
        return near[:3] + [number, near[3], *known, *steps]

    return [row(t) for t in times], sizes


def progress(items, part, doing):
    """A bar for what is done to one of PARTS, in a line of its own: several are made at once."""
    return tqdm(items, desc=f"{part} {doing}", position=PARTS.index(part), mininterval=1)


def fit(model, loss_of, steps, lr, part, doing):
    """The plain loop: minimise loss_of(step)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    bar = progress(range(steps), part, doing)
    for step in bar:
        loss = loss_of(step)
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def teach(kind, steps, o):
    """A miniature encoder that has learnt to tell what sounds when: see `context`."""
    encoder = make_encoder(kind)
    louder = {"conv1.weight": 3, "conv2.weight": 3, "local_encoder.proj.weight": 8}
    with torch.no_grad():  # or the positions, whose size is fixed, would drown what is heard
        for name, p in encoder.named_parameters():
            p *= louder.get(name, 1)
    T, bands = encoder.grid
    times = (np.arange(T) + 0.5) * SECONDS / T
    fronts, truth = [], []
    scenes = (s for s in (scene("train", i, o.seed) for i in count(APART))
              if s["domain"] in LESSONS[kind] or s["key"] % 4 == 0)
    for s in progress([*islice(scenes, o.hear_clips)], kind, "gets clips"):
        fronts.append(encoder.front_end(torch.from_numpy(render(s))[None]).half())
        rows, sizes = context(kind, s, times)
        truth.append(rows)
    fronts, truth = torch.cat(fronts), torch.tensor(truth)
    head = nn.Linear(encoder.width, sum(sizes))  # lives only here

    def loss_of(step):
        batch = torch.randint(len(fronts), (8,))
        tokens = encoder(fronts[batch].float())[:, encoder.extra:]  # (B, T * bands, width)
        # what a connector will average is to know what sounds at its time, in whichever band
        logits = head(tokens).unflatten(1, (T, -1, min(bands, WINDOWS[kind]))).mean(3)
        told = truth[batch][:, :, None].expand(*logits.shape[:-1], len(sizes))
        return sum(F.cross_entropy(part.flatten(0, 2), told[..., i].flatten())
                   for i, part in enumerate(logits.split(sizes, dim=-1)))

    fit(nn.ModuleList([encoder, head]), loss_of, steps, 1.5e-3, kind, "learns to hear")
    return encoder


def match(steps, o):
    """A miniature CLAP that has learnt which clip goes with which words, in any order (contrastive,
    Radford et al. 2021; the text tower is a bag of words and lives only here)."""
    encoder = make_encoder("clap")
    scenes = [scene("train", APART + i, o.seed) for i in range(o.hear_clips)]
    bags = [set(chain.from_iterable([word("whisper", s, [e]), word("sslam", s, [e]), *traits(e)]
                                    for e in s["events"])) for s in scenes]
    names = sorted(set().union(*bags))
    told = torch.tensor([[float(name in bag) for name in names] for bag in bags])
    fronts = torch.cat([encoder.front_end(torch.from_numpy(render(s))[None])
                        for s in progress(scenes, "clap", "gets clips")])
    words, ears = nn.Linear(len(names), 64), nn.Linear(encoder.width, 64)
    scale = nn.Parameter(torch.tensor(2.5))

    def loss_of(step):
        batch = torch.randint(len(fronts), (24,))
        heard = F.normalize(ears(encoder(fronts[batch]).mean(1)), dim=-1)  # (B, 64)
        likeness = scale.exp() * heard @ F.normalize(words(told[batch]), dim=-1).T  # (B, B)
        own = torch.arange(len(batch))
        return F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)

    fit(nn.ModuleList([encoder, words, ears, nn.ParameterList([scale])]), loss_of, steps, 2e-3,
        "clap", "learns to match")
    return encoder


def read_world(o):
    """A tokenizer and a small LLM that have learnt to answer about training scenes, of which they
    have heard nothing: they read what encoders without fault would note down, see `context`, each
    number an embedding."""
    dice, D = np.random.default_rng(o.seed), LLMConfig.hidden_size
    times = (np.arange(25) + 0.5) * SECONDS / 25

    def page(i):
        """Scene i, and talks about it: three questions and a checklist."""
        s = scene("train", APART + i, o.seed)
        asked = [[(q["instruction"] + "\n", q["output"])]
                 for q in dice.permutation(questions(s, dice))[:3]]
        return s, asked + [checklist(s, dice)]

    texts = [text for i in range(3000) for pairs in page(i)[1] for pair in pairs for text in pair]
    tokenizer = train_tokenizer(texts, LLMConfig.vocab_size)
    llm = LLM(replace(LLMConfig(), vocab_size=tokenizer.vocab_size))
    sizes = {kind: context(kind, scene("train", 0), [])[1] for kind in LESSONS}
    tables = nn.ModuleDict({kind: nn.ModuleList(nn.Embedding(n, D) for n in sizes[kind])
                            for kind in LESSONS})  # live only here
    for p in tables.parameters():
        nn.init.normal_(p, std=D ** -0.5)

    def notes(kind, scenes):
        rows = torch.tensor([context(kind, s, times)[0] for s in scenes])  # (B, T, columns)
        return sum(table(column) for table, column in zip(tables[kind], rows.unbind(2)))

    def loss_of(step):
        scenes, talks = zip(*map(page, range(16 * step, 16 * step + 16)))
        told = torch.cat([notes(kind, scenes) for kind in LESSONS], 1)  # (B, N, D)
        rows = [row for row, some in enumerate(talks) for _ in some]
        talks = [*chain(*talks)]
        ids, weights = zip(*(conversation(tokenizer, pairs) for pairs in talks))
        ids, weights = pad([*map(torch.tensor, ids)]), pad([*map(torch.tensor, weights)])
        # half of all notes are read the one way, half the other, so that neither is strange
        segments = [("plits", llm.embed(torch.tensor([[tokenizer.bos_id]])), None),
                    (("plits", "lal")[step % 2], told, None)]
        cache = KVCache(llm.config.num_hidden_layers)
        run(llm, segments, cache)
        text = [("plits", llm.embed(ids[:, :-1]), None)]
        hidden = run(llm, text, cache.fork(rows, ids.shape[1]))
        return weighted_loss(llm, hidden, ids, weights) / sum(map(len, talks))

    fit(nn.ModuleList([llm, tables]), loss_of, o.read_steps, 2e-3, "llm", "reads")
    return tokenizer, llm


def make_part(name, o):
    """One of PARTS, in a process of its own: its weights, and what else base.pt says of it."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(o.seed)
    more = {}
    if name == "llm":
        tokenizer, part = read_world(o)
        more = {"llm_config": asdict(part.config), "tokenizer": tokenizer.proto}
    elif name == "clap":
        part = match(o.hear_steps // 8, replace(o, hear_clips=math.ceil(o.hear_clips / 3)))
    else:  # SSLAM's is by far the hardest lesson
        part = teach(name, o.hear_steps * (3 if name == "sslam" else 1), o)
    return {k: v.half().numpy() for k, v in part.state_dict().items()}, more


def prepare(o):
    """Make assets/base.pt: what is frozen, or joined, must know something first. No part needs
    another, and two cores make two parts sooner than one after the other: each gets a process."""
    with ProcessPoolExecutor(min(len(PARTS), os.cpu_count())) as pool:
        try:
            made = dict(zip(PARTS, pool.map(make_part, PARTS, repeat(o))))
        except BrokenProcessPool:
            raise ValueError("--prepare: one of its processes was killed; if for want of memory, "
                             "lower --hear-clips") from None
        except BaseException:  # a Ctrl-C, too: nobody waits for the others
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    state = {name: {k: torch.from_numpy(v) for k, v in made[name][0].items()}
             for name in ("llm", *WINDOWS)}
    more = made["llm"][1]
    save_atomically(o.base, {"format": BASE, "state": state, "llm_config": more["llm_config"],
                             "tokenizer": to_bytes(more["tokenizer"])})
    print(f"wrote {o.base}, {Path(o.base).stat().st_size / 1e6:.1f} MB")


BASE = "prepared parts 1"


def load_base(path, mode, windows, sources=None, folder=None, arm=Arm(), kinds="all"):
    """An AudioLLM of the prepared parts, with new connectors.

    kinds: of the prepared encoders, "all" or with commas between.
    sources: {kind: path} of real encoders, which then take the place of all miniatures.
    folder: of a real LLM, which takes the place of the small one. arm: see AudioLLM.
    """
    saved = load_checkpoint(path, BASE)
    try:
        llm = LLM(LLMConfig(**saved["llm_config"]))
        encoders = {kind: make_encoder(kind) for kind in saved["state"] if kind != "llm"}
        for name, part in {"llm": llm, **encoders}.items():
            part.load_state_dict(saved["state"][name])
    except (KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"{path}: made by another version of this code; make it anew with "
                         f"--prepare ({e})") from None
    if kinds != "all":
        if unknown := set(kinds.split(",")) - set(encoders):
            raise ValueError(f"--encoders {kinds}: {path} has {', '.join(encoders)}, not "
                             f"{', '.join(sorted(unknown))}")
        encoders = {kind: encoders[kind] for kind in kinds.split(",")}
    tokenizer = read_tokenizer(from_bytes(saved["tokenizer"]))
    if folder:
        llm, tokenizer = LLM.from_pretrained(folder), load_tokenizer(folder)
    real = {kind: load_encoder(kind, source) for kind, source in (sources or {}).items() if source}
    return AudioLLM(llm, tokenizer, real or encoders, mode, windows, arm)


# --------------------------------------------------------------------------------------- main

@dataclass(frozen=True)
class Options:
    mode: str = option("lal", "how the audio enters the LLM", choices=MODES)
    connector: str = option(None, "auto is lfst for sslam with clap, else mlp; if none is named, "
                            "auto for real encoders, mlp for the miniatures",
                            choices=("auto", "mlp", "qformer", "lfst"))
    connector_layers: int = option(Arm.connector_layers, "of a qformer or lfst", low=1, high=99)
    queries: int = option(Arm.queries, "of a qformer: the tokens of each encoder", low=1, high=9999)
    grid_steps: int = option(Arm.grid_steps, "time steps that lfst makes of a window of sound",
                             low=1, high=9999)
    grid_bands: int = option(Arm.grid_bands, "bands of frequency in each of them", low=1, high=128)
    lal_layers: str = option(Arm.lal_layers, "the LLM's layers that hear, under lal and pal: all, "
                                             "2: or ::2 or 0,1")
    audio_rope: str = option(Arm.audio_rope, "off: under lal and pal audio keys tell no positions",
                             choices=("on", "off"))
    flamingo_every: int = option(Arm.flamingo_every, "flamingo: a layer that listens before every "
                                                     "so many of the LLM's", low=1, high=9999)
    freeze: str = option("none", "what of the LLM is never trained: ffn (its MLPs) or llm (all)",
                         choices=("none", "ffn", "llm"))
    data: str = option(None, "your own questions, a JSON list or JSONL; else the listening world")
    val_data: str = option(None, "questions to score on, with --data")
    audio_root: str = option(None, "folder that audio_id is relative to; else the list's own")
    skip_bad: bool = option(False, "go on without the items of --data that cannot be used")
    out: str = option(None, "folder of the checkpoint and metrics.jsonl; else out/MODE")
    base: str = option("assets/base.pt", "the prepared encoders and LLM")
    encoders: str = option("all", "of the prepared ones those that are joined, like whisper,sslam")
    llm: str = option(None, "folder of a real LLM, Llama or Qwen2; it replaces the small one")
    whisper: str = option(None, "a public Whisper checkpoint; real encoders replace the miniatures")
    sslam: str = option(None, "a public SSLAM or EAT checkpoint")
    clap: str = option(None, "a public CLAP checkpoint")
    seed: int = option(0, "of the world, the connectors and the order of the questions")
    clips: int = option(4500, "training clips of the listening world", low=1)
    test_clips: int = option(240, "test clips of the listening world, about nine questions each",
                             low=1)
    difficulty: int = option(1, "of the listening world: more events, overlap and noise", high=2)
    batch: int = option(None, "questions a step; else the stage's own, 32 or with --llm 256", low=1)
    steps1: int = option(None, "steps of stage 1, connectors alone on classification; else as in "
                               "the tables at the top of train.py")
    steps2: int = option(None, "steps of stage 2, LLM and connectors on closed questions")
    steps3: int = option(None, "steps of stage 3, LLM and connectors on all questions")
    epochs: float = option(0.0, "passes over a stage's questions, instead of steps")
    lr: float = option(0.0, "peak rate of the LLM, with which the connectors' changes; 0: the "
                            "mode's or the stage's own")
    connector_lr: float = option(0.0, "peak rate of the connectors; 0: the stage's own")
    blur: float = option(None, "noise on what the encoders give, relative to its standard "
                               "deviation; else the stage's own, 0.3 or with --llm none")
    tasks: str = option(None, "tasks to learn, with commas between, or all; else the stage's own")
    stage: str = option("all", "one stage, which starts from the one before, or all of them",
                        choices=["1", "2", "3", "all"])
    save_every: int = option(500, "steps between two checkpoints, step-*.pt", low=1)
    keep: int = option(2, "how many of them stay", low=1)
    resume: bool = option(False, "go on from the newest step-*.pt in --out, with the same options")
    micro: int = option(32, "questions at once: a larger batch is added up, part by part", low=1)
    recompute: bool = option(False, "save memory: compute feed-forward parts again for backward")
    compile: bool = option(False, "torch.compile the feed-forward parts")
    dtype: str = option("auto", "of the products: auto is bfloat16 on cuda, else float32",
                        choices=["auto", "bfloat16", "float32"])
    keep_features: bool = option(True, "hear each training clip once; if they do not fit in memory:"
                                       " --no-keep-features, hear it each time it is asked about")
    workers: int = option(0, "processes that read and prepare data ahead", high=256)
    device: str = option("auto", "cpu, cuda, mps or auto")
    watch: str = option(None, "say how much a checkpoint looks at the sounds it names, and stop")
    prepare: bool = option(False, "make assets/base.pt anew and stop")
    read_steps: int = option(1700, "with --prepare: steps of the LLM's reading")
    hear_clips: int = option(12000, "with --prepare: clips the encoders learn from, CLAP from a "
                                    "third of them", low=1)
    hear_steps: int = option(2400, "with --prepare: steps of Whisper; SSLAM takes three times, "
                                   "CLAP an eighth")


def sources_of(o):
    """{kind: path} of real encoders, None where there is none."""
    return {kind: getattr(o, kind) for kind in WINDOWS}


def arm_of(o):
    """The Arm that the options name."""
    arm = {f.name: getattr(o, f.name) for f in fields(Arm)}
    return Arm(**arm | {"connector": o.connector or ("auto" if any(sources_of(o).values())
                                                     else "mlp")})


def main(o):
    # where the loss is small, gradients are so small that a CPU would take twice the time for them
    torch.set_flush_denormal(True)
    o = replace(o, out=o.out or f"out/{o.mode}")
    if o.prepare or o.watch:
        return prepare(o) if o.prepare else watch(o)
    device = join_processes(o)
    if not o.data and (o.val_data or o.audio_root):
        raise ValueError("--val-data and --audio-root say more about --data, which is missing")
    if not o.keep_features and not o.val_data:
        raise ValueError("--no-keep-features is for --data, and needs --val-data besides")
    torch.manual_seed(o.seed)
    model = load_base(o.base, o.mode, WINDOWS, sources_of(o), o.llm, arm_of(o), o.encoders)
    if o.data:
        items = Questions(o.data, o.audio_root, o.skip_bad)
        train_data = val_data = test_data = items.clips() if o.keep_features else {}, items
        if o.val_data:
            items = Questions(o.val_data, o.audio_root, o.skip_bad)
            val_data = test_data = items.clips(), items
        if not o.val_data:
            print("no --val-data: the scores below are on the training questions themselves")
    else:
        train_data, val_data, test_data = (
            world(split, clips, o.seed, o.difficulty)
            for split, clips in (("train", o.clips), ("val", 30), ("test", o.test_clips)))
        with_ids(model.tokenizer, train_data[1])
    stages = [stage for stage in curriculum(o)
              if o.stage in ("all", stage.name) and len(lessons(stage, train_data[1])[0])]
    if not stages:
        raise ValueError("nothing to train: no stage has both steps and questions of its tasks")
    Path(o.out).mkdir(parents=True, exist_ok=True)
    start = beginning(model, o, train_data[1].mark if o.data else None)
    device = pick_device(device, o.dtype)
    model.to(device)
    lighten(model, o.recompute, o.compile)
    data = train_data, val_data, test_data  # of which two may be the same, to be heard once
    clips_of = {id(items): clips for clips, items in data}
    features = {key: hear_all(model, clips) for key, clips in clips_of.items()}
    sets = [(features[id(items)], items) for _, items in data]
    metrics, (rank, _) = f"{o.out}/metrics.jsonl", processes()
    if not o.data and rank == 0:
        write_demo(*test_data)
    if rank:
        metrics = os.devnull  # only the first process writes
    elif o.resume and os.path.getsize(metrics) > start["logged"]:
        os.truncate(metrics, start["logged"])  # what came after will come again
    elif not start["step"] and os.path.exists(metrics):
        os.replace(metrics, f"{o.out}/metrics.old.jsonl")
    with open(metrics, "a") as file:
        tell_parts(model, stages, o.freeze)
        seconds = train(model, sets[0], sets[1], o, file, start)
        scores = table(model, *sets[2], sets[0][1])
        print(f"{1000 * seconds:.0f} ms a step, peak memory {peak_memory(device):.0f} MiB; the "
              f"model is {o.out}/model.pt")
        log(file, scores=scores, seconds_per_step=seconds, options=asdict(o))
    if rank == 0:
        for path in kept(o.out):  # finished: nothing to resume
            path.unlink()
    if dist.is_initialized():
        dist.destroy_process_group()


def lighten(model, recompute, compile):
    """Make the feed-forward parts, which keep the most for backward, keep nothing but their input,
    or compile them. Attention writes a cache, which must not happen twice."""
    for block in model.llm.model.layers:
        if compile:
            block.mlp.compile()
        if recompute:
            block.mlp.forward = partial(checkpoint, block.mlp.forward, use_reentrant=False)


def write_demo(clips, items, count=8):
    """A few clips and their questions to play with: out/demo/0.wav ..., out/demo/questions.json."""
    Path("out/demo").mkdir(parents=True, exist_ok=True)
    for i in range(min(count, len(clips))):
        save_wav(f"out/demo/{i}.wav", clips[i](RATE), RATE)
    asked = [{"audio_id": f"{item['clip']}.wav", "dataset": item["domain"]}
             | {k: item[k] for k in ("instruction", "output", "task")}
             for item in items if item["clip"] < count]
    Path("out/demo/questions.json").write_text(json.dumps(asked, indent=1))


if __name__ == "__main__":
    command_line(Options, __doc__, main)
