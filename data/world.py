"""The listening world: a synthetic stand-in for the paper's data, OpenAQA's millions of questions.

Clips of four seconds, of sounds, speech or music, and questions whose answers are known because we
put the sounds there. Nothing is stored: a clip is a function of (split, index, seed, difficulty),
so every machine makes the same ones. Read `scene`, `render` and `questions` first.

    python -c "from data.world import *; write_demo(*load_world('test', 8, seed=0))"  # out/demo
"""
import json
import zlib
from functools import partial
from itertools import combinations, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.audio import save_wav
from lib.resampling import resample

RATE = 16000   # samples per second
SECONDS = 4.0  # length of every clip
SPLITS = ("train", "val", "test")
DOMAINS = ("sound", "speech", "music")
LOUD = 4.0     # dB above the mean; soft is as much below it


# ------------------------------------------------------------------------------- waves of a sound

def shaped_noise(rng, n, spectral_shape):
    """n samples of noise of root mean square 1. spectral_shape: a function Hz -> amplitude."""
    # a power of two is quickest to transform; after two seconds it repeats, which nobody notices
    size = min(1 << (n - 1).bit_length(), 32768)
    f = np.fft.rfftfreq(size, 1 / RATE).astype(np.float32)
    gain = (f >= 20) * spectral_shape(np.maximum(f, 20))  # nothing below hearing
    bins = rng.standard_normal((len(f), 2), np.float32).view(np.complex64)[:, 0]
    wave = np.resize(np.fft.irfft(bins * gain), n)
    return wave / np.sqrt(np.mean(wave ** 2))


def band(low, high):  # the spectral shape that passes these frequencies, in Hz
    return lambda f: ((f > low) & (f < high)).astype(np.float32)


def tone(pitch, *amplitudes):
    """A pitch track (n,) in Hz and the amplitudes of its harmonics 1, 2, 3... -> wave (n,)."""
    bins = np.zeros(2049, np.complex64)
    bins[1:len(amplitudes) + 1] = amplitudes
    # one period of the sum of sines (4096,), then read as fast as the pitch says
    period = np.fft.irfft(bins * -2048j).astype(np.float32)
    phase = np.cumsum(pitch, dtype=np.float64) / RATE % 1  # the integral of frequency
    return period[(phase * 4096).astype(np.int32)]


# A new kind of sound takes three lines: a function of (rng, t) named by a simple noun, the wave it
# returns, its entry in KINDS; then `python -m data.pretrain`, for encoders and LLM to meet it. t
# (n,) is the time in seconds since the sound began; `render` sees to loudness and fades. Kinds
# should differ in band, in texture (steady, gliding, pulsed) or in both.
def siren(rng, t):  # a note that wails up and down
    swing = np.sin(2 * np.pi * (rng.uniform(1.5, 3) * t + rng.random()))
    return tone(rng.uniform(700, 1000) * 2 ** (0.5 * swing), 1, 0.5, 0.25)


def alarm(rng, t):  # one note, on and off
    gate = np.clip(0.5 + 5 * np.sin(2 * np.pi * rng.uniform(5, 8) * t), 0, 1)
    return gate * tone(rng.uniform(1200, 1700) + 0 * t, 1, 0, 0.4)


def whistle(rng, t):  # one pure high note with a little vibrato
    return tone(rng.uniform(2200, 3200) * (1 + 0.01 * np.sin(2 * np.pi * 6 * t)), 1)


def bird(rng, t):  # quick upward sweeps, very high
    u = t * rng.uniform(6, 10) % 1  # 0..1 within each sweep
    return np.sin(np.pi * u) * tone(rng.uniform(3500, 4800) * 2 ** (0.6 * u), 1)


def bell(rng, t):  # no simple ratios; the high partials die first
    base = 2 * np.pi * rng.uniform(500, 900) * t
    return sum(np.exp(-(1.5 + r) * t) * np.sin(r * base) for r in (1, 2.1, 2.9, 4.2, 5.4))


def guitar(rng, t):  # plucked again and again, bright then mellow
    u = t % (1 / rng.uniform(3, 4.5))
    base = rng.uniform(110, 220) + 0 * t
    return np.exp(-4 * u) * tone(base, 1, 0.6, 0.4) + np.exp(-15 * u) * tone(base, *[0.3] * 16)


def drum(rng, t):  # thuds whose pitch falls, each with a slap
    u = t % (1 / rng.uniform(3.5, 6))
    phase = rng.uniform(60, 100) * u - 2 * np.exp(-30 * u)
    slap = np.exp(-80 * u) * shaped_noise(rng, len(t), band(200, 5000))
    return np.exp(-16 * u) * np.sin(2 * np.pi * phase) + 0.3 * slap


def clock(rng, t):  # ticks: all high frequencies at once, then nothing
    u = t % (1 / rng.uniform(6, 10))
    return np.exp(-150 * u) * shaped_noise(rng, len(t), band(1000, 7900))


def horn(rng, t):  # two steady brassy notes
    low = rng.uniform(220, 330) + 0 * t
    return sum(tone(pitch, 1, 0.9, 0.7, 0.5, 0.3, 0.2) for pitch in (low, 1.26 * low))


def buzzer(rng, t):  # a low note that is nearly all overtones
    return tone(rng.uniform(90, 130) + 0 * t, *np.linspace(0.5, 1, 40))


def hiss(rng, t):  # steady noise, high
    return shaped_noise(rng, len(t), band(rng.uniform(3000, 4500), rng.uniform(7000, 8000)))


def rumble(rng, t):  # rolling noise, low
    return (1 + 0.5 * np.sin(20 * t)) * shaped_noise(rng, len(t), band(30, rng.uniform(120, 180)))


KINDS = {make.__name__: make for make in (siren, alarm, whistle, bird, bell, guitar, drum, clock,
                                          horn, buzzer, hiss, rumble)}


# An instrument is the same with a pitch: a function of (pitch track (n,) in Hz, t).
def piano(pitch, t):  # struck, then dying away
    return np.exp(-4 * t) * tone(pitch, 1, 0.5, 0.35, 0.2, 0.1)


def flute(pitch, t):  # nearly pure, and it wavers
    return np.minimum(1, 15 * t) * tone(pitch * (1 + 0.01 * np.sin(35 * t)), 1, 0.15)


def organ(pitch, t):  # steady; octaves
    return tone(pitch, 1, 0.9, 0, 0.8, 0, 0, 0, 0.7)


def violin(pitch, t):  # it swells; all overtones
    return np.minimum(1, 5 * t) * tone(pitch * (1 + 0.006 * np.sin(38 * t)), *1 / np.arange(1, 13))


INSTRUMENTS = {make.__name__: make for make in (piano, flute, organ, violin)}
SCALE = 220 * 2 ** (np.array([0, 4, 7, 12, 16, 19, 24, 28]) / 12)  # Hz: a major chord, repeated


# ----------------------------------------------------------------------------------------- speech

# Speech is a source, pulses of the vocal folds or noise, through a filter, the resonances of the
# mouth (formants, here a man's first three, in Hz). A syllable is a consonant and a vowel: "ba".
# A voice: its pitch is drawn between two, in Hz; its formants are a man's times a factor.
VOICES = {"man": (95, 135, 1.0), "woman": (180, 230, 1.17), "child": (270, 340, 1.35)}
VOWELS = {"a": (730, 1090, 2440), "e": (500, 1840, 2480), "i": (270, 2290, 3010),
          "o": (500, 880, 2540), "u": (300, 700, 2240)}
# Seconds, amplitude of the pulses, formants; amplitude of the noise, for how many seconds before
# the vowel, from and to which frequency in Hz.
CONSONANTS = {
    "b": (0.07, 0.15, (250, 700, 2200), 0.3, 0.016, (300, 1500)),
    "d": (0.07, 0.15, (250, 1900, 2800), 0.5, 0.020, (3000, 5000)),
    "k": (0.09, 0.00, (300, 1200, 2000), 1.0, 0.040, (1200, 2600)),
    "t": (0.10, 0.00, (300, 1900, 2800), 1.0, 0.050, (3500, 7000)),
    "f": (0.13, 0.00, (350, 900, 2200), 0.4, 0.130, (1000, 7900)),
    "s": (0.14, 0.00, (300, 1700, 2600), 0.9, 0.140, (4800, 7800)),
    "sh": (0.14, 0.00, (300, 1800, 2400), 1.0, 0.140, (2200, 5000)),
    "m": (0.11, 0.40, (250, 900, 2200), 0.0, 0.020, (0, 0)),
    "n": (0.11, 0.40, (250, 1700, 2600), 0.0, 0.020, (0, 0)),
    "l": (0.09, 0.50, (360, 1200, 2900), 0.0, 0.020, (0, 0)),
    "r": (0.10, 0.60, (330, 1060, 1400), 0.0, 0.020, (0, 0)),
    "w": (0.10, 0.60, (290, 610, 2150), 0.0, 0.020, (0, 0))}
SYLLABLES = "ba di ku so ma ne ti lo sha fu ra we".split()
HOP = 128  # samples, 8 ms, between two frames of speech


def articulate(syllables, frames, f):
    """How the mouth moves in one utterance.

    syllables: its Events. frames (F,): seconds since it began. f (bins,): in Hz. Returns three
    formants (F,) in Hz, the voice's amplitude (F,), and the noise's spectrum (F, bins).
    """
    formants, voicing, frication = [], [], 0
    for e in syllables:
        length, amplitude, consonant, noise, burst, noise_band = CONSONANTS[e.name[:-1]]
        vowel = VOWELS[e.name[-1]]
        start, stop = e.start - syllables[0].start, e.end - syllables[0].start
        onset = start + length  # of the vowel, to which the formants glide in 60 ms
        formants += [(start, *consonant), (onset, *consonant)]
        formants += [(onset + 0.06, *vowel), (stop, *vowel)]
        voicing += [(start, 0), (start + 0.015, amplitude), (onset, amplitude)]
        voicing += [(onset + 0.025, 1), (stop - 0.08, 0.8), (stop, 0)]
        burst_times = [onset - burst - 0.008, onset - burst, onset, onset + 0.012]
        envelope = np.interp(frames, burst_times, [0, noise, noise, 0])
        frication = frication + np.outer(envelope, band(*noise_band)(f))
    times, *tracks = zip(*formants)
    formants = [np.interp(frames, times, track) for track in tracks]
    return formants, np.interp(frames, *zip(*voicing)), frication


def speak(rng, voice, syllables, t):
    """Events of one utterance -> wave (n,), t (n,) seconds after the first one's start."""
    low, high, formant_factor = VOICES[voice]
    frames = np.arange(len(t) // HOP + 2) * HOP / RATE  # (F,)
    f = np.fft.rfftfreq(2 * HOP, 1 / RATE).astype(np.float32)  # (bins,)
    formants, voicing, frication = articulate(syllables, frames, f)
    # the source: a pulse whenever the phase of a pitch that sinks and wavers passes an integer
    base = rng.uniform(low, high)
    waver = np.interp(frames, np.arange(0, 5, 0.2), rng.uniform(0.95, 1.05, 25))
    phase = np.cumsum(base * waver * (1.05 - 0.05 * frames)) * HOP / RATE
    pulse_times = np.interp(np.arange(1, phase[-1]), phase, frames)
    source = np.zeros((2, len(t) + 3 * HOP), np.float32)
    source[0, (pulse_times * RATE).astype(int)] = np.sqrt(RATE / base)
    source[1] = 0.3 * rng.standard_normal(source.shape[1], np.float32)  # and white noise
    # the filter of the pulses (F, bins): a peak at each formant, the higher the fainter
    peaks = 0.01
    for track, gain, width in zip(formants, (1, 0.6, 0.35), (80, 100, 140)):
        centre = formant_factor * track[:, None]
        peaks = peaks + gain / (1 + ((f - centre) / width) ** 2)
    resonance = voicing[:, None] * peaks * (f > 60)
    # cut into windows that overlap by half, filter each one's spectrum, add them up again
    window = np.sin(np.pi * (np.arange(2 * HOP, dtype=np.float32) + 0.5) / (2 * HOP))
    pieces = np.lib.stride_tricks.sliding_window_view(source, 2 * HOP, axis=1)[:, ::HOP]
    pulses, breath = np.fft.rfft(pieces[:, :len(frames)] * window)  # (F, bins) each
    pieces = np.fft.irfft(pulses * np.float32(resonance) + breath * np.float32(frication)) * window
    return (pieces[1:, :HOP] + pieces[:-1, HOP:]).ravel()[:len(t)]


# ---------------------------------------------------------------------------------------- a scene

class Event(NamedTuple):
    """A sound, a syllable, or what an instrument plays: notes one after another, or a chord."""
    name: str
    start: float        # seconds
    end: float
    level: float = 0.0  # dB
    notes: tuple = ()   # steps of SCALE
    beat: float = 0.0   # seconds from note to note; 0: all at once

    @property
    def contour(self):
        """Which way a melody goes, in an answer's words."""
        if not self.beat:
            return "a chord"
        steps = ["up" if b > a else "down" for a, b in zip(self.notes, self.notes[1:])]
        return steps[0] if steps[0] == steps[-1] else f"{steps[0]} and {steps[-1]}"


# How hard clips are, at difficulty 0, 1 and 2: from where to where something is drawn, how often.
DIFFICULTY = {
    "sounds": ((1, 2), (1, 3), (2, 5)),  # fewest and most in a clip
    "syllables": ((2, 4), (2, 5), (3, 6)),
    "notes": ((3, 3), (3, 4), (3, 5)),   # in a melody
    "mixed": (0.0, 0.4, 0.6),            # share of speech with a sound beside or within it
    "overlap": (0.0, 0.2, 0.5),          # share of sounds that begin before the last one ends
    "phrases": (0.0, 0.5, 0.7),          # share of music where two play, one after the other
    "noise": ((-24, -18), (-18, -12), (-12, -4)),  # dB relative to the events, of half the clips
}


def draw(rng, choices):
    return list(choices)[rng.integers(len(choices))]


# These return `count` events, each at second 0, and the pause after each in seconds.
def compose_sounds(rng, count, settings):
    names = [draw(rng, KINDS) for _ in range(count)]
    if count > 2 and rng.random() < 0.3:  # or one would hardly ever come twice
        names[2] = names[0]
    longest = min(0.8, 3 / count)
    events = [Event(name, 0, rng.uniform(0.35, longest), draw(rng, (-LOUD, LOUD)))
              for name in names]
    pauses = []
    for i, (one, two) in enumerate(zip(events, events[1:])):
        # none is hidden by both of its neighbours, or by one that is louder
        overlap = rng.random() < settings["overlap"] and min(pauses[-1:], default=0) >= 0
        pauses.append(-0.45 * min(one.end, two.end) if overlap else 0.15)
        if overlap:
            events[i + 1] = two._replace(level=events[i].level)
    return events, pauses + [0]


def compose_speech(rng, count, settings):
    tempo = rng.uniform(0.38, 0.55 if count < 6 else 0.45)
    events = [Event(draw(rng, SYLLABLES), 0, tempo * rng.uniform(0.93, 1.07))
              for _ in range(count)]
    pauses = [0.02] * count
    if rng.random() < settings["mixed"]:  # a sound before, within or after what is said
        at = rng.integers(count + 1)
        events.insert(at, Event(draw(rng, KINDS), 0, rng.uniform(0.35, 0.6)))
        pauses = [0.15 if at in (i, i + 1) else 0.02 for i in range(count + 1)]
    return events, pauses


def compose_music(rng, count, settings):
    slow_first = bool(rng.integers(2))  # of two melodies one is slow, the other fast
    events = []
    for i in range(count):
        n = int(rng.integers(*settings["notes"], endpoint=True))
        slow = slow_first == (i == 0)
        beat = rng.uniform(0.51, 0.54) if slow else rng.uniform(0.33, 0.36)
        beat *= min(1, 4 / n)  # or five notes twice would not fit in
        notes = draw_melody(rng, n)
        if rng.random() < 0.25:
            notes, beat = tuple(sorted(rng.choice(8, 3, replace=False).tolist())), 0.0
        events.append(Event(draw(rng, INSTRUMENTS), 0, beat * n or 0.8, 0.0, notes, beat))
    return events, [0.25] * count


def draw_melody(rng, n):
    """n different steps of the scale that rise, fall, or do one and then the other."""
    turn = rng.choice([n - 1, rng.integers(1, n - 1)])
    upward = rng.random() < 0.5
    notes = np.sort(rng.choice(8, n, replace=False))
    others = rng.permutation(notes[:-1])
    notes = np.r_[np.sort(others[:turn]), notes[-1], -np.sort(-others[turn:])]
    return tuple((notes if upward else 7 - notes).tolist())


COMPOSERS = {"sound": compose_sounds, "speech": compose_speech, "music": compose_music}


def held_out(names):
    """Whether this sequence of sounds or syllables is reserved for the test, as a fifth are."""
    return zlib.crc32(" ".join(names).encode()) % 5 == 0


def may_contain(split, domain, events):
    """Whether clips of this split may have these events: no name twice in a row, and the test has
    the sequences that are held out, no other split has them. A single sound may be in any."""
    names = [e.name for e in events]
    if domain == "music":
        names = [f"{e.name} {e.notes}" for e in events]
    elif any(a == b for a, b in zip(names, names[1:])):
        return False
    single = domain == "sound" and len(events) == 1
    return single or held_out(names) == (split == "test")


def spread(rng, events, pauses, joined):
    """The events at their times in the clip. What they leave of its length goes at random before,
    between and after them; if they are joined, only before and after."""
    earliest = np.cumsum([0] + [e.end + pause for e, pause in zip(events, pauses)])[:-1]
    spare = SECONDS - earliest[-1] - events[-1].end
    shifts = np.sort(rng.uniform(0, spare, 1 if joined else len(events)))
    for i, pause in enumerate(pauses[:-1]):
        if pause < 0:  # what overlaps stays together
            shifts[i + 1] = shifts[i]
    starts = (earliest + shifts).round(3).tolist()
    return [e._replace(start=t, end=round(t + e.end, 3)) for e, t in zip(events, starts)]


def scene(split, index, seed=0, difficulty=1):
    """What happens in clip `index` of a split, in words and seconds: sound, speech, music in turn.

    A test clip of two or more events, or of music, is a sequence that train and val never contain:
    to answer, a model must have learnt the parts, not the whole. Returns a dict of domain, events,
    noise_level (dB relative to the events), render_seed and, for speech, voice.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    domain = DOMAINS[index % 3]
    settings = {name: values[difficulty] for name, values in DIFFICULTY.items()}
    phrases = 1 + (rng.random() < settings["phrases"])
    counts = {"sound": settings["sounds"], "speech": settings["syllables"],
              "music": (phrases, phrases)}
    # drawn before any events, some of which are drawn again, so that counts are uniform
    count = int(rng.integers(*counts[domain], endpoint=True))
    events, pauses = COMPOSERS[domain](rng, count, settings)
    while not may_contain(split, domain, events):
        events, pauses = COMPOSERS[domain](rng, count, settings)
    events = spread(rng, events, pauses, domain == "speech")
    noise = settings["noise"] if rng.random() < 0.5 else (-30, -24)
    content = {"domain": domain, "events": events, "noise_level": float(rng.uniform(*noise)),
               "render_seed": int(rng.integers(1 << 62))}
    return content | ({"voice": draw(rng, VOICES)} if domain == "speech" else {})


def group_syllables(events):
    """Events in order, in lists: syllables that follow each other together, all else alone."""
    # the key is True for every syllable, and any other event itself
    return [list(group) for _, group in groupby(events, lambda e: e.name in SYLLABLES or e)]


def play(e, t):
    """What an instrument plays -> wave (n,)."""
    instrument = INSTRUMENTS[e.name]
    if not e.beat:
        return sum(instrument(SCALE[note] + 0 * t, t) for note in e.notes)
    index = np.minimum(t / e.beat, len(e.notes) - 1).astype(int)
    u = t - index * e.beat  # time since the note began
    fade = np.minimum(1, 100 * np.minimum(u, np.maximum(0, e.beat - u)))
    return fade * instrument(SCALE[np.array(e.notes)[index]], u)


def render(scene):
    """A scene -> its wave (samples,), float32 within [-1, 1], the same each time."""
    rng = np.random.default_rng(scene["render_seed"])
    wave = np.zeros(int(SECONDS * RATE), np.float32)
    for group in group_syllables(scene["events"]):
        e = group[0]
        first, last = int(e.start * RATE), int(group[-1].end * RATE)
        t = np.arange(last - first, dtype=np.float32) / RATE
        if e.name in SYLLABLES:
            sound = speak(rng, scene["voice"], group, t)
        else:
            sound = play(e, t) if e.notes else KINDS[e.name](rng, t)
        sound = sound * np.minimum(1, 100 * np.minimum(t, t[::-1]))  # 10 ms fades: no clicks
        gain = 10 ** ((e.level + rng.uniform(-1, 1)) / 20) / np.sqrt(np.mean(sound ** 2))
        wave[first:last] += gain * sound  # rms 1, but for its level
    # the background is white, pink or brown: its power falls with 1, 1/f or 1/f^2
    slope = -int(rng.integers(3)) / 2
    background = shaped_noise(rng, len(wave), lambda f: np.maximum(f, 60) ** slope)
    wave += 10 ** (scene["noise_level"] / 20) * background
    wave -= wave.mean()
    if scene["domain"] == "sound":  # one volume for all, or a single sound could not be soft;
        return np.clip(0.022 * wave, -1, 1)  # the peaks of a loud clock just fit
    return wave * np.float32(rng.uniform(0.3, 0.95) / np.abs(wave).max())


# ------------------------------------------------------------------------------- what can be said

NUMBERS = "zero one two three four five six".split()
ORDINALS = "first second third fourth fifth".split()
# what an answer may say of an event: of each attribute one word, or none
ATTRIBUTES = {"loudness": ("loud", "soft"),
              "contour": ("up", "down", "up and down", "down and up", "a chord"),
              "notes": tuple(NUMBERS[3:6]), "top": tuple(ORDINALS), "tempo": ("fast", "slow")}
VOCABULARY = {"sound": KINDS, "speech": SYLLABLES, "music": INSTRUMENTS}
UNITS = {"sound": "sound", "speech": "syllable", "music": "instrument"}

# The phrasings of each kind of question. {x} is "the siren", "a siren" or "di", or two of them;
# "after" asks for the next one.
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
    "contour": "Which way does {x} go?|In which direction does {x} move?|How does {x} move?",
    "top": "Which note of {x} is the highest?|Where is {x} highest?|Which is the top note of {x}?",
    "chord": "Does {x} play a chord?|Do the notes of {x} sound together?|Is there a chord by {x}?",
    "tempo": "Is the second melody faster or slower?|How fast is the second melody?",
    "same": "Is the second instrument the same or different?|Same instrument twice, or different?"}
TASKS = {"what": "classification", "who": "classification", "describe": "captioning",
         "words": "transcription"}  # all others are reasoning


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join_words(words, conjunction):
    """"the siren, the drum or the bell"."""
    return f" {conjunction} ".join(", ".join(words).rsplit(", ", 1))


def attributes(e):
    """{attribute: the word of ATTRIBUTES that is true of an event, or ""}."""
    words = dict.fromkeys(ATTRIBUTES, "")
    if e.level:
        words["loudness"] = "loud" if e.level > 0 else "soft"
    if e.notes:
        words["contour"] = e.contour
    if e.beat:
        words["notes"] = NUMBERS[len(e.notes)]
        words["top"] = ORDINALS[int(np.argmax(e.notes))]
        words["tempo"] = "fast" if e.beat * max(1, len(e.notes) / 4) < 0.43 else "slow"
    return words


def caption(scene):
    """A scene in one sentence, everything in order of time."""
    parts = []
    for group in group_syllables(scene["events"]):
        e = group[0]
        if e.name in SYLLABLES:
            said = " ".join(e.name for e in group)
            parts.append(f"{with_article(scene['voice'])} says {said}")
        elif e.beat:
            parts.append(f"{with_article(e.name)} plays {NUMBERS[len(e.notes)]} notes {e.contour}")
        else:
            parts.append(with_article(e.name) + " plays a chord" * bool(e.notes))
    return ", then ".join(parts).capitalize() + "."


# -------------------------------------------------------------------------------------- questions

def questions(scene, rng):
    """Every question that has one right answer here, each in a phrasing drawn from rng.

    Returns dicts of topic and x, see PHRASINGS, and task, instruction, output, domain. An answer
    that is a list names every event in order of time: "a drum, a bell and a drum". Questions whose
    answer would be the rarer one of yes and no are asked more often.
    """
    items = []
    # `topics` draws from rng too, in turn with the phrasings: the order decides what is drawn
    for topic, output, x in topics(scene, rng):
        phrasing = draw(rng, PHRASINGS[topic].split("|"))
        items.append({"topic": topic, "x": x, "task": TASKS.get(topic, "reasoning"),
                      "instruction": phrasing.format(x=x, unit=UNITS[scene["domain"]]),
                      "output": output, "domain": scene["domain"]})
    return items


def topics(scene, rng):
    """Yield (topic, answer, x) of every question: what all domains share, then a domain's own."""
    domain = scene["domain"]
    names = [e.name for e in scene["events"] if e.name in VOCABULARY[domain]]
    # a sound is "a siren", or "the siren" if the question takes it as known; a syllable is "di"
    new = names if domain == "speech" else [with_article(name) for name in names]
    known = names if domain == "speech" else [f"the {name}" for name in names]
    if domain == "speech":
        yield from speech_topics(scene, names)
    else:
        yield "what", join_words(new, "and"), ""
    yield "describe", caption(scene), ""
    absent = draw(rng, [name for name in VOCABULARY[domain] if name not in names])
    answer = draw(rng, ["yes", "no"])
    absent = absent if domain == "speech" else with_article(absent)
    yield "present", answer, draw(rng, new) if answer == "yes" else absent
    if domain != "music":
        yield "count", NUMBERS[len(names)], ""
    if len(names) > 1:
        yield "first", new[0], ""
        yield "last", new[-1], ""
    # what points at an event by its name must be the only one of that name
    unique = [i for i, name in enumerate(names) if names.count(name) == 1]
    if domain == "music":
        yield from music_topics(scene["events"], known, unique, rng)
        return
    heard = [e.name for e in scene["events"]]
    neighbours = [*zip(heard, heard[1:])]
    followed = [i for i in unique if tuple(names[i:i + 2]) in neighbours]
    if followed:
        i = draw(rng, followed)
        yield "after", new[i + 1], known[i]
    if domain == "sound" and len(names) > 1:
        yield from sound_topics(scene["events"], new, known, unique, rng)


def speech_topics(scene, names):
    voice = with_article(scene["voice"])
    sounds = [(i, e.name) for i, e in enumerate(scene["events"]) if e.name in KINDS]
    yield "what", " and ".join([f"{voice} speaking"] + [with_article(s) for _, s in sounds]), ""
    yield "who", voice, ""
    yield "words", " ".join(names), ""
    for i, sound in sounds:
        yield "besides", with_article(sound), ""
        for topic, said in (("said before", names[:i]), ("said after", names[i:])):
            if said:
                yield topic, " ".join(said), f"the {sound}"


def music_topics(events, known, unique, rng):
    for i in unique:
        if events[i].beat:
            words = attributes(events[i])
            yield "notes", words["notes"], known[i]
            yield "contour", words["contour"], known[i]
            yield "top", f"the {words['top']}", known[i]
        if not events[i].beat or rng.random() < 0.4:
            yield "chord", "no" if events[i].beat else "yes", known[i]
    if len(events) == 2 and (not unique or rng.random() < 0.4):
        yield "same", "different" if unique else "same", ""
    if len(events) == 2 and all(e.beat for e in events):
        yield "tempo", "slower" if events[0].beat < events[1].beat else "faster", ""


def sound_topics(events, new, known, unique, rng):
    names = [e.name for e in events]
    if len(names) > 2:
        yield "middle", new[1], ""
        name = max(names, key=names.count)
        if names.count(name) > 1 or rng.random() < 0.4:
            yield "times", NUMBERS[names.count(name)], with_article(name)
        if len(unique) == len(names):
            yield "order", ", ".join(known), join_words(rng.permutation(known).tolist(), "and")
    pairs = [(i, j) for i, j in combinations(unique, 2) if events[i].level != events[j].level]
    if pairs:
        loud, soft = sorted(draw(rng, pairs), key=lambda i: -events[i].level)
        yield "louder", known[loud], join_words(rng.permutation([known[loud], known[soft]]), "or")
    pairs = [(i, i + 1) for i in unique if i + 1 in unique]
    overlapping = [(i, j) for i, j in pairs if events[j].start < events[i].end]
    if overlapping or pairs and rng.random() < 0.4:
        i, j = draw(rng, overlapping or pairs)
        yield "overlap", "yes" if overlapping else "no", join_words([known[i], known[j]], "and")


# the topics about several events that a checklist has too
RELATIONS = "middle times order louder overlap same tempo".split()


def checklist(scene, rng):
    """Was it there, what came after it: pairs of what some questions ask, and the answer.

    Most are asked in the fewest words, " drum loud", and answered at once, which teaches a small
    LLM to look back for the word; from whole sentences it would learn that only after hours. The
    few that are whole end in a newline. Last come two questions about several events, in few words.
    """
    domain, events = scene["domain"], scene["events"]
    names, checks = [e.name for e in events], []
    words = [*VOCABULARY[domain], *(KINDS if domain == "speech" else ())]
    absent = [word for word in words if word not in names]
    true = [f"{e.name} {word}" for e in events for word in attributes(e).values() if word]
    false = [f"{e.name} {word}" for e in events for attribute, own in attributes(e).items() if own
             for word in ATTRIBUTES[attribute]]
    false = [text for text in false if text not in true]
    for n in range(4):
        yes = rng.random() < 0.5
        of_attributes = n % 2 == 0 and bool(true and false)
        right, wrong = (true, false) if of_attributes else (names, absent)
        x = draw(rng, right if yes else wrong)
        whole = not of_attributes and rng.random() < 0.25
        phrasing = draw(rng, PHRASINGS["present"].split("|"))
        sentence = phrasing.format(x=x if x in SYLLABLES else with_article(x)) + "\n"
        checks.append((sentence if whole else f" {x}", "yes" if yes else "no"))
    unique = [i for i, name in enumerate(names[:-1]) if names.count(name) == 1]
    for i in rng.permutation(unique)[:2]:
        checks.append((f" after {names[i]}", names[i + 1]))
    related = [q for q in questions(scene, rng) if q["topic"] in RELATIONS]
    for q in rng.permutation(related)[:2]:
        checks.append((f" {q['topic']} {q['x']}".rstrip(), q["output"]))
    return checks


# -------------------------------------------------------------------------------------- data sets

def load_world(split, clips, seed, difficulty=1):
    """So many clips of a split and the items about them.

    Returns {clip: function rate -> (samples,)}, and a list of dicts: a question, see `questions`,
    or for training a checklist, as "pairs", both with the number of their "clip".
    """
    scenes = [scene(split, i, seed, difficulty) for i in range(clips)]
    items = []
    for i, s in enumerate(scenes):
        rng = np.random.default_rng([seed, SPLITS.index(split), i, 1])
        items += [q | {"clip": i} for q in questions(s, rng)]
        if split == "train":
            items += [{"pairs": checklist(s, rng), "task": "checklist", "domain": s["domain"],
                       "clip": i} for _ in range(2)]
    return {i: partial(scene_clip, s) for i, s in enumerate(scenes)}, items


def scene_clip(scene, rate):
    """The wave (samples,) of a scene at `rate` Hz."""
    return resample(torch.from_numpy(render(scene)), RATE, rate)


def write_demo(clips, items, count=8):
    """The first clips and their questions: out/demo/0.wav and so on, out/demo/questions.json."""
    folder = Path("out/demo")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(count, len(clips))):
        save_wav(folder / f"{i}.wav", clips[i](RATE), RATE)
    entries = [{"audio_id": f"{item['clip']}.wav", "dataset": item["domain"]}
               | {key: item[key] for key in ("instruction", "output", "task")}
               for item in items if item["clip"] < count]
    (folder / "questions.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
