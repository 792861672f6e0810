"""The command `functree`, or `python -m experiments`: lists the experiments, or starts one of them.

    functree                     the experiments, a line each
    functree gpt --steps 100     the same as python experiments/gpt.py --steps 100
    functree gpt --help          its flags

Nothing heavy is imported before a script is chosen, so that the list is there at once.
"""

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def scripts() -> dict[str, Path]:
    """{name: path} of every experiment, in alphabetical order."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("__")}


def summary(path: Path) -> str:
    """The first sentence of a script's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence, full_stop, _ = paragraph.partition(". ")
    return sentence + full_stop.strip()


def program() -> str:
    """The words that start this program."""
    start = Path(sys.argv[0])
    return "python -m experiments" if start.name == "__main__.py" else start.stem


def listing() -> str:
    """Usage, and every experiment with its summary."""
    paths = scripts()
    width = max(map(len, paths))
    lines = (f"  {name:{width}}  {summary(path)}" for name, path in paths.items())
    usage = f"usage: {program()} EXPERIMENT [flags]\n       {program()} EXPERIMENT --help\n\nexperiments:"
    return "\n".join([usage, *lines])


def unknown(name: str) -> str:
    """The error for a name that is no experiment's, with the nearest that are."""
    near = difflib.get_close_matches(name.removesuffix(".py"), scripts(), cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "expected one of the list"
    return f"error: '{name}' is no experiment; {hint} (see {program()} --help)"


def main() -> None:
    """List the experiments, or start the one that the command line names as `python experiments/NAME.py` does."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        try:
            print(listing(), flush=True)
        except BrokenPipeError:  # whoever read it has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        except OSError as error:  # a full disk
            print(f"error: cannot write: {error.strerror}", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(2)
        return
    if name not in scripts():
        print(unknown(name), file=sys.stderr)
        sys.exit(2)
    # run_path makes the script's path argv[0]; the name for its help and its hints is a global (command_line.program).
    own = {"PROGRAM": f"{program()} {name}"}
    sys.argv[1:] = flags
    runpy.run_path(str(scripts()[name]), own, run_name="__main__")


if __name__ == "__main__":
    main()
