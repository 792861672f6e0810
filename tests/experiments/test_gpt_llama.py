"""experiments/gpt.py with a Llama: trained, continued, sampled, evaluated, and from published weights."""

import json

import pytest
import torch

from core import spec, tree
from nets.language import llama
from tests.experiments.gpt_runs import QUICK, TEXT, call
from tests.experiments.runs import config, one_error, result
from tests.nets.language.llama_cases import model_of
from train.data.text import tokenizers
from train.run import checkpoints


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_llama_is_trained_continued_sampled_and_evaluated(here, capsys):
    assert call(*QUICK, "--preset", "llama-tiny", "--steps", "3", "--dropout", "0.1", "--name", "a") == 0
    assert call("--resume", "--name", "a", "--steps", "5") == 0
    run = here / "runs" / "gpt" / "a"
    cfg = llama.Config(**config(run)["net"])
    assert cfg.vocabulary == len(set(TEXT)) and cfg.kv_heads == 2 and cfg.dropout == 0.1
    params = checkpoints.restore(run / "checkpoints", llama.spec(cfg), part="params")
    spec.check(llama.spec(cfg), params)
    figures = result(run)
    assert figures["steps"] == 5 and figures["parameters"] == tree.count(llama.spec(cfg))
    capsys.readouterr()
    assert call("evaluate", "--run", run) == 0
    assert f"loss {figures['val_loss']:.4f} nats" in capsys.readouterr().out
    assert call("sample", "--run", run, "--prompt", "The 5", "--max-new-tokens", "12", "--temperature", "0") == 0
    tokenizer = tokenizers.load(run / "tokenizer.json")
    ids = tokenizer.encode("The 5")
    for _ in range(12):
        ids.append(int(llama.apply(params, torch.tensor([ids]), cfg)[0, -1].argmax()))
    assert capsys.readouterr().out.removesuffix("\n") == tokenizer.decode(ids)


def test_published_llama(here, capsys):
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=280, show_progress=False)
    model = model_of("qwen2", vocab_size=280)
    model.save_pretrained("weights")
    tokenizer.save("weights/tokenizer.json")
    ids = torch.tensor([tokenizer.encode("The 5 quick").ids])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    flags = ("--prompt", "The 5 quick", "--max-new-tokens", "8", "--temperature", "0")
    assert call("sample", "--weights", "weights", *flags) == 0
    theirs, ours = tokenizer.decode(expected, skip_special_tokens=False), capsys.readouterr().out
    assert theirs.startswith(ours.rstrip("\n\ufffd")) and len(ours) > 12
    assert call(*QUICK, "--weights", "weights", "--steps", "1", "--name", "b") == 0
    assert config(here / "runs" / "gpt" / "b")["net"]["qkv_bias"]
    path = here / "weights" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "bert"}))
    capsys.readouterr()
    assert call("sample", "--weights", "weights") == 2
    expected = "of model_type 'bert', expected one of gpt2, openai-gpt, llama, mistral, qwen2"
    assert expected in one_error(capsys.readouterr().err)
