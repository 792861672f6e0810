"""Modules of torchvision, timm and transformers, and models of Python files, for `experiments/examine.py`."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core import tree
from core.lift import lift
from core.tree import Tree
from experiments.parts import encoder as encoders
from experiments.parts import examined_data
from experiments.parts.examined_data import Examples, Preparation, unit
from experiments.parts.examined_subject import Source, Subject, classification, of_classifier, of_tokens
from nets.classifiers import torchvision_weights
from train.data.text import ragged


def lifted(module: nn.Module) -> tuple[Tree, Tree, Callable]:
    """(params, stats, apply), apply(values, ...) giving logits; in evaluation mode.

    Raises ValueError: the module has no parameters.
    """
    params, stats, call = lift(module.eval())
    if not tree.leaves(params):
        raise ValueError(f"the {type(module).__name__} has no parameters")

    def apply(values: Tree, *args: Any, **kwargs: Any) -> Tensor:
        out = call(values, *args, **kwargs)
        out = getattr(out, "logits", out)
        out = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(out, Tensor):
            raise ValueError(f"the {type(module).__name__} returns a {type(out).__name__}; expected logits")
        return out

    return params, stats, apply


def _weights_into(module: nn.Module, source: Source) -> None:
    """Load the state dict of --weights. Raises ValueError: it cannot be read, or does not fit."""
    try:
        if source.weights.endswith(".safetensors"):
            import safetensors.torch

            state = safetensors.torch.load_file(source.weights)
        else:
            state = torch.load(source.weights, map_location="cpu", weights_only=True)
        module.load_state_dict(state.get("state_dict", state) if isinstance(state, dict) else state)
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"--weights '{source.weights}' cannot be loaded: {line}") from error


def _pictures_of(module: nn.Module, examples: Examples, mean: Any, std: Any) -> Subject:
    params, stats, call = lifted(module)
    preparation = torchvision_weights.Published("", mean=tuple(mean), std=tuple(std))
    return of_classifier(
        lambda p, x: call(p, torchvision_weights.preprocess(unit(x), preparation)), params, examples, stats
    )


def of_torchvision(name: str, source: Source) -> Subject:
    """A classifier of torchvision, with its published weights or a state dict for the classes of the data."""
    models = _library("torchvision.models", "torchvision")
    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classifier '{name}'{_similar(name, models.list_models(module=models))}")
    if source.weights is not None:
        examples = source.images(Preparation(224 if source.size is None else source.size, channels=3))
        module = models.get_model(name, weights=None, num_classes=len(examples.classes))
        _weights_into(module, source)
        return _pictures_of(module, examples, **torchvision_weights.IMAGENET)
    try:
        weights = models.get_model_weights(name).DEFAULT
        module = models.get_model(name, weights=weights)
    except OSError as error:
        raise ValueError(
            f"the weights of torchvision's '{name}' cannot be fetched: {error}; or --weights FILE"
        ) from error
    steps = weights.transforms()
    preparation = Preparation(steps.crop_size[0], steps.resize_size[0], 3, steps.interpolation.value)
    examples = source.images(preparation, _known_classes(source, tuple(weights.meta["categories"])))
    return _pictures_of(module, examples, steps.mean, steps.std)


def of_timm(name: str, source: Source) -> Subject:
    """A classifier of timm, in the same way."""
    timm = _library("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model '{name}'{_similar(name, timm.list_models())}")
    config = timm.data.resolve_data_config({}, model=timm.create_model(name, num_classes=0))
    size = config["input_size"][-1] if source.size is None else source.size
    options = Preparation(size, round(size / config["crop_pct"]), config["input_size"][0], config["interpolation"])
    if source.weights is not None:
        examples = source.images(options)
        module = timm.create_model(name, num_classes=len(examples.classes))
        _weights_into(module, source)
        return _pictures_of(module, examples, config["mean"], config["std"])
    try:
        module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights of timm's '{name}' cannot be fetched: {line}; or --weights FILE") from error
    examples = source.images(options, _known_classes(source, _imagenet(module.num_classes)))
    return _pictures_of(module, examples, config["mean"], config["std"])


def of_transformers(name: str, source: Source) -> Subject:
    """A classifier of texts or pictures, or a decoder, of a folder or a repository."""
    library = _library("transformers", "transformers")
    try:
        config = library.AutoConfig.from_pretrained(name)
        kind = (getattr(config, "architectures", None) or ["none"])[0]
        loader, subject = next((value for end, value in ARCHITECTURES.items() if kind.endswith(end)), (None, None))
        if loader is None:
            raise ValueError(f"its architecture is {kind}; expected one of ...{', ...'.join(ARCHITECTURES)}")
        options = {} if loader == "AutoModelForImageClassification" else {"attn_implementation": "eager"}
        module = getattr(library, loader).from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"--model transformers:{name} cannot be loaded: {line}") from error
    return subject(name, module, library, source)


def _sequence_classifier(name: str, module: nn.Module, library: Any, source: Source) -> Subject:
    classes = _named(module)
    examples, _ = source.texts(None if source.is_python else classes)
    if examples.labels is None:
        raise ValueError(f"--data '{source.data}' has no labels; a classifier needs them")
    tokens, lengths = _tokens(name, library, examples.inputs, source.longest)
    params, stats, call = lifted(module)

    def apply(values: Tree, x: Tree) -> Tensor:
        return call(values, input_ids=x["tokens"], attention_mask=encoders.mask_of(x["tokens"], x["lengths"]).long())

    data = {"inputs": {"tokens": tokens, "lengths": lengths}, "labels": examples.labels}
    return Subject("texts", classification(apply), params, data, examples, stats=stats, texts=examples.inputs)


def _decoder(name: str, module: nn.Module, library: Any, source: Source) -> Subject:
    examples = source.lines()
    tokens, lengths = _tokens(name, library, examples.inputs, source.longest)
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    params, stats, call = lifted(module)
    out = of_tokens(examples, rows, lambda p, x: call(p, input_ids=x["tokens"], use_cache=False), params)
    return out._replace(stats=stats)


def _image_classifier(name: str, module: nn.Module, library: Any, source: Source) -> Subject:
    side = getattr(module.config, "image_size", 224)
    usual = torchvision_weights.Published(name, resize=side, crop=side)
    steps = torchvision_weights.preparation(name, {}, usual)
    sizes = Preparation(steps.crop, steps.resize, 3, steps.interpolation)
    return _pictures_of(
        module, source.images(sizes, None if source.is_python else _named(module)), steps.mean, steps.std
    )


def _named(module: nn.Module) -> tuple[str, ...]:
    """The classes of a model of transformers; numbers where it has no names of its own."""
    names = [str(module.config.id2label[i]) for i in range(module.config.num_labels)]
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return tuple(str(i) if unnamed else name for i, name in enumerate(names))


def _tokens(name: str, library: Any, texts: tuple[str, ...], longest: int) -> tuple[Tensor, Tensor]:
    tokenizer = library.AutoTokenizer.from_pretrained(name)
    rows = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    return ragged.padded(rows, tokenizer.pad_token_id or 0)


ARCHITECTURES = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", _sequence_classifier),
    "ForImageClassification": ("AutoModelForImageClassification", _image_classifier),
    "ForCausalLM": ("AutoModelForCausalLM", _decoder),
    "LMHeadModel": ("AutoModelForCausalLM", _decoder),
}


def of_python(rest: str, source: Source) -> Subject:
    """The model that a function returns: a module, or (params, apply) with `apply(params, inputs) -> logits`."""
    value = examined_data.called(f"python:{rest}")
    examples = source.images(Preparation(source.size))
    if isinstance(value, nn.Module):
        params, stats, call = lifted(value)
        return of_classifier(lambda p, x: call(p, unit(x)), params, examples, stats)
    if isinstance(value, tuple) and len(value) == 2 and callable(value[1]):
        params, apply = value
        return of_classifier(lambda p, x: apply(p, unit(x)), tree.sort(params), examples)
    kind = type(value).__name__
    raise ValueError(f"--model python:{rest} returns a {kind}; expected an nn.Module, or (params, apply)")


PREFIXES: dict[str, Callable[[str, Source], Subject]] = {
    "python": of_python,
    "timm": of_timm,
    "torchvision": of_torchvision,
    "transformers": of_transformers,
}


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"--model {package}: needs the package {package}: pip install {package}") from error
    except Exception as error:  # one that does not fit this torch raises what it likes
        raise ValueError(f"the package {package} cannot be imported: {type(error).__name__}: {error}") from error


def _similar(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 3)
    return f"; close to it: {', '.join(close)}" if close else ""


def _imagenet(count: int) -> tuple[str, ...]:
    names = torchvision_weights.class_names(torchvision_weights.Published(""), count)
    return tuple(names)


def _known_classes(source: Source, classes: tuple[str, ...]) -> tuple[str, ...] | None:
    """The model's classes, which those of the data must be among; data of a function bring numbers."""
    return None if source.is_python else classes
