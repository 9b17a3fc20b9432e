"""A second process for half of the tests, where `python -m pytest` is all that was said.

The tests compute with one thread each, so on two cores two processes need half the time. The second
one is pytest again. It begins with the last test, the first one with the first, and where they meet
both have ended; then what the second one reports is read and counted here. With any further word,
such as a file or `-x`, one process runs what is asked for.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = "TEST_FOLDER_OF_BOTH_PROCESSES"  # in the second one's environment


def pytest_configure(config):
    if path := os.environ.pop(FOLDER, None):  # tests that start pytest start one that is alone
        config.pluginmanager.register(Second(config, path))
    elif not config.invocation_params.args and (os.cpu_count() or 1) > 1:
        config.pluginmanager.register(First(config))


class Process:
    """One of the two. A test belongs to whoever first makes a folder of its number."""

    def __init__(self, config, folder):
        self.config, self.folder, self.own = config, Path(folder), set()
        self.reports = self.folder / "reports"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        self.numbers = {item.nodeid: str(number) for number, item in enumerate(items)}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        try:
            (self.folder / self.numbers[item.nodeid]).mkdir()
        except FileExistsError:
            return True  # nothing is left to be done with it
        self.own.add(item.nodeid)


class Second(Process):
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        super().pytest_collection_modifyitems(items)
        items.reverse()

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.reports, "a", encoding="utf-8") as file:
            print(json.dumps(data), file=file)


class First(Process):
    def __init__(self, config):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        super().__init__(config, folder.name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest"], env={**os.environ, FOLDER: folder.name}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        config.add_cleanup(self.process.wait)
        config.add_cleanup(self.process.kill)  # the last that is added is the first that is done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        result = yield
        output, _ = self.process.communicate()
        if self.process.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise pytest.UsageError(f"the second process of tests failed:\n{output}")
        self.reports.touch()  # the first one may have been much faster
        with open(self.reports, encoding="utf-8") as file:
            reports = [session.config.hook.pytest_report_from_serializable(
                config=session.config, data=json.loads(line)) for line in file]
        others = {report.nodeid for report in reports}
        assert others.isdisjoint(self.own) and others | self.own == {*self.numbers}
        for report in reports:
            session.config.hook.pytest_runtest_logreport(report=report)
        return result
