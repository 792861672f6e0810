"""Files of SentencePiece, written for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.text.sentencepiece import NORMAL, message


def write_model(path: Path, pieces: Mapping[str, float | tuple[float, int]], kind: int = 1, **normalizer: Any) -> Path:
    """A model with these pieces and their scores, or scores and types, whose normaliser changes white space only."""
    model = message()()
    for piece, score in pieces.items():
        score, type_of = score if isinstance(score, tuple) else (score, NORMAL)
        model.pieces.add(piece=piece, score=score, type=type_of)
    model.trainer.model_type = kind
    for name, value in normalizer.items():
        setattr(model.normalizer, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path
