"""Greedy generation with a key-value cache against transformers' `generate` on the same weights.

Small GPT-2 shapes (4 layers, 128 or 256 wide, a vocabulary of 256), 16 prompt tokens, 128 new ones, batch 1 and 8. The
larger the net, the more of the time is matrix products, which take as long on both sides. The tokens of both sides are
compared first. `compiled` decodes through torch.compile; compiling is not counted.

    python tests/benchmarks/generation.py [--rounds 5] [--widths 128 256] [--vocabulary 256] [--tokens 128]
"""

import argparse
import tempfile

import torch
import torchvision_operators  # noqa: F401
from timing import interleaved, report
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from core import random
from nets.language import gpt2

PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for width in args.widths:
        compare(width, args.vocabulary, args.tokens, args.rounds)


def compare(width: int, vocabulary: int, new: int, rounds: int) -> None:
    torch.manual_seed(0)
    last = vocabulary - 1
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": width, "vocab_size": vocabulary}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=last, eos_token_id=last)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params, cfg = gpt2.from_pretrained(folder)

    for batch in (1, 8):
        prompt = random.randint(random.key(1), (batch, PROMPT), 0, cfg.vocabulary).long()
        mask = torch.ones_like(prompt)
        compiled = torch.compile(gpt2.decode, fullgraph=True, dynamic=False)

        def ours(decode=gpt2.decode, prompt=prompt):
            with torch.inference_mode():
                return gpt2.generate(params, prompt, cfg, new, temperature=0.0, decode=decode)

        def ours_compiled(compiled=compiled, ours=ours):
            return ours(compiled)

        def theirs(prompt=prompt, mask=mask):
            with torch.inference_mode():
                options = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
                return model.generate(prompt, attention_mask=mask, **options)[:, PROMPT:]

        assert torch.equal(ours(), theirs()) and torch.equal(ours_compiled(), theirs()), "the tokens differ"
        sides = {"functree": ours, "functree, compiled": ours_compiled, "transformers": theirs}
        medians = interleaved(sides, rounds, warmup=1)
        title = f"{new} greedy tokens, width {width}, batch {batch}: " + ", ".join(
            f"{name} {batch * new / seconds:.0f} tokens/s" for name, seconds in medians.items()
        )
        report(title, medians, "functree", {"transformers": 0.333})
        report("", medians, "functree, compiled", {"transformers": 0.333})


if __name__ == "__main__":
    main()
