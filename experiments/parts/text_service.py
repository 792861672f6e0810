"""`/v1/completions`: texts of a GPT or a Llama over HTTP, as clients of OpenAI's interface, vLLM and llama.cpp ask for
them, whole or as server-sent events."""

import asyncio
import json
import secrets
import time
import typing
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from core import random
from experiments.parts import web
from experiments.parts.engine import Texts
from experiments.parts.language_model import Writer, ids_of, text_of
from experiments.parts.web import Limits, Metrics, Refusal
from nets.language.continuous_batching import Text
from nets.language.sampling import Options
from train.run.flags import Count, Integer, NonNegative, Portion, range_of

PATH = "/v1/completions"
NEUTRAL: dict[str, tuple] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "stream_options": (None, {}, {"include_usage": True}, {"include_usage": False}),
    "suffix": (None, ""),
}
"""Parameters of others with the values that ask for nothing; another value is refused, not ignored."""
STOPS = 16
"""Stop texts of a request, at most."""
CONTEXT = 8
"""Tokens before a new one that decide on its letters."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The body of a request."""

    prompt: str
    """The text to continue; the start of a text if empty."""
    max_tokens: Count = 16
    """New tokens, at most."""
    temperature: NonNegative = 1.0
    """Below 1 more likely, above 1 more varied; 0 always takes the most likely token."""
    top_p: Portion = 1.0
    """Sample only from the most likely tokens that together have this probability."""
    top_k: Count | None = None
    """Sample only from this many most likely tokens."""
    min_p: Portion | None = None
    """Sample only from tokens with at least this share of the probability of the best one."""
    seed: Integer | None = None
    """The same seed gives the same text; a new one, which the answer names, if None."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends, one or a list."""
    stream: bool = False
    """Send the text as server-sent events while it is written."""


def completion_of(body: dict[str, Any], model: str) -> Completion:
    """The request of a JSON object. Raises Refusal naming the first field that is unknown, missing or wrong.

    model: name of the net that is served, which a request may repeat.
    """
    if body.get("model") not in (None, model):
        raise Refusal(404, f"the model {_short(body['model'])} is not served here; expected {_short(model)}", "model")
    hints = typing.get_type_hints(Completion, include_extras=True)
    values: dict[str, Any] = {}
    for name, value in body.items():
        if name in hints:
            values[name] = _value(name, value, hints[name])
        elif name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise Refusal(400, f"{name} is not supported here; leave it out", name)
        elif name not in ("model", "user"):
            known = ", ".join(field.name for field in fields(Completion))
            raise Refusal(400, f"'{name}' is unknown; expected some of {known}", name)
    if "prompt" not in values:
        raise Refusal(400, "prompt is missing; expected a text", "prompt")
    return Completion(**{name: value for name, value in values.items() if value is not None})


def _value(name: str, value: Any, hint: Any) -> Any:
    """The value of a field; None keeps its default."""
    if name == "prompt" or name == "stop":
        texts = value if isinstance(value, list) and name == "stop" else [value]
        if value is None and name == "stop":
            return None
        if not all(isinstance(text, str) for text in texts) or (name == "stop" and "" in texts):
            raise Refusal(400, f"{name} is {_short(value)}; expected a text", name)
        if len(texts) > STOPS:
            raise Refusal(400, f"stop has {len(texts)} texts; expected up to {STOPS}", name)
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            raise Refusal(400, f"{name} has half of a surrogate pair; expected Unicode characters", name)
        return value if name == "prompt" else tuple(texts)
    if name == "stream":
        if not isinstance(value, bool | None):
            raise Refusal(400, f"stream is {_short(value)}; expected true or false", name)
        return value
    allowed, whole = range_of(hint), name in ("max_tokens", "top_k", "seed")
    if value is None or (name == "top_k" and value in (0, -1)):  # others' words for all tokens
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value not in allowed:
        kind = "an integer, " if whole else ""
        raise Refusal(400, f"{name} is {_short(value)}; expected {kind}{allowed}", name)
    try:
        return value if whole else float(value)
    except OverflowError:
        raise Refusal(400, f"{name} is {_short(value)}; expected a number below 1e308", name) from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class Pieces:
    """The text of tokens that come one after the other, without its end that may still change, up to a stop text."""

    def __init__(self, writer: Writer, prompt: Sequence[int], stop: Sequence[str]):
        self.writer, self.stop = writer, stop
        self.ids, self.begin, self.read = list(prompt), max(0, len(prompt) - CONTEXT), len(prompt)
        self.pending, self.stopped = "", False

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that is certain now; with `last`, all of it."""
        self.ids += tokens
        text = text_of(self.writer, self.ids[self.begin :])
        if last or not text.endswith("\ufffd"):  # the first bytes of a character, of which others are still to come
            self.pending += text[len(text_of(self.writer, self.ids[self.begin : self.read])) :]
            self.begin, self.read = max(self.begin, len(self.ids) - CONTEXT), len(self.ids)
        ends = [self.pending.find(stop) for stop in self.stop if stop in self.pending]
        if ends:
            self.stopped, out = True, self.pending[: min(ends)]
            return out
        overlap = 0 if last else max((_overlap(self.pending, stop) for stop in self.stop), default=0)
        out, self.pending = self.pending[: len(self.pending) - overlap], self.pending[len(self.pending) - overlap :]
        return out


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of the text that a stop text begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Service:
    """A writer behind an engine."""

    def __init__(self, writer: Writer, engine: Texts, limits: Limits, metrics: Metrics, name: str):
        self.writer, self.engine, self.limits, self.metrics, self.name = writer, engine, limits, metrics, name

    def text_of(self, request: Completion, seed: int) -> Text:
        """The tokens and options of a request. Raises Refusal."""
        if request.max_tokens > self.limits.tokens:
            message = f"max_tokens is {request.max_tokens}; expected up to {self.limits.tokens} here"
            raise Refusal(400, message, "max_tokens")
        try:
            prompt = tuple(ids_of(self.writer, request.prompt))
        except ValueError as error:
            raise Refusal(400, f"prompt: {error}", "prompt") from None
        ends = tuple((end,) for end in self.writer.ends)
        filters = {"top_k": request.top_k, "top_p": request.top_p, "min_p": request.min_p}
        options = Options(temperature=request.temperature, stop=ends, **filters)
        text = Text(prompt, request.max_tokens, random.key(seed), options)
        try:
            self.engine.batch.check(text)
        except ValueError as error:
            raise Refusal(400, str(error), "prompt") from None
        return text

    async def written(self, http: Any, text: Text, stop: Sequence[str]) -> AsyncIterator[tuple[str, int, str | None]]:
        """(piece of the text, tokens so far, why it has ended or None). Raises Refusal, Gone."""
        job, pieces, count = web.submitted(self.engine, text), Pieces(self.writer, text.prompt, stop), 0
        begin = time.perf_counter()
        self.metrics.tokens.labels("prompt").inc(len(text.prompt))
        stream = web.events(self.engine, job, http, self.limits.timeout)
        try:
            async for events in stream:
                if not count:
                    self.metrics.first.observe(time.perf_counter() - begin)
                tokens, last = [event.value for event in events], events[-1].last
                count += len(tokens)
                self.metrics.tokens.labels("written").inc(len(tokens))
                piece = pieces.push(tokens, last)
                ended = last and tokens[-1] in self.writer.ends
                reason = "stop" if pieces.stopped or ended else "length" if last else None
                if piece or reason:
                    yield piece, count, reason
                if reason:
                    return
        except (Refusal, web.Gone):
            raise
        except Exception as error:
            raise web.refusal_of(error) from error
        finally:
            await stream.aclose()

    async def complete(self, http: Any) -> Any:
        """The answer to a request, whole or streamed."""
        from fastapi.responses import JSONResponse, StreamingResponse

        request = completion_of(web.object_of(await http.body()), self.name)
        seed = secrets.randbits(31) if request.seed is None else request.seed
        text = await asyncio.to_thread(self.text_of, request, seed)  # megabytes of text take a tokenizer seconds
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        head |= {"model": self.name, "seed": seed}
        stream = self.written(http, text, request.stop)
        if request.stream:
            first = await anext(stream)  # so that a full queue or a bad prompt is an answer of its own
            return StreamingResponse(self._sent(head, text, first, stream), media_type="text/event-stream")
        whole, count, reason = "", 0, None
        async for piece, count, reason in stream:  # noqa: B007
            whole += piece
        return JSONResponse(head | {"choices": [_choice(whole, reason)], "usage": _usage(text, count)})

    async def _sent(self, head: dict, text: Text, first: tuple, stream: AsyncIterator) -> AsyncIterator[str]:
        """Server-sent events: pieces, and [DONE]; of an error its message, and no [DONE]."""
        try:
            while True:
                piece, count, reason = first
                usage = {"usage": _usage(text, count)} if reason else {}
                yield _event(head | {"choices": [_choice(piece, reason)]} | usage)
                if reason:
                    break
                first = await anext(stream)
            yield "data: [DONE]\n\n"
        except Refusal as refusal:
            yield _event(refusal.body)
        except web.Gone:
            return
        finally:
            await stream.aclose()


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}


def _usage(text: Text, count: int) -> dict[str, int]:
    prompt = len(text.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def add_routes(app: Any, service: Service) -> None:
    from fastapi import Request

    schema = {"type": "object", "required": ["prompt"], "properties": {}}
    for field in fields(Completion):
        schema["properties"][field.name] = {}
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post(PATH, openapi_extra=body)
    async def completions(request: Request) -> Any:
        """A text that goes on from a prompt."""
        return await service.complete(request)

    app.state.paths.add(PATH)
