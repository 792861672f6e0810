"""Greedy generation with a key-value cache against transformers' `generate` on the same weights.

16 prompt tokens, 128 new ones, batch 1 and 8. The larger the net, the more of the time is matrix products, which take
as long on both sides. The tokens of both sides are compared first. `compiled` decodes through torch.compile; compiling
is not counted.

gpt2: 4 layers, 128 or 256 wide, against `generate` as it is. llama: 8 layers, 512 wide, two query heads per head of
keys and values, against `generate` with its static cache, compiled. Each token needs all weights once per batch, so
memory bandwidth limits the steps per second; the share of that limit is printed beside the bandwidth, which is that of
a sum of 256 MB. "8 bits" are the same weights as 8-bit integers (`core.int8`), whose texts may differ.

    python tests/benchmarks/generation.py [--net gpt2] [--rounds 5] [--widths 128 256] [--vocabulary 256] [--tokens 128]
    python tests/benchmarks/generation.py --net llama
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torchvision_operators  # noqa: F401
from timing import interleaved, report
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from core import int8, random, tree
from nets.language import gpt2, llama

PROMPT = 16


@dataclass(frozen=True)
class Case:
    """A net, the widths and targets (at batch 1 and 8) of its default, and whether transformers compiles, too."""

    net: ModuleType
    widths: tuple[int, ...]
    targets: tuple[float, float]
    compiled: bool


CASES = {
    "gpt2": Case(gpt2, (128, 256), (0.333, 0.333), compiled=False),
    "llama": Case(llama, (512,), (0.7, 0.9), compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=CASES, default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", help="default: those of the net above")
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    case = CASES[args.net]
    for width in args.widths or case.widths:
        compare(case, width, args.vocabulary, args.tokens, args.rounds)


def model_of(net: ModuleType, width: int, vocabulary: int) -> PreTrainedModel:
    """transformers' model with random weights."""
    torch.manual_seed(0)
    ends = {"bos_token_id": vocabulary - 1, "eos_token_id": vocabulary - 1, "vocab_size": vocabulary}
    if net is gpt2:
        return GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=width, **ends)).eval()
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **sizes, **ends)).eval()


def bandwidth(rounds: int) -> float:
    """Bytes per second of reading memory, the best of some sums of 256 MB."""
    values, seconds = torch.ones(2**26), []
    for _ in range(3 + rounds):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return values.nbytes / min(seconds)


TIE = 1e-5
"""Difference of two logits that rounding errors of float32 may turn over; the logits here have deviations of 0.4."""


def check_same(net: ModuleType, params: dict, cfg: Any, prompt: torch.Tensor, text: torch.Tensor, expected) -> None:
    """Exit unless each text is the expected one, up to a place where the two best tokens are equally likely."""
    for row, (ours, theirs) in enumerate(zip(text, expected, strict=True)):
        if torch.equal(ours, theirs):
            continue
        at = int((ours != theirs).nonzero()[0])
        tokens = torch.cat([prompt[row], ours[:at]])[None]
        logits = net.apply(tree.cast(params, torch.float64), tokens, cfg)[0, -1]
        gap = float((logits[ours[at]] - logits[theirs[at]]).abs())
        if gap > TIE:
            raise SystemExit(f"the texts of row {row} differ from token {at} on, where the logits differ by {gap:.1e}")
        print(f"  row {row} parts at token {at}: two logits are equal to {gap:.0e}")


def compare(case: Case, width: int, vocabulary: int, new: int, rounds: int) -> None:
    net, model = case.net, model_of(case.net, width, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params, cfg = net.from_pretrained(folder)
    options = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    if case.compiled:
        options |= {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")}
        options["compile_config"]._compile_all_devices = True  # on a CPU too
    other = "transformers, compiled" if case.compiled else "transformers"
    # Of an embedding with an output layer of its own, a step reads one row.
    unread = params["tokens"]["weight"].nbytes if "output" in params else 0
    small = int8.unformed(int8.quantise(params))
    weights = sum(leaf.nbytes for leaf in tree.leaves(params)) - unread

    for batch, target in zip((1, 8), case.targets, strict=True):
        prompt = random.randint(random.key(1), (batch, PROMPT), 0, cfg.vocabulary).long()
        mask = torch.ones_like(prompt)
        compiled = torch.compile(net.decode, fullgraph=True, dynamic=False)

        def ours(decode=net.decode, prompt=prompt):
            with torch.inference_mode():
                return net.generate(params, prompt, cfg, new, temperature=0.0, decode=decode)

        def ours_compiled(compiled=compiled, ours=ours):
            return ours(compiled)

        def ours_small(compiled=compiled, prompt=prompt):
            with torch.inference_mode():
                return net.generate(small, prompt, cfg, new, temperature=0.0, decode=compiled)

        def theirs(prompt=prompt, mask=mask):
            with torch.inference_mode():
                return model.generate(prompt, attention_mask=mask, **options)[:, PROMPT:]

        expected = theirs()
        for text in (ours(), ours_compiled()):
            check_same(net, params, cfg, prompt, text, expected)
        sides = {"functree": ours, "functree, compiled": ours_compiled, "functree, compiled, 8 bits": ours_small}
        sides[other] = theirs
        medians = interleaved(sides, rounds, warmup=1)
        title = f"{new} greedy tokens, width {width}, batch {batch}: " + ", ".join(
            f"{name} {batch * new / seconds:.0f} tokens/s" for name, seconds in medians.items()
        )
        report(title, medians, "functree", {other: target})
        report("", medians, "functree, compiled", {other: target})
        report("", medians, "functree, compiled, 8 bits", {"functree, compiled": 1.0})
        limit = bandwidth(rounds)
        share = new * weights / medians["functree, compiled"] / limit
        sizes = f"{weights / 1e6:.1f} MB of weights per step, {limit / 1e9:.1f} GB/s"
        print(f"  share of the bandwidth limit: {share:.2f} ({sizes}: {limit / weights:.0f} steps/s)")


if __name__ == "__main__":
    main()
