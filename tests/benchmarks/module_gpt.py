"""The other side of the benchmarks: GPT-2 as people write it with torch.nn."""

import torch
import torch.nn.functional as F
from torch import nn

from core import tree
from nets.language import gpt2


class Block(nn.Module):
    def __init__(self, cfg: gpt2.Config):
        super().__init__()
        self.heads = cfg.heads
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.qkv, self.proj = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)
        self.up, self.down = nn.Linear(cfg.width, 4 * cfg.width), nn.Linear(4 * cfg.width, cfg.width)

    def forward(self, x):
        b, t, c = x.shape
        parts = self.qkv(self.norm1(x)).split(c, 2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Module(nn.Module):
    """Cross-entropy of tokens and targets; starts from our parameters (a net with biases, without dropout)."""

    def __init__(self, cfg: gpt2.Config, params):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(cfg.vocabulary, cfg.width), nn.Embedding(cfg.context, cfg.width)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.layers)])
        self.norm = nn.LayerNorm(cfg.width)
        self.load_state_dict({n.replace(".attn.", ".").replace(".mlp.", "."): x for n, x in tree.items(params)})

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((self.norm(x) @ self.tokens.weight.T).flatten(0, 1), targets.flatten())

    def adamw(self, learning_rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
        decayed = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
