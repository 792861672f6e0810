"""Text by any net: sampling, speculative decoding, tokens per second.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192): a small net
drafts several tokens, the large one judges them in one pass, and the text is distributed as the large one's own.
Without a flag a Llama of 8 layers and a draft of 1 learn the text of gpt.py, character by character, and write:

    python experiments/generate.py                                             under 3 minutes on a CPU core
    python experiments/generate.py sample --run runs/gpt/NAME --prompt "The "            a run of gpt.py, char_rnn.py
    python experiments/generate.py sample --weights openai-community/gpt2-xl --draft openai-community/gpt2 --prompt "A "
    python experiments/generate.py sample --weights google-t5/t5-small --prompt "translate English to German: Hi."
    python experiments/generate.py sample --weights HuggingFaceTB/SmolLM2-135M --file - --stop "." < prompt.txt

`sample` takes published GPTs, Llamas, T5 and Marian; with --draft a run or weights of the same vocabulary.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from core import int8, random, spec, tree
from experiments.parts import language_model, writer
from experiments.parts.language_model import Writer
from experiments.parts.writer import Sampling
from nets.language import llama
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.text import text
from train.data.understood import understood
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import Run, begin, command_line
from train.run.flags import Common, Count, NonNegative, Positive, Shared, check_source
from train.run.logs import read_curves
from train.step import make_step, start

RUNS = Path("runs/generate")
WINDOWS = 20
"""Batches of 32 windows of the validation text that are evaluated."""


@dataclass(frozen=True)
class Args:
    text: Path | None = None
    """UTF-8 text to learn from: a file (.gz too), a folder of them, or shakespeare or wikitext-2 (downloaded
    once). None: the language reference inside Python."""
    layers: Count = 8
    """Layers of the net."""
    width: Count = 128
    """Size of its hidden states, a multiple of 32."""
    draft_layers: Count = 1
    """Layers of the draft: what a step of a small net costs."""
    draft_width: Count = 160
    """Size of the draft's hidden states, a multiple of 32."""
    context: Count = 128
    """Tokens of an example, and of a text."""
    steps: Count = 400
    """Training steps of both; the learning rate falls to a tenth of its peak over all of them."""
    batch: Count = 8
    """Examples per step."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    ahead: tuple[Count, ...] = (1, 2, 3, 4, 6, 8)
    """Tokens that the draft proposes before each pass of the net: each number is timed."""
    rounds: Count = 8
    """Texts that are timed each way."""
    common: Shared = Common(compile=False)


@dataclass(frozen=True)
class SampleArgs(Sampling):
    run: Path | None = None
    """Folder of a run of gpt.py, char_rnn.py or generate.py, such as runs/gpt/NAME."""
    checkpoint: str = "latest"
    """Which checkpoint of the run: latest, best (where the run keeps one) or a step."""
    weights: str | None = None
    """Published weights instead: a folder (model.safetensors, config.json, the tokenizer) or a repository."""
    draft: str | None = None
    """A smaller net that proposes tokens: the folder of a run, or published weights. Of a run of generate.py,
    its draft."""
    ahead: Count = 4
    """Tokens that the draft proposes before each pass of the net."""
    beam: Count | None = None
    """Search for the --count best texts with this many beams, in place of sampling."""
    length_penalty: NonNegative = 1.0
    """With --beam: alpha; log-probabilities are divided by the length to this power."""
    max_new_tokens: Count = 100
    """Tokens per sample, at most."""
    file: Path | None = None
    """File with the prompt; - reads standard input."""
    int8: bool = False
    """Matrices of 8-bit integers, rounded from the weights: a quarter of the memory, nearly the same texts."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = False
    """Compile the steps of the nets; the texts are written twice, and the second time counts."""


def configs(args: Args, vocabulary: int) -> dict[str, llama.Config]:
    """The net and its draft."""
    sizes = {"draft": (args.draft_layers, args.draft_width), "target": (args.layers, args.width)}
    nets = {}
    for name, (layers, width) in sizes.items():
        if width % 32:
            raise ValueError(f"--{'draft-' * (name == 'draft')}width is {width}; expected a multiple of 32")
        heads, hidden = width // 32, 11 * width // 4
        nets[name] = llama.Config(vocabulary, args.context, layers, heads, heads, width, hidden, tied=True)
    return nets


def losses_of_each(params, batch, nets: dict[str, llama.Config]) -> dict[str, torch.Tensor]:
    """{net: (examples,)}: the mean cross-entropy of each example's tokens, in nats."""
    tokens, targets = batch
    logits = {
        name: llama.apply(params[name], tokens, cfg) for name, cfg in nets.items()
    }  # (examples, time, vocabulary)
    return {name: cross_entropy(out, targets, reduction="none").mean(1) for name, out in logits.items()}


def losses(params, batch, keys, nets: dict[str, llama.Config]):
    """(examples,): the sum of both nets' losses, neither of which the other's parameters change; and the two."""
    each = losses_of_each(params, batch, nets)
    return each["draft"] + each["target"], {f"{name}_loss": loss.mean() for name, loss in each.items()}


@torch.no_grad()
def validate(params, nets: dict[str, llama.Config], tokens) -> dict[str, float]:
    """Mean cross-entropy of each net in nats per token, over windows from all of the text."""
    context, device = nets["target"].context, tree.leaves(params)[0].device
    every = max(1, len(tokens) // (32 * context * WINDOWS))
    batches = itertools.islice(text.windows(tokens, context, 32), 0, None, every)
    each = [losses_of_each(params, tree.move(batch, device), nets) for batch in batches]
    return {f"{name}_val_loss": float(torch.cat([part[name] for part in each]).mean()) for name in nets}


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("text", "steps", "batch", "learning_rate", "rounds", "ahead"))
    if max(args.ahead, default=0) + 2 > args.context or not args.ahead:
        raise ValueError(f"--ahead is {list(args.ahead)}; expected numbers of tokens that fit --context {args.context}")
    data = text.open_text(args.text, None, cache=RUNS / "tokens")
    train_tokens, validation_tokens = parts = text.split(data.tokens, least=4 * args.context)
    nets = configs(args, data.tokenizer.vocabulary_size)
    understood(print, text.facts(data, *parts) | nets)
    if min(map(len, parts)) <= args.context:
        raise ValueError(f"'{data.name}' has {len(data.tokens):,} tokens; a context of {args.context} needs more")

    init_key, run_key, data_key = random.split(random.key(args.common.seed), 3).unbind(0)
    model = {name: llama.spec(cfg) for name, cfg in nets.items()}
    rate = schedules.warmup_cosine(args.learning_rate, min(50, args.steps // 10), args.steps, final=0.1)
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adamw(rate, 0.9, 0.99))
    state = start(run_key.to(run.device), spec.init(init_key.to(run.device), model), model, optimizer)
    state = run.restore(state, nets | {"data": fingerprint(data.tokens)}, args.steps)
    options = {"policy": run.policy, "compile": args.common.compile, "donate": True}
    step = make_step(functools.partial(losses, nets=nets), optimizer, **options)

    with run.open({}, unit="tokens", files={"tokenizer.json": data.tokenizer.save}):
        sizes = {name: tree.count(part) for name, part in model.items()}
        run.log.print(f"{sizes['target']:,} parameters, the draft {sizes['draft']:,}; run in {run.folder}")
        for at, batch in run.steps(text.token_batches(train_tokens, data_key, run.remaining, args.batch, args.context)):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, args.batch * args.context)
            if run.due(at, args.common.save_every):
                run.save(at, state)
        figures = validate(state.params, nets, validation_tokens)
        figures["unigram_entropy"] = text.unigram_entropy(*parts)
        report(run, [Writer(llama, state.params[name], nets[name], data.tokenizer) for name in nets], figures)


def report(run: Run, pair: list[Writer], figures: dict[str, float]) -> None:
    """Both ways of writing, timed; their figures, curves and texts."""
    args, (draft, target) = run.args, pair
    prompt = language_model.ids_of(target, "")
    # Both ways write texts of one length, and each length of the draft's proposals has room.
    flags = Sampling(
        max_new_tokens=args.context - max(args.ahead) - len(prompt), temperature=1.0, seed=args.common.seed
    )
    ways = [{}, *({"draft": draft, "ahead": k} for k in args.ahead)]
    texts: list[list[writer.Texts]] = [[] for _ in ways]
    for i in range(args.rounds + 1):  # the ways take turns, as other work on the machine comes and goes
        for each, way in zip(texts, ways, strict=True):
            each.append(writer.write(target, prompt, replace(flags, seed=flags.seed + i), **way))
    rates = [median_rate(each[1:]) for each in texts]  # the first is to warm up
    accepted = [sum(one.acceptance for one in each[1:]) / args.rounds for each in texts[1:]]
    best = max(range(len(args.ahead)), key=lambda i: rates[1 + i])
    figures |= {f"acceptance_{k}": share for k, share in zip(args.ahead, accepted, strict=True)}
    speeds = {f"{k}_ahead_tokens_per_second": rate for k, rate in zip(args.ahead, rates[1:], strict=True)}
    run.result(figures | speeds | {"tokens_per_second": rates[0]})
    lines = {"drafted and judged": (args.ahead, rates[1:]), "alone": (args.ahead, [rates[0]] * len(args.ahead))}
    curves = read_curves(run.folder, "train/target_loss", "train/draft_loss")
    with plots.panels(run.folder / "speed.png", 1, 2, 5.2, 4.0) as (left, right):
        plots.curves(left, lines, "drafted tokens per pass", "tokens per second", "Speculative decoding")
        plots.curves(right, curves, ylabel="nats per token", title="Cross-entropy")
    sample = language_model.text_of(target, texts[1 + best][0].rows[0])
    (run.folder / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"{sample.strip()}\n\n{'ahead':>8}{'accepted':>10}{'tokens/s':>10}{'times':>8}")
    for k, share, rate in zip(args.ahead, accepted, rates[1:], strict=True):
        print(f"{k:8}{share:10.3f}{rate:10.0f}{rate / rates[0]:8.2f}")
    print(f"alone: {writer.speed(target, texts[0][1], writer.bandwidth(run.device))}")
    print(f"validation loss {figures['target_val_loss']:.4f} nats per token, the draft's", end=" ")
    print(f"{figures['draft_val_loss']:.4f} (unigram entropy: {figures['unigram_entropy']:.4f});", end=" ")
    print(f"{rates[1 + best] / rates[0]:.2f} times as fast with {args.ahead[best]} tokens ahead;", end=" ")
    print(f"{run.seconds:.0f} s; files in {run.folder}/")


def median_rate(texts: list[writer.Texts]) -> float:
    rates = sorted(each.count / each.seconds for each in texts)
    return (rates[len(rates) // 2] + rates[(len(rates) - 1) // 2]) / 2


def read_prompt(args: SampleArgs) -> str:
    """The prompt of the flags. Raises ValueError: two of them, or no UTF-8."""
    if args.file is None:
        return args.prompt
    if args.prompt:
        raise ValueError("expected either --prompt TEXT or --file PATH")
    try:
        content = sys.stdin.buffer.read() if str(args.file) == "-" else args.file.read_bytes()
        return content.decode("utf-8-sig").rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{args.file}' is no UTF-8 text: byte {error.start}") from None


def sample(args: SampleArgs) -> None:
    """Write on from a prompt, or answer it, with a run's net or published weights."""
    check_source(args)
    device, prompt = command_line.device(args.device), read_prompt(args)
    net = language_model.of_run(args.run, args.checkpoint) if args.run else language_model.of_weights(args.weights)
    draft = language_model.load(args.draft) if args.draft else None
    small = (lambda params: int8.unformed(int8.quantise(params))) if args.int8 else lambda params: params
    net, draft = (one and one._replace(params=small(tree.move(one.params, device))) for one in (net, draft))
    args = replace(args, prompt=prompt)
    size = f"{len(language_model.ids_of(net, prompt))} tokens"
    understood(print, {"net": net.cfg, "draft": draft and draft.cfg, "prompt": size, "samples": args.count})
    options = {"draft": draft, "ahead": args.ahead, "beam": args.beam, "length_penalty": args.length_penalty}
    if args.compile:
        options["compiled"] = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    print("--- sample 1")
    texts = writer.print_texts(net, args, **options)
    print(f"\n{writer.speed(net, texts, writer.bandwidth(device))}")
    if texts.acceptance is not None:
        print(f"{texts.acceptance:.3f} of the draft's tokens accepted")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS, sample=(SampleArgs, sample))
