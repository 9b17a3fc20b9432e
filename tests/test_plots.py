"""Pictures, the commands that draw them, and the report of where attention falls."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lists import write_wav

import lib.attention
import sample
from data.world import SECONDS, scene
from lib import plots

LAL = str(Path(__file__).parents[1] / "assets" / "lal.pt")


@pytest.fixture
def draw(monkeypatch, tmp_path, capsys):
    """draw("masks", "a.png") runs a command of lib.plots: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        try:
            plots.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [
    ("listen", "a.png", "--audio", "a.wav"), ("masks", "a.png"), ("curves", "out")])
def test_a_picture_without_matplotlib_says_what_to_install(arguments, draw, monkeypatch, tmp_path):
    write_wav(tmp_path / "a.wav", 0.2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "stage": "1", "loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, stderr = draw(*arguments)
    assert code == 2 and "pip install matplotlib" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, words", [
    (("curves", "out/none"), ["out/none/metrics.jsonl"]), (("attention", "none.pt"), ["none.pt"]),
    (("listen", "a.png", "--audio", "none.wav"), ["none.wav"]), ((), ["command"]),
    (("masks",), ["path"]), (("mask", "a.png"), ["mask"]), (("masks", ""), ["path", "empty"]),
    (("attention", LAL, "--clips", 0), ["--clips 0"]),
    (("attention", LAL, "--seed", -1), ["--seed -1"]),
    (("attention", LAL, "--clip", 1), ["--clip 1"]),
    (("attention", LAL, "--encoders", "whisper"), ["--encoders whisper"]),
    (("attention", LAL, "--device", "none"), ["--device none"])])
def test_a_users_mistake_is_one_line(arguments, words, draw):
    pytest.importorskip("matplotlib")
    code, _, stderr = draw(*arguments)
    lines = [line for line in stderr.splitlines() if line.startswith("python -m lib.plots")]
    assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), stderr
    assert lines[0] == stderr.splitlines()[-1]


@pytest.mark.parametrize("line", ['{"loss": 1', '{"loss": 1}', "", "7", "\udcff"])
def test_a_damaged_log_is_named(line, draw, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(line + "\n", errors="surrogateescape")
    code, _, stderr = draw("curves", ".")
    assert code == 2 and "./metrics.jsonl: " in stderr and stderr.count("\n") == 1


def test_pictures_that_cannot_be_drawn_are_one_line(refuses):
    refuses(["--listen", "--audio"], sample, "--listen", "a.png", "--prompt", "x")


def test_pictures_are_drawn_and_leave_matplotlib_as_it_was(draw, call, checkpoint, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    settings = dict(matplotlib.rcParams)
    for name, seconds in (("a", 0.01), ("b", 5.0)):
        write_wav(f"{name}.wav", seconds)
        options = ["--ckpt", checkpoint, "--device", "cpu", "--audio", f"{name}.wav", "--prompt",
                   "Is $^ it \udcff?", "--max-new-tokens", 3, "--listen", f"new/{name}.png"]
        assert call(sample, *options)[0] == 0 and is_picture(tmp_path / f"new/{name}.png")
    assert draw("listen", "c.png", "--audio", "a.wav", "--ckpt", checkpoint)[0] == 0
    assert draw("masks", "masks.png")[0] == 0
    lines = [{"step": 1, "stage": "1", "loss": 2.0}, {"step": 2, "stage": "2", "loss": 1.0},
             {"step": 2, "stage": "2", "validation": 0.5},
             {"scores": {"all all": {"questions": 3, "model": 0.5, "silence": 0.1}}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert draw("curves", ".")[0] == 0
    assert all(is_picture(tmp_path / name) for name in ("c.png", "masks.png", "curves.png"))
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("focus, share", [("sound", 100.0), ("anywhere", None)])
def test_the_report_says_how_much_attention_falls_on_the_sound(focus, share, draw, checkpoint,
                                                               monkeypatch):
    """All of it, if all of it does; and if it falls anywhere alike, as much as by chance."""
    ones = [s for s in (scene("test", i, 0) for i in range(0, 60, 3))
            if len(s["events"]) == 1][:3]
    clips = iter(ones)

    def attention(model, features, question, ids):
        (_, begin, end, *_), = next(clips)["events"]
        steps, bands = model.connectors["lfst"].grid
        edges = torch.linspace(0, SECONDS, steps + 1)
        weights = torch.ones(steps)
        if focus == "sound":  # on the steps that lie wholly in it
            weights = ((edges[:-1] >= begin) & (edges[1:] <= end)).float()
        return {"lfst": weights.repeat_interleave(bands + 1).expand(4, len(ids), -1)}

    monkeypatch.setattr(lib.attention, "attention_by_source", attention)
    code, text, _ = draw("attention", checkpoint, "--clips", 3, "--device", "cpu")
    rows = {line[:12].strip(): [float(x.rstrip("%")) for x in line[12:].split()]
            for line in text.splitlines() if "%" in line}
    chance = np.mean([(e - b) / SECONDS for s in ones for _, b, e, *_ in s["events"]])
    assert code == 0 and abs(rows["chance"][1] - 100 * chance) < 0.06
    for label in ("attention", "in layer 1", "in layer 4"):
        assert abs(rows[label][1] - (share or rows["chance"][1])) < 0.11
        assert abs(sum(rows[label]) - 100) < 0.2
