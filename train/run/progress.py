"""A progress bar for work that is no training."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, task: str) -> Iterator[Callable[..., None]]:
    """A bar on the terminal while the block runs; yields a function to call after each of `total` steps."""
    from rich import progress as bars

    columns = ("{task.description}", bars.BarColumn(bar_width=24), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    with bars.Progress(*columns, "left", bars.TimeRemainingColumn(), transient=True) as bar:
        bar.disable = not bar.console.is_terminal
        number = bar.add_task(task, total=total)
        yield lambda *_: bar.advance(number)
