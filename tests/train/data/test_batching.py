import pytest
import torch

from core import random
from train.data import DataError
from train.data.batching import bucket_batch, epoch_batch, evaluation_batches

KEY = random.key(5)


def test_an_epoch_goes_through_the_examples_once():
    epochs = [torch.cat([epoch_batch(KEY, step, 23, 5) for step in range(4 * e, 4 * e + 4)]) for e in range(3)]
    for order in epochs:
        assert len(set(order.tolist())) == 20 and 0 <= order.min() and order.max() < 23
    assert len({tuple(order.tolist()) for order in epochs}) == 3
    assert len(set(torch.cat(epochs).tolist())) == 23  # what one epoch leaves out comes in others


def test_order_is_the_permutation_of_the_epochs_key():
    expected = random.permutation(random.fold_in(KEY, 1), 12)
    assert torch.equal(epoch_batch(KEY, torch.tensor(4), 12, 4), expected[4:8])
    assert epoch_batch(KEY, 0, 12, 4).dtype == torch.int64


def test_batches_do_not_share_memory_with_what_is_kept():
    before = epoch_batch(KEY, 3, 12, 4).tolist()
    epoch_batch(KEY, 3, 12, 4).zero_()
    assert epoch_batch(KEY, 3, 12, 4).tolist() == before
    assert epoch_batch(random.key(6), 3, 12, 4).tolist() != before


@pytest.mark.parametrize(("count", "batch"), [(3, 4), (3, 0), (0, 1)])
def test_batch_larger_than_the_data(count, batch):
    with pytest.raises(DataError, match=f"batches of {batch} from {count} examples"):
        epoch_batch(KEY, 0, count, batch)


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (9, 3), (2, 5), (0, 5)])
def test_evaluation_covers_all_in_order(count, batch):
    parts = [torch.arange(count)[part] for part in evaluation_batches(count, batch)]
    assert torch.equal(torch.cat([torch.arange(0), *parts]), torch.arange(count))
    assert all(len(part) == batch for part in parts[:-1])


def test_bucket_batches_go_through_all_members_once_per_epoch():
    key, counts, rows = random.key(3), (7, 4), (2, 4)
    epoch = [bucket_batch(key, step, counts, rows) for step in range(4)]
    assert sorted(number for number, _ in epoch) == [0, 0, 0, 1]
    members = [sorted(int(i) for number, part in epoch if number == n for i in part) for n in (0, 1)]
    assert len(set(members[0])) == 6 and members[1] == [0, 1, 2, 3]
    number, part = bucket_batch(key, torch.tensor(2), counts, rows)
    assert number == epoch[2][0] and part.tolist() == epoch[2][1].tolist()
