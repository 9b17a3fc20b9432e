"""What is promised is there: every command, option and path that the README and the files name."""
import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = sorted(path.stem for path in ROOT.glob("*.py"))


def fenced(text):
    """The lines of ``` blocks, those that end in a backslash joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def python_commands(lines):
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("python")]


def docstring_commands():
    for name in PROGRAMS:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        opening = source.split('"""')[1].replace("\\\n", " ")
        yield from python_commands(re.split(r"\n|Try:", opening))


def check(command, call):
    """A command names a file that exists, and options that it has, with values that they take."""
    python, *words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word in ("|", ">", "2>", "&")]
    words = words[:min(ends, default=len(words))]
    assert python == "python" and words, f"{command}: only 'python' is sure to exist"
    if words[0] == "-c":
        compile(words[1], command, "exec")
        return
    if words[0] == "-m":
        importlib.import_module(words[1])
        paths = [word for word in words[2:] if "/" in word]
        assert all((ROOT / path.split("::")[0]).exists() for path in paths), command
        return
    path = ROOT / words[0]
    assert path.is_file(), f"{command}: no file {words[0]}"
    if path.parent != ROOT:
        return
    got = []

    options = importlib.import_module(path.stem).Options
    stub = SimpleNamespace(__name__=path.stem, __doc__="", Options=options, main=got.append)
    code, _, stderr = call(stub, *words[1:])
    assert code == 0 and len(got) == 1, f"{command}: {stderr}"


@pytest.mark.parametrize("command", python_commands(fenced(README)))
def test_a_command_of_the_readme_exists_with_its_options(command, call):
    check(command, call)


@pytest.mark.parametrize("command", list(docstring_commands()))
def test_a_command_in_the_opening_of_a_file_exists_with_its_options(command, call):
    check(command, call)


def test_a_command_that_does_not_exist_would_be_noticed(call):
    for wrong in ("python trian.py", "python train.py --mod lal", "python train.py --mode flits",
                  "python -m pytset", "python -m pytest tests/none.py", "python3 train.py"):
        with pytest.raises((AssertionError, ImportError)):
            check(wrong, call)
    block = "```bash\npip install x && python train.py \\\n  --mode lal  # y\n```\npython b.py\n"
    assert [c.split() for c in python_commands(fenced(block))] == [
        ["python", "train.py", "--mode", "lal", "#", "y"]]


def test_the_readme_shows_how_to_start():
    commands = python_commands(fenced(README))
    assert any(c.startswith("python train.py") for c in commands)
    assert any(c.startswith("python sample.py") for c in commands)
    assert README.count("\n```") % 2 == 0


def test_every_path_that_the_readme_names_exists():
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", README)
    quoted = re.findall(r"`((?:assets|tests)/[^`\s]*|[a-z_]+\.py)`", README)
    for path in links + quoted:
        assert list(ROOT.glob(path.rstrip("/"))), f"the README names {path}, which is not there"


def test_the_readme_and_continuous_integration_run_the_same_tests():
    line = re.search(r"^python -m pytest.*$", README, re.M)
    assert line and line[0] in fenced(README)
    assert "grep -m1 '^python -m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
