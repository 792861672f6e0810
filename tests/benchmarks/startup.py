"""Seconds from the start of the main job to its first finished step, with the compiler's cache warm.

python tests/benchmarks/startup.py [--rounds 5] [--no-compile]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpt.py"


def seconds_to_first_step(folder: str, compile: bool) -> float:
    """From launching Python to the line that reports the first step."""
    start = time.perf_counter()
    command = [sys.executable, "-u", str(SCRIPT), "--steps", "1", *([] if compile else ["--no-compile"])]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("first step done"):
                seconds = time.perf_counter() - start
        if process.wait():
            sys.exit(f"{SCRIPT} failed")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first, *others = (seconds_to_first_step(folder, args.compile) for _ in range(args.rounds + 1))
    median = statistics.median(others)
    print(f"first start {first:.1f} s (if the cache was cold); later {', '.join(f'{x:.1f}' for x in others)} s")
    print(f"median of the later ones {median:.1f} s (target at most 6: {'reached' if median <= 6 else 'missed'})")


if __name__ == "__main__":
    main()
