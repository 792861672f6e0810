"""The table of where tools for per-example gradients are right: error of the norms against a loop of plain autograd.
README.md says what the words in it mean.

    python tests/comparisons/table.py            prints it
    python tests/comparisons/table.py --write    puts it between the markers of README.md
    python tests/comparisons/table.py --tools functree captum --errors
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import linecache
import logging
import traceback
import warnings
from pathlib import Path

import torch
from cases import BATCH, CASES, case
from tools import TOOLS, OtherFunction, run, squares_by_parameter, version

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table.py begins -->", "<!-- table.py ends -->"
EXACT = 1e-10


def verdict(tool: str, name: str) -> tuple[str, str]:
    """(the verdict on a tool in a case, its own message)."""
    if tool != "functree" and version(tool) is None:
        return "not installed", ""
    about, printed = case(name), io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            norms = run(tool, about)
    except OtherFunction as error:
        return "other function", str(error)
    except Exception as error:
        return ("refuses" if on_purpose(error) else "stops"), f"{type(error).__name__}: {error}"
    text = " ".join([printed.getvalue(), *(str(w.message) for w in warned)])
    if norms.shape != (BATCH,):
        return f"shape {tuple(norms.shape)}", text
    squares = squares_by_parameter(about)
    error = relative_error(norms, squares.sum(0))
    if error <= EXACT:
        return "exact", text
    # What a tool leaves out is found from the outside: its norm is exact over some of the parameters only.
    names = [name for name, _ in about.module.named_parameters()]
    for left in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names))):
        rest = [i for i, name in enumerate(names) if name not in left]
        if relative_error(norms, squares[rest].sum(0)) <= EXACT:
            named = all(any(word in text for word in _words(about.module, name)) for name in left)
            return f"leaves out {_short(left, names)}{' (says so)' if named else ''}: {percent(error)}", text
    return f"wrong: {percent(error)}", text


def _words(module: torch.nn.Module, parameter: str) -> list[str]:
    """Words by which a message may name a parameter: its name, or the types of the layers around it."""
    layers = [parameter.rpartition(".")[0]]
    while "." in layers[-1]:
        layers.append(layers[-1].rpartition(".")[0])
    return [parameter, *(type(module.get_submodule(layer)).__name__ for layer in layers)]


def _short(left: tuple[str, ...], names: list[str]) -> str:
    """The parameters left out, where these are all of a layer by its name."""
    layers = dict.fromkeys(name.partition(".")[0] for name in left)
    whole = [layer for layer in layers if all(n in left for n in names if n.partition(".")[0] == layer)]
    return ", ".join([*whole, *(name for name in left if name.partition(".")[0] not in whole)])


def percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error < 0.995 else f"{100 * error:.0f} %"


def relative_error(norms: torch.Tensor, squares: torch.Tensor) -> float:
    """The greatest relative error of the per-example norms."""
    return ((norms - squares.sqrt()).abs() / squares.sqrt()).max().item()


def on_purpose(error: Exception) -> bool:
    """Whether the last line that ran is a `raise` or an `assert` (nothing says so of what torch's C++ raises)."""
    if isinstance(error, LookupError | AttributeError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    return linecache.getline(last.filename, last.lineno).strip().startswith(("raise", "assert"))


def markdown(rows: dict[str, list[str]], tools: list[str]) -> str:
    table = [["case", *tools], *([name, *cells] for name, cells in rows.items())]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * w for w in widths])
    lines = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def versions(tools: list[str], *libraries: str) -> str:
    numbers = {"torch": torch.__version__} | {TOOLS[tool][1]: version(tool) for tool in tools if TOOLS[tool][1]}
    numbers |= {library: importlib.metadata.version(library) for library in libraries}
    return "With " + ", ".join(f"{name} {number or 'not installed'}" for name, number in numbers.items()) + "."


def write(text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the text between the markers of the README."""
    before, _, rest = README.read_text().partition(begin)
    after = rest.partition(end)[2]
    README.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--errors", action="store_true", help="print what the tools raise, too")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    args = parser.parse_args()
    if args.write and args.tools != list(TOOLS):
        parser.error("--write needs all tools")
    logging.disable(logging.WARNING)
    rows = {}
    for name in CASES:
        verdicts = {tool: verdict(tool, name) for tool in args.tools}
        rows[name] = [words for words, _ in verdicts.values()]
        for tool, (words, text) in verdicts.items():
            if args.errors and text:
                print(f"{name}, {tool}: {words}: {' '.join(text.split())[:300]}")
    text = f"{markdown(rows, args.tools)}\n\n{versions(args.tools)}"
    print(text)
    if args.write:
        write(text)


if __name__ == "__main__":
    main()
