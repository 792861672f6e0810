"""Steps for beam search: Markov chains whose texts are listed in full, and transformers' Marian."""

import itertools

import torch
from transformers import MarianConfig, MarianMTModel
from transformers.modeling_outputs import BaseModelOutput

from core import random

END = 1
PADDING = 39  # transformers' beam search pads with the end where the padding is token 0


def markov(vocabulary=4, batch=1, seed=0):
    """A step whose next token depends on the last two, on the position and on the example: (step, cache, logs).

    The position makes the scores of all texts different. Entry (i, t, a, b, c) of logs is log p(c | a b) at position t.
    """
    table = 1.5 * random.normal(random.key(seed), (batch, vocabulary, vocabulary, vocabulary), torch.float64)
    sharper = 1 + 0.05 * torch.arange(20)[:, None, None, None]

    def step(cache, tokens, position):
        logits = cache["table"][torch.arange(len(tokens)), cache["before"], tokens]
        return logits * (1 + 0.05 * position), {"before": tokens, "table": cache["table"]}

    cache = {"before": torch.zeros(batch, dtype=torch.int64), "table": table}
    return step, cache, torch.log_softmax(table[:, None] * sharper, -1)


def divisor(length, length_penalty=1.0, normalization="length"):
    return (length if normalization == "length" else (5 + length) / 6) ** length_penalty


def texts(logs, max_length, first=0, min_length=0, stop=()):
    """Log-probability of every text of one example, that ends or is of max_length."""
    vocabulary, logs, log_p = logs.shape[-1], logs.tolist(), {}
    for n in range(1, max_length + 1):
        for text in itertools.product(range(vocabulary), repeat=n):
            ends = [m for m in range(min_length + 1, n + 1) if any(text[:m][-len(s) :] == s for s in ((END,), *stop))]
            if END in text[:min_length] or min(ends, default=max_length) != n:
                continue
            path = (0, first, *text)
            log_p[text] = sum(logs[t][path[t]][path[t + 1]][c] for t, c in enumerate(text))
    return log_p


def listed(actual, i=0):
    """[(text, score)] of example i."""
    pairs = zip(actual.tokens[i].tolist(), actual.lengths[i].tolist(), actual.scores[i].tolist(), strict=True)
    return [(tuple(text[:n]), score) for text, n, score in pairs if n]


def marian(seed=0, vocabulary=40):
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    config = MarianConfig(
        vocab_size=vocabulary,
        **sizes,
        pad_token_id=PADDING,
        eos_token_id=END,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        dropout=0.0,
        init_std=0.6,
    )
    model = MarianMTModel(config).eval().requires_grad_(False)
    # Another output layer than the embedding, which would repeat the last token, and texts that end at all lengths.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, 16), requires_grad=False)
    model.final_logits_bias[0, END] = 4.0
    source = random.randint(random.key(seed), (6, 7), 3, PADDING).long()
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 7, 4])[:, None]
    return model, torch.where(mask, source, PADDING), mask.long()


def marian_step(model, source, mask, positions):
    """Without a cache of theirs: all tokens are read again at each position."""
    memory = model.model.encoder(source, attention_mask=mask).last_hidden_state

    def step(cache, tokens, position, shared):
        texts = cache.index_copy(1, position[None], tokens[:, None])
        beams = len(tokens) // len(shared["memory"])
        memory, mask = (shared[name].repeat_interleave(beams, 0) for name in ("memory", "mask"))
        output = model(
            encoder_outputs=BaseModelOutput(memory),
            attention_mask=mask,
            decoder_input_ids=texts[:, : position + 1],
            use_cache=False,
        )
        return output.logits[:, -1], texts

    return step, torch.zeros(len(source), positions, dtype=torch.int64), {"memory": memory, "mask": mask}


def generated(model, inputs, **options):
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True} | options
    return model.generate(inputs, **options)


def assert_same(actual, tokens, scores):
    time = actual.tokens.shape[2]
    assert torch.equal(actual.tokens, tokens[:, :, :time]) and (tokens[:, :, time:] == PADDING).all()
    torch.testing.assert_close(actual.scores, scores, rtol=1e-5, atol=1e-5)
