"""Distillation for `experiments/pretrain.py`: a student with fewer layers learns what its teacher computes.

Sanh et al. 2019, "DistilBERT" (arXiv:1910.01108), on masked tokens, T = 2:

    5 T² KL(softmax(teacher / T) || softmax(student / T)) + 2 cross-entropy + 1 (1 - cos(student, teacher))

the divergence and the cosine, of the last hidden states, as means over all tokens. Of a teacher without a head for
masked tokens, such as one of sentence embeddings: the cosines of the hidden states and of the sentence embeddings, on
whole texts.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder
from experiments.parts.pretraining import (
    Objective,
    at,
    encoder_and_examples,
    mask_of,
    measure,
    open_encoder,
    scores_of,
    share_right,
    token_baselines,
    tokens_of,
    total_of,
    with_dropout,
)
from nets.language.bert import sentence_embeddings
from train.data.fingerprint import fingerprint
from train.data.text import masking
from train.losses import cosine_distance, soft_targets


class Outputs(NamedTuple):
    """Last hidden states (batch, time, width), and of a net with a head logits (batch, time, vocabulary)."""

    hidden: Tensor
    logits: Tensor | None


def outputs(net: Encoder, params: Tree, tokens: Tensor, **options: Any) -> Outputs:
    hidden = net.net.features(params, tokens, net.cfg, mask=mask_of(net, tokens), **options)
    return Outputs(hidden, net.net.token_logits(params, hidden, net.cfg) if net.cfg.head == "masked_tokens" else None)


def over(mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, number) of values (batch, time) where the mask is True."""
    return torch.where(mask, values, 0.0).sum(), mask.sum().to(values.dtype)


def beside(student: Outputs, teacher: Outputs, mask: Tensor, temperature: float) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, number) of each loss of a student beside its teacher: `hidden` and, over tokens, `soft` of the logits; of
    nets without a head `embedding`, over texts."""
    parts = {"hidden": over(mask, cosine_distance(student.hidden, teacher.hidden, reduction="none"))}
    if student.logits is not None:
        soft = soft_targets(student.logits, teacher.logits, temperature=temperature, reduction="none")
        return parts | {"soft": over(mask, soft)}
    texts = [sentence_embeddings(each.hidden, mask) for each in (student, teacher)]
    distances = cosine_distance(*texts, reduction="none")  # (batch,)
    return parts | {"embedding": over(torch.ones_like(distances, dtype=torch.bool), distances)}


def student_layers(teacher: int, student: int) -> list[int]:
    """Numbers of the teacher's layers that a student begins with, evenly from the first to the last.

    6 of 12 are 0, 2, 4, 7, 9, 11, as the authors of DistilBERT took them. Raises ValueError: more than the teacher has.
    """
    if student > teacher:
        raise ValueError(f"--layers is {student}; expected up to the {teacher} of the teacher")
    if student == 1:
        return [0]
    return [round(i * (teacher - 1) / (student - 1)) for i in range(student)]


def student_of(teacher: Encoder, layers: list[int]) -> Encoder:
    """A net of some of the teacher's layers, and of all its other parameters."""
    blocks = [teacher.params["blocks"][i] for i in layers]
    params = tree.map(torch.Tensor.clone, {**teacher.params, "blocks": blocks})
    return teacher._replace(params=params, cfg=dataclasses.replace(teacher.cfg, layers=len(layers)))


def distil(args: Any, folder: Path | None, key: Tensor, *, split: bool = True) -> Objective:
    """A student of --teacher; LoRA's adapters have no part in it."""
    if not args.teacher:
        raise ValueError("--objective distil needs --teacher: a run of this script, or published weights")
    if args.weights or args.lora:
        raise ValueError(f"--{'weights' if args.weights else 'lora'} is not for --objective distil; see --teacher")
    teacher, has_head = open_encoder(args.teacher)
    layers = student_layers(teacher.cfg.layers, args.layers or max(1, teacher.cfg.layers // 2))
    student = with_dropout(student_of(teacher, layers), args.dropout)
    _, examples, facts = encoder_and_examples(args, folder, lambda tokenizer: teacher, teacher.tokenizer, split=split)
    marks = masking.marks_of(teacher.tokenizer)
    model = student.net.spec(student.cfg)
    names = "soft targets, masked tokens, hidden states" if has_head else "hidden states, sentence embeddings"
    facts |= {"teacher": args.teacher, "student": f"layers {layers} of the {teacher.cfg.layers}", "losses": names}
    facts |= {} if has_head else {"head": "the teacher has none for masked tokens, so the student learns none"}
    device = torch.device(args.common.device)
    taught = tree.move(teacher.params, device)

    def corrupt(keys: Tensor, batch: Any) -> Tree:
        tokens = tokens_of(batch, marks, args.lines)
        return masking.mask_tokens(keys, tokens, marks, args.mask_rate) if has_head else (tokens,)

    def compute(params: Tree, batch: Tree, **options: Any):
        tokens = batch[0]
        own = outputs(student, params, tokens, **options)
        parts = beside(own, outputs(teacher, taught, tokens), mask_of(student, tokens), args.temperature)
        return parts, scores_of(at(own.logits, batch.positions), batch) if has_head else None

    def loss(params: Tree, batch: Tree, keys: Tensor):
        sums, scores = compute(params, batch, key=keys, train=True)
        parts = {name: total / number for name, (total, number) in sums.items()}
        metrics: dict[str, Tensor] = dict(parts)
        if scores is not None:
            values, weights = total_of(scores)
            parts["masked"] = metrics["masked"] = values.sum() / weights.sum().clamp(min=1)
            metrics["accuracy"] = share_right(scores)
        return sum(getattr(args, f"{name}_weight") * value for name, value in parts.items()), metrics

    def compare(params: Tree, batch: Tree) -> dict[str, tuple[Tensor, Tensor]]:
        sums, _ = compute(params, batch)
        figures = {"cosine": (sums["hidden"][1] - sums["hidden"][0], sums["hidden"][1])}
        if has_head:
            teachers = scores_of(at(outputs(teacher, taught, batch[0]).logits, batch.positions), batch)
            nats, number = (part.sum() for part in total_of(teachers))
            return figures | {"teacher_val_loss": (nats, number), "soft": sums["soft"]}
        return figures | {"embedding_cosine": (sums["embedding"][1] - sums["embedding"][0], sums["embedding"][1])}

    def baselines(objective: Objective) -> dict[str, float]:
        figures, _ = measure(objective, tree.move(student.params, device))
        figures = {f"untrained_{name}": value for name, value in figures.items() if not name.startswith("teacher")}
        if has_head:
            return figures | token_baselines(objective)
        return figures | {"mean_embedding_cosine": mean_embedding_cosine(teacher, taught, objective)}

    return Objective(
        facts={**facts, "net": student.cfg},
        stored=encoders.stored(student),
        identity={"data": fingerprint(*examples[:2]), "net": student.cfg, "teacher": weights_of(teacher)},
        tokenizer=teacher.tokenizer,
        examples=examples,
        corrupt=corrupt,
        model=model,
        values=student.params,
        loss=loss,
        score=(lambda params, batch: compute(params, batch)[1]) if has_head else None,
        compare=compare,
        baselines=baselines,
        net=lambda params: student._replace(params=params),
    )


@torch.no_grad()
def mean_embedding_cosine(teacher: Encoder, params: Tree, objective: Objective) -> float:
    """Mean cosine of the teacher's sentence embeddings with the one vector that has the largest, their mean."""
    device, parts = tree.leaves(params)[0].device, []
    for (tokens,) in objective.held_out_batches():
        tokens = tokens.to(device)
        hidden = outputs(teacher, params, tokens).hidden
        parts.append(sentence_embeddings(hidden, mask_of(teacher, tokens)))
    return float(torch.cat(parts).mean(0).norm())


def weights_of(teacher: Encoder) -> str:
    """The identity of a teacher."""
    return fingerprint(*tree.leaves(teacher.params), teacher.tokenizer)
