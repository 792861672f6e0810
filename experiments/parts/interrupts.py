"""The first import of every script: Ctrl-C during the others, a few seconds, ends it without a traceback."""

import sys
from typing import Any


def _report(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report
