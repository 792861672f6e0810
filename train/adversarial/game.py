"""A GAN as a few choices: what both players minimise, made of `objectives`, `regularisers` and spectral norm.

critic_loss, generator_loss = losses(Game("wasserstein", regulariser="gradient-penalty"), generate, outputs)
step = make_step(critic_loss, generator_loss, ...)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core import random
from core.spectral import spectral_norm, spectral_vectors
from core.tree import Tree
from train.adversarial import objectives
from train.adversarial.objectives import OBJECTIVES, PAIRINGS, Objective
from train.adversarial.regularisers import REGULARISERS

ENERGIES = ("energy", "equilibrium")


@dataclass(frozen=True)
class Game:
    """What a paper on GANs decides, apart from the nets and the optimizers.

    Attributes:
        objective: a name of `objectives.OBJECTIVES`; for energies "energy" (EBGAN) or "equilibrium" (BEGAN).
        pairing: none, average or paired, as in `objectives.relativistic`.
        regulariser: "none" or a name of `regularisers.REGULARISERS`, added to the critic's loss.
        weight: of the regulariser; its paper's if None.
        spectral, spectral_generator: divide the critic's, the generator's weights by their spectral norms.
        pulling_away: weight of EBGAN's term in the generator's loss.
        margin: EBGAN's.
        diversity, balance_rate: BEGAN's gamma and lambda_k.
        classify: both players minimise the cross-entropy of the classes that the critic tells too (ACGAN).
        categories, codes: how many values a categorical code has that the generator gets and the critic is to tell, and
            how many continuous ones there are (InfoGAN); 0 for none.
    """

    objective: str = "non-saturating"
    pairing: str = "none"
    regulariser: str = "none"
    weight: float | None = None
    spectral: bool = False
    spectral_generator: bool = False
    pulling_away: float = 0.0
    margin: float = 1.0
    diversity: float = 0.5
    balance_rate: float = 1e-3
    classify: bool = False
    categories: int = 0
    codes: int = 0

    def __post_init__(self):
        for name, options in (
            ("objective", (*OBJECTIVES, *ENERGIES)),
            ("pairing", PAIRINGS),
            ("regulariser", ("none", *REGULARISERS)),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} '{getattr(self, name)}' is unknown; expected one of {', '.join(options)}")
        if self.objective in ENERGIES and self.pairing != "none":
            raise ValueError(f"objective '{self.objective}' has no pairs of scores; expected pairing none")


class Latents(NamedTuple):
    """What a generator begins from: z (batch, latent), of which the last numbers are the codes.

    category: (batch,) integers; codes: (batch, codes) in [-1, 1]; None without.
    """

    z: Tensor
    category: Tensor | None = None
    codes: Tensor | None = None


def latents(game: Game, key: Tensor, count: int, width: int) -> Latents:
    """Standard normal numbers, then the category as one of n, then the codes: z (count, width) in all.

    Raises ValueError if the codes leave no room for noise.
    """
    noise = width - game.categories - game.codes
    if noise < 1:
        raise ValueError(f"{game.categories} categories and {game.codes} codes leave no room in {width} latent numbers")
    keys = random.sites(key, 3).unbind(0)
    parts, category, codes = [random.normal(keys[0], (count, noise))], None, None
    if game.categories:
        category = random.randint(keys[1], (count,), 0, game.categories).long()
        parts.append((category[:, None] == torch.arange(game.categories, device=key.device)).float())
    if game.codes:
        codes = random.uniform(keys[2], (count, game.codes), minval=-1.0, maxval=1.0)
        parts.append(codes)
    return Latents(torch.cat(parts, 1), category, codes)


def memory(game: Game, key: Tensor, critic: Tree, generator: Tree) -> Tree:
    """What the losses of this game carry from step to step, at the beginning; the trees are the players' parameters."""
    parts = {"k": torch.zeros((), device=key.device)} if game.objective == "equilibrium" else {}
    parts |= {"vectors": spectral_vectors(key, critic)} if game.spectral else {}
    return parts | ({"generator_vectors": spectral_vectors(key, generator)} if game.spectral_generator else {})


def losses(
    game: Game,
    latent: int,
    generate: Callable[[Tree, Latents, Tensor | None, Tensor], Tensor],
    outputs: Callable[[Tree, Tensor, Tensor | None, Tensor], dict[str, Tensor]],
) -> tuple[Callable, Callable]:
    """(critic_loss, generator_loss) as `train.adversarial.step.make_step` takes them; a batch is (real, labels).

    Args:
        latent: numbers that the generator begins from.
        generate: (params, latents, labels, key) -> examples, in training.
        outputs: (params, examples, labels, key) -> what the critic says of them in training: `scores` (batch,), and as
            the game needs them `classes`, `category` and `codes` (logits, logits, means) and `features`.

    The metrics of the critic are `real` and `fake`, its mean scores, and each term of its loss by name.

    Raises ValueError if the codes leave no room for noise.
    """
    latents(game, random.key(0), 1, latent)

    def objective(memory: Tree) -> Objective:
        if game.objective == "energy":
            return objectives.energy(game.margin)
        if game.objective == "equilibrium":
            return objectives.equilibrium(memory["k"])
        return objectives.choose(game.objective, game.pairing)

    def told(said: dict[str, Tensor], given: Latents, labels: Tensor) -> dict[str, Tensor]:
        """What is lost where the critic does not tell what the generator was given."""
        terms = {}
        if game.classify:
            terms["classes"] = F.cross_entropy(said["classes"], labels)
        if given.category is not None:
            terms["category"] = -objectives.categorical_information(said["category"], given.category)
        if given.codes is not None:
            terms["codes"] = -0.1 * objectives.gaussian_information(said["codes"], given.codes)
        return terms

    def total(terms: dict[str, Tensor], metrics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return sum(terms.values()), {**metrics, **{name: term.detach() for name, term in terms.items()}}

    def critic_loss(own: Tree, other: Tree, batch: tuple, key: Tensor, memory: Tree):
        real, labels = batch
        keys = random.sites(key, 5).unbind(0)
        given = latents(game, keys[0], len(real), latent)
        generator = spectral_norm(other, memory["generator_vectors"], steps=0)[0] if game.spectral_generator else other
        fake = generate(generator, given, labels, keys[1])
        if game.spectral:
            own, vectors = spectral_norm(own, memory["vectors"])
            memory = {**memory, "vectors": vectors}
        on_real, on_fake = outputs(own, real, labels, keys[2]), outputs(own, fake, labels, keys[3])
        scores = on_real["scores"], on_fake["scores"]
        terms = {"objective": objective(memory).critic(*scores), **told(on_fake, given, labels)}
        if game.classify:
            terms["real_classes"] = F.cross_entropy(on_real["classes"], labels)
        if game.regulariser != "none":
            options = {} if game.weight is None else {"weight": game.weight}
            regularise = REGULARISERS[game.regulariser]
            terms["penalty"] = regularise(
                lambda x: outputs(own, x, labels, keys[2])["scores"], real, fake, keys[4], **options
            )
        metrics = {"real": scores[0].mean().detach(), "fake": scores[1].mean().detach()}
        if game.objective == "equilibrium":
            control = {"diversity": game.diversity, "rate": game.balance_rate}
            k, metrics["convergence"] = objectives.next_equilibrium(memory["k"], *scores, **control)
            memory = {**memory, "k": k}
        value, metrics = total(terms, metrics)
        return value, (metrics, memory)

    def generator_loss(own: Tree, other: Tree, batch: tuple, key: Tensor, memory: Tree):
        real, labels = batch
        keys = random.sites(key, 4).unbind(0)
        given = latents(game, keys[0], len(real), latent)
        if game.spectral_generator:
            own, vectors = spectral_norm(own, memory["generator_vectors"])
            memory = {**memory, "generator_vectors": vectors}
        fake = generate(own, given, labels, keys[1])
        critic = spectral_norm(other, memory["vectors"], steps=0)[0] if game.spectral else other
        said, goal = outputs(critic, fake, labels, keys[2]), objective(memory)
        real_scores = outputs(critic, real, labels, keys[3])["scores"] if goal.needs_real else None
        terms = {"objective": goal.generator(said["scores"], real_scores), **told(said, given, labels)}
        if game.pulling_away:
            terms["pulling_away"] = game.pulling_away * objectives.pulling_away(said["features"])
        value, metrics = total(terms, {})
        return value, (metrics, memory)

    return critic_loss, generator_loss
