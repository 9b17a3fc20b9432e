"""Exercises that check themselves: fill in a function's body, or find a bug that was planted.

    python -m tests.exercises              # the list
    python -m tests.exercises start 4      # takes the body out of a function, and says what to do
    python -m tests.exercises check 4      # is it right? If not, what is wrong, in one line
    python -m tests.exercises hint 4       # one hint more each time
    python -m tests.exercises solve 4      # puts the original back, shows how yours differs
    python -m tests.exercises plant 21     # puts a bug into the code, and tells its symptom
    python -m tests.exercises grade        # a table of all, and a line of JSON

The exercises themselves are in tests/exercise_texts.py, their tests in tests/test_exercises.py. The
original of each function, and whatever you wrote in its place, is kept under out/exercises/.
"""
import argparse
import ast
import difflib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent))
from exercise_texts import EXERCISES, FILL_INS, HUNTS  # noqa: E402 - found from any folder

TIME_LIMIT = 20  # seconds that pytest may take, and 10 more for each exercise
STUB = 'raise NotImplementedError("exercise {}: {}")'


# ------------------------------------------------------------------------ a function in a file

def read_source(path):
    """The text of a file, with \\n for \\r\\n. ValueError, one line, if it is no Python."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        ast.parse(text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8; save it as UTF-8") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{path}, line {line}: is no Python yet ({error.args[0]})") from None
    return text


def write_source(path, text):
    """Write a file with the line ends and the byte order mark that it had."""
    old, status = path.read_bytes(), path.stat()
    new = text.replace("\n", "\r\n") if b"\r\n" in old else text
    path.write_bytes(new.encode("utf-8-sig" if old.startswith(b"\xef\xbb\xbf") else "utf-8"))
    # Python tells by seconds and size whether what it compiled before is stale
    now = max(int(time.time()), int(status.st_mtime) + 1)
    os.utime(path, (now, now))


def find_function(text, name):
    """The syntax tree of a function, such as KVCache.fork; None if there is none of that name."""
    node = ast.parse(text)
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        named = [child for child in node.body if isinstance(child, kinds) and child.name == part]
        if not named:
            return None
        node = named[-1]  # of two definitions the later one holds
    return node


def locate(text, exercise):
    """The function of an exercise in a file's text, as for find_function; else ValueError."""
    node = find_function(text, exercise.function)
    if node is None:
        raise ValueError(f"{exercise.file} has no function {exercise.function}: give it back the "
                         f"name that exercise {exercise.number} knows")
    return node


def get_function(text, exercise):
    node = locate(text, exercise)
    return "\n".join(text.split("\n")[node.lineno - 1:node.end_lineno])


def replace_function(text, exercise, source):
    """The file's text with another source for the exercise's function."""
    node, lines = locate(text, exercise), text.split("\n")
    return "\n".join(lines[:node.lineno - 1] + source.split("\n") + lines[node.end_lineno:])


def replace_body(text, exercise, body):
    """The file's text with another body below the signature and docstring of the function."""
    node, lines = locate(text, exercise), text.split("\n")
    indent = " " * (node.col_offset + 4)
    start = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        start = node.body[0].end_lineno
    new = [indent + line if line else line for line in body.split("\n")]
    return "\n".join(lines[:start] + new + lines[node.end_lineno:])


def take_out_body(text, exercise):
    return replace_body(text, exercise, STUB.format(exercise.number, exercise.title))


def put_in_bug(text, exercise):
    source = get_function(text, exercise)
    if source.count(exercise.old) != 1:
        raise ValueError(f"bug {exercise.number} cannot be planted: {exercise.function} in "
                         f"{exercise.file} is not as it was; solve the exercise that you did "
                         "there, or take a fresh copy")
    return replace_function(text, exercise, source.replace(exercise.old, exercise.new))


# ------------------------------------------------------------------------------- what is kept

class Workspace:
    """A copy of the repository, and what out/exercises/ in it remembers."""

    def __init__(self, root):
        self.root = Path(root)
        self.folder = self.root / "out" / "exercises"

    def path(self, exercise):
        return self.root / exercise.file

    def read(self, exercise):
        return read_source(self.path(exercise))

    def kept(self, exercise, name="original"):
        return self.folder / f"{exercise.number:02}-{name}.py"

    def keep(self, exercise, source, name):
        """Write a function's source under out/exercises/; returns the path."""
        path = self.kept(exercise, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.encode())
        return path

    def original(self, exercise):
        """The source that `start` or `plant` kept; None if they did not."""
        path = self.kept(exercise)
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def keep_attempt(self, exercise, source):
        """Keep what a student wrote, unless it is kept already; returns the path."""
        attempts = sorted(self.folder.glob(f"{exercise.number:02}-attempt-*.py"))
        for path in attempts:
            if path.read_text(encoding="utf-8") == source:
                return path
        return self.keep(exercise, source, f"attempt-{len(attempts) + 1:02}")

    def notes(self, exercise, **new):
        """What is noted of an exercise, a dict; `new` is added to it."""
        path = self.folder / "notes.json"
        try:
            notes = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            notes = {}
        own = notes.setdefault(str(exercise.number), {})
        if new:
            own.update(new)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(notes, indent=1), encoding="utf-8")
        return own

    def status(self, exercise):
        """One word for the list: -, open, done, solved; ? for a file that is no Python."""
        try:
            source = get_function(self.read(exercise), exercise)
        except ValueError:
            return "?"
        if STUB.format(exercise.number, "")[:-2] in source:
            return "open"
        notes = self.notes(exercise)
        if exercise.is_hunt and exercise.new not in source and notes.get("green"):
            return "done"  # whatever has been done to the function since
        if notes.get("green") == fingerprint(source):
            return "done"
        if self.original(exercise) is None:
            return "-"
        return "solved" if notes.get("solved") == fingerprint(source) else "open"


def fingerprint(source):
    return hashlib.sha256(source.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------- commands

def show_list(space):
    for title, exercises in (("Fill in", FILL_INS), ("Bug hunts", HUNTS)):
        print(f"{title}\n{'':>4} {'what':<50}{'where':<38}{'min':>4}{'level':>6}  {'status':<7}"
              "  first")
        for e in exercises:
            where = "" if e.is_hunt else f"{e.file} {e.function}"
            print(f"{e.number:>4} {e.title:<50}{where:<38}{e.minutes:>4}{e.level:>6}  "
                  f"{space.status(e):<7}  {', '.join(map(str, e.needs))}".rstrip())
        print()
    print("begin: python -m tests.exercises start 4   or, to find a bug:   "
          "python -m tests.exercises plant 24")


def start(space, exercise):
    """Take the function's body out; what was there is kept, and named."""
    if exercise.is_hunt:
        raise ValueError(f"{exercise.number} is a bug hunt: plant {exercise.number}")
    text = space.read(exercise)
    source, stubbed = get_function(text, exercise), take_out_body(text, exercise)
    for bug in HUNTS:
        if (bug.file, bug.function) == (exercise.file, exercise.function) and bug.new in source:
            raise ValueError(f"exercise {exercise.number} is about a function with a bug in it: "
                             f"solve {bug.number} first")
    if source == get_function(stubbed, exercise):
        print(f"exercise {exercise.number} is open already")
        return
    original = space.original(exercise)
    if original is None:
        print(f"kept: {space.keep(exercise, source, 'original')}")
    elif source != original:
        print(f"kept, with your edit: {space.keep_attempt(exercise, source)}")
    space.notes(exercise, green="", solved="")
    write_source(space.path(exercise), stubbed)


def tell_task(exercise):
    needs = f"first: {', '.join(map(str, exercise.needs))}\n" if exercise.needs else ""
    print(f"\nExercise {exercise.number}: {exercise.title} ({exercise.minutes} minutes)\n"
          f"Fill in {exercise.function} in {exercise.file}.\n\n{exercise.text}\n\n{needs}"
          f"check: python -m tests.exercises check {exercise.number}\n"
          f"green? then try: {exercise.then}")


def plant(space, exercise):
    if not exercise.is_hunt:
        raise ValueError(f"{exercise.number} is to be filled in: start {exercise.number}")
    text = space.read(exercise)
    source = get_function(text, exercise)
    if exercise.new in source and exercise.old not in source:
        print(f"bug {exercise.number} is planted already")
    else:
        changed = put_in_bug(text, exercise)
        if space.original(exercise) not in (None, source):
            print(f"kept: {space.keep_attempt(exercise, space.original(exercise))}")
        space.keep(exercise, source, "original")
        space.notes(exercise, green="", solved="")
        write_source(space.path(exercise), changed)
    print(f"\nBug {exercise.number}: {exercise.title} ({exercise.minutes} minutes)\n"
          f"{exercise.text}\n\n"
          f"measure: python -m tests.exercises check {exercise.number}\n"
          "A good hunter does not look under out/exercises/, at `git diff` or at the list of bugs.")


def run_tests(root, exercises):
    """{number: None if its tests pass, else the first line of what is wrong}; what no test was
    run for is missing. ValueError if the tests could not start or did not end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    markers = " or ".join(f"ex{exercise.number}" for exercise in exercises)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", str(Path("tests", "test_exercises.py")), "-q",
                   "-m", markers, "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            process = subprocess.run(command, cwd=root, env=environment, capture_output=True,
                                     timeout=TIME_LIMIT + 10 * len(exercises), encoding="utf-8",
                                     errors="replace", stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise ValueError("the tests did not end: is there an endless loop, or a recursion that "
                             "does its work over and over?") from None
        cases = ElementTree.parse(report).iter("testcase") if report.is_file() else ()
        results = {}
        for case in cases:
            name = case.get("name")
            if name.startswith("test_ex"):
                problem = case.find("failure") if case.find("error") is None else case.find("error")
                number = int(name[len("test_ex"):].split("_")[0])
                message = None if problem is None else problem.get("message") or "error"
                results[number] = results.get(number) or message and message.splitlines()[0]
    if not results:
        lines = [line for line in (process.stdout + process.stderr).splitlines()
                 if line.startswith("E ") or "Error" in line] or ["no test was found"]
        raise ValueError(f"the tests cannot start: {lines[-1].removeprefix('E ').strip()}")
    return results


def check(space, exercise):
    """Run an exercise's tests, and say in one line what is wrong. Returns whether it is green."""
    source = get_function(space.read(exercise), exercise)
    message = run_tests(space.root, [exercise])[exercise.number]
    number = exercise.number
    if message is None:
        space.notes(exercise, green=fingerprint(source))
        if exercise.is_hunt:
            print(f"bug {number}: green, the symptom is gone")
        else:
            print(f"exercise {number}: green; now try: {exercise.then}")
        return True
    message = message.removeprefix("AssertionError: ")
    if message.startswith("NotImplementedError: exercise "):
        other = message.split()[2].rstrip(":")
        print(f"exercise {number}: " + ("nothing is filled in yet" if other == str(number) else
                                        f"exercise {other} is open, and has to be done first"))
    elif exercise.is_hunt:
        print(f"bug {number}: still there: {message}")
    else:
        print(f"exercise {number}: not yet: {message} | hint: {exercise.hints[0]}")
    return False


def hint(space, exercise):
    n = space.notes(exercise).get("hints", 0)
    if n >= len(exercise.hints):
        print(f"no more hints; all {n} again, or solve {exercise.number} shows the original:")
        print("\n".join(exercise.hints))
        return
    space.notes(exercise, hints=n + 1)
    print(f"hint {n + 1} of {len(exercise.hints)}: {exercise.hints[n]}")


def solve(space, exercise):
    """Put the original back, and show how the student's differs from it."""
    original = space.original(exercise)
    if original is None:
        raise ValueError(f"exercise {exercise.number} was not begun here: "
                         f"{space.kept(exercise)} is missing")
    text = space.read(exercise)
    source = get_function(text, exercise)
    if source == original:
        print(f"exercise {exercise.number}: the original is there already")
        return
    given = (original.replace(exercise.old, exercise.new) if exercise.is_hunt
             else get_function(take_out_body(text, exercise), exercise))
    if source != given:
        print(f"kept, your own: {space.keep_attempt(exercise, source)}")
    write_source(space.path(exercise), replace_function(text, exercise, original))
    space.notes(exercise, solved=fingerprint(original), green="")
    print("\n".join(difflib.unified_diff(source.split("\n"), original.split("\n"), "yours",
                                         f"{exercise.file} {exercise.function}", lineterm="")))


def run_all_tests(space, exercises):
    """As run_tests, but what keeps tests from running is a message too."""
    try:
        for exercise in exercises:
            space.read(exercise)
    except ValueError as error:  # one file imports another: nothing can run
        return {exercise.number: str(error) for exercise in exercises}
    try:
        return run_tests(space.root, exercises)
    except ValueError as error:
        if len(exercises) == 1:
            return {exercises[0].number: str(error)}
    results = {}  # one of them stopped all: now each on its own
    for exercise in exercises:
        results |= run_all_tests(space, [exercise])
    return results


def grade(space):
    """A table of every fill-in, and of bugs that were planted; the last line is JSON."""
    exercises = [*FILL_INS, *(e for e in HUNTS if space.original(e) is not None)]
    results = run_all_tests(space, exercises)
    green = {e.number: results.get(e.number, "no test") is None for e in exercises}
    for exercise in exercises:
        message = results.get(exercise.number, "no test") or "green"
        print(f"{exercise.number:>4} {exercise.title:<50} {message[:100]}")
    print(json.dumps({"green": sum(green.values()), "of": len(green), "exercises": green}))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"exercises: {message} (--help lists every command)\n")


def choose(number, command):
    """The exercises of a number; "all" is for start alone."""
    if number == "all" and command == "start":
        return FILL_INS
    if not number.isdecimal() or int(number) not in EXERCISES:
        raise ValueError(f"there is no exercise {number}: fill-ins are 1 to {len(FILL_INS)}, bug "
                         f"hunts {HUNTS[0].number} to {HUNTS[-1].number}")
    return [EXERCISES[int(number)]]


def main(arguments=None):
    """Returns the exit code: 0, or 1 for a check that is red, or 2 for a mistake of the user's."""
    parser = Parser("exercises", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"start": start, "check": check, "hint": hint, "solve": solve, "plant": plant}
    parser.add_argument("command", nargs="?", default="list",
                        choices=["list", *commands, "grade"])
    parser.add_argument("number", nargs="?", help="of an exercise; start all: every fill-in")
    parser.add_argument("--root", default=Path(__file__).parents[1], type=Path,
                        help="the copy of the repository to work in, by default this one")
    o = parser.parse_args(arguments)
    space = Workspace(o.root)
    try:
        if o.command == "list":
            show_list(space)
        elif o.command == "grade":
            grade(space)
        elif o.number is None:
            raise ValueError(f"{o.command} needs a number, like: {o.command} 4")
        else:
            exercises = choose(o.number, o.command)
            for exercise in exercises:
                if commands[o.command](space, exercise) is False:
                    return 1
            if o.command == "start" and len(exercises) == 1:
                tell_task(exercises[0])
            elif o.command == "start":
                print(f"{len(exercises)} functions are open; the originals are under "
                      f"{space.folder}: leave that folder out of what you hand out")
    except (ValueError, OSError) as error:
        print(f"exercises: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may lack some characters
    sys.exit(main())
