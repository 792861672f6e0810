"""Unigram models of SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226), read for the `tokenizers` library.

A file is a protobuf message. Only the fields that unigram models need are declared here, by their numbers in
SentencePiece's sentencepiece_model.proto.
"""

import functools
import os
from pathlib import Path
from typing import Any

from train.data import DataError

SPACE = "\u2581"
"""Replaces the space in pieces."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces."""
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

MESSAGES = {
    "Piece": {"piece": (1, "STRING", ""), "score": (2, "FLOAT", "0"), "type": (3, "INT32", "1")},
    "Trainer": {"model_type": (3, "INT32", "1"), "treat_whitespace_as_suffix": (24, "BOOL", "false")},
    "Normalizer": {
        "precompiled_charsmap": (2, "BYTES", ""),
        "add_dummy_prefix": (3, "BOOL", "true"),
        "remove_extra_whitespaces": (4, "BOOL", "true"),
        "escape_whitespaces": (5, "BOOL", "true"),
    },
    "Model": {"pieces": (1, "Piece", ""), "trainer": (2, "Trainer", ""), "normalizer": (3, "Normalizer", "")},
}
"""{message: {field: (number, type, default)}}; `pieces` is repeated."""


@functools.cache
def message() -> type:
    """The class of a whole file."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="functree/sentencepiece.proto", package="functree", syntax="proto2")
    for kind, fields in MESSAGES.items():
        declared = file.message_type.add(name=kind)
        for name, (number, type_name, default) in fields.items():
            field = declared.field.add(name=name, number=number, label=3 if name == "pieces" else 1)
            if type_name in MESSAGES:
                field.type, field.type_name = field.TYPE_MESSAGE, f".functree.{type_name}"
            else:
                field.type, field.default_value = getattr(field, f"TYPE_{type_name}"), default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("functree.Model"))


def load(path: str | os.PathLike) -> Any:
    """A `tokenizers.Tokenizer` with the pieces of a unigram model; a text without a piece becomes a token of its own.

    Its ids are the positions of the normal pieces after the unknown one: use its tokens where another file has the ids.
    It differs from SentencePiece only in letters with several combining marks, of which the library's normaliser drops
    some, and in a text that ends with a literal U+2581.

    Raises DataError: it is no such file, or a model of another kind.
    """
    import tokenizers
    from google.protobuf.message import DecodeError
    from tokenizers import Regex, normalizers

    model = message()()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except DecodeError:
        raise DataError(f"{path} is not a SentencePiece model") from None
    if not model.pieces:
        raise DataError(f"{path} is not a SentencePiece model: it has no pieces")
    kind = KINDS.get(model.trainer.model_type, "unknown")
    if kind != "unigram":
        raise DataError(f"{path} is a {kind} model of SentencePiece; expected unigram")
    usual = {"treat_whitespace_as_suffix": False, "escape_whitespaces": True, "remove_extra_whitespaces": True}
    for name, expected in usual.items():
        settings = model.trainer if name == "treat_whitespace_as_suffix" else model.normalizer
        if getattr(settings, name) != expected:
            raise DataError(f"{path} has {name}={not expected}; only {expected} is supported")
    if {piece.type for piece in model.pieces} & {USER_DEFINED, BYTE}:
        raise DataError(f"{path} has user-defined or byte pieces, which are not supported")

    # The unknown piece is one that no text has, which has no spaces by then; those like </s> are left out, as a text
    # that looks like one is a text.
    pieces = [(" ", 0.0), *((piece.piece, piece.score) for piece in model.pieces if piece.type == NORMAL)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    steps = []
    if model.normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.normalizer.precompiled_charsmap))
    steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if model.normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer
