"""A trained net as an HTTP service: texts by continuous batching, pictures as uploads, and a page to try it.

Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models" (OSDI): texts join and
leave the batch between any two tokens. Serves a run of gpt.py, generate.py, pretrain.py (a decoder), classify.py,
detect.py, segment.py or superres.py; without a flag the newest one under runs/:

    python experiments/serve.py --run runs/gpt/NAME                            http://127.0.0.1:8000
    python experiments/serve.py --weights openai-community/gpt2 --slots 8      published weights
    python experiments/serve.py --weights published --net resnet18             an image classifier
    curl 127.0.0.1:8000/v1/completions -d '{"prompt": "The ", "max_tokens": 100, "seed": 1, "stream": true}'
    curl 127.0.0.1:8000/v1/predict --data-binary @photo.jpg

`/v1/completions` is that of OpenAI's clients, vLLM and llama.cpp; `/health`, `/metrics` (Prometheus) and `/v1/models`
are beside it. Needs the extra `serve`: pip install "functree[serve]".
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from core import int8, tree
from experiments.parts import classifier, language_model, picture_service, text_service, web
from experiments.parts.engine import Pictures, Texts
from experiments.parts.language_model import Writer
from experiments.parts.web import Limits
from nets.language import gpt2, llama
from nets.language.continuous_batching import Batch, Text
from nets.language.sampling import Options
from train.data.understood import understood
from train.run import Count, Natural, checkpoints, command_line

TEXTS = ("gpt", "generate", "pretrain")
SCRIPTS = (*TEXTS, *picture_service.MODELS)
"""Experiments whose runs are served."""
CONNECTIONS = 512
"""Open connections, at most: those beyond get a 503."""


@dataclass(frozen=True)
class Args:
    run: Path | None = None
    """Folder of a run; the newest one under runs/ that can be served if None."""
    checkpoint: str = "latest"
    """Checkpoint of the run: latest, best (where the run keeps one) or a step."""
    weights: str | None = None
    """Published weights instead: a folder or repository of a GPT or Llama; with --net "published", a file or a
    repository of an image classifier."""
    net: str | None = None
    """With --weights: their net, any preset of nets.classifiers (a wrong name lists them)."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 every network that it is in."""
    port: Natural = 8000
    """Port to listen at; a free one if 0."""
    slots: Count = 16
    """Texts that are written at once."""
    context: Count | None = None
    """Tokens that the cache of a text has room for; the net's context if None. Beyond it a text goes on after its
    last half."""
    exact: bool = False
    """Always compute all slots: a text then does not depend on its neighbours by a single bit, and a lone text takes as
    long per token as a full batch. Without, it could where two tokens are equally likely up to rounding."""
    int8: bool = False
    """Matrices of 8-bit integers, rounded from the weights: a quarter of the memory, nearly the same texts."""
    compile: bool = False
    """Compile the steps of texts, which goes with --exact: tens of seconds at the start, then faster."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    drain: Count = 30
    """Seconds that requests have to end after SIGTERM or Ctrl-C; then they are cut off."""
    limits: Annotated[Limits, tyro.conf.OmitArgPrefixes] = Limits()


def source_of(args: Args) -> tuple[str, Path | None]:
    """(experiment or "weights", folder of the run). Raises ValueError: neither, both, or a run of another script."""
    if args.run and args.weights:
        raise ValueError("expected either --run DIR or --weights SOURCE, not both")
    if args.net and not args.weights:
        raise ValueError("--net goes with --weights; a run has its own net")
    if args.weights:
        return "weights", None
    folder = args.run or newest()
    saved = folder / "checkpoints"
    if not saved.is_dir():
        raise ValueError(f"'{folder}' is not the folder of a run; expected one of {', '.join(SCRIPTS)}")
    name = checkpoints.read_config(saved).get("experiment")
    if name not in SCRIPTS:
        raise ValueError(f"'{folder}' is a run of {name}.py; expected one of {', '.join(SCRIPTS)}")
    return name, folder


def newest() -> Path:
    """The run under runs/ that was begun last. Raises ValueError: there is none."""
    configs = [path for name in SCRIPTS for path in Path("runs").glob(f"{name}/*/config.json")]
    configs = [path for path in configs if any((path.parent / "checkpoints").glob("*"))]
    if not configs:
        hint = "train one, such as: python experiments/gpt.py"
        raise ValueError(f"there is no run in 'runs' that can be served; expected --run DIR, or --weights; {hint}")
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def name_of(args: Args, experiment: str, folder: Path | None) -> str:
    """The name by which clients ask for the model: without the folders above it."""
    if folder:
        return f"{experiment}/{folder.resolve().name}"
    return Path(args.weights).resolve().name if Path(args.weights).exists() else args.weights


def writer_of(args: Args, folder: Path | None, device: torch.device) -> Writer:
    """The net of texts. Raises ValueError: it is not one that is served."""
    writer = language_model.of_run(folder, args.checkpoint) if folder else language_model.of_weights(args.weights)
    if writer.net not in (gpt2, llama):
        raise ValueError(f"texts of {net_name(writer)} are not served; expected a GPT or a Llama")
    params = int8.unformed(int8.quantise(writer.params)) if args.int8 else writer.params
    return writer._replace(params=tree.move(params, device))


def net_name(writer: Writer) -> str:
    return writer.net.__name__.rpartition(".")[2]


def serving_texts(args: Args, name: str, writer: Writer) -> Any:
    """The application that writes texts. Raises ValueError: flags that do not fit the net or each other."""
    if args.context and args.context > writer.cfg.context:
        raise ValueError(f"--context is {args.context}; expected up to the net's {writer.cfg.context}")
    if args.compile and not args.exact:
        raise ValueError("--compile needs --exact: one compiled step for all slots")
    options: dict[str, Any] = {"context": args.context, "exact": args.exact}
    if args.compile:
        options["decode"] = torch.compile(writer.net.decode, fullgraph=True, dynamic=False)
    batch = Batch(writer.net, writer.params, writer.cfg, args.slots, **options)
    engine = Texts(batch, args.limits.queue)
    slots = f"{args.slots} of {batch.context} tokens"
    understood(print, {"served": name, "net": writer.cfg, "slots": slots, "device": args.device})
    sizes = {"vocabulary": writer.cfg.vocabulary, "context": batch.context, "max_tokens": args.limits.tokens}
    if args.compile:  # now, since it takes longer than a request may
        print("compiling ...", flush=True)
        batch.add(name, Text((0,), 1, options=Options(temperature=0.0)))
        batch.step()
    metrics = web.Metrics(engine)
    app = web.application(engine, {"id": name, "kind": "texts", "net": net_name(writer), **sizes}, args.limits, metrics)
    text_service.add_routes(app, text_service.Service(writer, engine, args.limits, metrics, name))
    return app


def serving_pictures(args: Args, name: str, model: picture_service.Model) -> Any:
    """The application that answers pictures."""
    engine = Pictures(model.answer, model.together, args.limits.queue)
    service = picture_service.Service(model, engine, args.limits)
    facts = {"net": model.facts["net"], "answers": model.kind, "classes": model.facts.get("classes")}
    understood(print, {"served": name, **facts, "pixels": f"up to {service.pixels:,}", "device": args.device})
    facts = {"id": name, "kind": model.kind, **model.facts}
    app = web.application(engine, facts, args.limits, web.Metrics(engine))
    picture_service.add_routes(app, service)
    return app


def application(args: Args) -> Any:
    """The service of the flags. Raises ValueError, OSError: what cannot be served."""
    device, (experiment, folder) = command_line.device(args.device), source_of(args)
    name = name_of(args, experiment, folder)
    if experiment in TEXTS or (args.weights and not args.net):
        return serving_texts(args, name, writer_of(args, folder, device))
    if args.weights:
        trained, values = classifier.published(args.weights, args.net)
        return serving_pictures(args, name, picture_service.of_classifier(trained, tree.move(values, device)))
    return serving_pictures(args, name, picture_service.of_run(experiment, folder, args.checkpoint, device))


def listening(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises ValueError: the address is not to be had."""
    if port > 65535:
        raise ValueError(f"--port is {port}; expected 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ValueError(f"cannot listen at --host {host} --port {port}: {reason}") from None


def serve(args: Args) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that have begun are answered first."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f'{error.name} is not installed; install it by: pip install "functree[serve]"') from None

    class Server(uvicorn.Server):
        """Signals end it in good order, once more at once; then it returns, instead of raising them again."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            numbers = [signal.SIGINT, signal.SIGTERM]
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"serving at http://{address}/ (Ctrl-C ends it)", flush=True)

    with listening(args.host, args.port) as place:
        host, port = place.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        app = application(args)
        options = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": args.drain}
        options["limit_concurrency"] = CONNECTIONS
        Server(uvicorn.Config(app, http="h11", ws="none", lifespan="on", **options)).run(sockets=[place])
    print("ended")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, serve))
