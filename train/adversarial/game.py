"""A GAN as a few choices: the losses of both players, made of `objectives`, `regularisers` and spectral norm.

The losses go into `adversarial.step`:

    critic_loss, generator_loss = losses(Game("wasserstein", regulariser="gradient-penalty"), generate, outputs)
    step = make_step(critic_loss, generator_loss, ...)
"""

import math
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
from train.objective import widen

ENERGIES = ("energy", "equilibrium")


@dataclass(frozen=True)
class Game:
    """The choices of a paper on GANs, apart from the nets and the optimizers.

    Attributes:
        objective: a name of `objectives.OBJECTIVES`; for energies "energy" (EBGAN) or "equilibrium" (BEGAN).
        pairing: none, average or paired, as in `objectives.relativistic`.
        regulariser: "none" or a name of `regularisers.REGULARISERS`, added to the critic's loss.
        weight: weight of the regulariser; its paper's if None.
        spectral: divide the critic's weights by their spectral norms.
        spectral_generator: the same of the generator's weights.
        pulling_away: weight of EBGAN's pulling-away term in the generator's loss.
        margin: EBGAN's margin.
        diversity: BEGAN's gamma.
        balance_rate: BEGAN's lambda_k.
        classify: both players also minimise the cross-entropy of the critic's class prediction (ACGAN).
        categories: number of values of the categorical code that the generator gets and the critic should recover
            (InfoGAN); 0 for none.
        codes: number of continuous codes, likewise.
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
        for name, high in (
            ("weight", math.inf),
            ("pulling_away", math.inf),
            ("margin", math.inf),
            ("diversity", 1),
            ("balance_rate", 1),
            ("categories", math.inf),
            ("codes", math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= high:
                raise ValueError(f"{name} is {value}; expected at least 0{', up to 1' if high == 1 else ''}")
        if self.objective in ENERGIES and self.pairing != "none":
            raise ValueError(f"objective '{self.objective}' has no pairs of scores; expected pairing none")


class Latents(NamedTuple):
    """The generator's inputs: z (batch, latent), of which the last dimensions are the codes.

    category: (batch,) integers; codes: (batch, codes) in [-1, 1]; None without.
    """

    z: Tensor
    category: Tensor | None = None
    codes: Tensor | None = None


def latents(game: Game, key: Tensor, count: int, width: int) -> Latents:
    """Standard normal noise, then the category as one of n, then the codes: z (count, width) in all.

    Raises ValueError if the codes leave no room for noise.
    """
    noise = width - game.categories - game.codes
    if noise < 1:
        taken = f"{game.categories} categories and {game.codes} codes"
        raise ValueError(f"{taken} leave no room in {width} latent dimensions")
    keys = random.sites(key, 3).unbind(0)
    parts, category, codes = [random.normal(keys[0], (count, noise))], None, None
    if game.categories:
        category = random.randint(keys[1], (count,), 0, game.categories).long()
        values = torch.arange(game.categories, device=key.device)
        parts.append((category[:, None] == values).float())  # one-hot, (count, categories)
    if game.codes:
        codes = random.uniform(keys[2], (count, game.codes), minval=-1.0, maxval=1.0)
        parts.append(codes)
    return Latents(torch.cat(parts, 1), category, codes)  # z: (count, noise + categories + codes)


def memory(game: Game, key: Tensor, critic: Tree, generator: Tree) -> Tree:
    """The first memory of the game's losses (see `adversarial.step`); the trees are the players' parameters."""
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
        latent: latent dimensions, the codes included.
        generate: (params, latents, labels, key) -> examples, in training mode.
        outputs: (params, examples, labels, key) -> the critic's outputs in training mode: `scores` (batch,), and as
            the game needs them `classes`, `category` and `codes` (logits, logits, means) and `features`.

    The metrics of the critic are `real` and `fake`, its mean scores, and each term of its loss by name. Latents have
    the dtype of the real examples; the critic's outputs are taken to float32 where they are in half precision.

    Raises ValueError if the codes leave no room for noise.
    """
    latents(game, random.key(0), 1, latent)

    def objective(memory: Tree) -> Objective:
        if game.objective == "energy":
            return objectives.energy(game.margin)
        if game.objective == "equilibrium":
            return objectives.equilibrium(memory["k"])
        return objectives.choose(game.objective, game.pairing)

    def latents_like(key: Tensor, real: Tensor) -> Latents:
        inputs = latents(game, key, len(real), latent)
        return inputs._replace(z=inputs.z.to(real.dtype)) if real.is_floating_point() else inputs

    def judge(params: Tree, x: Tensor, labels: Tensor, key: Tensor) -> dict[str, Tensor]:
        return {name: widen(value) for name, value in outputs(params, x, labels, key).items()}

    def auxiliary(on_fake: dict[str, Tensor], inputs: Latents, labels: Tensor) -> dict[str, Tensor]:
        """Auxiliary losses: the critic must recover the class, category and codes."""
        terms = {}
        if game.classify:
            terms["classes"] = F.cross_entropy(on_fake["classes"], labels)
        if inputs.category is not None:
            terms["category"] = -objectives.categorical_information(on_fake["category"], inputs.category)
        if inputs.codes is not None:
            terms["codes"] = -0.1 * objectives.gaussian_information(on_fake["codes"], inputs.codes)
        return terms

    def total(terms: dict[str, Tensor], metrics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return sum(terms.values()), {**metrics, **{name: term.detach() for name, term in terms.items()}}

    def critic_loss(own: Tree, other: Tree, batch: tuple, key: Tensor, memory: Tree):
        real, labels = batch
        keys = random.sites(key, 5).unbind(0)
        inputs = latents_like(keys[0], real)
        generator = spectral_norm(other, memory["generator_vectors"], steps=0)[0] if game.spectral_generator else other
        fake = generate(generator, inputs, labels, keys[1])
        if game.spectral:
            own, vectors = spectral_norm(own, memory["vectors"])
            memory = {**memory, "vectors": vectors}
        on_real, on_fake = judge(own, real, labels, keys[2]), judge(own, fake, labels, keys[3])
        scores = on_real["scores"], on_fake["scores"]
        terms = {"objective": objective(memory).critic(*scores), **auxiliary(on_fake, inputs, labels)}
        if game.classify:
            terms["real_classes"] = F.cross_entropy(on_real["classes"], labels)
        if game.regulariser != "none":
            options = {} if game.weight is None else {"weight": game.weight}
            regularise = REGULARISERS[game.regulariser]
            terms["penalty"] = regularise(
                lambda x: judge(own, x, labels, keys[2])["scores"], real, fake, keys[4], **options
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
        inputs = latents_like(keys[0], real)
        if game.spectral_generator:
            own, vectors = spectral_norm(own, memory["generator_vectors"])
            memory = {**memory, "generator_vectors": vectors}
        fake = generate(own, inputs, labels, keys[1])
        critic = spectral_norm(other, memory["vectors"], steps=0)[0] if game.spectral else other
        on_fake, goal = judge(critic, fake, labels, keys[2]), objective(memory)
        real_scores = judge(critic, real, labels, keys[3])["scores"] if goal.needs_real else None
        terms = {"objective": goal.generator(on_fake["scores"], real_scores), **auxiliary(on_fake, inputs, labels)}
        if game.pulling_away:
            terms["pulling_away"] = game.pulling_away * objectives.pulling_away(on_fake["features"])
        value, metrics = total(terms, {})
        return value, (metrics, memory)

    return critic_loss, generator_loss
