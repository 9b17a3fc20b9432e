"""What all tests share: a base and a checkpoint that have learnt next to nothing, made once, and a
way to run a program."""
import gc
import io
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import second_process
import torch
from exercise_texts import EXERCISES

from data import pretrain
from encoders import CLAP, SSLAM, SSLAMConfig, Whisper, WhisperConfig
from lib.cli import command_line
from lib.weights import load_checkpoint
from model import LLM, LLMConfig

gc.set_threshold(100_000, 20, 20)  # thousands of modules are looked through each time
torch.set_num_threads(1)  # sums of this size end sooner where no thread waits for another


@dataclass(frozen=True)
class ShallowLLMConfig(LLMConfig):
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int = 1


SHALLOW = {Whisper: WhisperConfig(width=64, layers=1, seconds=4.0),
           SSLAM: SSLAMConfig(width=64, layers=1, seconds=4.0),
           CLAP: replace(CLAP.sizes["mini"], width=16, depths=(1, 1, 1))}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The path of a file like assets/base.pt, made the way it was made, but in no time; it has
    fewer and narrower layers, or a test would spend its time on them."""
    path = tmp_path_factory.mktemp("base") / "base.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "LLMConfig", ShallowLLMConfig)
        patch.setattr(pretrain, "TOKENIZER_SCENES", 300)
        for encoder, config in SHALLOW.items():
            patch.setitem(encoder.sizes, "mini", config)
        # where torch has CUDA, a process that has computed gradients may not be forked
        patch.setattr(pretrain, "ProcessPoolExecutor", lambda n: ThreadPoolExecutor(1))
        pretrain.pretrain(pretrain.Options(str(path), llm_steps=1, encoder_clips=2,
                                           encoder_steps=1))
    saved, load = load_checkpoint(path, pretrain.BASE_FORMAT), pretrain.load_checkpoint
    with pytest.MonkeyPatch.context() as patch:  # it is read hundreds of times
        patch.setattr(pretrain, "load_checkpoint", lambda name, format: (
            deepcopy(saved) if str(name) == str(path) else load(name, format)))
        yield path


@pytest.fixture(scope="session")
def checkpoint(base):
    """The path of a checkpoint of an AudioLLM in mode PAL."""
    torch.manual_seed(0)
    path = base.with_name("model.pt")
    pretrain.load_base(base, "pal").save(path)
    return path


@pytest.fixture
def brief(monkeypatch):
    """Answers of at most five tokens: a model that has learnt nothing never stops by itself."""
    generate = LLM.generate
    monkeypatch.setattr(LLM, "generate", lambda llm, ids, new, *args, **kwargs: generate(
        llm, ids, min(new, 5), *args, **kwargs))


def program_file(program):
    """data.pretrain -> pretrain.py, as argparse names it in its messages."""
    return program.__name__.split(".")[-1] + ".py"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(train, "--mode", "lal") runs a program in an empty folder: (exit code, stdout, stderr).

    A program is a module with Options, main and a docstring. An exception that would end it with a
    traceback comes through, and fails the test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test cuts the power

    def run(program, *options, stdin=""):
        monkeypatch.setattr(sys, "argv", [program_file(program), *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            command_line(program.Options, program.__doc__, program.main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refuses(call):
    """refuses(["a", "word"], train, "--mode", "x"): exit code 2, one line with all the words."""
    def check(words, program, *options, **kwargs):
        code, _, stderr = call(program, *options, **kwargs)
        prefix = program_file(program) + ": "
        lines = [line for line in stderr.splitlines() if line.strip()]
        assert code == 2 and [line.startswith(prefix) for line in lines].count(True) == 1, stderr
        assert lines[-1].startswith(prefix) and all(word in lines[-1] for word in words), stderr
        return lines

    return check


def pytest_configure(config):
    config.pluginmanager.register(second_process)
    for number, exercise in EXERCISES.items():
        config.addinivalue_line("markers", f"ex{number}: {exercise.title}, see tests/exercises.py")


def pytest_itemcollected(item):
    if number := re.match(r"test_ex(\d+)_", item.name):
        item.add_marker(f"ex{int(number[1])}")


def pytest_collection_finish():
    gc.freeze()  # what has been imported stays, and need not be looked through
