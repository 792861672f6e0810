"""The compiled train step of a small GPT against the same net as an nn.Module under torch.compile, and in JAX.

4 layers, 256 wide, 128 tokens, batch 16, AdamW. All three start from the same weights and are first compared: the loss
after five steps must agree.

    python tests/benchmarks/train_step.py [--rounds 60] [--batch 16]
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from module_gpt import Module
from timing import interleaved, report

from core import random, spec, tree
from nets.language import gpt2
from train import optimizers
from train.losses import cross_entropy
from train.step import make_step, start

CFG = gpt2.Config(vocabulary=65, context=128, layers=4, heads=8, width=256, dropout=0.0)
LEARNING_RATE, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.1


def module_step(params):
    module = Module(CFG, params)
    optimizer = module.adamw(LEARNING_RATE, BETAS, DECAY)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)

    def step(batch):
        loss = compiled(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def jax_step(params):
    def norm(p, x):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * p["weight"] + p["bias"]

    def dense(p, x):
        return x @ p["weight"].T + p["bias"]

    def loss(params, tokens, targets):
        t = tokens.shape[1]
        x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][:t]
        visible = jnp.tril(jnp.ones((t, t), bool))
        for p in params["blocks"]:
            parts = jnp.split(dense(p["attn"]["qkv"], norm(p["norm1"], x)), 3, -1)
            q, k, v = (y.reshape(*y.shape[:2], CFG.heads, -1).transpose(0, 2, 1, 3) for y in parts)
            scores = jnp.where(visible, q @ k.swapaxes(-1, -2) / (CFG.width // CFG.heads) ** 0.5, -jnp.inf)
            y = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
            x = x + dense(p["attn"]["proj"], y)
            x = x + dense(p["mlp"]["down"], jax.nn.gelu(dense(p["mlp"]["up"], norm(p["norm2"], x))))
        logits = norm(params["norm"], x) @ params["tokens"]["weight"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    optimizer = optax.adamw(
        LEARNING_RATE, *BETAS, weight_decay=DECAY, mask=lambda p: jax.tree.map(lambda x: x.ndim >= 2, p)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, tokens, targets):
        value, grads = jax.value_and_grad(loss)(params, tokens, targets)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = tree.map(lambda x: jnp.array(x.numpy()), params)
    state = optimizer.init(params)

    def step(batch):
        nonlocal params, state
        tokens, targets = (np.asarray(x) for x in batch)
        params, state, value = update(params, state, tokens, targets)
        return value.block_until_ready()

    return step


def functree_step(params, **options):
    beta1, beta2 = BETAS
    optimizer = optimizers.adamw(
        LEARNING_RATE, beta1, beta2, weight_decay=DECAY, mask=lambda name, leaf: leaf.ndim >= 2
    )

    def loss(params, batch, keys):
        tokens, targets = batch
        return cross_entropy(gpt2.apply(params, tokens, CFG, train=True), targets)

    state = start(random.key(1), tree.map(torch.clone, params), gpt2.spec(CFG), optimizer)
    train = make_step(loss, optimizer, **options)

    def step(batch):
        nonlocal state
        state, metrics = train(state, batch)
        return metrics["loss"]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(2)
    params = spec.init(random.key(0), gpt2.spec(CFG))
    text = random.randint(random.key(2), (args.batch, CFG.context + 1), 0, CFG.vocabulary).long()
    batch = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    steps = {
        "functree, donated": functree_step(params, donate=True, update_norm=False),
        "functree, donated, update norm": functree_step(params, donate=True),
        "functree, pure": functree_step(params),
        "nn.Module, torch.compile": module_step(params),
        "jax + optax, jit": jax_step(params),
    }
    losses = {name: [float(step(batch)) for _ in range(5)][-1] for name, step in steps.items()}
    print("loss after 5 steps:", {name: round(value, 5) for name, value in losses.items()})
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    medians = interleaved({name: functools.partial(step, batch) for name, step in steps.items()}, args.rounds)
    targets = {"nn.Module, torch.compile": 0.95, "jax + optax, jit": 0.70}
    report(f"one train step, 4 layers, 256 wide, 128 tokens, batch {args.batch}", medians, "functree, donated", targets)


if __name__ == "__main__":
    main()
