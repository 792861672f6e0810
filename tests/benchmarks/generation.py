"""Greedy generation with a key-value cache against transformers' `generate` on the same weights.

A small GPT-2 (4 layers, 256 wide, the published vocabulary), 16 prompt tokens, 128 new ones, batch 1 and 8. The tokens of
both sides are compared first. `compiled` decodes through torch.compile, as a server would; compiling is not counted.

    python tests/benchmarks/generation.py [--rounds 5]
"""

import argparse
import tempfile

import torch
from timing import interleaved, report
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from core import random
from nets import gpt2

PROMPT, NEW = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=8, n_embd=256)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params, cfg = gpt2.from_pretrained(folder)

    for batch in (1, 8):
        prompt = random.randint(random.key(1), (batch, PROMPT), 0, cfg.vocabulary).long()
        mask = torch.ones_like(prompt)
        compiled = torch.compile(gpt2.decode, fullgraph=True, dynamic=False)

        def ours(decode=gpt2.decode, prompt=prompt):
            with torch.inference_mode():
                return gpt2.generate(params, prompt, cfg, NEW, temperature=0.0, decode=decode)

        def ours_compiled(compiled=compiled, ours=ours):
            return ours(compiled)

        def theirs(prompt=prompt, mask=mask):
            with torch.inference_mode():
                options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
                return model.generate(prompt, attention_mask=mask, **options)[:, PROMPT:]

        assert torch.equal(ours(), theirs()) and torch.equal(ours_compiled(), theirs()), "the tokens differ"
        sides = {"functree": ours, "functree, compiled": ours_compiled, "transformers": theirs}
        medians = interleaved(sides, rounds, warmup=1)
        title = f"{NEW} greedy tokens, batch {batch}: " + ", ".join(
            f"{name} {batch * NEW / seconds:.0f} tokens/s" for name, seconds in medians.items()
        )
        report(title, medians, "functree", {"transformers": 1 / 3})
        report("", medians, "functree, compiled", {"transformers": 1 / 3})


if __name__ == "__main__":
    main()
