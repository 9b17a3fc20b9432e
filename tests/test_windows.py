"""The programs on Windows, as far as it can be simulated: without what only POSIX systems have,
with new processes spawned, and on a console that knows 256 characters (cp1252)."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_lists import item, write_wav

ROOT = Path(__file__).parents[1]

# Every process that is started here runs this first, spawned ones too.
SITECUSTOMIZE = """
import multiprocessing, os, sys
for name in ("pread", "setsid", "sysconf", "fork", "forkpty", "mkfifo", "O_NONBLOCK"):
    vars(os).pop(name, None)
sys.modules.update(dict.fromkeys(("resource", "fcntl", "termios", "pty", "grp", "pwd")))
multiprocessing.set_start_method("spawn")
"""

# One after the other, as each would do by itself, to import torch only once.
RUN = """
import importlib, json, sys
sys.path.insert(0, {root!r})
from lib.cli import command_line

if __name__ == "__main__":
    for name, *options in json.loads({commands!r}):
        program = importlib.import_module(name)
        program.VALIDATION_CLIPS = 2  # train.py's, for speed
        sys.argv = [name + ".py", *options]
        command_line(program.Options, program.__doc__, program.main)
        print("done:", name)
"""

TRAIN = ["train", "--device", "cpu", "--steps1", "1", "--steps2", "1", "--steps3", "1",
         "--batch", "3", "--save-every", "2"]
LIST = ["--data", "q.json", "--val-data", "q.jsonl", "--tasks", "all"]


@pytest.fixture
def windows(tmp_path, base):
    """windows([program, option, ...], ...) runs programs in turn; the output, all exit codes 0."""
    write_wav(tmp_path / "a.wav", 0.2)
    raw = [item(output="ein Hörnchen 🎵"), item(output="a cat", task="classification")]
    (tmp_path / "q.json").write_bytes("\ufeff".encode("utf-16-le") + json.dumps(raw).encode(
        "utf-16-le"))
    (tmp_path / "q.jsonl").write_text("\r\n".join(map(json.dumps, raw)), newline="")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def run(*commands):
        commands = [[*command, *(["--base", str(base)] if command[0] == "train" else [])]
                    for command in commands]
        (tmp_path / "run.py").write_text(RUN.format(root=str(ROOT), commands=json.dumps(commands)))
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1",
                                    "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        result = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=environment,
                                capture_output=True)
        text = result.stdout.decode("cp1252"), result.stderr.decode("cp1252")
        assert result.returncode == 0 and text[0].count("done: ") == len(commands), "".join(text)
        return text[0]

    return run


def test_a_list_is_trained_on_and_asked_and_the_arithmetic_is_done(windows, tmp_path):
    text = windows(
        [*TRAIN, *LIST],
        ["sample", "--data", "q.json", "--out", "p.json", "--max-new-tokens", "2", "--ckpt",
         "out/lal/model.pt"],
        ["sample", "--audio", "a.wav", "--prompt", "🎵?", "--max-new-tokens", "2"],
        ["bench", "--measure", "nothing"])
    assert "H\xf6rnchen ?" in text  # of the examples that training shows
    rows = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert rows[0]["ref"] == "ein Hörnchen 🎵"


@pytest.mark.slow
def test_the_world_is_trained_on_and_workers_are_spawned(windows):
    windows([*TRAIN, "--clips", "2", "--test-clips", "2"],
            [*TRAIN, *LIST, "--no-keep-features", "--workers", "1", "--out", "out/workers",
             "--steps2", "0", "--steps3", "0"])
