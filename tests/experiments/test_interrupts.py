"""Ctrl-C while a script still imports what it needs."""

import ast
import signal
import subprocess
import sys

import pytest

from tests import processes
from tests.experiments import runs
from tests.registry.experiments import EXPERIMENTS

FIRST = "experiments.parts.interrupts"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_it_is_the_first_import_of_every_script(experiment):
    body = ast.parse(runs.script(experiment.name).read_text(encoding="utf-8")).body
    first = next(node for node in body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert isinstance(first, ast.Import) and first.names[0].name == FIRST


@pytest.mark.parametrize(("then", "code", "err"), [("signal.raise_signal(2)", -2, "interrupted\n"), ("1 / 0", 1, "")])
def test_interruption_is_one_line_and_errors_keep_their_traceback(then, code, err):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": runs.ENVIRONMENT}
    process = processes.start([sys.executable, "-c", f"import {FIRST}, signal; {then}"], **pipes)
    actual, _, message = runs.finish(process)
    assert signal.SIGINT == 2 and actual == code
    assert message == err if err else message.startswith("Traceback") and "ZeroDivisionError" in message
