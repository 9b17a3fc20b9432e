"""A second process for half of the tests, where `python -m pytest` is all that was said.

The tests compute with one thread each, so on two cores two processes need half the time. The second
one is pytest again; what it reports is read and counted here when both have ended. With any further
word, such as a file or `-x`, one process runs what is asked for.
"""
import json
import os
import subprocess
import sys
import tempfile

import pytest

REPORTS = "TEST_REPORTS_OF_SECOND_PROCESS"  # in its environment: the file it reports to


def pytest_configure(config):
    if path := os.environ.pop(REPORTS, None):  # tests that start pytest start one that is alone
        config.pluginmanager.register(Second(config, path))
    elif not config.invocation_params.args and (os.cpu_count() or 1) > 1:
        config.pluginmanager.register(First(config))


class Second:
    def __init__(self, config, path):
        self.config, self.path = config, path

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = items[1::2]

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a", encoding="utf-8") as file:
            print(json.dumps(data), file=file)


class First:
    def __init__(self, config):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "reports")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest"], env={**os.environ, REPORTS: self.path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        config.add_cleanup(self.process.wait)
        config.add_cleanup(self.process.kill)  # the last that is added is the first that is done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        second, session.items = session.items[1::2], session.items[0::2]
        result = yield
        output, _ = self.process.communicate()
        if self.process.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise pytest.UsageError(f"the second process of tests failed:\n{output}")
        with open(self.path, encoding="utf-8") as file:
            reports = [session.config.hook.pytest_report_from_serializable(
                config=session.config, data=json.loads(line)) for line in file]
        assert {report.nodeid for report in reports} == {item.nodeid for item in second}
        for report in reports:
            session.config.hook.pytest_runtest_logreport(report=report)
        return result
