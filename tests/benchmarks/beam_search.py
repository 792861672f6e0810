"""Beam search, beam 5, against transformers' `generate` of a Marian with the same weights, in sentences a second.

Random weights; sentences and translations have lengths as in Multi30k (mean 14 tokens, deviation 5): once a translation
has its length, the end token is what both nets predict, and before that they cannot. So all beams of a sentence end at
once and no side searches on. The same batches go to both sides, mixed as sentences come or sorted by length; encoding
is part of it. Tokens and scores of both sides are compared first. `compiled` is one graph for all shapes, and compiling
is not counted. The larger net and batch, the more of the time is matrix products, which take as long on both sides.

    python tests/benchmarks/beam_search.py [--presets tiny small base] [--batches 1 8 32] [--sentences 64] [--rounds 5]
        [--vocabulary 10000]
        [--no-compile] [--threads 2] [--device cpu]
"""

import argparse
from functools import partial

import torch
import torchvision_operators  # noqa: F401
from timing import interleaved, report
from torch import Tensor
from transformers import MarianConfig, MarianMTModel
from transformers.utils import logging

from core import random, tree
from nets.language import marian, transformer
from nets.language.beam_search import beam_search

END, BEAMS, LONGEST = 1, 5, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, help="if not that of the preset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for preset in args.presets:
        compare(preset, args)


def net(preset: str, vocabulary: int, device: str) -> tuple[MarianMTModel, dict, transformer.Config]:
    ours = transformer.PRESETS[preset]
    sides = {"layers": ours.layers, "attention_heads": ours.heads, "ffn_dim": ours.hidden}
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=ours.width,
        **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sides.items()},
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=2 * LONGEST,
        pad_token_id=vocabulary - 1,
        decoder_start_token_id=vocabulary - 1,
        eos_token_id=END,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MarianMTModel(config).eval().requires_grad_(False)
    model.final_logits_bias[0, END] = -1e4
    cfg = marian.published_config(config.to_dict())
    params = marian.from_published(model.state_dict(), cfg)
    return model.to(device), tree.map(lambda leaf: leaf.to(device), params), cfg


def sentences(count: int, vocabulary: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """(source ids, padded at the end; lengths), of the sentences and of their translations, which are as long."""
    lengths = (14 + 5 * random.normal(random.key(1), (count,))).round().long().clamp(4, LONGEST)
    lengths = lengths.sort().values if ordered else lengths
    ids = random.randint(random.key(2), (count, int(lengths.max())), 2, vocabulary - 1).long()
    return torch.where(torch.arange(ids.shape[1]) < lengths[:, None], ids, vocabulary - 1), lengths


def compare(preset: str, args: argparse.Namespace) -> None:
    vocabulary = args.vocabulary or transformer.PRESETS[preset].target_vocabulary
    model, params, cfg = net(preset, vocabulary, args.device)
    padding, finishing = vocabulary - 1, {}

    def ending(module, inputs, output):
        # As `step` below: the end, once it is time.
        ends = finishing["place"] + 1 >= finishing["lengths"]
        finishing["place"] += 1
        output.logits[:, -1, END].masked_fill_(ends, 50.0)

    model.register_forward_hook(ending)

    def theirs(batches, scored=False):
        outputs = []
        for source, lengths in batches:
            finishing.update(place=0, lengths=lengths.repeat_interleave(BEAMS))
            options = {"num_beams": BEAMS, "max_new_tokens": LONGEST, "do_sample": False}
            options |= {"return_dict_in_generate": scored, "output_scores": scored}
            outputs.append(model.generate(source, attention_mask=(source != padding).long(), **options))
        return outputs

    def ours(batches, step):
        step = transformer.stepper(params, cfg, step)

        def ending_step(cache, tokens, position, shared):
            logits, cache = step(cache, tokens, position, shared["source"])
            ends = position + 1 >= shared["lengths"].repeat_interleave(len(tokens) // len(shared["lengths"]))
            logits[:, END].masked_fill_(ends, 50.0)
            return logits, cache

        outputs = []
        for source, lengths in batches:
            mask = source != padding
            cache = transformer.start(params, transformer.encode(params, source, cfg, mask=mask), mask, cfg, 16)
            first = torch.full_like(lengths, padding)
            options = {"beams": BEAMS, "end": END, "max_length": LONGEST, "padding": padding, "positions_axis": 2}
            options["shared"] = {"source": cache["shared"], "lengths": lengths}
            outputs.append(beam_search(ending_step, cache["past"], first, **options))
        return outputs

    step = partial(transformer.step, donate=True)  # the caches are not used again
    sides = {"functree": partial(ours, step=step), "transformers": theirs}
    if args.compile:
        sides["functree, compiled"] = partial(ours, step=torch.compile(step, fullgraph=True, dynamic=True))
    orders = [(batch, ordered) for batch in args.batches for ordered in ((False, True) if batch > 1 else (False,))]
    for batch, ordered in orders:
        source, lengths = (x.to(args.device) for x in sentences(args.sentences, vocabulary, ordered))
        batches = [
            (ids[:, : int(n.max())].contiguous(), n)
            for ids, n in zip(source.split(batch), lengths.split(batch), strict=True)
        ]
        with torch.inference_mode():
            expected = theirs(batches, scored=True)
            for side in (side for name, side in sides.items() if name != "transformers"):
                check(side(batches), expected)
            medians = interleaved({name: timed(side, batches) for name, side in sides.items()}, args.rounds, warmup=1)
        rates = ", ".join(f"{name} {args.sentences / seconds:.1f}" for name, seconds in medians.items())
        order = "" if batch == 1 else " sorted by length" if ordered else " as they come"
        report(
            f"{preset}, batches of {batch}{order}, sentences/s: {rates}", medians, "functree", {"transformers": 1 / 3}
        )
        if args.compile:
            report("", medians, "functree, compiled", {"transformers": 1 / 3})


def check(outputs, expected) -> None:
    """Tokens and scores are the same, but for a few sentences: where the last beam that goes on and the first that does
    not differ by less than single precision tells apart (2.6e-8, say), other beams go on, whichever side has it."""
    differ = 0
    for ours, theirs in zip(outputs, expected, strict=True):
        tokens = theirs.sequences[:, 1 : 1 + ours.tokens.shape[2]]
        same = (ours.tokens[:, 0] == tokens).all(1)
        torch.testing.assert_close(ours.scores[same, 0], theirs.sequences_scores[same], rtol=1e-5, atol=1e-5)
        differ += int((~same).sum())
    total = sum(len(ours.scores) for ours in outputs)
    assert differ <= 0.05 * total, f"{differ} of {total} texts differ"
    if differ:
        print(f"{differ} of {total} texts differ")


def timed(side, batches):
    def run():
        side(batches)
        if batches[0][0].device.type == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main()
