"""The other side of the recurrent language models: a net of torch.nn's layers, and its training step.

It is what pytorch/examples' word_language_model computes, and its tensors have that model's names: embedding, dropout,
layers, dropout, logits; plain SGD after the norm of the gradient is clipped, the state carried without its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import tree
from nets.language import rnn

LAYERS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


class RNNModel(nn.Module):
    def __init__(self, cfg: rnn.Config):
        super().__init__()
        self.drop = nn.Dropout(cfg.dropout)
        self.encoder = nn.Embedding(cfg.vocabulary, cfg.embedding)
        between = cfg.dropout if cfg.layers > 1 else 0.0
        self.rnn = LAYERS[cfg.kind](cfg.embedding, cfg.width, cfg.layers, dropout=between)
        self.decoder = nn.Linear(cfg.width, cfg.vocabulary)
        if cfg.tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor, state=None):
        """tokens: (time, batch), time leading as in that model -> logits (time, batch, vocabulary), and the state."""
        h, state = self.rnn(self.drop(self.encoder(tokens)), state)
        return self.decoder(self.drop(h)), state


def module_of(cfg: rnn.Config, params: tree.Tree) -> RNNModel:
    """The module with our parameters."""
    table = rnn.rename_table(cfg)
    state = {table[name].theirs: value.clone() for name, value in tree.items(params)}
    if cfg.tied:
        state["decoder.weight"] = state["encoder.weight"]
    module = RNNModel(cfg).to(params["head"]["bias"].dtype)
    module.load_state_dict(state)
    return module


def module_step(module: RNNModel, rate: float, clip: float):
    """`step((tokens, targets)) -> loss`, batch leading, which carries the state from call to call."""
    state = None

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal state
        tokens, targets = (x.T for x in batch)  # (time, batch)
        module.zero_grad()
        logits, state = module(tokens, state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(p.grad, alpha=-rate)
        state = tuple(x.detach() for x in state) if isinstance(state, tuple) else state.detach()
        return loss.detach()

    return step
