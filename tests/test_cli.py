"""Options, their errors, and devices."""
import io
import os
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_lists import write_wav

import sample
import train
from data import pretrain
from lib.cli import command_line, pick_device


@pytest.mark.parametrize("program", [sample, train, pretrain])
def test_help_shows_every_option_and_its_default(program, call):
    code, text, _ = call(program, "--help")
    words = " ".join(text.split())
    assert code == 0
    for f in fields(program.Options):
        flag = "--" + f.name.replace("_", "-")
        assert flag in words and "_" not in flag
        assert f.metadata["help"] in words
        if f.default is not None and f.default is not False:
            assert f"(default: {f.default})" in words.split(f.metadata["help"], 1)[1]


def test_help_is_grouped_and_ends_with_the_commands_of_the_docstring(call):
    _, text, _ = call(train, "--help")
    places = [text.index(f"\n{group}:\n") for group in ("model", "data", "training", "output")]
    assert places == sorted(places) and places[1] < text.index("  --val-data ") < places[2]
    examples = text.split("\nexamples:\n")[1].splitlines()
    assert examples and all(line in train.__doc__ for line in examples)
    assert "(default: None)" not in text


def test_options_reach_the_program(call):
    configs = []

    stub = SimpleNamespace(__name__="x", __doc__="", Options=sample.Options, main=configs.append)
    assert call(stub, "--audio", "x.wav", "--top-p", "0.5", "--max-new-tokens", "7")[0] == 0
    assert configs == [sample.Options(audio="x.wav", top_p=0.5, max_new_tokens=7)]


@pytest.mark.parametrize("options, words", [
    ("--audio a.wav --promp what", ["unrecognized", "--promp"]),
    ("--audio a.wav --nonsense", ["unrecognized", "--nonsense"]),
    ("--audio a.wav --prompt=", ["--prompt is empty"]),
    ("--audio a.wav --ckpt=", ["--ckpt is empty"]),
    ("--audio a.wav --temperature hot", ["--temperature", "hot"]),
    ("--audio a.wav --temperature -1", ["--temperature -1", "0 to"]),
    ("--audio a.wav --temperature nan", ["--temperature nan"]),
    ("--audio a.wav --temperature inf", ["--temperature inf"]),
    ("--audio a.wav --top-p 0", ["--top-p 0"]),
    ("--audio a.wav --top-p 1.1", ["--top-p 1.1", "to 1"]),
    ("--audio a.wav --max-new-tokens 0", ["--max-new-tokens 0", "1 to"]),
    ("--audio a.wav --max-new-tokens 99999999999", ["--max-new-tokens"]),
    ("--audio a.wav --seed -1", ["--seed -1", "0 or more"]),
    (f"--audio a.wav --seed {2 ** 64}", ["--seed"])])
def test_options_that_mean_nothing_are_refused(options, words, refuses):
    assert len(refuses([*words, "--help"], sample, *options.split())) == 1


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:999", "cpux"])
def test_an_unknown_device_is_refused(device, refuses, checkpoint):
    write_wav("a.wav", 0.2)
    refuses([f"--device {device}"], sample, "--audio", "a.wav", "--ckpt", checkpoint,
            "--device", device)


def test_a_console_that_lacks_a_character_shows_a_question_mark(monkeypatch):
    console = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
               for name in ("stdout", "stderr")}
    for name, stream in console.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit):
        command_line(sample.Options, "", lambda o: (print("é 🎵"), Path("🎵").read_bytes()), [])
    assert console["stdout"].buffer.getvalue() == "é ?\n".replace("\n", os.linesep).encode("cp1252")
    assert b": ?: " in console["stderr"].buffer.getvalue()


def test_a_mistake_in_the_code_is_no_users_mistake(call, monkeypatch):
    def broken(o):
        raise KeyError("oh")

    monkeypatch.setattr(sample, "main", broken)
    with pytest.raises(KeyError):
        call(sample, "--audio", "a.wav")


def test_a_gpu_with_a_number_becomes_the_current_one_and_one_without_stays(monkeypatch):
    """As set_device does, which takes no device without a number."""
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # as if there were GPUs
    monkeypatch.setattr(torch.cuda, "set_device",
                        lambda device: chosen.append(torch.cuda._utils._get_device_index(device)))
    for name in ("cuda", "cuda:1", "cpu"):
        assert str(pick_device(name)) == name
    assert chosen == [1]
