"""Figures of recognised entities: precision, recall and F1 over whole entities, by seqeval, and F1 by type."""

from collections.abc import Sequence
from typing import Any

MODE = "seqeval, default mode (as conlleval: an I- that follows no entity of its type begins one)"
"""An entity is right if its type, first and last word are."""


def figures(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """precision, recall, f1 (micro averages; 0 where there is nothing to divide by), and `f1_by_type`.

    Args:
        gold, predicted: the IOB2 tags of each sentence, as many of one as of the other.
    """
    from seqeval.metrics import classification_report

    none = {"precision": 0.0, "recall": 0.0, "f1-score": 0.0}
    if all(tag == "O" for rows in (gold, predicted) for row in rows for tag in row):
        report: dict[str, Any] = {"micro avg": none}  # seqeval would take the mean of no types
    else:
        report = classification_report(
            list(map(list, gold)), list(map(list, predicted)), output_dict=True, zero_division=0
        )
    micro = report["micro avg"]
    types = {name: row for name, row in report.items() if not name.endswith(" avg")}
    return {
        "precision": float(micro["precision"]),
        "recall": float(micro["recall"]),
        "f1": float(micro["f1-score"]),
        "f1_by_type": {name: float(row["f1-score"]) for name, row in types.items()},
    }
