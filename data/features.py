"""What frozen encoders make of clips, which is computed once and trained on many times; and
warnings about clips that do not suit a model.

    python train.py --mode lal --feature-cache out/features    # kept for later runs, too

De an encoder's width, n its tokens about a clip.
"""
import hashlib
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data.world
import encoders
import integrate
from data.batches import read_clips, report_unreadable
from data.lists import record_seconds
from lib import audio, resampling
from lib.processes import rank_and_size
from lib.weights import find_file, load_checkpoint, save_atomically


def extract_features(model, clips, unreadable=None):
    """Features of every clip, in eval mode and without gradients: {clip: {kind: (n, De)}}.

    unreadable: a set that gets the clips that cannot be read, which are told of and left out; None:
    such a clip is a ValueError.
    """
    model.eval()
    clips, seconds = record_seconds(clips)
    # CPU: one thread for each core, each with clips of its own. CUDA: two threads, of which one
    # reads while the other encodes. MPS: one. About 16 clips are in memory at once.
    threads = {"cpu": torch.get_num_threads(), "mps": 1}.get(model.device.type, 2)
    names, size = list(clips), math.ceil(16 / threads)
    groups = [{clip: clips[clip] for clip in names[i:i + size]}
              for i in range(0, len(names), size)]
    encode, features = partial(encode_clips, model, skip_bad=unreadable is not None), {}
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = pool.map(encode, groups)
        for encoded, problems in tqdm(results, "features", len(groups), leave=False, mininterval=1):
            features |= encoded
            report_unreadable(problems, unreadable)
    if not features:
        raise ValueError("none of the clips can be read: give others")
    warn_length_mismatch(model, list(seconds.values()))
    return features


@torch.no_grad()
def encode_clips(model, clips, skip_bad):
    """The features of clips {clip: function rate -> (samples,)}, on the CPU: {clip: {kind: (n,
    De)}}, and {clip: why it cannot be read}."""
    spectrograms, problems = read_clips(model.spectrograms, clips, skip_bad)
    encoded = model.encode(list(spectrograms.values())) if spectrograms else []
    return {clip: {kind: x.cpu() for kind, x in features.items()}
            for clip, features in zip(spectrograms, encoded)}, problems


def load_features(model, split, o):
    """The features of a split's clips, out of --feature-cache if an earlier run left them there, in
    a file whose name is a hash of all that they depend on: clips, encoders and code."""
    if not o.feature_cache:
        return extract_features(model, split.clips, split.unreadable)
    code = audio, resampling, encoders, integrate, data.world
    files = [find_file(o.base), *(module.__file__ for module in code), *split.clips]
    files += [encoder.checkpoint_path for encoder in model.encoders.values()]
    files = [Path(file).stat() for file in files if isinstance(file, (str, Path))]
    configs = [encoder.config for encoder in model.encoders.values()]
    key = split.fingerprint, configs, model.pool_sizes, [(f.st_size, f.st_mtime_ns) for f in files]
    path = Path(o.feature_cache) / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        saved = load_checkpoint(path, "features 1")["features"]  # None: could not be read
        features = {clip: x for clip, x in zip(split.clips, saved) if x is not None}
        if o.skip_bad or len(features) == len(saved):
            print(f"features are read from {path}; it has {len(features)} of {len(saved)} clips")
            if o.skip_bad:
                split.unreadable.update(set(split.clips) - set(features))
            return features
    features = extract_features(model, split.clips, split.unreadable)
    if rank_and_size()[0] == 0:
        saved = [features.get(clip) for clip in split.clips]
        save_atomically(path, {"format": "features 1", "features": saved})
    return features


def warn_length_mismatch(model, seconds):
    """Say which clips, of so many seconds each, are longer or shorter than an encoder's window."""
    for kind, encoder in model.encoders.items():
        heard = encoder.seconds
        longer, shorter = sum(s > heard for s in seconds), sum(s < heard for s in seconds)
        if longer:
            print(f"{kind} hears the first {heard:g} s: the rest is cropped from {longer} of "
                  f"{len(seconds)} clips (the longest has {max(seconds):.1f} s)", file=sys.stderr)
        if shorter:
            filling = "its own repetition" if kind == "clap" else "silence"
            print(f"{kind} hears {heard:g} s: {filling} is added to {shorter} of {len(seconds)} "
                  f"clips (the shortest has {min(seconds):.2f} s)", file=sys.stderr)


def warn_outside_world(model, path):
    """Say once that a model that was trained on the listening world knows no other sounds, if this
    clip is not from there."""
    ours = (Path("out/demo"), Path(__file__).parents[1] / "assets")
    miniatures = not any(encoder.checkpoint_path for encoder in model.encoders.values())
    if miniatures and not model.options.get("data") and not any(
            Path(path).resolve().is_relative_to(folder.resolve()) for folder in ours):
        print("this model has learnt only the sounds and words of the listening world (README): of "
              "other recordings expect nonsense; train one with --data", file=sys.stderr)
