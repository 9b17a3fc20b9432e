"""Pictures of where an answer's attention fell, what sees what, and how a training went; and a
report: does a model look at the sounds it names? Pictures need matplotlib: pip install matplotlib

    python -m lib.plots listen --audio assets/demo.wav --prompt "Describe the audio." out/listen.png
    python -m lib.plots masks out/masks.png
    python -m lib.plots curves out/lal
    python -m lib.plots attention assets/lal.pt
"""
import argparse
import json
import sys
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from tqdm import tqdm

# Colours that colour-blind readers can tell apart (Okabe and Ito)
COLOURS = {"start": "#777777", "whisper": "#e69f00", "sslam": "#0072b2", "clap": "#cc79a7",
           "text": "#009e73"}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
DPI = 120


def import_figure():
    """matplotlib's Figure class; ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    return Figure


@contextmanager
def open_figure(path, rows=1, columns=1, figsize=(8, 4), **kwargs):
    """Yields the axes of a new figure, and writes it to `path` at the end. The user's own settings
    and windows of matplotlib stay as they are."""
    Figure = import_figure()
    from matplotlib import rc_context
    if not str(path).strip():
        raise ValueError("the path of the picture is empty")
    with rc_context(STYLE):
        figure = Figure(figsize=figsize, layout="constrained")
        yield figure.subplots(rows, columns, **kwargs)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    print(f"wrote {path}", file=sys.stderr)


def draw_listening(path, spectrogram, band_hz, seconds, title, panels):
    """A clip's spectrogram, and below where the attention of an answer's words fell.

    spectrogram (frames, 128): log-mel, a frame each 10 ms; band_hz (128,): the bands' frequencies.
    panels: (name, words, grids (words, steps, bands), shares (words,) of all attention, seconds of
    a step) for each group of encoders.
    """
    heights = [1.6] + [0.3 + 0.3 * len(words) for _, words, *_ in panels]
    size = (8, 0.9 + sum(heights))
    with open_figure(path, len(heights), figsize=size, sharex=True, height_ratios=heights) as axes:
        top, rows = axes[0], [16, 48, 80, 112]
        top.imshow(spectrogram.T.numpy(), origin="lower", aspect="auto", cmap="magma",
                   vmin=spectrogram.max() - 5, extent=(0, len(spectrogram) / 100, 0, 128))
        top.set(ylabel="kHz", yticks=rows)
        top.set_yticklabels([f"{band_hz[row] / 1000:.1f}" for row in rows])
        top.set_title(title, wrap=True)
        for ax, (name, words, grids, shares, step) in zip(axes[1:], panels):
            for i, (grid, share) in enumerate(zip(grids, shares)):
                ax.imshow(grid.T.numpy(), origin="lower", aspect="auto", cmap="Blues", vmin=0,
                          vmax=grids.max(), extent=(0, len(grid) * step, i + 0.4, i - 0.4))
                ax.text(1.01, i, f"{share:.0%}", va="center", transform=ax.get_yaxis_transform())
            ax.set(title=f"{name}: where a word's attention fell, and how much of it",
                   xlim=(0, seconds), ylim=(len(words) - 0.4, -0.6), yticks=range(len(words)))
            ax.set_yticklabels(words)
        axes[-1].set_xlabel("seconds")


def draw_masks(path):
    """What sees what in each mode, by the rule of model.py, on a few tokens of each kind."""
    from encoders import ENCODERS
    from integrate import mode_routes
    from model import position_mask
    sizes = dict(zip(COLOURS, (1, 4, 4, 2, 5)))
    kinds = [kind for kind, n in sizes.items() for _ in range(n)]
    positions = torch.arange(len(kinds))
    visible = position_mask(positions[None], positions[None], torch.float32)[0, 0] == 0
    with open_figure(path, 1, 3, figsize=(10, 3.8), sharey=True) as axes:
        for ax, mode in zip(axes, ("plits", "lal", "pal")):
            routes = mode_routes(mode, ENCODERS)
            for i, query in enumerate(kinds):
                if routes.get(query) != "lal":  # LAL's audio is keys and values only
                    colours = [COLOURS[key] if seen else "#eeeeee"
                               for key, seen in zip(kinds, visible[i])]
                    ax.bar(range(len(kinds)), 0.9, 0.9, bottom=i - 0.45, color=colours)
            middles = [kinds.index(kind) + (n - 1) / 2 for kind, n in sizes.items()]
            ax.set(title=mode.upper(), xlabel="keys", xticks=middles, yticks=middles,
                   ylim=(len(kinds) - 0.4, -0.6))
            ax.set_xticklabels(sizes, rotation=45)
            ax.set_yticklabels(sizes)
        axes[0].set_ylabel("queries (white: asks nothing)")


def draw_curves(folder):
    """Loss and accuracy of a run of train.py, from its metrics.jsonl, as FOLDER/curves.png."""
    path, losses = f"{folder}/metrics.jsonl", {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        for line in lines:
            if "loss" in line:
                losses.setdefault(line["stage"], []).append((line["step"], line["loss"]))
        validation = [(line["step"], line["validation"]) for line in lines if "validation" in line]
        tests = [line["scores"]["all all"] for line in lines if "scores" in line]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not as train.py writes it ({error!r})") from None
    with open_figure(f"{folder}/curves.png", 1, 2, figsize=(10, 3.5)) as (left, right):
        for (stage, points), colour in zip(losses.items(), COLOURS.values()):
            left.plot(*zip(*points), ".", color=colour, label=f"stage {stage}")
        left.set(xlabel="step", ylabel="loss", yscale="log")
        left.yaxis.set_major_formatter("{x:g}")
        left.legend()
        right.plot([step for step, _ in validation], [share for _, share in validation], "o-",
                   color=COLOURS["sslam"], label="validation")
        for scores in tests:
            for (name, share), style in zip(list(scores.items())[1:], ["-", "--", "-.", ":"]):
                right.axhline(share, color=COLOURS["start"], linestyle=style, label=f"test: {name}")
        right.set(xlabel="step", ylabel="exactly right", ylim=(0, 1))
        right.yaxis.set_major_formatter("{x:.0%}")
        right.legend()


def label_logarithmic(axis):
    """Plain numbers at 1, 2, 5, 10 and so on."""
    from matplotlib.ticker import LogLocator, NullLocator
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def draw_costs(path, title, xlabel, panels):
    """What modes cost against the number of audio tokens, predicted as lines, measured as dots.

    panels: {title: {mode: (sizes, values, dots' sizes, dots' values)}}, one or more.
    """
    with open_figure(path, 1, len(panels), figsize=(9, 4), squeeze=False) as axes:
        axes[0, 0].figure.suptitle(title)
        for ax, (name, modes) in zip(axes[0], panels.items()):
            for (mode, (x, y, *dots)), colour in zip(modes.items(), COLOURS.values()):
                ax.plot(x, y, color=colour, label=mode.upper())
                ax.plot(*dots, "o", color=colour)
            ax.set(title=name, xlabel=xlabel, yscale="log")
            label_logarithmic(ax.yaxis)
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_learning(path, arms):
    """The share of right answers against the computing that it took to learn them.

    arms: {name: points}, each (TFLOPs, seconds, [% right of each seed]); bands span the seeds. No
    more arms than COLOURS.
    """
    assert len(arms) <= len(COLOURS), f"{len(arms)} arms: there are colours for {len(COLOURS)}"
    with open_figure(path, 1, 2, figsize=(9, 4), sharey=True) as axes:
        for ax, axis, label in zip(axes, (0, 1), ("TFLOPs of training", "seconds of training")):
            for (name, points), colour in zip(arms.items(), COLOURS.values()):
                x, shares = [point[axis] for point in points], [point[2] for point in points]
                ax.plot(x, [sum(s) / len(s) for s in shares], "o-", color=colour, label=name)
                ax.fill_between(x, [min(s) for s in shares], [max(s) for s in shares],
                                color=colour, alpha=0.2, linewidth=0)
            ax.set(xlabel=label, xscale="log")
            label_logarithmic(ax.xaxis)
        axes[0].set_ylabel("% exactly right")
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def draw_if_possible(function, path, *what):
    """Draw by one of the functions above, or say why there is no picture."""
    try:
        function(path, *what)
    except ValueError as error:  # such as no matplotlib: the numbers are worth having without it
        print(f"no picture: {error}", file=sys.stderr)


def attention_report(model, clips, seed, difficulty):
    """Does a model look at what it names? Prints how much of the attention that the last word of
    its answer ("a siren") gives to SSLAM's tokens, or LFST's, falls on the sound's time, and how
    much before and after, over test clips of one sound; and chance: the share of the clip's time.
    """
    from data.world import SECONDS, scene
    if clips < 1 or seed < 0:
        raise ValueError(f"--clips {clips} --seed {seed}: expected at least 1 and 0")
    source = next((s for s, kinds in model.connector_inputs.items() if "sslam" in kinds), None)
    if not source:
        raise ValueError("the checkpoint has no SSLAM, whose tokens this report is about")
    single = (s for s in (scene("test", i, seed, difficulty) for i in count(0, 3))
              if len(s["events"]) == 1)
    shares, chances, right = [], [], 0
    for s in tqdm(islice(single, clips), total=clips, desc="clips", mininterval=1):
        word, grid, step = name_sound(model, source, s)
        event, = s["events"]
        right += word == event.name
        time = grid.sum(-1)  # (layers, steps)
        edges = torch.arange(time.shape[1] + 1) * step
        # what part of each step lies before, in and after the sound (3, steps)
        spans = (0, event.start), (event.start, event.end), (event.end, SECONDS)
        parts = torch.stack([edges.clamp(a, b).diff() for a, b in spans]) / step
        shares.append(time @ parts.T / time.sum(1, keepdim=True))
        chances.append(parts.mean(1))
    print_attention(torch.stack(shares), torch.stack(chances), right)


def name_sound(model, source, s):
    """The last word of the answer to "What do you hear?" about a scene, its attention to a source's
    tokens (layers, steps, bands), and the seconds of a step."""
    from data.world import SECONDS, scene_clip
    from lib.attention import attention_by_source, attention_on_grid, word_groups
    question = "What do you hear?"
    features, = model.features([partial(scene_clip, s)])
    ids = model.llm.generate(model.tokenizer.chat(question)[1], 48, cache=model.hear([features]),
                             eos_id=model.tokenizer.eos_ids)
    word, index = word_groups(model.tokenizer, ids)[-1]
    weights = attention_by_source(model, features, question, ids)[source][:, index].mean(1)
    return word, *attention_on_grid(model, source, weights, SECONDS)


def print_attention(shares, chances, right):
    """shares (clips, layers, 3), chances (clips, 3): before, on and after the sound."""
    rows = {"chance": chances.mean(0), "attention": shares.mean((0, 1))}
    rows |= {f"in layer {i}": row for i, row in enumerate(shares.mean(0), 1)}
    print(f"{len(shares)} clips, {right} sounds named right\n"
          f"{'':<12}{'before':>9}{'on it':>9}{'after':>9}")
    for label, row in rows.items():
        print(f"{label:<12}" + "".join(f"{share:>9.1%}" for share in row))
    more = (shares.mean(1) > chances)[:, 1].sum()
    print(f"on it more than by chance in {more} of {len(shares)} clips")


def run_listen(o):
    """The picture that sample.py --listen draws."""
    import sample
    sample.main(sample.Options(audio=o.audio, prompt=o.prompt, ckpt=o.ckpt, listen=o.path))


def run_attention(o):
    from lib.cli import pick_device
    from sample import load_model
    model = load_model(o.ckpt, o.encoders).to(pick_device(o.device))
    attention_report(model, o.clips, o.seed, o.difficulty)


def make_parser():
    from lib.cli import Parser
    parser = Parser(prog="python -m lib.plots", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    settings = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    listen = commands.add_parser("listen", help="where an answer's attention fell", **settings)
    listen.add_argument("path", help="the picture to write, a .png")
    listen.add_argument("--audio", required=True, help="the sound file to ask about")
    listen.add_argument("--prompt", default="Describe the audio.", help="the question")
    listen.add_argument("--ckpt", help="checkpoint of train.py; else the newest one")
    listen.set_defaults(run=run_listen)
    masks = commands.add_parser("masks", help="what sees what in each mode", **settings)
    masks.add_argument("path", help="the picture to write, a .png")
    masks.set_defaults(run=lambda o: draw_masks(o.path))
    curves = commands.add_parser("curves", help="loss and accuracy of a run", **settings)
    curves.add_argument("folder", help="of the run; the picture is written there")
    curves.set_defaults(run=lambda o: draw_curves(o.folder))
    report = commands.add_parser("attention", help="does it look at what it names?", **settings)
    report.add_argument("ckpt", help="checkpoint of train.py")
    report.add_argument("--encoders", help="where its encoders lie now, as for sample.py")
    report.add_argument("--clips", type=int, default=240, help="test clips of one sound")
    report.add_argument("--seed", type=int, default=0, help="of the listening world")
    report.add_argument("--difficulty", type=int, choices=(0, 1, 2), default=1, help="of its clips")
    report.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    report.set_defaults(run=run_attention)
    return parser


def main(arguments=None):
    from lib.cli import one_line_errors
    parser = make_parser()
    o = parser.parse_args(arguments)
    with one_line_errors(parser):
        o.run(o)


if __name__ == "__main__":
    main()
