"""What is promised is there: every command, option and path that the README and the files name."""
import argparse
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PROGRAMS = ("integrate", "model", "encoders", "train", "bench", "sample")  # as they are read
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("data/*.py")])


def fenced_lines(text):
    """The lines of ``` blocks, those that end in a backslash joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def python_commands(lines):
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("python")]


def docstring_commands():
    for path in FILES:
        opening = (path.read_text(encoding="utf-8") + '""""""').split('"""')[1]
        yield from python_commands(re.split(r"\n|[Tt]ry:", opening.replace("\\\n", " ")))


class Parsed(Exception):
    """The options of a command were right, and the program is not to go on."""


def check_program(name, program, words, call):
    """A program with Options takes these words; its main, which gets them, does not run."""
    received = []
    stub = SimpleNamespace(__name__=name, __doc__="", Options=program.Options, main=received.append)
    code, _, stderr = call(stub, *words)
    assert code == 0 and len(received) == 1, f"{name} {words}: {stderr}"


def check_parser(module, words, monkeypatch):
    """A module with a parser of its own takes these words; it stops as soon as it has read them."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after_parsing(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    try:
        runpy.run_path(module.__file__, run_name="__main__")
    except Parsed:
        return
    except SystemExit as end:
        raise AssertionError(f"{module.__name__} {words}: exit code {end.code}") from None
    raise AssertionError(f"{module.__name__} has no commands")


def check(command, call, monkeypatch):
    """A command names a file that exists, and options that it has, with values that they take."""
    python, *words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word in ("|", ">", ">>", "2>", "&")]
    words = words[:min(ends, default=len(words))]
    assert python == "python" and words, f"{command}: only 'python' is sure to exist"
    if words[0] == "-c":
        compile(words[1], command, "exec")
    elif words[0] == "-m":
        module = importlib.import_module(words[1])
        paths = [word for word in words[2:] if "/" in word]
        if hasattr(module, "Options"):
            check_program(words[1], module, words[2:], call)
        elif words[1].split(".")[0] in ("lib", "data"):
            check_parser(module, words[2:], monkeypatch)
        else:
            assert all((ROOT / path.split("::")[0]).exists() for path in paths), command
    else:
        path = ROOT / words[0]
        assert path.is_file(), f"{command}: no file {words[0]}"
        if path.parent == ROOT:
            check_program(path.stem, importlib.import_module(path.stem), words[1:], call)


def document_commands():
    for path in DOCUMENTS:
        yield from python_commands(fenced_lines(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("command", list(document_commands()))
def test_a_command_of_the_readme_or_docs_exists_with_its_options(command, call, monkeypatch):
    check(command, call, monkeypatch)


@pytest.mark.parametrize("command", list(docstring_commands()))
def test_a_command_in_the_opening_of_a_file_exists_with_its_options(command, call, monkeypatch):
    check(command, call, monkeypatch)


@pytest.mark.parametrize("wrong", [
    "python trian.py", "python train.py --mod lal", "python train.py --mode flits",
    "python -m pytset", "python -m pytest tests/none.py", "python3 train.py",
    "python -m data.pretrain --sed 1", "python -m data.pretrian", "python -m lib.plots curvs out",
])
def test_a_command_that_does_not_exist_would_be_noticed(wrong, call, monkeypatch):
    with pytest.raises((AssertionError, ImportError)):
        check(wrong, call, monkeypatch)


def test_commands_are_found_in_blocks_alone():
    block = "```bash\npip install x && python train.py \\\n  --mode lal  # y\n```\npython b.py\n"
    assert [c.split() for c in python_commands(fenced_lines(block))] == [
        ["python", "train.py", "--mode", "lal", "#", "y"]]


def test_the_six_files_are_all_that_stand_at_the_top_and_each_opens_with_a_command():
    assert {path.stem for path in ROOT.glob("*.py")} == set(PROGRAMS)
    for name in PROGRAMS:
        opening = (ROOT / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
        commands = python_commands(re.split(r"\n|[Tt]ry:", opening))
        assert commands, f"{name}.py names no command to try"


def test_the_readme_shows_how_to_start():
    commands = python_commands(fenced_lines(README))
    assert any(c.startswith("python train.py") for c in commands)
    assert any(c.startswith("python sample.py") for c in commands)
    assert README.count("\n```") % 2 == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_a_document_names_exists(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (document.parent / link).exists(), f"{document.name} links to {link}: not there"
    for path in re.findall(r"`((?:assets|tests|docs)/[^`\s]*|(?:[a-z]+/)?[a-z_]+\.py)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{document.name} names {path}: not there"


def test_the_readme_and_continuous_integration_run_the_same_tests():
    line = re.search(r"^python -m pytest.*$", README, re.M)
    assert line and line[0] in fenced_lines(README)
    assert "grep -m1 '^python -m pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def output_after(text, command):
    """The lines of the block that follows the block with this command."""
    block = text.split(command, 1)[1].split("```", 1)[1].split("```")[1]
    assert "python" not in block, f"no output is shown after {command}"
    return block.strip("\n").splitlines()


def test_the_answer_that_the_readme_shows_is_the_models(call):
    command = next(c for c in python_commands(fenced_lines(README)) if "assets/demo.wav" in c)
    words = [str(ROOT / w) if w.startswith("assets/") else w for w in shlex.split(command)[2:]]
    code, stdout, _ = call(importlib.import_module("sample"), *words)
    assert code == 0 and stdout.splitlines() == output_after(README, command)


def test_the_table_that_the_readme_shows_is_train_pys(call, base, brief):
    options = ["--base", base, "--clips", 3, "--test-clips", 30, "--device", "cpu", "--steps1", 1,
               "--steps2", 1, "--steps3", 1, "--mode", "lal"]
    code, stdout, _ = call(importlib.import_module("train"), *options)
    assert code == 0

    def forms(lines):  # numbers aside
        return {" ".join(re.sub(r"\d+(\.\d+)?", "0", line).split()) for line in lines}

    shown = output_after(README, "python train.py --mode lal\n")
    examples = [line for line in shown if line.startswith(("right: ", "wrong: "))]
    assert forms(set(shown) - set(examples)) <= forms(stdout.splitlines())
    printed = [line for line in stdout.splitlines() if line.startswith(("right: ", "wrong: "))]
    assert printed and len(examples) == 2
    for line in printed + examples:
        assert re.fullmatch(r"right: .+\? -> .*|right: .+\. -> .*|"
                            r"wrong: .+[?.] -> .*   \(it was: .+\)", line), line
