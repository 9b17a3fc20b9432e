"""Half of all tests run in a second process: all of them are run once, and told of."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os
import time
import pytest

@pytest.mark.parametrize("n", range(100))
def test_number(n):
    with open("ran", "a") as file:
        print(n, os.getpid(), file=file)
    deadline = time.time() + 30
    while len({line.split()[1] for line in open("ran")}) < 2 and time.time() < deadline:
        time.sleep(0.01)  # or one of the processes might have run all before the other began
    assert n not in {failing}
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one process for one core")
@pytest.mark.parametrize("failing", [(), (0, 99)])  # one of them in each process
def test_all_tests_run_once_and_failures_of_both_processes_are_told(failing, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS.replace("{failing}", repr(failing)))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent),
                   "PYTEST_ADDOPTS": "-q -p second_process -p no:cacheprovider"}
    process = subprocess.run([sys.executable, "-m", "pytest"], cwd=tmp_path, env=environment,
                             capture_output=True, text=True)
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert sorted(int(n) for n, _ in ran) == list(range(100))
    assert len({process for _, process in ran}) == 2
    assert process.returncode == (1 if failing else 0), process.stdout + process.stderr
    assert f"{100 - len(failing)} passed" in process.stdout
    failed = re.findall(r"FAILED .*test_number\[(\d+)\]", process.stdout)
    assert sorted(map(int, failed)) == [*failing]
