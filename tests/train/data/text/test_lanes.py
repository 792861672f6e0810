"""Lanes of a text against the batches of pytorch/examples' word_language_model, written out here."""

import pytest
import torch

from tests.train.data.text.test_text import as_file
from train.data import DataError
from train.data.text.text import lane_batch, lane_steps, split


def batchify(tokens, batch):
    """(lane length, batch): the columns are consecutive stretches; what does not fill them is cut off."""
    rows = tokens.size(0) // batch
    return tokens.narrow(0, 0, rows * batch).view(batch, rows).t().contiguous()


def get_batch(source, start, length):
    """Inputs and targets (time, batch) from row `start` on; at the end of the source fewer rows."""
    time = min(length, len(source) - 1 - start)
    return source[start : start + time], source[start + 1 : start + 1 + time]


@pytest.mark.parametrize("kind", ["tensor", "file", "blocks"])
@pytest.mark.parametrize(("count", "batch", "length"), [(5001, 4, 30), (5000, 7, 1), (3007, 3, 77), (3012, 3, 77)])
def test_equals_batchify_without_the_short_batch_at_the_end(kind, count, batch, length, tmp_path):
    tokens = torch.arange(count)
    source = as_file(tokens, tmp_path / "t") if kind != "tensor" else tokens
    if kind == "blocks":
        source, tokens = (split(x, least=10)[0] for x in (source, tokens))
        assert int(tokens.diff().max()) > 1  # the blocks are joined
    columns = batchify(tokens, batch)
    starts = range(0, len(columns) - 1, length)
    expected = [get_batch(columns, start, length) for start in starts]
    whole = [(x.T, y.T) for x, y in expected if len(x) == length]
    steps = lane_steps(source, batch, length)
    assert steps == len(whole) >= len(expected) - 1
    for step in range(2 * steps + 1):
        inputs, targets, fresh = lane_batch(source, step, batch, length)
        assert torch.equal(inputs, whole[step % steps][0]) and torch.equal(targets, whole[step % steps][1])
        assert fresh.shape == (batch,) and fresh.dtype == torch.bool
        assert fresh.all() if step % steps == 0 else not fresh.any()
    assert inputs.dtype == targets.dtype == torch.int64


def test_the_step_may_be_a_tensor_and_the_tokens_stay():
    tokens = torch.arange(100)
    for x, y in zip(lane_batch(tokens, torch.tensor(7), 3, 5), lane_batch(tokens, 7, 3, 5), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(tokens, torch.arange(100))


def test_text_that_is_too_short():
    message = "^19 tokens in 4 lanes are 4 each, too few for windows of 4: expected at least 20$"
    for function in (lambda x: lane_batch(x, 0, 4, 4), lambda x: lane_steps(x, 4, 4)):
        with pytest.raises(DataError, match=message):
            function(torch.arange(19))
        function(torch.arange(20))
    with pytest.raises(DataError, match="cannot make batches of 0 windows of 4 tokens"):
        lane_batch(torch.arange(19), 0, 0, 4)
