"""A second process for half of the tests, where there are many of them and two cores.

The tests compute with one thread each, so two processes need half the time. The second one is
pytest again, with the same words; what it reports is read and counted here when both have ended.
`-x`, `-s` and `--pdb` are for one process alone, as is any selection of less than MANY tests.
"""
import json
import os
import subprocess
import sys
import tempfile

import pytest

MANY = 1000
REPORTS = "TEST_REPORTS_OF_SECOND_PROCESS"  # in its environment: the file it reports to


class Reporter:
    def __init__(self, config, path):
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a", encoding="utf-8") as file:
            print(json.dumps(data), file=file)


def pytest_configure(config):
    if path := os.environ.pop(REPORTS, None):  # tests that start pytest start one that is alone
        config.pluginmanager.register(Reporter(config, path), "second process")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.pluginmanager.has_plugin("second process"):
        items[:] = items[1::2]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    option = session.config.option
    alone = option.maxfail or option.usepdb or option.capture == "no" or option.collectonly
    alone = alone or session.config.pluginmanager.has_plugin("second process")
    if alone or len(session.items) < MANY or (os.cpu_count() or 1) < 2:
        return (yield)
    second, session.items = session.items[1::2], session.items[0::2]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "reports")
        words = [sys.executable, "-m", "pytest", *session.config.invocation_params.args]
        with subprocess.Popen(words, env={**os.environ, REPORTS: path}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                result = yield
                output, _ = process.communicate()
            finally:
                process.kill()
        if process.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise pytest.UsageError(f"the second process of tests failed:\n{output}")
        with open(path, encoding="utf-8") as file:
            reports = [session.config.hook.pytest_report_from_serializable(
                config=session.config, data=json.loads(line)) for line in file]
    assert {report.nodeid for report in reports} == {item.nodeid for item in second}
    for report in reports:
        session.config.hook.pytest_runtest_logreport(report=report)
    return result
