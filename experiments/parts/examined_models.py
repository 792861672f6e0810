"""Models for `experiments/examine.py`: nets that have still to learn, and those of runs."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from core import spec
from core.tree import Tree
from experiments.parts import classifier, encoder_classifier, language_model
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Tuning
from experiments.parts.examined_data import Preparation, unit
from experiments.parts.examined_subject import Source, Subject, classification, of_classifier, of_encoder, of_tokens
from experiments.parts.foreign_models import PREFIXES
from nets.classifiers import by_name, mlp
from nets.language import gpt2
from train.data.text import tokenizers
from train.losses import cross_entropy
from train.run import checkpoints, open_run

LANGUAGE, TEXTS = "gpt", "bert"
"""Names of nets for lines of text and for labelled texts, which learn from them."""


def open_subject(name: str, source: Source, key: Tensor) -> Subject:
    """The model of `--model` and its examples.

    Args:
        key: (2,), of the initial values of what has to learn.

    Raises ValueError: no such model, or data that do not fit it.
    """
    prefix, colon, rest = name.partition(":")
    if source.weights is not None and prefix not in ("timm", "torchvision"):
        raise ValueError(f"--weights '{source.weights}' goes with --model timm:NAME or torchvision:NAME, not '{name}'")
    if colon and prefix in PREFIXES:
        return PREFIXES[prefix](rest, source)
    if (Path(name) / "checkpoints").is_dir():
        return of_run(Path(name), source)
    if "/" in name:
        raise ValueError(f"--model '{name}' is no run's folder; expected one, a name, or {', '.join(PREFIXES)}: ...")
    if name == LANGUAGE:
        return fresh_language(source)
    if name == TEXTS:
        return fresh_texts(source, key)
    return fresh_images(name, source)


# Nets that learn first.


def fresh_images(name: str, source: Source) -> Subject:
    """A net of nets.classifiers, or "mlp" with one hidden layer of 128."""
    if name != "mlp":
        by_name.find(name)
    examples = source.images(Preparation(), test=True)
    if examples.labels is None:
        raise ValueError(f"--data '{source.data}' has no labels; --model {name} needs them")
    shape, classes = tuple(examples.inputs.shape[1:]), len(examples.classes)
    if name == "mlp":
        net, cfg = mlp, mlp.Config((examples.inputs[0].numel(), 128, classes))
    else:
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"--model {name} takes square pictures; the inputs are {shape}")
        net, cfg = by_name.configured(name, channels=shape[0], classes=classes, size=shape[2])
    std, mean = torch.std_mean(unit(examples.inputs[:2000]).float())  # one number each, as of any inputs

    def prepared(x: Tensor) -> Tensor:
        return (unit(x) - mean.to(x.device)) / std.clamp(min=1e-3).to(x.device)

    def learn(params: Tree, batch: Tree, keys: Tensor) -> Tensor:
        output = net.apply(params, prepared(batch["inputs"]), cfg, key=keys, train=True)
        return sum(
            weight * cross_entropy(logits, batch["labels"], reduction="none")
            for weight, logits in by_name.weighted_logits(net, output)
        )

    loss = classification(lambda params, x: net.apply(params, prepared(x), cfg))
    test = None if examples.test is None else {"inputs": examples.test.images, "labels": examples.test.labels}
    data = {"inputs": examples.inputs, "labels": examples.labels}
    pictures = examples.inputs if len(shape) == 3 else None
    fresh = {"model": net.spec(cfg), "learn": learn, "pictures": pictures, "test": test}
    return Subject("images", loss, None, data, examples, **fresh)


def fresh_texts(source: Source, key: Tensor) -> Subject:
    """A BERT of two layers, whose vocabulary is learned from the texts."""
    examples, held = source.texts()
    if examples.labels is None:
        raise ValueError(f"--data '{source.data}' has no labels; --model {TEXTS} needs them")
    tuning = Tuning(layers=2, width=128, longest=source.longest, dropout=0.0)
    encoder = encoders.scratch(tuning, examples.inputs, "sequence", len(examples.classes), key=key)
    encoder = encoder._replace(cfg=dataclasses.replace(encoder.cfg, dropout=0.0, attention_dropout=0.0))
    out = of_encoder(encoder, examples, source.longest)
    test = None
    if held is not None:
        numbers = {name: i for i, name in enumerate(examples.classes)}
        labels = torch.tensor([numbers[name] for name in held.labels])
        inputs = dict(zip(("tokens", "lengths"), encoders.tokens_of(encoder, held.texts, source.longest), strict=True))
        test = {"inputs": inputs, "labels": labels}

    def learn(params: Tree, batch: Tree, keys: Tensor) -> Tensor:
        return out.loss(params, batch)[0]

    return out._replace(params=None, model=encoder.net.spec(encoder.cfg), learn=learn, test=test)


def fresh_language(source: Source) -> Subject:
    """A GPT of two layers of 64, whose byte pairs are learned from the texts."""
    examples = source.lines()
    tokenizer = tokenizers.train_byte_pairs(examples.inputs, 1024)
    rows = [tokenizer.encode(text)[: source.longest] for text in examples.inputs]
    cfg = gpt2.Config(tokenizer.vocabulary_size, source.longest, layers=2, heads=4, width=64, dropout=0.0)
    out = of_tokens(examples, rows, lambda params, x: gpt2.apply(params, x["tokens"], cfg))

    def learn(params: Tree, batch: Tree, keys: Tensor) -> Tensor:
        return out.loss(params, batch)[0]

    return out._replace(model=gpt2.spec(cfg), learn=learn)


# Runs.


def of_run(folder: Path, source: Source) -> Subject:
    """A run of classify.py, finetune_text.py, gpt.py, generate.py or pretrain.py (causal)."""
    name = checkpoints.read_config(folder / "checkpoints").get("experiment")
    if name == "classify":
        trained, values = classifier.load(folder)
        net, cfg = classifier.net_of(trained)
        preparation = Preparation(trained.size, trained.resize, trained.channels, trained.interpolation)
        examples = source.images(preparation, trained.classes)
        params, stats = spec.split(net.spec(cfg), values)

        def apply(params: Tree, x: Tensor) -> Tensor:
            return net.apply(params, classifier.normalised(x, trained), cfg)

        return of_classifier(apply, params, examples, stats)
    if name == "finetune_text":
        model = encoder_classifier.load(open_run(folder, Path("runs") / name, "best"))
        return of_encoder(model.encoder, source.texts(model.classes)[0], model.longest)
    if name in ("gpt", "generate", "pretrain"):
        writer = language_model.of_run(folder)
        if writer.first is not None:
            raise ValueError(f"'{folder}' has an encoder and a decoder; expected a decoder alone, or a classifier")
        examples, longest = source.lines(), min(source.longest, writer.cfg.context)

        def tokens(text: str) -> list[int]:
            try:
                return writer.tokenizer.encode(text)[:longest]
            except ValueError:  # a character that the run has never seen
                return []

        rows = [tokens(text) for text in examples.inputs]
        return of_tokens(
            examples, rows, lambda params, x: writer.net.apply(params, x["tokens"], writer.cfg), writer.params
        )
    known = "classify, finetune_text, gpt, generate or pretrain"
    raise ValueError(f"'{folder}' is a run of {name}.py; expected one of {known}")
