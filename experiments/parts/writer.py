"""Texts by a net of a run or of published weights: sampled, searched, or drafted by a smaller net; and their speed."""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.tree import Tree
from experiments.parts import translator
from experiments.parts.language_model import Writer, check_draft, ids_of, text_of
from nets.language import generation, gpt2, llama, rnn, speculative
from nets.language.beam_search import beam_search
from nets.language.decoding import Decoded, sample
from nets.language.sampling import Options, occurrences
from train.run.flags import Count, Natural, NonNegative, Portion, Positive, flag

Compile = Callable[[Callable], Callable]


def plain(function: Callable) -> Callable:
    """Nothing is compiled."""
    return function


class Texts(NamedTuple):
    """New tokens of each text, without padding; their number in all, the seconds, and of a draft its acceptance."""

    rows: list[list[int]]
    count: int
    seconds: float
    acceptance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling; flags of the commands that write."""

    prompt: str = ""
    """The text to continue, or the source of a net with an encoder; the start of a text if empty."""
    max_new_tokens: Count = 300
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
    """Texts after which a sample ends."""
    seed: Natural = 0
    """Seed of the samples."""


def before(writer: Writer, prompt: Sequence[int]) -> str:
    """The text that those of the net go on from; "" for the answers of a net with an encoder."""
    return "" if writer.first is not None else text_of(writer, prompt)


def new_text(writer: Writer, prompt: Sequence[int], row: Sequence[int], stop: Sequence[str]) -> str:
    """The text of new tokens, up to the end of the first stop text in it."""
    whole = text_of(writer, row if writer.first is not None else [*prompt, *row])
    new = whole[len(before(writer, prompt)) :]
    ends = [new.find(text) + len(text) for text in stop if text in new]
    return new[: min(ends, default=len(new))]


def options_of(writer: Writer, flags: Sampling, search: bool) -> Options:
    """The options of the flags, a text's end being one of the net's own and the tokens of the stop texts.

    search: beams, which draw nothing.
    """
    stop = []
    for text in flags.stop:
        ids = writer.tokenizer.encode(text) if text else []
        if not ids:
            raise ValueError(f"--stop {text!r} is no token; expected a text")
        stop.append(tuple(ids))
    stop += [(end,) for end in writer.ends]
    sampling = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    for name, value in sampling.items() if search else ():
        if value not in (getattr(Sampling, name), 0.0):
            raise ValueError(f"{flag(name)} {value} is for sampling; --beam draws nothing")
    return Options(stop=tuple(stop), repetition_penalty=flags.repetition_penalty, **({} if search else sampling))


@torch.no_grad()
def write(
    writer: Writer,
    prompt: Sequence[int],
    flags: Sampling,
    *,
    keys: Tensor | None = None,
    draft: Writer | None = None,
    ahead: int = 4,
    beam: int | None = None,
    length_penalty: float = 1.0,
    compiled: Compile = plain,
    show: Callable[[str], None] = lambda piece: None,
) -> Texts:
    """Texts that the net writes after, or in answer to, the tokens of a prompt, timed.

    Args:
        keys: (texts, 2); those of the flags' seed if None.
        draft, ahead: a smaller decoder of the same vocabulary, which proposes tokens, and their number per pass.
        beam, length_penalty: beams of a search for the best texts, in place of sampling, and its alpha.
        compiled: perhaps `torch.compile`; then the texts are written twice, and the second time counts.
        show: called with each new piece of the first text, prompt included; where a net with an encoder, a draft or
            beams write, with all of it at once.

    Raises ValueError: nets that do not fit each other, an option outside its range, more tokens than a context holds.
    """
    device, twice, compiled = tree.leaves(writer.params)[0].device, compiled is not plain, functools.cache(compiled)
    options = options_of(writer, flags, beam is not None)
    keys = random.split(random.key(flags.seed, device), flags.count) if keys is None else keys
    ids = torch.tensor([list(prompt)], device=device)  # (1, time)
    if beam is not None and draft is not None:
        raise ValueError("--beam searches without a --draft")
    if beam is not None and beam < flags.count:
        raise ValueError(f"--count is {flags.count}; --beam {beam} finds up to {beam} texts")
    if draft is not None:
        for one in (writer, draft):
            if one.net not in (gpt2, llama):
                raise ValueError("a draft is for a GPT or a Llama, and one itself; another net was given")
        check_draft(draft, writer)
        pair = [_decoder(one, compiled) for one in (writer, draft)]
        call = functools.partial(
            speculative.generate, *pair, ids, flags.max_new_tokens, ahead=ahead, key=keys, options=options
        )
    elif beam is not None or writer.first is not None:
        call = functools.partial(_respond, writer, ids, flags, options, keys, beam, length_penalty, compiled)
    else:
        step = "step" if writer.net is rnn else "decode"
        choices = {"key": keys, "options": options, step: compiled(getattr(writer.net, step))}
        call = functools.partial(writer.net.stream, writer.params, ids, writer.cfg, flags.max_new_tokens, **choices)
        if twice:
            deque(call(), maxlen=0)
        return _follow(writer, prompt, call(), options, flags, show)
    if twice:
        call()
    began = _clock(device)
    out = call()
    seconds = _clock(device) - began
    rows = [row[:n] for row, n in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]
    show(before(writer, prompt) + new_text(writer, prompt, rows[0], flags.stop))
    return Texts(rows, sum(map(len, rows)), seconds, out.acceptance if draft is not None else None)


def print_texts(writer: Writer, flags: Sampling, **options) -> Texts:
    """Print the texts after a prompt, the first one while it is written. The options are those of `write`."""
    ids = ids_of(writer, flags.prompt)
    texts = write(writer, ids, flags, show=functools.partial(print, end="", flush=True), **options)
    for number, row in enumerate(texts.rows[1:], 2):
        print(f"\n\n--- sample {number}\n{before(writer, ids)}{new_text(writer, ids, row, flags.stop)}", end="")
    print()
    return texts


def one_text(writer: Writer, tokens: int, key: Tensor) -> str:
    """A text from its start, such as a run shows at its end."""
    ids, flags = ids_of(writer, ""), Sampling(max_new_tokens=tokens)
    return text_of(writer, [*ids, *write(writer, ids, flags, keys=key[None]).rows[0]])


def _follow(
    writer: Writer,
    prompt: Sequence[int],
    stream: Iterator[Tensor],
    options: Options,
    flags: Sampling,
    show: Callable[[str], None],
) -> Texts:
    """Texts of a stream, until each has ended; the clock runs for the net alone."""
    rows: list[list[int]] = []
    done: set[int] = set()
    seconds, text, shown, device = 0.0, "", 0, tree.leaves(writer.params)[0].device
    while len(done) < max(len(rows), 1):
        began = _clock(device)
        tokens = next(stream, None)
        seconds += _clock(device) - began
        if tokens is None:
            break
        rows = rows or [[] for _ in tokens]
        for i, token in enumerate(tokens.tolist()):
            if i in done:
                continue
            rows[i].append(token)
            new = new_text(writer, prompt, rows[i], flags.stop) if i == 0 or flags.stop else ""
            if new.endswith(flags.stop) or any(rows[i][-len(ids) :] == list(ids) for ids in options.stop):
                done.add(i)
            text = before(writer, prompt) + new if i == 0 else text
        if not text.endswith("\ufffd"):  # the first bytes of a character are not shown before the last
            show(text[shown:])
            shown = len(text)
    show(text[shown:])
    return Texts(rows, sum(map(len, rows)), seconds)


def _decoder(writer: Writer, compiled: Compile) -> speculative.Decoder:
    return speculative.Decoder(compiled(writer.net.decode), writer.net.empty_caches, writer.params, writer.cfg)


def _respond(
    writer: Writer,
    prompt: Tensor,
    flags: Sampling,
    options: Options,
    keys: Tensor,
    beam: int | None,
    length_penalty: float,
    compiled: Compile,
) -> Decoded:
    """Samples of a net with an encoder, or the best texts of any net by beams: tokens (texts, time)."""
    prompt, steps = prompt.expand(len(keys) if beam is None else 1, -1), flags.max_new_tokens  # (rows, time)
    if writer.first is not None:
        steps = min(steps, getattr(writer.cfg, "context", steps))
    step, cache, first, choices = _beginning(writer, prompt, steps, compiled)
    choices |= {"max_length": steps, "batch_sizes": (len(first),), "options": options}
    if writer.first is None and options.repetition_penalty != 1.0:
        lengths = torch.full_like(first, prompt.shape[1])
        choices["present"] = occurrences(prompt, lengths, writer.cfg.vocabulary)
    if beam is None:
        return sample(step, cache, first, keys, **choices)
    out = beam_search(step, cache, first, beams=beam, n_best=flags.count, length_penalty=length_penalty, **choices)
    return Decoded(*(part[0] for part in out))


def _beginning(
    writer: Writer, prompt: Tensor, steps: int, compiled: Compile
) -> tuple[Callable, Tree, Tensor, dict[str, Any]]:
    """(step, cache, first tokens, further arguments) of `nets.language.decoding` after prompts (rows, time)."""
    net, params, cfg = writer.net, writer.params, writer.cfg
    if writer.first is not None:
        mask = prompt != cfg.padding_id
        cache = net.start(params, net.encode(params, prompt, cfg, mask=mask), mask, cfg, steps)
        step = net.stepper(params, cfg, functools.partial(compiled(net.step), donate=True))
        first = torch.full((len(prompt),), writer.first, device=prompt.device)
        choices = {"positions_axis": 2, "shared": cache["shared"]}
        return translator.avoiding(step, writer.forbidden), cache["past"], first, choices
    if net is rnn:
        one_step = compiled(rnn.step)
        state = rnn.empty_state(cfg, len(prompt), device=prompt.device)
        if prompt.shape[1] > 1:
            _, state = rnn.features(params, prompt[:, :-1], cfg)
        return lambda *args: one_step(params, *args, cfg), state, prompt[:, -1], {}
    decode = compiled(net.decode)
    room = prompt.shape[1] + steps - 1  # the last token is never read
    cache, first, position = generation.start(decode, net.empty_caches, params, prompt, cfg, room)
    return generation.stepper(decode, params, cfg), cache, first, {"position": position}


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
