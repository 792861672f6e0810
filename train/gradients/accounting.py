"""Accounting of private training: the (epsilon, delta) of a number of noisy steps on random batches.

A mechanism M is (epsilon, delta)-private if P(M(D) in S) <= e^epsilon P(M(D') in S) + delta for all neighbours D, D'.

| sampling  | neighbours                            | a step changes by     | accountants |
| --------- | ------------------------------------- | --------------------- | ----------- |
| "poisson" | one has one example more              | max_norm              | pld, rdp    |
| "fixed"   | one example is replaced by another    | 2 max_norm            | rdp         |

"pld": privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049), tight, takes about half a second. "rdp":
Renyi differential privacy (Mironov 2017, arXiv:1702.07476), fast, a tenth larger; for samples without replacement
theorem 27 of Wang et al. 2019 (arXiv:1808.00087). With equal settings "fixed" has the larger epsilon, since a replaced
example counts twice: the two speak of different neighbours.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

SAMPLINGS = {"poisson": ("pld", "rdp"), "fixed": ("rdp",)}
ACCOUNTANTS = ("pld", "rdp")


def check_number(name: str, value: Any, expected: str, ok: Callable[[Any], bool]) -> None:
    """Raise ValueError unless `value` is a number, not nan, and `ok(value)`."""
    if not isinstance(value, Real) or math.isnan(value) or not ok(value):
        raise ValueError(f"{name} is {value if isinstance(value, Real) else repr(value)}; expected {expected}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a positive, finite number."""
    check_number(name, value, "a positive number", lambda x: 0 < x < math.inf)


def check_noise(noise_multiplier: Any) -> None:
    """Raise ValueError unless the noise multiplier is finite and not negative."""
    check_number("noise_multiplier", noise_multiplier, "a number that is not negative", lambda x: 0 <= x < math.inf)


def spent_epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: str | None = None,
    *,
    sampling: str = "poisson",
) -> float:
    """The least epsilon for which `steps` steps are known to be (epsilon, delta)-private.

    Args:
        noise_multiplier: standard deviation of the noise over max_norm.
        sampling_rate: probability that an example is in a batch; with "fixed" the batch size over the examples.
        accountant: "pld" or "rdp"; by default the first that the sampling has.
        sampling: "poisson" or "fixed", see above.

    Returns:
        epsilon; 0 without a step, infinity without noise.

    Raises:
        ValueError: a number out of range, an unknown sampling, or an accountant that it does not have.
    """
    import dp_accounting
    from dp_accounting import pld, rdp

    check_number("sampling_rate", sampling_rate, "a number in (0, 1]", lambda x: 0 < x <= 1)
    accountant = _accountant(accountant, sampling)
    check_number("delta", delta, "a number between 0 and 1", lambda x: 0 < x < 1)
    check_number("steps", steps, "an integer, at least 0", lambda x: x == int(x) >= 0)
    check_noise(noise_multiplier)
    if steps == 0 or noise_multiplier == 0:
        return math.inf if steps else 0.0
    if sampling == "fixed":
        # A replaced example changes the sum by up to 2 max_norm. The accountant takes the quotient of the sizes alone.
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
        event = dp_accounting.SampledWithoutReplacementDpEvent(1, sampling_rate, gaussian)
        spent = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    else:
        event = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
        spent = pld.PLDAccountant() if accountant == "pld" else rdp.RdpAccountant()
    return float(spent.compose(event, int(steps)).get_epsilon(delta))


def noise_for_epsilon(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    accountant: str | None = None,
    *,
    sampling: str = "poisson",
) -> float:
    """The least noise multiplier with which `steps` steps spend at most `epsilon`: the inverse of `spent_epsilon`.

    Exact to a thousandth, from above; takes some six times as long as `spent_epsilon`.

    Raises:
        ValueError: as `spent_epsilon`; epsilon is not positive, or so small that the accountant cannot show it.
    """
    from scipy.optimize import brentq

    check_positive("epsilon", epsilon)
    check_number("steps", steps, "at least 1", lambda x: x >= 1)
    accountant = _accountant(accountant, sampling)

    def excess(log_noise: float, accountant: str) -> float:
        """log(spent / epsilon), about linear in the logarithm of the noise."""
        spent = spent_epsilon(math.exp(log_noise), sampling_rate, steps, delta, accountant, sampling=sampling)
        return math.log(max(spent, 1e-12) / epsilon)

    low, high = -3.0, 12.0
    if excess(high, "rdp") > 0:
        raise ValueError(f"epsilon is {epsilon}; no noise multiplier up to {math.exp(high):.0f} is known to keep to it")
    while excess(low, "rdp") <= 0:
        low -= 1
    root = brentq(excess, low, high, ("rdp",), xtol=1e-4)
    if accountant == "pld":
        # Renyi differential privacy asks for more noise, rarely for half as much again.
        low = root - 0.4
        while excess(low, accountant) <= 0:
            low -= 0.4
        root = brentq(excess, low, root + 1e-3, (accountant,), xtol=3e-4)
    while excess(root, accountant) > 0:
        root += 3e-4
    return math.exp(root)


def _accountant(accountant: str | None, sampling: str) -> str:
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling '{sampling}' is unknown; expected one of {', '.join(SAMPLINGS)}")
    if accountant is not None and accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant '{accountant}' is unknown; expected one of {', '.join(ACCOUNTANTS)}")
    if accountant is not None and accountant not in SAMPLINGS[sampling]:
        choices = ", ".join(SAMPLINGS[sampling])
        raise ValueError(f"accountant '{accountant}' has no bound for sampling '{sampling}'; expected {choices}")
    return accountant or SAMPLINGS[sampling][0]
