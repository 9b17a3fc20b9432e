"""From questions about clips to the batches of a training step: their order, and their loading.

A batch is an array of indices of questions. It is run in microbatches, as much at once as memory
allows, which several processes share. Try:

    python -c "from data.batches import *; b = index_batches(np.arange(9), 4, \
               np.random.default_rng(0)); print(next(b), next(b), next(b))"
"""
import os
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.lists import add_token_ids, count_answers
from lib.audio import load_audio
from lib.processes import gather_lists, rank_and_size, start_session

QUESTIONS_A_CLIP = 4  # that meet in a batch, where their clip is heard once for all of them


def index_batches(sizes, batch, rng, clips=None):
    """Batches without end, arrays of up to `batch` indices: every item once before any comes again.

    sizes (n,): of the items' texts; similar ones meet, so that little of a batch is padding. clips
    (n,): what each item is about, None if that is not known. Items about one clip stay together
    by fours, for then their clip is heard once for all four. For example

        item    0  1  2  3  4  5        by clip and size, in groups:  5 1 3 0 | 4 | 2
        clip    7  7  8  7  7  7        groups by their longest item: 5 1 3 0 | 4 | 2
        size    5  3  9  4  6  2        batches of 4, in any order:   [5 1 3 0], [4 2]

    Groups are shuffled before, and sorted only within pools of some 16 batches.
    """
    groups, longest = np.arange(len(sizes), dtype=np.int32)[:, None], sizes
    if clips is not None:
        groups = []
        for i in np.lexsort((sizes, clips)):
            group = groups[-1] if groups else []
            if not group or clips[group[0]] != clips[i] or len(group) == QUESTIONS_A_CLIP:
                groups.append([])
            groups[-1].append(i)
        longest = np.array([sizes[group[-1]] for group in groups])
    while True:
        for pool in np.array_split(rng.permutation(len(groups)), 1 + len(sizes) // (16 * batch)):
            pool = pool[np.argsort(longest[pool], kind="stable")]
            items = np.concatenate([groups[i] for i in pool])
            batches = [items[i:i + batch] for i in range(0, len(items), batch)]
            for i in rng.permutation(len(batches)):
                yield batches[i]


class Microbatch(NamedTuple):
    """Questions of a batch that a process runs at once."""
    items: list         # indices; once loaded, the items themselves
    answers: int        # in the whole batch, in all processes
    last: bool          # whether it is its process's last one of the batch
    spectrograms: dict  # {clip: its spectrograms}, empty if features are kept
    left_out: list      # (clip, why, answers) of each question whose clip cannot be read


def microbatches(batches, items, size, rank=0, ranks=1):
    """Cut batches of indices into the Microbatches, of up to `size` items, of one process.

    Of 5 items, in microbatches of 2, the first of two processes gets 2 and 1, the second one 2.
    """
    for batch in batches:
        answers = sum(count_answers(items[i]) for i in batch)
        own = np.array_split(batch, ranks)[rank].tolist()
        for i in range(0, max(1, len(own)), size):  # an empty one, if there are too few
            yield Microbatch(own[i:i + size], answers, i + size >= len(own), {}, [])


def read_clips(spectrograms, clips, skip_bad):
    """Read clips {clip: function rate -> (samples,)}, of any split, for `spectrograms`, AudioLLM's.

    Returns {clip: its spectrograms} and {clip: why it cannot be read}. The first of those is a
    ValueError unless skip_bad.
    """
    loaded, problems = {}, {}
    for clip, read in clips.items():
        try:
            loaded[clip] = spectrograms(read)
        except ValueError as error:
            if not skip_bad:
                raise
            problems[clip] = str(error)
    return loaded, problems


def report_unreadable(problems, unreadable):
    """Name the clips of {clip: why} once, in one process, and add them to the set `unreadable`."""
    for clip in [clip for clip in problems if clip not in unreadable]:
        unreadable.add(clip)
        if rank_and_size()[0] == 0:
            message = f"{problems[clip]} (left out: clip {len(unreadable)} so far)"
            tqdm.write(message, file=sys.stderr)


class ItemDataset:
    """Loads Microbatches: items with token ids and, if features are not kept, spectrograms. Items
    whose clip has no features, or cannot be read, are left out."""

    def __init__(self, split, model):  # split: see train.Split
        self.split, self.tokenizer, self.spectrograms = split, model.tokenizer, model.spectrograms
        self.seconds = model.seconds

    def __getitem__(self, part):
        try:
            items = add_token_ids(self.tokenizer, [self.split.items[i] for i in part.items])
            spectrograms, problems = {}, {}
            if self.split.features is None:
                clips = {item["clip"]: self.reader(item["clip"]) for item in items}
                spectrograms, problems = read_clips(
                    self.spectrograms, clips, self.split.unreadable is not None)
            readable = spectrograms if self.split.features is None else self.split.features
            left_out = [(item["clip"], problems.get(item["clip"]), count_answers(item))
                        for item in items if item["clip"] not in readable]
            items = [item for item in items if item["clip"] in readable]
            return part._replace(items=items, spectrograms=spectrograms, left_out=left_out)
        except ValueError as e:  # raised in a worker it would come with a page of its traceback
            return part._replace(items=e)

    def reader(self, clip):
        return self.split.clips.get(clip) or partial(load_audio, clip, seconds=self.seconds)


def load_batches(batches, dataset, o):
    """For each batch of indices this process's Microbatches, a list; --workers load them ahead."""
    parts = microbatches(batches, dataset.split.items, o.micro, *rank_and_size())
    loader = DataLoader(
        dataset, sampler=parts, batch_size=None, collate_fn=Microbatch._make,  # as it is
        num_workers=o.workers, worker_init_fn=start_session,
        multiprocessing_context="fork" if o.workers and hasattr(os, "fork") else None)
    loaded = []
    for part in loader:
        if isinstance(part.items, ValueError):
            raise part.items
        loaded.append(part)
        if part.last:
            yield leave_out(loaded, dataset.split)
            loaded = []


def leave_out(parts, split):
    """The Microbatches of a batch, whose answers no longer count those that are left out, in any
    process; clips that cannot be read are told of."""
    if split.unreadable is None:
        return parts
    left_out = gather_lists([question for part in parts for question in part.left_out])
    report_unreadable({clip: why for clip, why, _ in left_out}, split.unreadable)
    answers = parts[0].answers - sum(count for *_, count in left_out)
    return [part._replace(answers=answers) for part in parts]
