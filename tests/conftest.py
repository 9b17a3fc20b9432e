"""What the rooms share: parts that have learnt next to nothing, made once, and a way to call."""
import io
import os
import sys
from functools import partialmethod

import pytest
import torch

import train
from integrate import AudioLLM
from sample import command_line

torch.set_num_threads(1)  # sums of this size end sooner where no thread waits for another


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A file like assets/base.pt, made the way it was made, but in no time."""
    path = tmp_path_factory.mktemp("base") / "base.pt"
    train.prepare(train.Options(base=str(path), read_steps=1, hear_clips=2, hear_steps=1))
    return path


@pytest.fixture(scope="session")
def checkpoint(base):
    torch.manual_seed(0)
    path = base.with_name("model.pt")
    train.load_base(base, "pal", train.WINDOWS).save(path)
    return path


@pytest.fixture
def brief(monkeypatch):
    """Answers of at most five tokens: who has learnt nothing never stops talking."""
    monkeypatch.setattr(AudioLLM, "ask", partialmethod(AudioLLM.ask, max_new_tokens=5))


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(train, "--mode", "lal") runs a program in an empty folder: (exit code, stdout, stderr).

    An exception that would end it with a traceback comes through, and fails the test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nobody cuts the power here

    def run(program, *options, stdin=""):
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            command_line(program.Options, program.__doc__, program.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refuses(call):
    """refuses(["a", "word"], train, "--mode", "x"): exit code 2, one line with all the words."""
    def check(words, *command, **kwargs):
        code, _, stderr = call(*command, **kwargs)
        name = command[0].__name__ + ".py: "
        lines = [line for line in stderr.splitlines() if line.strip()]
        assert code == 2 and [line.startswith(name) for line in lines].count(True) == 1, stderr
        assert lines[-1].startswith(name) and all(word in lines[-1] for word in words), stderr
        return lines

    return check
