"""The train step of two players: some steps of the critic, one of the generator, compiled.

    critic <- critic - a grad L_C(critic, generator),  `critic_steps` times;   generator <- generator - b grad L_G

A player's parameters can be a tree of several nets: CycleGAN's generator is two of them. Since all is torch.func inside
one compiled function, a critic's loss may hold gradients of its own (`regularisers`), which plain PyTorch cannot
compile.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, transforms, tree
from core.stats import update as update_stats
from core.tree import Tree
from train import step as single
from train.objective import FULL_PRECISION, Policy, check_split, widen
from train.optimizers import Optimizer
from train.step import TrainState, advance, compiled

Loss = Callable[[Tree, Tree, Tree, Tensor, Tree], tuple[Tensor, tuple[dict[str, Tensor], Tree]]]


class State(NamedTuple):
    """Both players, and what else their losses carry from step to step: `memory`, a tree of tensors, perhaps empty.

    Examples are the vectors of spectral norm, BEGAN's k, CycleGAN's buffer of images.
    """

    critic: TrainState
    generator: TrainState
    memory: Tree


def create(
    key: Tensor,
    critic: Tree,
    generator: Tree,
    critic_optimizer: Optimizer,
    generator_optimizer: Optimizer,
    memory: Tree = None,
) -> State:
    """The state before the first step; `critic` and `generator` are specs.

    Args:
        key: (2,); the critic begins from `fold_in(key, 0)`, the generator from `fold_in(key, 1)`.
    """
    keys = random.split(key).unbind(0)
    players = zip(keys, (critic, generator), (critic_optimizer, generator_optimizer), strict=True)
    return State(*(single.create(*player) for player in players), {} if memory is None else memory)


def make_step(
    critic_loss: Loss,
    generator_loss: Loss,
    critic_optimizer: Optimizer,
    generator_optimizer: Optimizer,
    *,
    policy: Policy = FULL_PRECISION,
    critic_steps: int = 1,
    constrain: Callable[[Tree], Tree] | None = None,
    unroll: bool = False,
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[[State, Tree], tuple[State, dict[str, Tensor]]]:
    """One step of the game.

    Args:
        critic_loss, generator_loss: `loss(own, other, batch, key, memory) -> (scalar, (metrics, memory))`: the values,
            merged with their Stats, of the player whose loss it is and of the other; a key (2,) of that step and
            player. Only `own` is differentiated and has its Stats updated.
        policy: mixed precision, as in `train.step.make_step`: the losses get both players' parameters and the batch's
            floating-point leaves in another dtype; the memory keeps its own.
        critic_steps: steps of the critic per step of the generator.
        constrain: applied to the critic's parameters after each of its steps, such as clipping (WGAN).
        unroll: compile all of it as one graph, which grows with the steps of the critic, instead of one graph per
            player. Five steps of a small WGAN-GP take three minutes to compile, one step and the generator's a quarter
            of that, and run as fast.
        compile: through torch.compile, `fullgraph`; `backend` as there.

    Returns:
        `step(state, batch) -> (state, metrics)`. Each leaf of the batch is (critic_steps, examples, ...): the critic's
        batches, of which the generator sees the last. The metrics, 0-D and in float32 or wider, are `critic/loss`,
        `critic/grad_norm` and those of the loss, `critic/...` of the critic's last step, and likewise `generator/...`.

    Raises:
        ValueError: from the step: the batch has not `critic_steps` parts; Stats among a player's parameters.
    """
    if critic_steps < 1:
        raise ValueError(f"critic_steps is {critic_steps}; expected at least 1")

    def values(player: TrainState) -> Tree:
        return tree.merge(policy.cast(player.params), player.stats)

    def turn(loss: Loss, optimizer: Optimizer, player: TrainState, other: TrainState, batch: Tree, memory: Tree):
        """One player's step: (player, metrics, memory)."""
        check_split(player)
        key = random.fold_in(player.key, player.step)
        others, batch = values(other), policy.cast(batch)

        def objective(params: Tree, stats: Tree):
            own = tree.merge(policy.cast(params), stats)
            value, (metrics, new) = loss(own, others, batch, key, memory)
            # In its own dtype: the next step would be compiled anew for another one.
            new = tree.map(lambda old, x: x.to(old.dtype), memory, new)
            return widen(value), (tree.map(widen, metrics), new)

        (value, (metrics, memory)), (grads, increments) = transforms.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(player.params, player.stats)
        # The second derivative of a convolution comes transposed, and so would the state of the optimizer.
        grads = tree.map(torch.Tensor.contiguous, grads)
        metrics = {"loss": value, "grad_norm": tree.norm(grads), **metrics}
        player, _ = advance(optimizer, player, grads, update_stats(player.stats, increments))
        return player, metrics, memory

    def critic_turn(state: State, batch: Tree):
        critic, metrics, memory = turn(
            critic_loss, critic_optimizer, state.critic, state.generator, batch, state.memory
        )
        critic = critic if constrain is None else critic._replace(params=constrain(critic.params))
        return State(critic, state.generator, memory), metrics

    def generator_turn(state: State, batch: Tree):
        generator, metrics, memory = turn(
            generator_loss, generator_optimizer, state.generator, state.critic, batch, state.memory
        )
        return State(state.critic, generator, memory), metrics

    def maybe_compiled(f: Callable) -> Callable:
        return compiled(f, backend) if compile else f

    turns = critic_turn, generator_turn
    critic_call, generator_call = turns if unroll else map(maybe_compiled, turns)

    def whole(state: State, batch: Tree):
        for i in range(critic_steps):
            part = tree.map(lambda x, i=i: x[i], batch)
            state, metrics = critic_call(_usual_strides(state), part)
        state, more = generator_call(_usual_strides(state), part)
        metrics = {f"critic/{name}": value for name, value in metrics.items()}
        return state, metrics | {f"generator/{name}": value for name, value in more.items()}

    run = maybe_compiled(whole) if unroll else whole

    def step(state: State, batch: Tree):
        sizes = {len(leaf) for leaf in tree.leaves(batch)}
        if sizes != {critic_steps}:
            raise ValueError(
                f"the batch has {sorted(sizes)} parts; expected {critic_steps}, one per step of the critic"
            )
        return run(state, batch)

    return step


def _usual_strides(state: State) -> State:
    """The state in the strides that a first state has.

    A compiled step may return others in axes of length 1, where they do not matter; it would be compiled once more for
    its own result.
    """

    def usual(x: Tensor) -> Tensor:
        return x.view(-1).view(x.shape) if x.ndim > 1 and 1 in x.shape and x.is_contiguous() else x

    return tree.map(usual, state)
