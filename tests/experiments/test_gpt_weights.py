"""experiments/gpt.py with published weights: a small GPT-2 and its tokenizer, made by other libraries."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from experiments.parts import language_model
from tests.experiments.gpt_runs import QUICK, TEXT, call, state_of
from tests.experiments.runs import contents, one_error, result, same_bits
from train.data.text import tokenizers
from train.run import checkpoints


@pytest.fixture(scope="module")
def model():
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(3)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, resid_pdrop=0.1, **sizes, **ends)).eval()


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """A folder as the Hugging Face hub has them: config.json, model.safetensors, tokenizer.json."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.save_model(str(folder))  # vocab.json and merges.txt
    return folder


@pytest.fixture
def here(published, tmp_path, monkeypatch):
    """Stands in a folder with a text and a copy of the weights, `weights`, that a test may spoil."""
    shutil.copytree(published, tmp_path / "weights")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("files", [{"tokenizer.json"}, {"vocab.json", "merges.txt"}], ids=["one", "two"])
def test_tokenizer_of_a_repository(files, published, tmp_path, monkeypatch):
    """Each of its files is fetched by itself."""

    def download(repository, name, **_):
        if name not in files:
            raise EntryNotFoundError(name)
        return shutil.copy(published / name, tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer = language_model.published_tokenizer("someone/weights")
    expected = language_model.published_tokenizer(str(published / "model.safetensors"))
    assert tokenizer.encode(TEXT) == expected.encode(TEXT) and {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab.json"])
def test_sample_equals_transformers(tokenizer, here, model, capsys):
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(here / "weights" / "tokenizer.json"))
    if tokenizer == "vocab.json":
        (here / "weights" / "tokenizer.json").unlink()
    ids = torch.tensor([theirs.encode("The 5 quick ☕").ids])
    expected = model.generate(ids, max_length=32, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    steps = str(32 - ids.shape[1])
    flags = ("--prompt", "The 5 quick ☕", "--max-new-tokens", steps, "--temperature", "0")
    assert call("sample", "--weights", "weights", *flags) == 0
    out, err = capsys.readouterr()
    assert err == "" and theirs.decode(expected, skip_special_tokens=False).startswith(out.rstrip("\n\ufffd"))
    assert len(out) > 20


def test_training_starts_from_the_weights(here, model, capsys):
    """With a learning rate of nearly nothing the validation loss is that of transformers on the same text."""
    flags = (*QUICK, "--weights", "weights", "--steps", "2", "--learning-rate", "1e-30", "--dropout", "0")
    assert call(*flags, "--name", "a") == 0
    run = here / "runs" / "gpt" / "a"
    ids = torch.tensor(tokenizers.load("weights").encode(TEXT))
    held_out, total = ids[int(len(ids) * 0.9) :], 0.0
    for at in range(0, len(held_out) - 1, 32):
        window = held_out[at : at + 33]
        with torch.no_grad():
            scores = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(scores, window[1:], reduction="sum").item()
    assert result(run)["val_loss"] == pytest.approx(total / (len(held_out) - 1), rel=1e-5)
    assert checkpoints.read_config(run / "checkpoints")["net"]["dropout"] == 0.0
    assert torch.equal(state_of(run).params["tokens"]["weight"], model.transformer.wte.weight)
    assert call("--resume", "--name", "a", "--steps", "3") == 0
    capsys.readouterr()
    assert call("sample", "--run", run, "--prompt", "The", "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out.startswith("The")


def change(rewrite):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        save_file({name: x.contiguous() for name, x in rewrite(state).items()}, folder / "model.safetensors")

    return spoil


def set_config(**entries):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))

    return spoil


def shorten(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def grow_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["Ġzebra"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def forget(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


FIRST, QKV = "transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(lambda s: {n: x for n, x in s.items() if n != QKV}), "'h.1.attn.c_attn.weight' is missing"),
        (change(lambda s: {**s, "transformer.h.2.ln_1.bias": torch.ones(16)}), "no place for: 'h.2.ln_1.bias'"),
        (change(lambda s: {**s, QKV: s[QKV].T}), "has shape (48, 16), expected (16, 48) for 'blocks.1.attn.qkv"),
        (change(lambda s: {**s, FIRST: s[FIRST].long()}), "holds torch.int64, expected floating-point numbers"),
        (change(lambda s: {**s, "lm_head.weight": s[FIRST] + 1}), "'lm_head.weight' differs from the token embedding"),
        (shorten, "model.safetensors' cannot be read as weights"),
        (write("model.safetensors", b"\x00" * 100), "model.safetensors' cannot be read as weights"),
        (forget("model.safetensors"), "'weights' has none of the files model.safetensors"),
        (forget("config.json"), "'weights' has none of the files config.json"),
        (forget("tokenizer.json", "vocab.json"), "'weights' has none of the files tokenizer.json, vocab.json"),
        (write("config.json", b"{"), "config.json' is not readable as JSON"),
        (write("config.json", b"[1]"), "config.json' holds no JSON object"),
        (set_config(model_type="bert"), "the configuration is of model_type 'bert', expected one of gpt2, openai-gpt"),
        (set_config(n_layer="two"), "the configuration has n_layer='two'; expected a number"),
        (set_config(n_head=3), "width 16 is not divisible by 3 heads"),
        (set_config(n_layer=3), "'h.2.attn.c_proj.bias' is missing"),
        (write("tokenizer.json", b'{"model": 3}'), "tokenizer.json is not a tokenizer"),
        (write("tokenizer.json", b"\xff"), "tokenizer.json is not valid JSON"),
        (grow_tokenizer, "the tokenizer has 401 tokens, expected up to the 300 of the net"),
    ],
    ids=[
        "missing", "extra", "misshapen", "integers", "untied", "truncated", "garbled", "no-weights", "no-config",
        "no-tokenizer", "half-config", "foreign-config", "other-model", "layers-word", "heads", "more-layers",
        "foreign-tokenizer", "binary-tokenizer", "larger-tokenizer",
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_in_one_line(spoil, message, here, capfd):
    spoil(here / "weights")
    before = contents(here)
    for command in (["sample"], [*QUICK, "--steps", "2"]):
        assert call(*command, "--weights", "weights") == 2
        assert message in one_error(capfd.readouterr().err)
    assert contents(here) == before


def test_weights_cannot_run_code(here, capfd):
    class Evil:
        def __reduce__(self):
            return open, (str(here / "owned"), "w")

    (here / "weights" / "model.safetensors").unlink()
    torch.save({"wte.weight": Evil()}, here / "weights" / "pytorch_model.bin")
    assert call("sample", "--weights", "weights") == 2
    assert "pytorch_model.bin' cannot be read as weights" in one_error(capfd.readouterr().err)
    assert not (here / "owned").exists()


def test_prompt_that_is_no_text(here, capfd):
    assert call("sample", "--weights", "weights", "--prompt", "\udcff") == 2
    assert "character '\\udcff' at position 0 is no Unicode text" in one_error(capfd.readouterr().err)


def test_damaged_token_cache_is_made_anew(here, caplog):
    flags = (*QUICK, "--steps", "1", "--tokenizer", "weights")
    assert call(*flags, "--preset", "tiny", "--name", "a") == 0
    (cache,) = (here / "runs" / "gpt" / "tokens").iterdir()
    cache.write_bytes(cache.read_bytes()[:-6])
    assert call(*flags, "--name", "b") == 0
    assert "is damaged, and made anew" in caplog.text
    assert same_bits(state_of(here / "runs/gpt/a"), state_of(here / "runs/gpt/b"))
