import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from train.run.logs import RunLog, read_curves, read_metrics, read_result


@dataclass
class Args:
    width: int = 3
    path: Path = Path("runs/a")


def without_time(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The values as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_records_of_a_run(tmp_path):
    with RunLog(tmp_path / "run", Args(), quiet=True) as log:
        log.metrics(1, {"train/loss": torch.tensor(2.5), "lr": 1e-3})
        log.metrics(torch.tensor(2), {"train/loss": 2.0})
        log.result({"accuracy": 0.9, "loss": float("nan")})
    assert json.loads((tmp_path / "run/config.json").read_text()) == {"width": 3, "path": "runs/a"}
    records = without_time(read_metrics(tmp_path / "run"))
    assert records == [{"step": 1, "train/loss": 2.5, "lr": 1e-3}, {"step": 2, "train/loss": 2.0}]
    assert read_result(tmp_path / "run") == {"accuracy": 0.9, "loss": "NaN"}
    assert events(tmp_path / "run")["train/loss"] == [(1, 2.5), (2, 2.0)]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        log.metrics(1, {"a": float("nan"), "b": torch.tensor(-math.inf), "c": math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == ("NaN", "-Infinity", "Infinity")
    assert math.isnan(float(record["a"])) and float(record["b"]) == -math.inf
    assert events(tmp_path)["b"] == [(1, -math.inf)]


def test_resumed_run_has_no_doubles(tmp_path):
    with RunLog(tmp_path, {"a": 1}, quiet=True) as log:
        for step in (10, 20, 30):
            log.metrics(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # killed while it wrote
    assert len(read_metrics(tmp_path)) == 3
    # TensorBoard reads files in the order of their names: the second, and of one process a number (10 before 9).
    time.sleep(1.01)
    with RunLog(tmp_path, {"a": 2}, resume=20, quiet=True) as log:
        log.metrics(30, {"loss": 31.0})
    assert without_time(read_metrics(tmp_path)) == [
        {"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": 31.0}
    ]  # fmt: skip
    assert events(tmp_path)["loss"] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2}


def test_another_runs_record_is_not_mixed_in(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        log.metrics(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="holds the record of another run"):
        RunLog(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def test_garbled_and_missing_records(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*metrics.jsonl: No such file"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="cannot read .*result.json: No such file"):
        read_result(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl line 2 is not a record"):
        RunLog(tmp_path, resume=1)


def test_lines_where_stdout_is_no_terminal(tmp_path, capsys):
    with RunLog(tmp_path, total=100, unit="tokens", every=0.0) as log:
        for step in range(1, 101):
            log.progress(step, items=50, loss=torch.tensor(1 / step))
        log.print("done [with it]")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 101 and lines[0].startswith("step 1/100  loss 1") and lines[-1] == "done [with it]"
    assert re.fullmatch(r"step 50/100  loss 0.02  [\d.]+[kMG]? tokens/s  0:00:00 left", lines[49])
    assert re.fullmatch(r"step 100/100  loss 0.01  [\d.]+[kMG]? tokens/s", lines[99])


def test_few_lines_and_few_reads(tmp_path, capsys):
    class Counted(float):
        reads = 0

        def __float__(self):
            Counted.reads += 1
            return 0.5

    with RunLog(tmp_path, total=500) as log:
        for step in range(1, 501):
            log.progress(step, loss=Counted())
    assert len(capsys.readouterr().out.splitlines()) == 2 and Counted.reads == 2


def test_quiet(tmp_path, capsys):
    with RunLog(tmp_path, quiet=True) as log:
        log.progress(1, loss=1.0)
    assert capsys.readouterr().out == ""


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    from rich import console

    screen = io.StringIO()
    real = console.Console
    monkeypatch.setattr(console, "Console", lambda: real(file=screen, force_terminal=True, width=100))
    with RunLog(tmp_path, total=4, unit="examples") as log:
        for step in range(1, 5):
            log.progress(step, items=8, loss=0.25)
        log.print("a line")
    assert "4/4" in screen.getvalue() and "loss 0.25" in screen.getvalue() and "examples/s" in screen.getvalue()
    assert "a line" in screen.getvalue()


def test_import_is_light():
    code = "import sys, train.run.logs, train.plots, train.data.images, train.data.text, train.data.text.tokenizers\n"
    code += "heavy = {'rich', 'tensorboard', 'matplotlib', 'sklearn', 'PIL', 'pooch', 'tokenizers', 'tensorflow'}\n"
    code += "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_read_curves_pairs_steps_with_values(tmp_path):
    with RunLog(tmp_path, quiet=True) as log:
        for step in (10, 20):
            log.metrics(step, {"loss": 1.0 / step})
        log.metrics(20, {"accuracy": 0.5})
    assert read_curves(tmp_path, "loss", "accuracy") == {"loss": ([10, 20], [0.1, 0.05]), "accuracy": ([20], [0.5])}
