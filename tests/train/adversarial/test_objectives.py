"""Losses of the two players against formulas written out with torch.nn.functional and numpy, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad

from train.adversarial import objectives
from train.adversarial.objectives import OBJECTIVES, PAIRINGS, choose, least_squares, relativistic

GENERATOR = torch.Generator().manual_seed(0)
REAL = 2 * torch.randn(6, generator=GENERATOR, dtype=torch.float64)
FAKE = 2 * torch.randn(6, generator=GENERATOR, dtype=torch.float64)
ONES, ZEROS = torch.ones_like(REAL), torch.zeros_like(REAL)
bce, mse = F.binary_cross_entropy_with_logits, F.mse_loss


def adversarial(real, fake):
    return bce(real, ONES) + bce(fake, ZEROS)


def hinge_of(real, fake):
    return F.margin_ranking_loss(real, ZEROS, ONES, margin=1) + F.margin_ranking_loss(ZEROS, fake, ONES, margin=1)


CASES = {
    "minimax": (adversarial, lambda fake: -bce(fake, ZEROS)),
    "non-saturating": (adversarial, lambda fake: bce(fake, ONES)),
    "wasserstein": (lambda real, fake: -(real.mean() - fake.mean()), lambda fake: -fake.mean()),
    "least-squares": (
        lambda real, fake: 0.5 * mse(real, ONES) + 0.5 * mse(fake, ZEROS),
        lambda fake: 0.5 * mse(fake, ONES),
    ),
    "hinge": (hinge_of, lambda fake: -fake.mean()),
}


def test_every_objective_has_a_case():
    assert list(CASES) == list(OBJECTIVES)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    critic, generator = CASES[name]
    objective = OBJECTIVES[name]
    assert not objective.needs_real
    for ours, theirs, arguments in (
        (objective.critic, critic, (REAL, FAKE)),
        (objective.generator, generator, (FAKE,)),
    ):
        torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-12, atol=1e-12)
        for i in range(len(arguments)):
            torch.testing.assert_close(grad(ours, i)(*arguments), grad(theirs, i)(*arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_both_players_pull_the_way_they_should(name, pairing):
    """The critic gains by higher real and lower fake scores, the generator by higher fake ones."""
    objective = choose(name, pairing)
    real, fake = torch.tensor([0.4, 0.2]), torch.tensor([0.3, 0.1])  # between the labels of least squares
    to_real, to_fake = grad(objective.critic, (0, 1))(real, fake)
    assert (to_real < 0).all() and (to_fake > 0).all()
    assert (grad(objective.generator)(fake, real) < 0).all()


@pytest.mark.parametrize("name", ["minimax", "non-saturating", "hinge"])
def test_scores_that_are_far_out_stay_finite(name):
    far = torch.tensor([1e4, -1e4])
    objective = OBJECTIVES[name]
    values = (*grad(objective.critic, (0, 1))(far, far), grad(objective.generator)(far), objective.critic(far, far))
    assert all(torch.isfinite(x).all() for x in values)


def test_non_saturating_keeps_its_gradient_where_minimax_loses_it():
    sure = torch.tensor([-30.0])
    assert grad(OBJECTIVES["minimax"].generator)(sure).abs() < 1e-9
    assert grad(OBJECTIVES["non-saturating"].generator)(sure) == -1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_patches_are_averaged(name):
    real, fake = REAL.reshape(2, 1, 3, 1), FAKE.reshape(2, 1, 3, 1)
    torch.testing.assert_close(OBJECTIVES[name].critic(real, fake), OBJECTIVES[name].critic(REAL, FAKE))
    torch.testing.assert_close(OBJECTIVES[name].generator(fake), OBJECTIVES[name].generator(FAKE))


def test_half_precision_is_averaged_in_single():
    scores = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    value = OBJECTIVES["wasserstein"].critic(scores, 2 * scores)
    assert value.dtype == torch.float32 and abs(value - scores[0].float()) < 1e-6


@pytest.mark.parametrize("name", ["minimax", "non-saturating"])
def test_relativistic_standard_is_the_papers(name):
    average = relativistic(OBJECTIVES[name], "average")
    expected = bce(REAL - FAKE.mean(), ONES) + bce(FAKE - REAL.mean(), ZEROS)
    torch.testing.assert_close(average.critic(REAL, FAKE), expected)
    expected = bce(FAKE - REAL.mean(), ONES) + bce(REAL - FAKE.mean(), ZEROS)
    torch.testing.assert_close(average.generator(FAKE, REAL), expected)
    paired = relativistic(OBJECTIVES[name], "paired")
    torch.testing.assert_close(paired.critic(REAL, FAKE), bce(REAL - FAKE, ONES))
    torch.testing.assert_close(paired.generator(FAKE, REAL), bce(FAKE - REAL, ONES))
    assert average.needs_real and paired.needs_real


def test_relativistic_least_squares_has_labels_around_zero():
    expected = 0.5 * mse(REAL - FAKE.mean(), ONES) + 0.5 * mse(FAKE - REAL.mean(), -ONES)
    torch.testing.assert_close(choose("least-squares", "average").critic(REAL, FAKE), expected)


def test_paired_wasserstein_is_wasserstein():
    paired = choose("wasserstein", "paired")
    torch.testing.assert_close(paired.critic(REAL, FAKE), OBJECTIVES["wasserstein"].critic(REAL, FAKE))


def test_pearson_labels_of_least_squares():
    objective = least_squares(-1, 1, 0)
    torch.testing.assert_close(objective.critic(REAL, FAKE), 0.5 * mse(REAL, ONES) + 0.5 * mse(FAKE, -ONES))
    torch.testing.assert_close(objective.generator(FAKE), 0.5 * FAKE.square().mean())


def test_energies():
    real, fake = REAL.abs(), FAKE.abs()
    objective = objectives.energy(1.5)
    expected = real.mean() + np.maximum(0, 1.5 - fake.numpy()).mean()
    torch.testing.assert_close(objective.critic(real, fake), expected)
    torch.testing.assert_close(objective.generator(fake), fake.mean())
    assert (grad(objective.critic, 1)(real, fake) == 0).equal(fake > 1.5)
    torch.testing.assert_close(
        objectives.equilibrium(torch.tensor(0.3)).critic(real, fake), real.mean() - 0.3 * fake.mean()
    )


def test_pulling_away_is_the_mean_squared_cosine():
    s = torch.randn(5, 7, generator=GENERATOR, dtype=torch.float64)
    pairs = [F.cosine_similarity(s[i], s[j], 0) ** 2 for i in range(5) for j in range(5) if i != j]
    torch.testing.assert_close(objectives.pulling_away(s), torch.stack(pairs).mean())
    torch.testing.assert_close(objectives.pulling_away(torch.eye(4)), torch.tensor(0.0))
    torch.testing.assert_close(objectives.pulling_away(s[:1].expand(3, 7)), torch.tensor(1.0, dtype=torch.float64))


def test_equilibrium_is_held():
    """k goes up while generated energies are too low, stays inside [0, 1], and settles where E(y) = diversity E(x)."""
    k, real = torch.tensor(0.0), torch.tensor([1.0, 3.0])
    before = k.clone()
    k, measure = objectives.next_equilibrium(k, real, torch.tensor([0.4, 0.2]), diversity=0.5, rate=0.1)
    torch.testing.assert_close(k, torch.tensor(0.1 * (0.5 * 2 - 0.3)))
    torch.testing.assert_close(measure, torch.tensor(2 + abs(0.5 * 2 - 0.3)))
    assert before == 0
    for _ in range(100):
        k, _ = objectives.next_equilibrium(k, real, torch.zeros(2), rate=0.1)
    assert k == 1
    held, measure = objectives.next_equilibrium(k, real, torch.ones(2), rate=0.1)
    assert held == k and measure == 2
    for _ in range(100):
        k, _ = objectives.next_equilibrium(k, real, 9 * torch.ones(2), rate=0.1)
    assert k == 0


def test_categorical_information():
    logits = torch.randn(9, 4, generator=GENERATOR, dtype=torch.float64)
    codes = torch.arange(9) % 4
    expected = np.mean([math.log(4) + float(logits[i].log_softmax(0)[codes[i]]) for i in range(9)])
    torch.testing.assert_close(objectives.categorical_information(logits, codes), torch.tensor(expected))
    assert abs(objectives.categorical_information(torch.zeros(9, 4), codes)) < 1e-6
    sure = 100 * F.one_hot(codes, 4).float()
    assert abs(objectives.categorical_information(sure, codes) - math.log(4)) < 1e-6


def test_gaussian_information():
    mean, codes, log_variance = torch.randn(3, 8, 2, generator=GENERATOR, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = (normal.log_prob(codes) + math.log(2)).sum(1).mean()
    torch.testing.assert_close(objectives.gaussian_information(mean, codes, log_variance), expected)
    unit = torch.distributions.Normal(mean, 1.0).log_prob(codes).sum(1).mean()
    torch.testing.assert_close(objectives.gaussian_information(mean, codes, entropy=0.0), unit)


def test_compiled_losses_are_the_eager_ones():
    torch._dynamo.reset()

    def every(real, fake):
        values = [f for name in OBJECTIVES for p in PAIRINGS for f in choose(name, p)[:2]]
        return torch.stack([f(real, fake) for f in values])

    compiled = torch.compile(every, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(REAL, FAKE), every(REAL, FAKE))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: choose("hinged"), "no objective 'hinged': choose one of minimax"),
        (lambda: choose("hinge", "both"), "no pairing 'both'"),
        (lambda: relativistic(OBJECTIVES["hinge"], "none"), "pairing must be 'average' or 'paired'"),
        (lambda: choose("hinge", "paired").critic(REAL, FAKE[:3]), r"got \(6,\) and \(3,\)"),
        (lambda: choose("hinge", "paired").generator(FAKE), "needs the real scores"),
        (lambda: objectives.energy(0), "margin must be positive"),
        (lambda: objectives.pulling_away(torch.ones(1, 3)), r"\(1, 3\), expected"),
        (lambda: objectives.next_equilibrium(ZEROS[0], REAL, FAKE, diversity=2), "diversity must be in"),
        (lambda: objectives.categorical_information(torch.ones(3, 4), torch.zeros(2)), r"logits \(3, 4\)"),
        (lambda: objectives.gaussian_information(torch.ones(3, 4), torch.zeros(3)), r"mean \(3, 4\)"),
    ],
)
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
