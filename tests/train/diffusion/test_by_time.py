import math

import pytest
import torch
from PIL import Image

from train.diffusion import by_time
from train.run.logs import RunLog


@pytest.mark.parametrize(("count", "rounds", "steps"), [(4, 5, 20), (3, 2, 12), (10, 2, 1000)])
def test_all_rounds_together_see_every_part_as_often(count, rounds, steps):
    times = torch.cat([by_time.spread(count, i, rounds, steps) for i in range(rounds)])
    total = count * rounds
    assert sorted(times.tolist()) == [i * steps // total for i in range(total)]


def test_means_of_groups():
    time = torch.tensor([0, 4, 5, 19])
    middle, mean = by_time.grouped(time, torch.tensor([1.0, 3.0, 5.0, 7.0]), 20, 4)
    assert middle.tolist() == [2.5, 7.5, 12.5, 17.5]
    assert mean.tolist()[:2] == [2.0, 5.0] and math.isnan(mean[2]) and mean[3] == 7
    assert len(by_time.grouped(time % 3, torch.ones(4), 3)[0]) == 3  # no more groups than times


def test_log_and_picture(tmp_path):
    with RunLog(tmp_path, {}, total=3) as log:
        for at in range(3):
            values = by_time.norms(torch.tensor([0, 1, 9]), torch.tensor([1.0, 3.0, at + 4.0]), 10)
            assert values == {"gradients/time/0000-0001": 2.0, "gradients/time/0008-0009": at + 4.0}
            log.metrics(at, values)
    by_time.draw(tmp_path, 10)
    with Image.open(tmp_path / "gradients_by_time.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 2
