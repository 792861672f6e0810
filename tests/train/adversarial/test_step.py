"""The step of two players against a loop in plain PyTorch, and its laws: pure, compiled, in mixed precision."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize

from core import random, tree
from core.layers import batch_norm, batch_norm_spec, linear, linear_spec
from train import optimizers
from train.adversarial import game as games
from train.adversarial.game import Game
from train.adversarial.regularisers import clip
from train.adversarial.step import create, make_step
from train.step import Policy

LATENT, WIDTH, BATCH = 3, 8, 6
SPECS = {
    "critic": {"hidden": linear_spec(2, WIDTH), "out": linear_spec(WIDTH, 1)},
    # Batch norm removes a bias before it: Adam would move it by rounding errors.
    "generator": {
        "hidden": linear_spec(LATENT, WIDTH, bias=False),
        "norm": batch_norm_spec(WIDTH),
        "out": linear_spec(WIDTH, 2),
    },
}


def generate(params, latents, labels, key):
    x = batch_norm(params["norm"], linear(params["hidden"], latents.z), train=True)
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
            generator.eval()  # the statistics are those of the batch, and do not change
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
        actual = names(player, net)
        theirs = net.state_dict()
        for name, value in actual.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.generator.stats["norm"]["mean"], generator[1].running_mean, rtol=1e-3, atol=1e-4)
    assert state.generator.stats["norm"]["count"] == 3  # not in the critic's turns


HINGE = Game("hinge", regulariser="dragan", pairing="average", spectral=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("game", "unroll"),
    [
        pytest.param(HINGE, False, id="spectral-dragan"),
        pytest.param(Game("energy", pulling_away=0.1), True, id="unrolled"),
    ],
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
        other, actual = compiled(other, batch)
        close(actual, metrics, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == (1 if unroll else 2)
    close(other, state, rtol=1e-3, atol=1e-4)


POLICY_GAMES = {
    "spectral": Game("hinge", regulariser="r1", spectral=True, spectral_generator=True, pairing="average"),
    "equilibrium": Game("equilibrium"),
    "codes": Game("non-saturating", categories=1, codes=1, classify=True),
}


@pytest.mark.parametrize("name", POLICY_GAMES)
def test_bfloat16_policy_keeps_master_values_and_memory(name):
    dtypes = set()

    def narrow_generate(params, latents, labels, key):
        stats = {"norm.count", "norm.mean", "norm.var"}
        dtypes.update(x.dtype for path, x in tree.items(params) if path not in stats)
        return generate(params, latents, labels, key)

    def narrow_outputs(params, x, labels, key):
        dtypes.update({x.dtype, *(leaf.dtype for leaf in tree.leaves(params))})
        out = outputs(params, x, labels, key)
        parts = out["features"][:, :2]
        return {**out, "category": parts[:, :1], "codes": parts[:, 1:], "classes": parts}

    game, (batch,) = POLICY_GAMES[name], batches(1, 1)
    both = optimizers.adam(1e-2, 0.5, 0.9), optimizers.adam(5e-3, 0.5, 0.9)
    state, _ = parts(game)
    players = games.losses(game, LATENT, narrow_generate, narrow_outputs)
    _, expected = make_step(*players, *both, compile=False)(state, batch)
    dtypes.clear()
    step = make_step(*players, *both, policy=Policy(torch.bfloat16), compile=False)
    after, metrics = step(state, batch)
    assert dtypes == {torch.bfloat16}
    assert tree.map(lambda x: x.dtype, after) == tree.map(lambda x: x.dtype, state)
    assert {x.dtype for x in metrics.values()} == {torch.float32}
    # bfloat16 has 8 bits; the penalty squares a gradient, and a norm of gradients adds many such errors.
    close(metrics, expected, rtol=0.1, atol=0.02)


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
    # One power iteration from (1, 0); the memory itself starts where one more moves nothing.
    weight, v = state.critic.params["hidden"]["weight"], torch.tensor([1.0, 0.0])
    vectors = {**state.memory["vectors"], "hidden": {"weight": {"u": torch.zeros(WIDTH), "v": v}}}
    after, _ = step(state._replace(memory={**state.memory, "vectors": vectors}), (points, labels))
    u = normalize(weight @ v, dim=0)
    moved = normalize(weight.T @ u, dim=0)
    assert (moved - v).norm() > 0.01
    torch.testing.assert_close(after.memory["vectors"]["hidden"]["weight"], {"u": u, "v": moved})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Game("hinged"), "objective 'hinged' is unknown; expected one of minimax"),
        (lambda: Game(regulariser="r3"), "regulariser 'r3' is unknown; expected one of none, gradient-penalty"),
        (lambda: Game("energy", pairing="paired"), "objective 'energy' has no pairs of scores"),
        (lambda: Game(weight=-1.0), "weight is -1.0; expected at least 0"),
        (lambda: Game(diversity=1.5), "diversity is 1.5; expected at least 0, up to 1"),
        (lambda: parts(critic_steps=0), "critic_steps is 0; expected at least 1"),
        (lambda: games.latents(Game(categories=3), random.key(0), 2, 3), "leave no room in 3 latent dimensions"),
    ],
    ids=["objective", "regulariser", "pairing", "weight", "diversity", "steps", "codes"],
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
    actual = games.latents(game, random.key(0), 50, 16)
    assert actual.z.shape == (50, 16) and actual.codes.abs().max() <= 1
    torch.testing.assert_close(actual.z[:, 10:14].argmax(1), actual.category)
    torch.testing.assert_close(actual.z[:, 14:], actual.codes)
    assert set(actual.category.tolist()) == {0, 1, 2, 3}
