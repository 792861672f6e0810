"""Flags: the ranges that numbers must keep, and the flags that every training script shares.

A numeric field says its range in its type, `steps: Count = 1500`; the help shows it, and `check` holds every field of a
command line to it.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both ends included unless they are open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below and -math.inf < number < math.inf

    def __str__(self) -> str:
        if math.isfinite(self.high):
            ends = ("(" if self.open_low else "[", ")" if self.open_high else "]")
            return f"a number in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}"
        if not math.isfinite(self.low):
            return "a finite number"
        return f"a number above {self.low:g}" if self.open_low else f"at least {self.low:g}"


def _number(kind: type, range: Range, metavar: str) -> Any:
    return Annotated[kind, range, tyro.conf.arg(metavar=metavar)]


Count = _number(int, Range(1), "INT>=1")
Natural = _number(int, Range(0), "INT>=0")
Integer = _number(int, Range(-(2**63), 2**63 - 1), "INT")
Positive = _number(float, Range(0, open_low=True), "FLOAT>0")
NonNegative = _number(float, Range(0), "FLOAT>=0")
Share = _number(float, Range(0, 1), "0<=FLOAT<=1")
Fraction = _number(float, Range(0, 1, open_low=True, open_high=True), "0<FLOAT<1")
Rate = _number(float, Range(0, 1, open_high=True), "0<=FLOAT<1")
Portion = _number(float, Range(0, 1, open_low=True), "0<FLOAT<=1")
Number = _number(float, Range(), "FLOAT")


@dataclass(frozen=True)
class Common:
    """Flags that all training scripts share."""

    seed: Integer = 0
    """Seed of everything random: initial values, order of the data, dropout, noise."""
    name: str | None = None
    """Folder of the run; the date and time if None. With --resume: which run, the newest if None."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    save_every: Count = 500
    """Steps between checkpoints."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the net: bfloat16 is mixed precision, with float32 parameters, losses and optimizer states."""
    compile: bool = True
    """Compile the train step with torch.compile: up to a minute the first time, a few seconds from its cache."""
    shard: Literal["replicate", "fsdp", "hsdp", "tensor"] = "replicate"
    """Under torchrun, what each process keeps of the state: replicate (all of it), fsdp (an equal part), hsdp (an
    equal part within each replica), tensor (its part of every layer); train/scale/README.md."""
    mesh: str | None = None
    """Under torchrun, the grid of processes, such as data=4,model=2; all of them along the axis of --shard if None."""
    local_norm: bool = False
    """Under torchrun, batch norms use each process's own rows instead of those of all."""


OTHER_NAMES = {
    "average_checkpoints": "average avg_checkpoints num_checkpoints",
    "batch": "batch_size bs batchsize examples_per_step",
    "classifier": "features feature_net inception",
    "compile": "compiled torch_compile jit",
    "count": "n num number num_samples number_of_samples num_images",
    "device": "gpu cuda place",
    "dtype": "precision amp half bf16 bfloat16 mixed_precision",
    "ema": "averaged ema_decay moving_average average_decay polyak",
    "epochs": "passes num_epochs max_epochs",
    "eval_every": "every test_every evaluate_every validate_every val_every eval_interval eval_steps",
    "label_smoothing": "smoothing",
    "learning_rate": "lr rate step_size",
    "local_norm": "no_sync_bn local_batch_norm",
    "max_new_tokens": "max_tokens max_length new_tokens",
    "micro_batches": "accumulate accumulation grad_accum gradient_accumulation",
    "out": "output output_dir outdir out_dir save_to to",
    "run": "checkpoint_dir from_run run_dir model_dir",
    "sampler_steps": "sampling_steps num_inference_steps inference_steps",
    "save_every": "checkpoint_every save_interval",
    "seed": "random_seed key",
    "shard": "strategy distributed parallel sharding_strategy dp ddp fsdp",
    "steps": "iterations iters max_steps train_steps training_steps num_steps updates",
    "warmup": "warmup_steps warm_up",
    "weight_decay": "wd l2",
    "workers": "num_workers processes",
}
"""One idea has one name, the field's; what other programs call it is no flag's name, but is understood in an error."""


# A box of its own in the help, and flags without a prefix: `--seed`, not `--common.seed`.
Shared = Annotated[Common, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True)
class FromRun:
    """Flags of a sub-command that uses what a run has trained."""

    run: Path
    """Folder of a run: runs/SCRIPT/NAME."""
    checkpoint: str = "latest"
    """Checkpoint of the run: latest, best (where the run keeps one) or a step."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True, kw_only=True)
class FromBest(FromRun):
    """Flags of a sub-command that uses the best net of a run that has a validation part."""

    checkpoint: str = "best"
    """Checkpoint of the run: best on the validation part, latest or a step."""


def called_here(name: str, kind: type) -> str | None:
    """The flag of a dataclass of arguments for what other programs call `name`; None where there is none."""
    fields = names(kind)
    wanted = [field for field, others in OTHER_NAMES.items() if name.replace("-", "_") in others.split()]
    wanted += {"steps": ["epochs"], "epochs": ["steps"]}.get((wanted or [name])[0], [])
    return next((flag(field) for field in wanted if field in fields), None)


def names(kind: type) -> list[str]:
    """The fields of a dataclass of arguments, those of nested ones too."""
    kinds = typing.get_type_hints(kind)
    out = []
    for field in dataclasses.fields(kind):
        inner = kinds[field.name]
        out += names(inner) if dataclasses.is_dataclass(inner) else [field.name]
    return out


def check_source(args: Any) -> None:
    """Raise ValueError unless a sub-command has either --run or --weights."""
    if (args.run is None) == (args.weights is None):
        raise ValueError("expected either --run DIR or --weights SOURCE")


def flag(name: str) -> str:
    """The flag of a field: `--save-every` of `save_every`."""
    return "--" + name.rpartition(".")[2].replace("_", "-")


def values(args: Any) -> dict[str, Any]:
    """{field: value} of a dataclass of arguments, nested ones as `common.seed`."""
    flat = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{name}": inner for name, inner in values(value).items()}
        else:
            flat[field.name] = value
    return flat


def check(args: Any) -> None:
    """Raise ValueError naming the first numeric flag of a dataclass of arguments that is out of its range."""
    kinds = typing.get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
            continue
        allowed = range_of(kinds[field.name])
        for number in value if isinstance(value, tuple) else (value,):
            if allowed is not None and number is not None and number not in allowed:
                raise ValueError(f"{flag(field.name)} is {number}; expected {allowed}")


def range_of(kind: Any) -> Range | None:
    """The range of a field's type; of `Count | None` and `tuple[Count, ...]` that of `Count`."""
    if typing.get_origin(kind) is Annotated:
        inner, *notes = typing.get_args(kind)
        return next((note for note in notes if isinstance(note, Range)), None) or range_of(inner)
    if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
        return next((inner for part in typing.get_args(kind) if (inner := range_of(part)) is not None), None)
    return None
