import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from core import random, tree
from core.layers import batch_norm, batch_norm_spec, linear, linear_spec
from train import optimizers
from train.adversarial import game as games
from train.adversarial.game import Game
from train.adversarial.regularisers import clip
from train.adversarial.step import create, make_step

LATENT, WIDTH, BATCH = 3, 8, 6
SPECS = {
    "critic": {"hidden": linear_spec(2, WIDTH), "out": linear_spec(WIDTH, 1)},
    # Batch norm takes a bias in front of it out again: Adam would move it by rounding errors.
    "generator": {
        "hidden": linear_spec(LATENT, WIDTH, bias=False),
        "norm": batch_norm_spec(WIDTH),
        "out": linear_spec(WIDTH, 2),
    },
}


def generate(params, given, labels, key):
    x = batch_norm(params["norm"], linear(params["hidden"], given.z), train=True)
    return linear(params["out"], x.tanh())


def outputs(params, x, labels, key):
    hidden = linear(params["hidden"], x).tanh()
    return {"features": hidden, "scores": linear(params["out"], hidden)[:, 0]}


WGAN_GP = Game("wasserstein", regulariser="gradient-penalty")


def parts(game=WGAN_GP, seed=0, **options):
    both = optimizers.adam(1e-2, 0.5, 0.9), optimizers.adam(5e-3, 0.5, 0.9)
    state = create(random.key(seed), SPECS["critic"], SPECS["generator"], *both)
    state = state._replace(memory=games.memory(game, random.key(9), state.critic.params, state.generator.params))
    return state, make_step(*games.losses(game, LATENT, generate, outputs), *both, compile=False, **options)


def batches(critic_steps, count=3):
    points = random.normal(random.key(1), (count, critic_steps, BATCH, 2))
    return [(x, torch.zeros(critic_steps, BATCH, dtype=torch.int64)) for x in points]


def close(a, b, **options):
    for (name, x), y in zip(tree.items(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **options)


def test_equal_to_a_loop_in_plain_pytorch():
    """Two steps of the critic and one of the generator, the penalty by autograd's create_graph, torch's Adam."""
    state, step = parts(critic_steps=2)

    class Critic(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Linear(2, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1))

    class Generator(torch.nn.Sequential):
        def __init__(self):
            norm, act = torch.nn.BatchNorm1d(WIDTH), torch.nn.Tanh()
            super().__init__(torch.nn.Linear(LATENT, WIDTH, bias=False), norm, act, torch.nn.Linear(WIDTH, 2))

    def names(player, net):
        layers = {"hidden": 0, "out": len(net) - 1, "norm": 1}
        return {f"{layers[n.split('.')[0]]}.{n.split('.')[1]}": x.clone() for n, x in tree.items(player.params)}

    nets = Critic(), Generator()
    for net, player in zip(nets, (state.critic, state.generator), strict=True):
        net.load_state_dict(names(player, net), strict=False)
    critic, generator = nets
    adams = [torch.optim.Adam(net.parameters(), rate, (0.5, 0.9)) for net, rate in zip(nets, (1e-2, 5e-3), strict=True)]

    for at, (points, labels) in enumerate(batches(2)):
        for i in range(2):
            keys = random.sites(random.fold_in(state.critic.key, 2 * at + i), 5)
            z = games.latents(Game(), keys[0], BATCH, LATENT).z
            generator.eval()  # the statistics are those of the batch, and are not kept
            hidden = generator[0](z)
            normal = torch.nn.functional.batch_norm(hidden, None, None, generator[1].weight, generator[1].bias, True)
            fake = generator[3](normal.tanh()).detach()
            u = random.uniform(keys[4], (BATCH, 1))
            between = (fake + u * (points[i] - fake)).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            penalty = 10 * (slope.norm(dim=1) - 1).square().mean()
            value = critic(fake).mean() - critic(points[i]).mean() + penalty
            adams[0].zero_grad()
            value.backward()
            adams[0].step()
        generator.train()
        keys = random.sites(random.fold_in(state.generator.key, at), 4)
        loss = -critic(generator(games.latents(Game(), keys[0], BATCH, LATENT).z)).mean()
        adams[1].zero_grad()
        loss.backward()
        adams[1].step()
        state, metrics = step(state, (points, labels))
        torch.testing.assert_close(metrics["critic/loss"], value.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(metrics["generator/loss"], loss.detach(), rtol=1e-4, atol=1e-5)
    for net, player in zip(nets, (state.critic, state.generator), strict=True):
        found = names(player, net)
        theirs = net.state_dict()
        for name, value in found.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.generator.stats["norm"]["mean"], generator[1].running_mean, rtol=1e-3, atol=1e-4)
    assert state.generator.stats["norm"]["count"] == 3  # not in the critic's turns


HINGE = Game("hinge", regulariser="dragan", pairing="average")


@pytest.mark.parametrize(
    ("game", "unroll"),
    [
        (Game("minimax"), False),
        (Game("non-saturating", regulariser="r1", spectral=True), False),
        (HINGE, False),
        (HINGE, True),
        (Game("energy", pulling_away=0.1), False),
        (Game("equilibrium"), False),
    ],
    ids=["minimax", "non-saturating", "hinge", "hinge-unrolled", "energy", "equilibrium"],
)
def test_compiled_as_eager(game, unroll):
    state, step = parts(game, critic_steps=2)
    both = optimizers.adam(1e-2, 0.5, 0.9), optimizers.adam(5e-3, 0.5, 0.9)
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = make_step(
        *games.losses(game, LATENT, generate, outputs), *both, critic_steps=2, unroll=unroll, backend=graphs
    )
    other = state
    for batch in batches(2):
        state, metrics = step(state, batch)
        other, found = compiled(other, batch)
        close(found, metrics, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == (1 if unroll else 2)
    close(other, state, rtol=1e-3, atol=1e-4)


def test_several_seeds_at_once():
    singles = [parts(seed=seed) for seed in range(3)]
    step = singles[0][1]
    together = tree.map(lambda *leaves: torch.stack(leaves), *(state for state, _ in singles))
    states = [state for state, _ in singles]
    for batch in batches(1):
        together, metrics = torch.vmap(step, in_dims=(0, None))(together, batch)
        states = [step(state, batch)[0] for state in states]
    assert metrics["critic/loss"].shape == (3,)
    close(together, tree.map(lambda *leaves: torch.stack(leaves), *states), rtol=1e-4, atol=1e-5)


def test_pure_and_clipped():
    state, step = parts(Game("wasserstein"), constrain=functools.partial(clip, limit=0.05))
    before = tree.map(torch.clone, state)
    (batch,) = batches(1, 1)
    after, _ = step(state, batch)
    again, _ = step(state, batch)
    close(state, before, rtol=0, atol=0)
    close(after, again, rtol=0, atol=0)
    assert max(float(leaf.abs().max()) for leaf in tree.leaves(after.critic.params)) <= 0.05 + 1e-6
    assert max(float(leaf.abs().max()) for leaf in tree.leaves(after.generator.params)) > 0.05


def test_memory_moves():
    state, step = parts(Game("equilibrium"))
    points, labels = batches(1, 1)[0]
    after, metrics = step(state._replace(memory={"k": torch.tensor(0.5)}), (points, labels))
    moved = 1e-3 * (0.5 * metrics["critic/real"] - metrics["critic/fake"])
    assert moved != 0
    torch.testing.assert_close(after.memory["k"], 0.5 + moved)
    state, step = parts(Game("hinge", spectral=True))
    after, _ = step(state, (points, labels))
    vectors = state.memory["vectors"]["hidden"]["weight"]["u"], after.memory["vectors"]["hidden"]["weight"]["u"]
    assert not torch.equal(*vectors)
    torch.testing.assert_close(vectors[1].norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Game("hinged"), "objective 'hinged' is unknown; expected one of minimax"),
        (lambda: Game(regulariser="r3"), "regulariser 'r3' is unknown; expected one of none, gradient-penalty"),
        (lambda: Game("energy", pairing="paired"), "objective 'energy' has no pairs of scores"),
        (lambda: parts(critic_steps=0), "critic_steps is 0; expected at least 1"),
        (lambda: games.latents(Game(categories=3), random.key(0), 2, 3), "leave no room in 3 latent numbers"),
    ],
    ids=["objective", "regulariser", "pairing", "steps", "codes"],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batch_of_other_parts_is_refused():
    state, step = parts(critic_steps=2)
    with pytest.raises(ValueError, match=r"the batch has \[3\] parts; expected 2"):
        step(state, batches(3, 1)[0])


def test_codes_are_the_end_of_the_latents():
    game = Game(categories=4, codes=2)
    found = games.latents(game, random.key(0), 50, 16)
    assert found.z.shape == (50, 16) and found.codes.abs().max() <= 1
    torch.testing.assert_close(found.z[:, 10:14].argmax(1), found.category)
    torch.testing.assert_close(found.z[:, 14:], found.codes)
    assert set(found.category.tolist()) == {0, 1, 2, 3}
