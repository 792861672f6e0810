"""The buffer of past images against one that handles them one after another."""

import pytest
import torch
from torch.func import vmap

from core import random
from train.adversarial.replay_buffer import buffer, create


def numbered(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 2, 3, 4).clone()


def one_by_one(stored: list, capacity: int, images: list, key) -> list:
    """The rule as the paper's code has it, with the same draws; changes `stored`."""
    swap_key, place_key = random.split(key).unbind(0)
    swaps = random.bernoulli(swap_key, 0.5, (len(images),)).tolist()
    places = random.randint(place_key, (len(images),), 0, capacity).tolist()
    passed = []
    for image, swap, place in zip(images, swaps, places, strict=True):
        if len(stored) < capacity:
            stored.append(image)
            passed.append(image)
        elif swap:
            passed.append(stored[place])
            stored[place] = image
        else:
            passed.append(image)
    return passed


@pytest.mark.parametrize(("capacity", "batch"), [(5, 1), (5, 3), (2, 6), (1, 2), (7, 7)])
def test_batches_are_handled_one_after_another(capacity, batch):
    state, stored = create((2, 3, 4), capacity), []
    for step in range(12):
        images = numbered(batch * step, batch)
        before = [x.clone() for x in state]
        key = random.fold_in(random.key(4), step)
        new, passed = buffer(state, images, key)
        expected = one_by_one(stored, capacity, list(range(batch * step, batch * step + batch)), key)
        assert passed[:, 0, 0, 0].tolist() == expected and int(new.count) == len(stored)
        assert new.images[: len(stored), 1, 2, 3].tolist() == stored and not new.images[len(stored) :].any()
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
        state = new


def test_half_of_what_passes_is_old():
    state = create((1, 1, 1), 50)
    old = []
    for step in range(200):
        images = torch.full((4, 1, 1, 1), float(step))
        state, passed = buffer(state, images, random.fold_in(random.key(0), step))
        old.append((passed < step).float().mean())
    assert not any(old[:12]) and 0.45 < torch.stack(old[20:]).mean() < 0.55


def test_compiles_once_and_under_vmap():
    torch._dynamo.reset()
    compiled = torch.compile(buffer, backend="aot_eager", fullgraph=True, dynamic=False)
    keys = random.split(random.key(1), 9)
    a = b = create((2, 3, 4), 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, key in enumerate(keys):
            (a, out), (b, expected) = compiled(a, numbered(3 * step, 3), key), buffer(b, numbered(3 * step, 3), key)
            assert torch.equal(out, expected) and torch.equal(a.images, b.images) and torch.equal(a.count, b.count)
    images = torch.stack([numbered(0, 3), numbered(50, 3)])
    (together, passed) = vmap(buffer, (None, 0, 0))(b, images, keys[:2])
    for i in range(2):
        alone, out = buffer(b, images[i], keys[i])
        assert torch.equal(passed[i], out) and torch.equal(together.images[i], alone.images)


def test_what_is_refused():
    with pytest.raises(ValueError, match="capacity is 0; expected at least 1"):
        create((1, 2, 2), 0)
    with pytest.raises(ValueError, match=r"expected images of shape \(1, 2, 2\), found \(3, 2, 2\)"):
        buffer(create((1, 2, 2)), torch.zeros(4, 3, 2, 2), random.key(0))


def test_images_in_half_precision_pass_in_half():
    state = create((2, 3, 4), 2)
    for step in range(4):
        state, passed = buffer(state, numbered(2 * step, 2).bfloat16(), random.fold_in(random.key(4), step))
        assert passed.dtype == torch.bfloat16 and state.images.dtype == torch.float32
