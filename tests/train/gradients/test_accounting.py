"""The accounting of private training against closed forms, numerical integrals and another accountant."""

import math

import numpy as np
import pytest
import torch

from train.gradients import accounting


def test_accounting_agrees_with_opacus():
    """Its Renyi accountant to the last digits; its PRV accountant is at most 0.01 above the least epsilon."""
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed", exc_type=ImportError)
    noise, rate, steps, delta = 1.1, 256 / 60000, 3515, 1e-5
    actual = {}
    for name, accountant in (("rdp", accountants.RDPAccountant()), ("pld", accountants.PRVAccountant())):
        accountant.history = [(noise, rate, steps)]
        actual[name] = accountant.get_epsilon(delta)
    ours = {name: accounting.spent_epsilon(noise, rate, steps, delta, name) for name in actual}
    assert ours["rdp"] == pytest.approx(actual["rdp"], rel=1e-6)
    assert actual["pld"] - 0.011 < ours["pld"] <= actual["pld"] + 1e-3
    assert ours["pld"] < ours["rdp"]


def test_epsilon_of_one_gaussian_is_the_exact_one():
    """delta(epsilon) of a Gaussian in closed form: Balle and Wang 2018, arXiv:1805.06530, theorem 8."""
    noise, delta = 2.0, 1e-5
    epsilon = accounting.spent_epsilon(noise, 1.0, 1, delta)

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    actual = phi(1 / (2 * noise) - epsilon * noise) - math.exp(epsilon) * phi(-1 / (2 * noise) - epsilon * noise)
    assert actual == pytest.approx(delta, rel=2e-3)


@pytest.mark.parametrize("accountant", ["rdp", pytest.param("pld", marks=pytest.mark.slow)])
def test_noise_for_epsilon_is_the_least(accountant):
    rate, steps, delta, epsilon = 0.01, 50, 1e-5, 1.0
    noise = accounting.noise_for_epsilon(epsilon, delta, rate, steps, accountant)
    assert accounting.spent_epsilon(noise, rate, steps, delta, accountant) <= epsilon
    assert accounting.spent_epsilon(noise * 0.998, rate, steps, delta, accountant) > epsilon


def test_limits_of_the_accounting():
    assert accounting.spent_epsilon(1.0, 0.1, 0, 1e-5) == 0
    assert accounting.spent_epsilon(0.0, 0.1, 1, 1e-5) == math.inf


def call_noise(**options):
    return accounting.noise_for_epsilon(**{"epsilon": 1.0, "delta": 1e-5, "sampling_rate": 0.1, "steps": 10} | options)


def test_fixed_size_is_an_upper_bound_of_the_worst_pair():
    """One step on m of n examples, the replaced one with gradients C and -C, the others with none.

    Then M(D) = (1 - q) N(0, s^2) + q N(C, s^2) and M(D') the same with -C, whose delta is an integral.
    """
    noise, rate, delta = 2.0, 0.5, 1e-5
    epsilon = accounting.spent_epsilon(noise, rate, 1, delta, sampling="fixed")
    x = np.linspace(-40, 40, 400_001)

    def density(shift):
        normal = np.exp(-(x**2) / (2 * noise**2)), np.exp(-((x - shift) ** 2) / (2 * noise**2))
        return ((1 - rate) * normal[0] + rate * normal[1]) / (noise * math.sqrt(2 * math.pi))

    def spent(epsilon):
        return np.clip(density(1.0) - math.exp(epsilon) * density(-1.0), 0, None).sum() * (x[1] - x[0])

    assert spent(epsilon) <= delta
    assert spent(epsilon / 2.5) > delta  # the bound is loose, but not by more
    as_if_added = accounting.spent_epsilon(2 * noise, rate, 1, delta, sampling="fixed")
    assert spent(as_if_added) > delta


def test_fixed_size_of_all_examples_is_the_plain_gaussian_of_twice_the_sensitivity():
    actual = accounting.spent_epsilon(3.0, 1.0, 20, 1e-5, sampling="fixed")
    assert actual == pytest.approx(accounting.spent_epsilon(1.5, 1.0, 20, 1e-5, "rdp"), rel=1e-9)


@pytest.mark.slow
def test_noise_for_a_fixed_size():
    noise = accounting.noise_for_epsilon(1.0, 1e-5, 0.5, 2, sampling="fixed")
    assert accounting.spent_epsilon(noise, 0.5, 2, 1e-5, sampling="fixed") <= 1
    assert accounting.spent_epsilon(noise * 0.998, 0.5, 2, 1e-5, sampling="fixed") > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accounting.spent_epsilon(-1.0, 0.1, 10, 1e-5), "noise_multiplier is -1.0; expected"),
        (lambda: accounting.spent_epsilon(1.0, 1.5, 10, 1e-5), "sampling_rate is 1.5; expected a number in"),
        (lambda: accounting.spent_epsilon(1.0, 0.1, -1, 1e-5), "steps is -1; expected an integer, at least 0"),
        (lambda: accounting.spent_epsilon(1.0, 0.1, 10, 1.0), "delta is 1.0; expected a number between 0 and 1"),
        (lambda: accounting.spent_epsilon(1.0, 0.1, 10, 1e-5, "moments"), "accountant 'moments' is unknown"),
        (lambda: call_noise(epsilon=0.0), "epsilon is 0.0; expected a positive number"),
        (lambda: call_noise(steps=0), "steps is 0; expected at least 1"),
        (lambda: accounting.spent_epsilon(1.0, 0.1, 2.5, 1e-5), "steps is 2.5; expected an integer"),
        (lambda: accounting.spent_epsilon(None, 0.1, 2, 1e-5), "noise_multiplier is None; expected a number"),
        (lambda: accounting.spent_epsilon(torch.tensor(1.0), 0.1, 2, 1e-5), r"noise_multiplier is tensor\(1.\); exp"),
        (lambda: accounting.spent_epsilon(1.0, 0.1, 2, 1e-5, sampling="shuffled"), "sampling 'shuffled' is unknown"),
        (
            lambda: accounting.spent_epsilon(1.0, 0.1, 2, 1e-5, "pld", sampling="fixed"),
            "accountant 'pld' has no bound for sampling 'fixed'; expected rdp",
        ),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
