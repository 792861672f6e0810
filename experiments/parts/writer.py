"""A net of a run or of published weights that writes: a prompt in, texts out, alone or with a draft, and its speed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.tree import Tree
from experiments.parts import language_model, translator
from nets import weights
from nets.language import gpt2, llama, rnn, speculative, t5, t5_weights, transformer
from nets.language.decoding import sample
from nets.language.sampling import Options
from train.data.text import tokenizers
from train.run import checkpoints, open_run
from train.run.flags import Count, Natural, NonNegative, Portion, Positive

Compile = Callable[[Callable], Callable]


def plain(function: Callable) -> Callable:
    """Nothing is compiled."""
    return function


OWN = {"gpt": "params", "char_rnn": "state.params", "generate": "params"}
"""Experiments whose runs write, and the part of their checkpoints with the parameters."""
KINDS = ("gpt2", "openai-gpt", *llama.KINDS, "t5", "marian")


class Writer(NamedTuple):
    """A net, its tokenizer, and what its texts need.

    ends: tokens that end a text.
    first: token before a text of a net with an encoder, whose prompt is its source; None for a decoder alone.
    forbidden: tokens that no text has.
    published: whether the tokenizer says which special tokens surround a prompt.
    """

    net: ModuleType
    params: Tree
    cfg: Any
    tokenizer: Any
    ends: tuple[int, ...] = ()
    first: int | None = None
    forbidden: tuple[int, ...] = ()
    published: bool = False


class Texts(NamedTuple):
    """New tokens of each text, without padding; their number in all, the seconds, and of a draft its acceptance."""

    rows: list[list[int]]
    count: int
    seconds: float
    acceptance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling; flags of the commands that write."""

    max_new_tokens: Count = 100
    """Tokens per sample, at most."""
    count: Count = 1
    """Number of samples."""
    temperature: NonNegative = 0.8
    """Below 1 more likely, above 1 more varied; 0 always takes the most likely token."""
    top_k: Count | None = None
    """Sample only from this many most likely tokens."""
    top_p: Portion | None = None
    """Sample only from the most likely tokens that together have this probability."""
    min_p: Portion | None = None
    """Sample only from tokens with at least this share of the probability of the best one."""
    repetition_penalty: Positive = 1.0
    """Above 1, tokens of the prompt and of what has been written become less likely (Keskar et al. 2019)."""
    stop: tuple[str, ...] = ()
    """Texts after which a sample ends, if its tokens are those of the text alone."""
    ahead: Count = 4
    """Tokens that the draft proposes before each pass of the net."""
    seed: Natural = 0
    """Seed of the samples."""


# Loading.


def of_run(folder: Path, checkpoint: str = "latest", part: str = "target") -> Writer:
    """The net of a run of gpt.py, char_rnn.py or generate.py. part: of the latter, target or draft.

    Raises ValueError: no such run, or one of another script.
    """
    saved = folder / "checkpoints"
    name = checkpoints.read_config(saved).get("experiment") if saved.is_dir() else "generate"
    if name in ("translate", "seq2seq"):
        raise ValueError(
            f"'{folder}' is a run of {name}.py; use: python experiments/{name}.py translate --run {folder}"
        )
    if name not in OWN:
        raise ValueError(f"'{folder}' is a run of {name}.py; expected one of gpt.py, char_rnn.py or generate.py")
    run, where = open_run(folder, Path("runs") / name, checkpoint), OWN[name]  # an error lists the runs that there are
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    if name == "gpt":
        net, cfg = language_model.net_of_run(run)
    elif name == "char_rnn":
        net, cfg = rnn, run.read("net", rnn.Config)
    else:
        net, cfg, where = llama, run.read(part, llama.Config), f"{where}.{part}"
    return Writer(net, run.restore(net.spec(cfg), where), cfg, tokenizer)


def of_weights(source: str) -> Writer:
    """Published weights of a GPT, Llama, T5 or Marian: a folder or repository with config.json and the tokenizer."""
    config = weights.read_config(source)
    kind = config.get("model_type")
    if kind not in KINDS:
        raise weights.WeightsError(f"the configuration is of model_type '{kind}', expected one of {', '.join(KINDS)}")
    if kind == "marian":
        params, cfg, tokenizer, marks = translator.published(source, "cpu")
        return Writer(transformer, params, cfg, tokenizer, (marks.end,), marks.start, marks.forbidden)
    settings = config | weights.read_config(source, "generation_config.json", optional=True)
    ends = settings.get("eos_token_id")
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    if kind == "t5":
        params, cfg = t5_weights.from_pretrained(source)
        path = weights.locate(weights.beside(source), ("tokenizer.json",))
        writer = Writer(t5, params, cfg, tokenizers.load(path, lossy=True), ends, cfg.padding_id, published=True)
    else:
        params, cfg = language_model.from_pretrained(source)
        tokenizer = language_model.published_tokenizer(source)
        writer = Writer(language_model.net_of(cfg), params, cfg, tokenizer, ends, published=True)
    language_model.check_vocabulary(writer.tokenizer, cfg)
    return writer


def load(source: str) -> Writer:
    """A run's folder, or published weights; a run of generate.py gives its draft."""
    folder = Path(source)
    return of_run(folder, part="draft") if (folder / "checkpoints").is_dir() else of_weights(source)


# Texts.


def ids_of(writer: Writer, prompt: str) -> list[int]:
    """The tokens of a prompt, with those that the tokenizer puts around it, such as Llama's <s> and T5's </s>."""
    if writer.published:
        ids = writer.tokenizer.tokenizer.encode(prompt, add_special_tokens=True).ids
        return ids or list(writer.ends[:1]) or language_model.opening(writer.tokenizer)
    if writer.first is not None:
        return [*writer.tokenizer.encode(prompt), *writer.ends]
    return writer.tokenizer.encode(prompt) if prompt else language_model.opening(writer.tokenizer)


def text_of(writer: Writer, ids: Sequence[int]) -> str:
    """Without special tokens."""
    if writer.published:
        return writer.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True)
    hidden = {*writer.ends, *writer.forbidden}
    return writer.tokenizer.decode([token for token in ids if token not in hidden])


def whole_text(writer: Writer, prompt: Sequence[int], row: Sequence[int], stop: Sequence[str]) -> str:
    """The prompt and the text after it, or a net's answer; up to the end of the first stop text in what is new."""
    before = "" if writer.first is not None else text_of(writer, prompt)
    new = text_of(writer, row) if writer.first is not None else text_of(writer, [*prompt, *row])[len(before) :]
    ends = [new.find(text) + len(text) for text in stop if text in new]
    return before + new[: min(ends, default=len(new))]


def options_of(writer: Writer, flags: Sampling) -> Options:
    """The options of the flags, a text's end being one of the net's own and the stop texts."""
    stop = []
    for text in flags.stop:
        ids = writer.tokenizer.encode(text) if text else []
        if not ids:
            raise ValueError(f"--stop {text!r} is no token; expected a text")
        stop.append(tuple(ids))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    stop += [(end,) for end in writer.ends]
    return Options(**{name: getattr(flags, name) for name in names}, stop=tuple(stop))


@torch.no_grad()
def write(
    writer: Writer,
    prompt: Sequence[int],
    flags: Sampling,
    *,
    draft: Writer | None = None,
    compiled: Compile = plain,
) -> Texts:
    """Texts that the net writes after, or in answer to, the tokens of a prompt, timed.

    draft: a smaller decoder of the same vocabulary, which proposes tokens.
    compiled: perhaps `torch.compile`; then the texts are written twice, and the second time counts.

    Raises ValueError: nets that do not fit each other, an option outside its range, more tokens than a context holds.
    """
    device = tree.leaves(writer.params)[0].device
    options, keys = options_of(writer, flags), random.split(random.key(flags.seed, device), flags.count)
    ids = torch.tensor([list(prompt)], device=device)  # (1, time)
    if draft is not None:
        for one in (writer, draft):
            if one.net not in (gpt2, llama):
                raise ValueError("a draft is for a GPT or a Llama, and one itself; another net was given")
        pair = [_decoder(one, compiled) for one in (writer, draft)]
        call = partial(speculative.generate, *pair, ids, flags.max_new_tokens, ahead=flags.ahead)
    elif writer.first is not None:
        step = compiled(writer.net.step)
        call = partial(_respond, writer, step, ids.expand(flags.count, -1), flags.max_new_tokens)
    else:
        step = "step" if writer.net is rnn else "decode"
        options_of_net = {step: compiled(getattr(writer.net, step))}
        call = partial(writer.net.generate, writer.params, ids, writer.cfg, flags.max_new_tokens, **options_of_net)
    if compiled is not plain:
        call(key=keys, options=options)
    began = _clock(device)
    out = call(key=keys, options=options)
    seconds = _clock(device) - began
    rows = [_until(row, options) for row in (out.tokens if draft is not None else out).tolist()]
    acceptance = out.acceptance if draft is not None else None
    return Texts(rows, sum(map(len, rows)), seconds, acceptance)


def _decoder(writer: Writer, compiled: Compile) -> speculative.Decoder:
    return speculative.Decoder(compiled(writer.net.decode), writer.net.empty_caches, writer.params, writer.cfg)


def _respond(writer: Writer, step: Callable, source: Tensor, steps: int, *, key: Tensor, options: Options) -> Tensor:
    """Texts of a net with an encoder, (batch, time)."""
    net, params, cfg = writer.net, writer.params, writer.cfg
    mask = source != cfg.padding_id
    steps = min(steps, getattr(cfg, "context", steps))
    cache = net.start(params, net.encode(params, source, cfg, mask=mask), mask, cfg, steps)
    step = translator.avoiding(net.stepper(params, cfg, partial(step, donate=True)), writer.forbidden)
    first = torch.full((len(source),), writer.first, device=source.device)
    sizes = {"max_length": steps, "positions_axis": 2, "batch_sizes": (len(source),)}
    return sample(step, cache["past"], first, key, shared=cache["shared"], options=options, **sizes).tokens


def _until(row: list[int], options: Options) -> list[int]:
    """A text up to the end of its first stop sequence; what follows is padding."""
    for n in range(1, len(row) + 1):
        if any(tuple(row[:n][-len(sequence) :]) == sequence for sequence in options.stop):
            return row[:n]
    return row


# Speed.


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bytes_per_token(writer: Writer) -> int:
    """Bytes of parameters that a step reads.

    Not those of the encoder, nor of the source's keys and values, which are read once per text; nor those of
    positions and of an embedding that is no output layer, of which a token reads one row.
    """
    output = writer.params.get("output", writer.params.get("head", {}))
    once = ("encoder", "positions", *(["tokens"] if "weight" in output or "tails" in output else []))
    leaves = [leaf for name, leaf in tree.items(writer.params)
              if not name.startswith(once) and ".cross.kv." not in name]  # fmt: skip
    return sum(leaf.nbytes for leaf in leaves)


def bandwidth(device: torch.device, size: int = 2**26) -> float:
    """Bytes per second of copying memory, read and written ones together; the best of some copies of `size` bytes."""
    source, seconds = torch.ones(size // 4, device=device), []
    copy = torch.empty_like(source)
    for _ in range(8):
        began = _clock(device)
        copy.copy_(source)
        seconds.append(_clock(device) - began)
    return 2 * source.nbytes / min(seconds)


def speed(writer: Writer, texts: Texts, bytes_per_second: float) -> str:
    """Tokens per second, beside the limit that the memory sets to a net that reads its parameters for each step."""
    rate, read = texts.count / texts.seconds, bytes_per_token(writer)
    limit = len(texts.rows) * bytes_per_second / read
    share = f"{rate / limit:.3f} of the limit by memory bandwidth, {limit:.0f} ({read / 1e6:.1f} MB per step"
    return f"{rate:.1f} tokens per second, {share}, {bytes_per_second / 1e9:.1f} GB/s)"
