"""Runs one module of CPython's own tests inside a sandbox and prints what failed, as JSON. See docs/testing.md.

The module is in TEST, such as `test_socket`, `test_asyncio.test_events`, or `multiprocessing` (by fork).
"""

import importlib
import io
import json
import os
import signal
import sys
import types
import unittest

SECONDS = 25  # of one test: a few wait for ever where they get no socket


class Result(unittest.TextTestResult):
    def startTest(self, test):
        super().startTest(test)
        signal.alarm(SECONDS)

    def stopTest(self, test):
        signal.alarm(0)
        super().stopTest(test)


def hung(signum, frame):
    raise TimeoutError("hung")


def main():
    name = os.environ["TEST"]
    signal.signal(signal.SIGALRM, hung)
    sys.argv = ["test"]
    if name == "multiprocessing":
        import test._test_multiprocessing as tests

        module = types.ModuleType("__main__")
        tests.install_tests_in_module_dict(module.__dict__, "fork")
        module.setUpModule()
    else:
        module = importlib.import_module("test." + name)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    result = unittest.TextTestRunner(stream=io.StringIO(), resultclass=Result).run(suite)
    failed = {str(test.id()): text.strip().splitlines()[-1] for test, text in result.failures + result.errors}
    print(json.dumps({"run": result.testsRun, "skipped": len(result.skipped), "failed": failed}, indent=1))
    sys.stdout.flush()
    os._exit(0)  # threads that a failed test left behind are not waited for


main()
