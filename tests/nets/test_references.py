"""Every net that has a reference computes the same from the same weights; the rows are in tests/registry."""

import pytest
import torch

from core import random
from tests.nets.parity import check_initial, check_names, check_parity, randomise
from tests.registry import classifier_references, dense_references  # noqa: F401 - their rows
from tests.registry.references import INITIAL, NAMES, PARITY


@pytest.mark.parametrize("row", NAMES.values(), ids=NAMES)
def test_names_and_shapes(row):
    with torch.device("meta"):
        module = row.module()
    check_names(row.net, row.cfg, module, row.source)


@pytest.mark.parametrize("row", PARITY.values(), ids=PARITY)
def test_parity(row):
    torch.manual_seed(0)
    check_parity(row.net, row.cfg, randomise(row.module()), random.normal(random.key(0), row.shape))


@pytest.mark.parametrize("row", INITIAL.values(), ids=INITIAL)
def test_initial_values(row):
    torch.manual_seed(0)
    check_initial(row.net, row.cfg, row.module(), row.without)
