"""Texts over HTTP: 16 clients at once against the same requests one after the other.

The service is experiments/serve.py in a process of its own, with a GPT that gpt.py has trained for a step; the clients
are threads of this one. Each streams texts of 48 tokens after 12 of a prompt. The median and the 99th percentile are
those of the time from a request to its first token, and to its last. Texts must be the same both ways.

`--minutes` is a test of endurance instead: texts, refusals, uploads that are too large and clients that go, beside the
resident memory of the service.

    python tests/benchmarks/serve.py [--clients 16] [--texts 10] [--tokens 48] [--preset tiny] [--exact] [--compile]
    python tests/benchmarks/serve.py --minutes 10
"""

import argparse
import contextlib
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PROMPT, TARGET = "Texts over H", 4.0


class Answer(NamedTuple):
    """A streamed text, the seconds to its first token and to its last, and its number of tokens."""

    text: str
    first: float
    last: float
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--texts", type=int, default=10, help="texts per client")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--preset", default="tiny", help="of gpt.py")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--compile", action="store_true", help="with --exact")
    parser.add_argument("--minutes", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), args.preset)
        flags = ["--slots", str(args.clients)] + ["--exact"] * args.exact + ["--compile"] * args.compile
        process = subprocess.Popen(
            [sys.executable, EXPERIMENTS / "serve.py", "--port", "0", *flags],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            line = next(line for line in process.stdout if line.startswith("serving at"))
            port = int(re.search(r":(\d+)/", line)[1])
            endure(port, process.pid, args) if args.minutes else compare(port, args)
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def train(folder: Path, preset: str) -> None:
    """A run of gpt.py in the folder, after one step."""
    (folder / "text.txt").write_text(__doc__ * 20, encoding="utf-8")
    flags = ["--text", "text.txt", "--preset", preset, "--steps", "1", "--batch", "1", "--no-compile"]
    command = [sys.executable, EXPERIMENTS / "gpt.py", *flags]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def request(port: int, body: bytes, size: int | None = None) -> socket.socket:
    """A connection on which the request has been sent. size: that the head declares, if not the body's own."""
    client = socket.create_connection(("127.0.0.1", port))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size or len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client


def stream(port: int, seed: int, tokens: int) -> Answer:
    body = {"prompt": PROMPT, "max_tokens": tokens, "seed": seed, "temperature": 0.8, "stream": True}
    begin, first, data = time.perf_counter(), 0.0, b""
    with request(port, json.dumps(body).encode()) as client:
        while part := client.recv(65536):
            data += part
            first = first or (time.perf_counter() - begin if b"data: " in data else 0.0)
    last = time.perf_counter() - begin
    events = [json.loads(line) for line in re.findall(rb"data: (\{.*)", data)]
    text = "".join(event["choices"][0]["text"] for event in events)
    return Answer(text, first, last, events[-1]["usage"]["completion_tokens"])


def compare(port: int, args: argparse.Namespace) -> None:
    """Both ways, in turns."""
    jobs = [(client, number) for number in range(args.texts) for client in range(args.clients)]
    single = jobs[: max(args.clients, len(jobs) // 4)]  # enough for its rate
    rates: dict[str, list[float]] = {"one after the other": [], "at once": []}
    answers: dict[str, list[Answer]] = {name: [] for name in rates}
    texts: dict[tuple[int, int], str] = {}
    stream(port, 0, args.tokens)
    for _ in range(3):
        for name, workers, some in (("one after the other", 1, single), ("at once", args.clients, jobs)):
            with ThreadPoolExecutor(workers) as pool:
                begin = time.perf_counter()
                each = list(pool.map(lambda job: stream(port, 1000 * job[0] + job[1], args.tokens), some))
                rates[name].append(sum(answer.tokens for answer in each) / (time.perf_counter() - begin))
            answers[name] += each
            for job, answer in zip(some, each, strict=True):
                if texts.setdefault(job, answer.text) != answer.text:
                    raise SystemExit(f"a text differs: {texts[job]!r}, then {answer.text!r}")
    kind = ", ".join(["eager"] * (not args.compile) + ["exact"] * args.exact + ["compiled"] * args.compile)
    print(f"{args.clients} clients, {len(jobs)} texts of {args.tokens} tokens, {args.preset} ({kind})")
    for name, each in answers.items():
        parts = []
        for what, values in (("first token", [one.first for one in each]), ("whole text", [one.last for one in each])):
            p50, p99 = (1e3 * x for x in (statistics.median(values), sorted(values)[int(0.99 * (len(values) - 1))]))
            parts.append(f"{what} p50 {p50:.0f}, p99 {p99:.0f} ms")
        print(f"  {name:<20} {statistics.median(rates[name]):8.0f} tokens/s; {'; '.join(parts)}")
    ratio = statistics.median(rates["at once"]) / statistics.median(rates["one after the other"])
    verdict = "reached" if ratio >= TARGET else "missed"
    print(f"  at once / one after the other: {ratio:.2f} (target at least {TARGET:g}: {verdict})")


def endure(port: int, pid: int, args: argparse.Namespace) -> None:
    """Mixed load for some minutes, and the memory of the service."""
    begin, end = time.monotonic(), time.monotonic() + 60 * args.minutes
    counts = dict.fromkeys(("texts", "refused", "too large", "gone"), 0)

    def client(number: int) -> None:
        seed = 0
        while time.monotonic() < end:
            seed += 1
            kind = (seed + number) % 8
            if kind == 0:
                with request(port, b'{"prompt": 3') as connection:
                    counts["refused"] += b" 400 " in connection.recv(4096)
            elif kind == 1:
                with contextlib.suppress(ConnectionError), request(port, bytes(2**20), size=20_000_000) as connection:
                    connection.sendall(bytes(20_000_000 - 2**20))
                    counts["too large"] += b" 413 " in connection.recv(4096)
            elif kind == 2:
                body = {"prompt": PROMPT, "max_tokens": 1000, "stream": True}
                with request(port, json.dumps(body).encode()) as connection:
                    connection.recv(4096)
                counts["gone"] += 1
            else:
                counts["texts"] += bool(stream(port, seed, 1 + seed % args.tokens).tokens)

    print(f"{args.minutes:g} minutes, {args.clients} clients")
    with ThreadPoolExecutor(args.clients) as pool:
        running = [pool.submit(client, number) for number in range(args.clients)]
        for part in range(1, 11):
            time.sleep(max(0.0, begin + 6 * args.minutes * part - time.monotonic()))
            print(f"  {6 * args.minutes * part:6.0f} s  {resident(pid) / 1e6:7.1f} MB resident  {counts}", flush=True)
        for one in running:
            one.result()


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
