"""gradient_flow.py: the gradients of the states are those of the net, and what the default run shows."""

from pathlib import Path

import pytest
import torch

from core import random, spec
from experiments import gradient_flow
from nets.language import sequence_classifier as net
from tests.experiments import runs
from train.losses import cross_entropy

F64 = torch.float64


def setting(kind, time=6):
    cfg = net.Config(vocabulary=8, d_in=5, width=4, kind=kind, outputs=3)
    params = spec.init(random.key(0), net.spec(cfg), F64)
    return cfg, params, random.randint(random.key(1), (5, time), 0, 8).long(), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("kind", gradient_flow.KINDS)
def test_states_without_a_change_are_those_of_the_net(kind):
    cfg, params, tokens, _ = setting(kind)
    zeros = (torch.zeros(5, 6, 4, dtype=F64),) * (2 if kind == "lstm" else 1)
    _, (h, *_) = gradient_flow.states(params, kind, tokens, zeros)
    pooled = net.features(params, (tokens, torch.full((5,), 6)), cfg)
    torch.testing.assert_close(h[:, -1], pooled, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", gradient_flow.KINDS)
def test_gradient_of_a_state_is_the_change_of_the_loss(kind):
    """Central differences: one state of one example is moved along a direction."""
    _, params, tokens, labels = setting(kind)
    norms = gradient_flow.flow(params, kind, tokens, labels)
    for i, state in enumerate(norms):

        def loss(step, unit, t, i=i):
            added = [torch.zeros(5, 6, 4, dtype=F64) for _ in norms]
            added[i][2, t, unit] = step
            _, (h, *_) = gradient_flow.states(params, kind, tokens, tuple(added))
            head = params["head"]
            return float(cross_entropy(h[:, -1] @ head["weight"].T + head["bias"], labels, reduction="none")[2])

        for t in (0, 4):
            slopes = torch.tensor([(loss(1e-5, u, t) - loss(-1e-5, u, t)) / 2e-5 for u in range(4)])
            assert float(slopes.norm()) == pytest.approx(float(norms[state][2, t]), rel=1e-5)


def test_cell_after_the_last_step_has_no_influence():
    norms = gradient_flow.flow(*setting("lstm")[1:2], "lstm", *setting("lstm")[2:])
    assert not norms["c"][:, -1].any() and norms["c"][:, :-1].all() and norms["h"].all()


def test_gate_and_spectral_radius():
    _, params, tokens, _ = setting("lstm")
    p = params["layers"][0]
    p["hh"] = {"bias": torch.zeros(16, dtype=F64), "weight": torch.zeros(16, 4, dtype=F64)}
    p["hh"]["weight"][8:12] = torch.diag(torch.tensor([0.5, -2.0, 0.1, 0.0], dtype=F64))  # of g
    p["ih"] = {"bias": torch.zeros(16, dtype=F64), "weight": torch.zeros(16, 5, dtype=F64)}
    p["ih"]["bias"][4:8] = 3.0  # of f
    figures = gradient_flow.numbers(params, "lstm", tokens)
    assert figures == {"spectral_radius": pytest.approx(2.0), "kept": pytest.approx(1 / (1 + 2.718281828**-3))}


def test_forget_bias_is_added_to_the_forget_gate_alone():
    model = {kind: net.spec(net.Config(vocabulary=8, d_in=5, width=4, kind=kind)) for kind in gradient_flow.KINDS}
    plain, moved = (gradient_flow.initial(random.key(0), model, bias) for bias in (0.0, 1.5))
    difference = moved["lstm"]["layers"][0]["ih"]["bias"] - plain["lstm"]["layers"][0]["ih"]["bias"]
    torch.testing.assert_close(difference, torch.tensor([0.0] * 4 + [1.5] * 4 + [0.0] * 8))


@pytest.mark.long
def test_default_run_shows_that_the_gates_hold_the_gradient(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.call("gradient_flow", "--name", "a", "--no-compile") == 0
    result = runs.result(Path("runs/gradient_flow/a"))
    assert all(result[f"initial_{kind}_per_step"] < 0.7 for kind in gradient_flow.KINDS)
    assert result["trained_gru_per_step"] > 0.95 and result["trained_rnn_per_step"] < 0.7
    assert result["trained_lstm_kept"] > result["initial_lstm_kept"] + 0.1
    assert result["gru_accuracy"] > 0.99 and result["lstm_accuracy"] > 0.99


@pytest.mark.slow
def test_open_gate_needs_no_short_sequences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.call("gradient_flow", "--shortest", "40", "--forget-bias", "2", "--steps", "120", "--no-compile") == 0
    (run,) = Path("runs/gradient_flow").iterdir()
    result = runs.result(run)
    assert result["lstm_accuracy"] > 0.99 and max(result["gru_accuracy"], result["rnn_accuracy"]) < 0.5
