"""Metrics that a watched run logs of the gradients of its examples, and draws."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from core import random, spec, tree
from core.per_example import each, reports
from core.scores import noise
from nets.classifiers import mlp
from train.gradients import watch
from train.run.logs import RunLog, read_metrics

F64 = torch.float64
NET = mlp.Config((5, 7, 3))
PARAMS = tree.cast(spec.init(random.key(0), mlp.spec(NET)), F64)


def losses(params, batch):
    return F.cross_entropy(mlp.apply(params, batch[0], NET), batch[1], reduction="none")


def batch_of(seed):
    return random.normal(random.key(seed), (6, 5), F64), torch.arange(6) % 3


def metrics_of(params, batch):
    return watch.watch(reports(losses, params, batch))


def record(log, steps, average):
    for at in steps:
        metrics = {"loss": torch.tensor(1.0), **metrics_of(PARAMS, batch_of(at))}
        average, rest = watch.record(log, at, metrics, average)
        assert rest.keys() == {"loss"}
    return average


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_watch_is_of_single_gradients(compile):
    torch._dynamo.reset()
    function = torch.compile(metrics_of, fullgraph=True, dynamic=False, backend="aot_eager") if compile else metrics_of
    actual = function(PARAMS, batch_of(1))
    gradients = {name: g.flatten(1) for name, g in tree.items(each(losses, PARAMS, batch_of(1)))}
    rows = torch.cat(list(gradients.values()), 1)
    torch.testing.assert_close(actual["trace"], rows.var(0).sum())
    torch.testing.assert_close(actual["square"], rows.mean(0).square().sum() - rows.var(0).sum() / 6)
    counts, _ = np.histogram(rows.norm(dim=1), watch.EDGES)
    assert actual["norms"].tolist() == counts.tolist() and counts.sum() == 6
    for name, g in gradients.items():
        torch.testing.assert_close(actual[f"gradients/norm/{name}"], g.norm(dim=1).mean())
    torch._dynamo.reset()


def test_log_of_a_run_and_of_one_that_was_resumed(tmp_path):
    with RunLog(tmp_path, total=25, quiet=True) as log:
        record(log, range(1, 14), noise.init(torch.zeros(())))
    with RunLog(tmp_path, total=25, quiet=True, resume=12) as log:
        average = record(log, range(13, 26), watch.begin(tmp_path))
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if "gradients/trace" in r] == list(range(1, 26))
    layers = {f"gradients/norm/{name}" for name in tree.names(PARAMS)}
    assert [r["step"] for r in records if layers <= r.keys()] == [10, 20]
    actual = [noise.total(noise.estimate(reports(losses, PARAMS, batch_of(i)))) for i in range(1, 26)]
    smooth = noise.smooth(tree.stack(actual), watch.DECAY)
    scale = {r["step"]: r["gradients/noise_scale"] for r in records if "gradients/noise_scale" in r}
    assert scale.keys() == {10, 20}
    for step, value in scale.items():
        assert value == pytest.approx(float(smooth.trace[step - 1] / smooth.square[step - 1]), rel=1e-5)
    assert float(noise.average(average).trace) == pytest.approx(float(smooth.trace[-1]), rel=1e-5)


def test_histograms_are_read_by_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, total=10, quiet=True) as log:
        record(log, [10], noise.init(torch.zeros(())))
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Histograms("gradients/norms")
    (line,) = [r["gradients/norms"] for r in read_metrics(tmp_path) if "gradients/norms" in r]
    value = event.histogram_value
    assert event.step == 10 and value.num == sum(value.bucket) == sum(line["counts"]) == 6
    assert np.allclose(value.bucket_limit, line["edges"]) and list(value.bucket[1:]) == line["counts"]
    assert "gradients/norm/layers.0.weight" in events.Tags()["scalars"]


def test_picture(tmp_path):
    with RunLog(tmp_path, total=30, quiet=True) as log:
        record(log, [1], noise.init(torch.zeros(())))
        watch.draw(tmp_path)
        assert not (tmp_path / "gradients.png").exists()
        record(log, [10, 20], noise.init(torch.zeros(())))
    watch.draw(tmp_path)
    assert (tmp_path / "gradients.png").read_bytes()[:4] == b"\x89PNG"


def test_norms_that_are_in_no_bin():
    counts = watch.count_norms(torch.tensor([0.0, 1e-9, 1.0, torch.inf, torch.nan]))
    assert counts.sum() == 1 and len(counts) == len(watch.EDGES) - 1
