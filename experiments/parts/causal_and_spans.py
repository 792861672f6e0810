"""Objectives of `experiments/pretrain.py` whose nets write: causal, and T5's corrupted spans."""

import dataclasses
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core.tree import Tree
from experiments.parts import language_model, writer
from experiments.parts.examples import open_windows
from experiments.parts.pretraining import (
    CACHE,
    LAYERS,
    Objective,
    Scores,
    heads_of,
    is_run,
    nothing,
    scores_of,
    share_right,
    token_baselines,
)
from nets.language import gpt2, llama, t5
from train.data.fingerprint import fingerprint
from train.data.text import masking, tokenizers
from train.data.text.masking import Masked
from train.data.text.subwords import SENTINELS, add_sentinels, train_unigram, train_word_piece

DECODERS = {"gpt2": gpt2, "llama": llama}


def open_source(args: Any, folder: Path | None, *nets: ModuleType) -> tuple[writer.Writer | None, Any]:
    """(the net of --weights or None; its tokenizer, that of the resumed run or of --tokenizer, or None)."""
    if args.lora:
        raise ValueError("--lora is for --objective masked")
    if args.lines:
        raise ValueError("--lines is for the objectives masked and distil")
    path = folder / "tokenizer.json" if folder else args.tokenizer
    known = tokenizers.load(path, lossy=True) if path else None
    if not args.weights:
        return None, known
    source = (
        language_model.of_run(Path(args.weights)) if is_run(args.weights) else language_model.of_weights(args.weights)
    )
    if source.net not in nets:
        names = " or ".join(net.__name__.rpartition(".")[2] for net in nets)
        raise ValueError(f"--weights '{args.weights}' are of another kind of net; expected {names}")
    return source, source.tokenizer


def whole(args: Any, cfg: Any, source: writer.Writer | None, content: tuple, **parts: Any) -> Objective:
    """An objective of all parameters of a net; `content` is that of `open_windows`."""
    net = t5 if isinstance(cfg, t5.Config) else language_model.net_of(cfg)
    examples, tokenizer, facts = content
    language_model.check_vocabulary(tokenizer, cfg)
    ends = () if net is not t5 else (tokenizer.token_id("</s>"),)
    first = cfg.padding_id if net is t5 else None
    return Objective(
        facts={**facts, "weights": args.weights, "net": cfg},
        stored={"kind": net.__name__.rpartition(".")[2], "net": cfg},
        identity={"data": fingerprint(*examples[:2]), "net": cfg},
        tokenizer=tokenizer,
        examples=examples,
        model=net.spec(cfg),
        values=source and source.params,
        compare=nothing,
        baselines=token_baselines,
        net=lambda params: writer.Writer(net, params, cfg, tokenizer, ends, first),
        **parts,
    )


def causal(args: Any, folder: Path | None, key: Tensor, *, split: bool = True) -> Objective:
    """Each next token, by a GPT-2 or a Llama."""
    source, known = open_source(args, folder, gpt2, llama)
    learn = functools.partial(train_word_piece, vocabulary_size=args.vocabulary, lower_case=not args.cased)
    content = open_windows(args.data, known or learn, args.context, CACHE, split=split)
    net = DECODERS[args.net] if source is None else source.net
    if source is None:
        heads = heads_of(args)
        sizes = {"layers": args.layers or LAYERS, "heads": heads, "width": args.width}
        sizes |= {"kv_heads": heads, "hidden": 8 * heads * 11, "tied": True} if net is llama else {}
        cfg = net.Config(content[1].vocabulary_size, args.context, **sizes)
    else:
        cfg = source.cfg
    if args.context > cfg.context:
        raise ValueError(f"--context is {args.context}; expected up to the {cfg.context} of the net")
    cfg = dataclasses.replace(cfg, dropout=args.dropout)

    def predict(params: Tree, batch: tuple[Tensor, Tensor], **options: Any) -> Scores:
        inputs, targets = batch
        logits = net.apply(params, inputs, cfg, **options)  # (batch, time, vocabulary)
        return scores_of(logits, every_position(inputs, targets))

    def loss(params: Tree, batch: tuple[Tensor, Tensor], keys: Tensor):
        scores = predict(params, batch, key=keys, train=True)
        return scores.nats.mean(1), {"accuracy": share_right(scores)}

    return whole(args, cfg, source, content, loss=loss, score=predict, corrupt=lambda keys, batch: batch)


def every_position(inputs: Tensor, targets: Tensor) -> Masked:
    """Targets (batch, time) of all positions."""
    positions = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    return Masked(inputs, positions, targets, torch.ones_like(targets, dtype=torch.bool))


def span(args: Any, folder: Path | None, key: Tensor, *, split: bool = True) -> Objective:
    """T5's corrupted spans: the input has a sentinel for each, the target what they hide."""
    source, known = open_source(args, folder, t5)
    if args.context < 5:
        raise ValueError(f"--context {args.context} has no room for a span; expected at least 5")
    length = masking.tokens_of_input(args.context, args.mask_rate, args.span)
    sizes = masking.span_sizes(length, args.mask_rate, args.span)
    if sizes.inputs > args.context or sizes.spans > SENTINELS:
        problem = f"makes {sizes.inputs} tokens in {sizes.spans} spans"
        raise ValueError(
            f"--context {args.context} {problem}; expected to have room for them and {SENTINELS} sentinels"
        )

    def learn(texts: Any) -> Any:
        if args.vocabulary <= SENTINELS:
            raise ValueError(f"--vocabulary is {args.vocabulary}; expected more than the {SENTINELS} sentinels")
        return add_sentinels(train_unigram(texts, args.vocabulary - SENTINELS))

    content = open_windows(args.data, known or learn, length, CACHE, split=split)
    examples, tokenizer, facts = content
    id_of = getattr(tokenizer, "token_id", lambda name: None)  # characters have no special tokens
    sentinel, end, padding = map(id_of, ("<extra_id_0>", "</s>", "<pad>"))
    if None in (sentinel, end, padding):
        raise ValueError("the tokenizer lacks <extra_id_0>, </s> or <pad>, which spans need")
    if source is None:
        layers, heads = args.layers or LAYERS, heads_of(args)
        net = {"heads": heads, "depth": 32, "width": args.width, "hidden": 4 * args.width, "padding_id": padding}
        cfg = t5.Config(tokenizer.vocabulary_size, layers, layers, **net)
    else:
        cfg = source.cfg
    cfg = dataclasses.replace(cfg, dropout=args.dropout)
    facts["corrupted"] = f"{sizes.noise} of {length} tokens in {sizes.spans} spans; input of {sizes.inputs}, target of "
    facts["corrupted"] += f"{sizes.targets}"

    def corrupt(keys: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return masking.corrupt_spans(keys, batch[0], sentinel, end, args.mask_rate, args.span)

    def predict(params: Tree, batch: tuple[Tensor, Tensor], **options: Any) -> Scores:
        inputs, targets = batch
        before = torch.cat([torch.full_like(targets[:, :1], cfg.padding_id), targets[:, :-1]], 1)
        return scores_of(t5.apply(params, (inputs, before), cfg, **options), every_position(before, targets))

    def loss(params: Tree, batch: tuple[Tensor, Tensor], keys: Tensor):
        scores = predict(params, batch, key=keys, train=True)
        return scores.nats.mean(1), {"accuracy": share_right(scores)}

    def score(params: Tree, batch: tuple[Tensor, Tensor]) -> Scores:
        targets = batch[1]
        of_text = (targets != end) & ((targets > sentinel) | (targets <= sentinel - SENTINELS))
        return predict(params, batch)._replace(counted=of_text)  # sentinels are easy

    return whole(args, cfg, source, content, loss=loss, score=score, corrupt=corrupt)
