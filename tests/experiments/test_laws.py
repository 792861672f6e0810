"""The laws that every script of experiments/ keeps; its row is in tests/registry/experiments.

A script runs without a question and leaves its files; a run that is stopped is saved, and goes on to the same bits;
wrong input is refused in one line, before anything is written; the help fits 80 columns and explains every flag.
"""

import dataclasses
import importlib
import json
import math
import shutil
import signal
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image

import experiments
from core import tree
from tests.experiments import runs
from tests.registry.experiments import EXPERIMENTS, Experiment
from train.run import Common, checkpoints, flags
from train.run.run import Run

DRAWN = True
every_experiment = pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str, scope="module")
# Another script of the default suite has their adversarial step, their loop over pairs of sentences or over pictures.
QUICK_TO_RESUME = (
    "classify",
    "examine",
    "imagenet",
    "gpt",
    "char_rnn",
    "vae",
    "diffusion",
    "sequences",
    "ner",
    "detect",
)
SPEEDS = ("seconds", "per_second")


def call(experiment: Experiment, *argv: str) -> int:
    return runs.call(experiment.name, *argv)


@pytest.fixture(scope="module")
def folder(experiment, tmp_path_factory):
    """A folder with the inputs and a whole run called `a`, of which `out` is what was printed; nothing changes it."""
    place = tmp_path_factory.mktemp(experiment.name)
    experiment.inputs(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert call(experiment, *experiment.flags, "--no-compile", "--name", "a") == 0
    return place


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A copy of it, in which the test stands."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(experiment: Experiment, place: Path, name: str = "a") -> Path:
    return place / "runs" / experiment.name / name


def arguments(script: str) -> list[type]:
    """The dataclasses of a script's command lines."""
    module = importlib.import_module(f"experiments.{script}")
    return [kind for name, kind in vars(module).items() if name.endswith("Args") and dataclasses.is_dataclass(kind)]


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(2**24))


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """The leaves of a run's last checkpoint by name."""
    record = checkpoints.read_record(run / "checkpoints")
    like = {
        name: torch.empty(leaf["shape"], dtype=getattr(torch, leaf["dtype"]), device="meta")
        for name, leaf in record.leaves.items()
    }
    return checkpoints.restore(run / "checkpoints", tree.nest(like))


def figures(run: Path) -> dict[str, typing.Any]:
    """The final figures, without those that a clock gave."""
    return {name: value for name, value in runs.result(run).items() if not name.endswith(SPEEDS)}


@every_experiment
def test_runs_and_leaves_its_files(experiment, folder):
    run = run_of(experiment, folder)
    result, config = runs.result(run), runs.config(run)
    assert config["experiment"] == experiment.name and config["args"]["common"]["name"] == "a"
    assert result["steps"] == experiment.steps and result["seconds"] > 0
    numbers = [value for value in result.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))
    assert not experiment.baseline or isinstance(result[experiment.baseline], float)
    assert runs.metrics(run)[-1]["step"] == experiment.steps
    assert checkpoints.latest(run / "checkpoints") == experiment.steps
    for pattern in experiment.pictures:
        paths = list(run.glob(pattern))
        assert paths and all(colours(path) > 2 for path in paths), pattern
    for pattern in experiment.files:
        assert all(path.stat().st_size for path in run.glob(pattern)) and list(run.glob(pattern)), pattern


@every_experiment
def test_prints_what_it_understood_and_where_its_files_are(experiment, folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    runs.undrawn(monkeypatch)
    capsys.readouterr()
    assert call(experiment, "--resume", "--name", "a") == 0  # all steps are done
    out = capsys.readouterr().out
    assert "parameters" in out and f"files in runs/{experiment.name}/a/" in out
    assert figures(run_of(experiment, tmp_path)) == figures(run_of(experiment, folder))


@pytest.mark.parametrize(
    "experiment",
    [e if e.name in QUICK_TO_RESUME else pytest.param(e, marks=pytest.mark.slow) for e in EXPERIMENTS],
    ids=str,
    scope="module",
)
def test_stopped_run_is_saved_and_goes_on_to_the_same_bits(experiment, here, monkeypatch, capsys):
    stop = experiment.steps // 2 + 1
    record = Run.record
    runs.undrawn(monkeypatch)

    def stopping(run, at, *args, **options):
        if at == stop:
            signal.raise_signal(signal.SIGTERM)
        record(run, at, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", stopping)
        assert call(experiment, *experiment.flags, "--no-compile", "--name", "b") == 128 + signal.SIGTERM
    stopped, whole = run_of(experiment, here, "b"), run_of(experiment, here)
    assert checkpoints.latest(stopped / "checkpoints") == stop and not (stopped / "result.json").exists()
    assert f"stopped at step {stop}; continue with: python " in capsys.readouterr().out
    assert call(experiment, "--resume", "--name", "b") == 0
    assert runs.same_bits(final_state(stopped), final_state(whole))
    assert figures(stopped) == figures(whole)
    records = [[{**line, "time": 0} for line in runs.metrics(run) if line["step"] != stop] for run in (stopped, whole)]
    assert records[0] == records[1]


def classes(hint: typing.Any) -> set[type]:
    """The classes in a type: int and None of `Count | None`."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return set()
    return set().union(*map(classes, inner)) if inner else {hint} if isinstance(hint, type) else set()


def refusals(experiment: Experiment) -> list[tuple[list[str], str]]:
    """(flags, error) of a row, and of each numeric flag with a number beside its range."""
    (args,) = [kind for kind in arguments(experiment.name) if kind.__name__ == "Args"]
    rows = [(["--stepz", "3"], "Unrecognized options: --stepz"), (["--name", "a"], "a' exists already")]
    rows += [(["--resume", "--name", "zz"], "nothing to resume"), (["--device", "abacus"], "--device 'abacus' cannot")]
    for kind in (args, Common):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            allowed = flags.range_of(hints[field.name])
            if allowed is not None and math.isfinite(allowed.low) and allowed.low > -(2**60):
                number = allowed.low if allowed.open_low else allowed.low - 1
                number = int(number) if int in classes(hints[field.name]) else float(number)
                rows.append(([flags.flag(field.name), str(number)], f"{flags.flag(field.name)} is {number}; expected"))
    return [*rows, *((list(argv), error) for argv, error in experiment.refusals)]


@every_experiment
def test_refuses_in_one_line_and_writes_nothing(experiment, here, capfd):
    for argv, error in refusals(experiment):
        line = runs.refused(experiment.name, capfd, *argv, "--no-compile")
        assert error in line, line


@every_experiment
def test_every_number_has_a_range_and_every_flag_a_help(experiment):
    for kind in (*arguments(experiment.name), Common):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            numeric = classes(hints[field.name]) & {int, float}
            assert not numeric or flags.range_of(hints[field.name]) is not None, f"{kind.__name__}.{field.name}"


def flags_of_scripts() -> dict[str, dict[str, set[type]]]:
    """{field: {script: classes of its values}} of all scripts and their sub-commands."""
    table: dict[str, dict[str, set[type]]] = {}

    def add(script: str, kind: type) -> None:
        for name, hint in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                add(script, hint)
                continue
            choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            values = {type(choice) for choice in choices} or classes(hint)
            table.setdefault(name, {}).setdefault(script, set()).update(values - {type(None)})

    for path in sorted(Path(experiments.__file__).parent.glob("[!_]*.py")):
        for kind in arguments(path.stem):
            add(path.stem, kind)
    return table


def test_one_spelling_per_flag():
    scripts = flags_of_scripts()
    wrong = [
        f"{script}: {flags.flag(other)}; better: {flags.flag(name)}"
        for name, others in flags.OTHER_NAMES.items()
        for other in others.split()
        for script in scripts.get(other, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_one_kind_of_value_per_flag():
    """A flag is not a number of steps in one script and a share of them in another."""
    scripts = flags_of_scripts()
    different = {name: kinds for name, kinds in scripts.items() if len(set(map(frozenset, kinds.values()))) > 1}
    assert not different, different


@every_experiment
def test_help_fits_80_columns(experiment, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("", *sorted({argv[0] for argv, _ in experiment.commands})):
        assert call(experiment, *([command] if command else []), "--help") == 0
        out = capsys.readouterr().out
        assert "usage:" in out and all(len(line) <= 80 for line in out.splitlines() if "│" in line or "╭" in line)
        flags_without_help = [line for line in out.split("│ --")[1:] if not line.partition("\n")[2].strip("│ \n─╯")]
        assert not flags_without_help


@every_experiment
def test_sub_commands(experiment, here, capsys):
    run = run_of(experiment, Path())
    for argv, files in experiment.commands:
        capsys.readouterr()
        assert call(experiment, *argv, "--run", str(run)) == 0, argv
        assert capsys.readouterr().out.strip()
        for name in files:
            assert (run / name).stat().st_size, name
    for command in sorted({argv[0] for argv, _ in experiment.commands}):
        assert call(experiment, command, "--run", "runs/nowhere") == 2
        assert "'runs/nowhere' is not the folder of a run; the runs in" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["experiment"] == experiment.name
