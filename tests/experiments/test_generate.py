"""experiments/generate.py sample: runs and published weights of every kind, prompts, stop texts, drafts, speed."""

import functools
import io
import json
import re
import shutil
import string
import types

import pytest
import torch

from core import int8
from core.layers.unformed import formed
from experiments.parts import language_model, writer
from tests.experiments import runs
from tests.experiments.gpt_runs import TEXT
from tests.nets.language import gpt2_cases, llama_cases, t5_cases
from tests.nets.language.test_marian import model_of as marian_of
from tests.train.data.text.sentencepiece_files import write_model
from train.data.text.tokenizers import BytePairTokenizer

call, refused = (functools.partial(function, "generate") for function in (runs.call, runs.refused))
FLAGS = writer.Sampling(max_new_tokens=8, temperature=0.0)
SHORT = ("--max-new-tokens", "8", "--temperature", "0")


def save_tokenizer(path, out, special, around):
    """tokenizer.json with special tokens around a prompt."""
    from tokenizers.processors import TemplateProcessing

    out.add_special_tokens(special)
    out.post_processor = TemplateProcessing(single=around, special_tokens=[(t, out.token_to_id(t)) for t in special])
    out.save(str(path))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights of a Llama whose texts begin with <s>, a GPT-2 of its vocabulary, a T5 and a Marian."""
    import tokenizers

    folder = tmp_path_factory.mktemp("weights")
    llama_cases.model_of("llama", vocab_size=300, eos_token_id=1).save_pretrained(folder / "llama")
    gpt2_cases.model_of("gpt2", vocab_size=300).save_pretrained(folder / "gpt2")
    special = ["<s>", "</s>"]
    pairs = tokenizers.ByteLevelBPETokenizer()
    pairs.train_from_iterator([TEXT.lower()], vocab_size=300, special_tokens=special, show_progress=False)
    for name in ("llama", "gpt2"):
        save_tokenizer(folder / name / "tokenizer.json", pairs._tokenizer, special, "<s> $A")
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(piece, -3.0) for piece in (*special, "▁", *string.ascii_lowercase)]
    letters = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    letters.pre_tokenizer, letters.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    (folder / "t5").mkdir()
    t5_cases.write(folder / "t5", "1.1")
    save_tokenizer(folder / "t5" / "tokenizer.json", letters, special, "$A </s>")
    (folder / "marian").mkdir()
    pieces = {"<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3)} | {piece: -3.0 for piece in ("▁", *"abcdefgh")}
    write_model(folder / "marian" / "source.spm", pieces)
    ids = {token: i for i, token in enumerate(["</s>", "<unk>", "▁", *"abcdefgh", "<pad>"])}
    (folder / "marian" / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    marks = {name: len(ids) - 1 for name in ("pad_token_id", "decoder_start_token_id")}
    marian_of(vocab_size=len(ids), bos_token_id=0, max_position_embeddings=64, **marks).save_pretrained(
        folder / "marian"
    )
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def sampled(capsys, *flags):
    """(texts, the lines after them) of the command."""
    capsys.readouterr()
    assert call("sample", *flags) == 0
    _, *texts = re.split(r"--- sample \d\n", capsys.readouterr().out)
    texts[-1], speed = re.split(r"\n\n(?=[\d.]+ tokens per second)", texts[-1])
    return [text.removesuffix("\n\n") for text in texts], speed.splitlines()


def test_a_llama_begins_with_its_first_token(here, capsys):
    from transformers import LlamaForCausalLM

    net = language_model.of_weights("llama")
    ids = language_model.ids_of(net, "the fox")
    assert net.tokenizer.tokenizer.id_to_token(ids[0]) == "<s>" and ids[1:] == net.tokenizer.encode("the fox")
    model = LlamaForCausalLM.from_pretrained("llama").eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)[0].tolist()
    (text,), lines = sampled(capsys, "--weights", "llama", "--prompt", "the fox", *SHORT)
    assert text == net.tokenizer.tokenizer.decode(expected) and text.startswith("the fox") and len(text) > 9
    assert len(lines) == 1 and re.search(r"0\.\d+ of the limit by memory bandwidth, \d+ \(\d\.\d MB per step", lines[0])


def test_t5_and_marian_answer_as_those_of_transformers(here, capsys):
    from transformers import MarianMTModel

    for folder, model in (("t5", t5_cases.model_in("t5")), ("marian", MarianMTModel.from_pretrained("marian").eval())):
        net = language_model.of_weights(folder)
        ids = language_model.ids_of(net, "a bad dog")
        assert ids[-1:] == list(net.ends)
        source = torch.tensor([ids])
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "use_cache": False}
        options |= {"forced_eos_token_id": None}
        if folder == "marian":
            options["bad_words_ids"] = [[net.cfg.padding_id]]
        expected = model.generate(source, attention_mask=torch.ones_like(source), **options)[0].tolist()
        texts, _ = sampled(capsys, "--weights", folder, "--prompt", "a bad dog", "--count", "2", *SHORT)
        assert texts == [language_model.text_of(net, expected[1:])] * 2 and len(texts[0]) > 2


def test_a_draft_changes_no_greedy_text(here, capsys):
    flags = ("--weights", "llama", "--prompt", "the fox", *SHORT)
    alone, _ = sampled(capsys, *flags)
    for draft in ("gpt2", "llama"):
        both, lines = sampled(capsys, *flags, "--draft", draft, "--ahead", "2")
        assert both == alone and re.fullmatch(r"\d\.\d+ of the draft's tokens accepted", lines[1])
    assert lines[1].startswith("1.000")


def test_a_draft_may_have_a_table_of_another_size_but_no_other_tokens(here, capfd):
    llama_cases.model_of("llama", vocab_size=320).save_pretrained(here / "padded")
    content = json.loads((here / "llama" / "tokenizer.json").read_text(encoding="utf-8"))
    (here / "padded" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    flags = ("--prompt", "the fox", *SHORT)
    for one, other in (("llama", "padded"), ("padded", "llama")):
        plain, _ = sampled(capfd, "--weights", one, *flags)
        assert sampled(capfd, "--weights", one, "--draft", other, *flags)[0] == plain
    vocabulary = content["model"]["vocab"]
    first, second = (next(token for token, i in vocabulary.items() if i == j) for j in (50, 60))
    vocabulary[first], vocabulary[second] = 60, 50
    (here / "padded" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    line = refused(capfd, "sample", "--weights", "llama", "--draft", "padded", *flags)
    assert f"the draft has another vocabulary: token 50 is {second!r} to the draft and {first!r} to the net" in line


def test_a_prompt_with_its_own_first_token_gets_no_second_one(here):
    net = language_model.of_weights("llama")
    assert language_model.ids_of(net, "<s>the fox") == language_model.ids_of(net, "the fox")
    assert language_model.ids_of(net, "<s>") == language_model.ids_of(net, "")
    t5 = language_model.of_weights("t5")
    assert language_model.ids_of(t5, "") == list(t5.ends)


END, START, BAD = "eos_token_id", "decoder_start_token_id", "bad_words_ids"


@pytest.mark.parametrize(
    ("folder", "entry", "value", "expected"),
    [
        *(("llama", END, x, "ids below 300") for x in ([1, None], ["1"], "1", True, {"a": 1}, [[1]], 300, -1)),
        *(("marian", END, x, "ids below 12") for x in ("0", 12)),
        *(("marian", START, x, "ids below 12") for x in ("x", 12)),
        *(("marian", BAD, x, "lists of ids") for x in ("x", [3])),
    ],
)
def test_tokens_of_a_configuration_that_are_none_are_named(folder, entry, value, expected, here, capfd, tmp_path):
    shutil.copytree(here / folder, tmp_path / "net")
    (tmp_path / "net" / "generation_config.json").write_text(json.dumps({entry: value}), encoding="utf-8")
    line = refused(capfd, "sample", "--weights", tmp_path / "net")
    assert f"the configuration has {entry}={value!r}; expected {expected}" in line


def test_prompts_come_from_files_and_standard_input(here, capsys, monkeypatch, tmp_path):
    expected = sampled(capsys, "--weights", "llama", "--prompt", "the fox", *SHORT)[0]
    (tmp_path / "prompt.txt").write_text("the fox\n", encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"the fox\n")))
    for file in (tmp_path / "prompt.txt", "-"):
        assert sampled(capsys, "--weights", "llama", "--file", file, *SHORT)[0] == expected


def test_texts_end_after_a_stop_text(here, capsys):
    flags = ("--weights", "llama", "--prompt", "the fox", "--count", "3", "--max-new-tokens", "12", "--seed", "5")
    plain, _ = sampled(capsys, *flags)
    letter = plain[0][12]
    expected = [text[:7] + text[7:].partition(letter)[0] + letter * (letter in text[7:]) for text in plain]
    assert expected != plain and sampled(capsys, *flags, "--stop", letter)[0] == expected


def written(net, ids, flags):
    """(pieces that are shown, texts) if the net writes these tokens."""
    pieces = []

    def stream(params, prompt, cfg, steps, **options):
        yield from torch.tensor(ids)[:, None]

    fake = net._replace(net=types.SimpleNamespace(stream=stream, decode=None))
    texts = writer.write(fake, fake.tokenizer.encode("x.t"), flags, show=pieces.append)
    return [piece for piece in pieces if piece], texts


def test_a_stop_text_counts_wherever_its_tokens_part(here):
    """Not only if they are those of the text alone; that in the prompt does not count."""
    net = language_model.of_weights("llama")
    ids, stop = net.tokenizer.encode("a.the quick"), net.tokenizer.encode(".t")
    assert len(stop) == 2 and stop[1] not in ids
    pieces, texts = written(net, ids, writer.Sampling(stop=("no such text", ".t")))
    assert "".join(pieces) == "x.ta.t" and texts.rows == [ids[:3]] and texts.count == 3


def test_characters_of_byte_tokens_are_shown_whole(here):
    """A decoder that turns a whole run of bytes into U+FFFD until the last is there, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models

    bytes_of = {f"<0x{b:02X}>": b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_of, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    net = language_model.of_weights("llama")._replace(tokenizer=BytePairTokenizer(tokenizer))
    pieces, _ = written(net, list("a你好".encode()), writer.Sampling())
    assert [piece for piece in pieces if piece] == ["x.ta", "你", "好"]


def test_a_text_is_shown_while_it_is_written_by_whole_characters(here):
    """A character of several tokens comes at once; what stays incomplete at the end, then."""
    net = language_model.of_weights("llama")
    ids = net.tokenizer.encode("a☕🦊")
    assert len(ids) == 8
    pieces, texts = written(net, [*ids, *ids[1:3]], writer.Sampling())
    assert pieces == ["x.ta", "☕", "🦊", "\ufffd"] and texts.rows == [[*ids, *ids[1:3]]]


@pytest.mark.parametrize("folder", ["llama", "gpt2", "t5"])
def test_beams_equal_transformers(folder, here, capsys):
    from transformers import AutoModelForCausalLM

    net = language_model.of_weights(folder)
    model = t5_cases.model_in("t5") if folder == "t5" else AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([language_model.ids_of(net, "a bad dog")])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    options |= {"length_penalty": 0.5, "pad_token_id": 0, "use_cache": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
    flags = ("--weights", folder, "--prompt", "a bad dog", "--max-new-tokens", "8", "--beam", "3", "--count", "2")
    texts, _ = sampled(capsys, *flags, "--length-penalty", "0.5")
    assert texts == [language_model.text_of(net, row) for row in expected] and texts[0] != texts[1]


def test_one_beam_is_greedy_with_a_penalty_of_the_prompt(here, capsys):
    flags = ("--weights", "llama", "--prompt", "the fox", "--repetition-penalty", "1.3", *SHORT)
    assert sampled(capsys, *flags, "--beam", "1")[0] == sampled(capsys, *flags)[0] != sampled(capsys, *flags[:4])[0]


def test_gpt_begins_with_the_first_token_of_a_llama(here, capsys):
    flags = ("--weights", "llama", "--prompt", "the fox", *SHORT)
    expected = sampled(capsys, *flags)[0][0]
    assert runs.call("gpt", "sample", *flags) == 0 and capsys.readouterr().out == expected + "\n"


def test_compiled_texts_are_the_same(here, capsys, monkeypatch):
    counted = []

    def compile(function, **options):
        counted.append(function.__name__)
        return lambda *args, **kwargs: function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    for folder, steps in (("llama", ["decode"]), ("t5", ["step"])):
        counted.clear()
        flags = ("--weights", folder, "--prompt", "the", *SHORT)
        assert sampled(capsys, *flags, "--compile")[0] == sampled(capsys, *flags)[0] and counted == steps


@pytest.mark.parametrize("folder", ["llama", "gpt2", "t5", "marian"])
def test_weights_of_8_bits_take_a_quarter_of_the_memory(folder, here, capsys):
    """The text is that of the rounded weights in single precision."""
    flags = ("--weights", folder, "--prompt", "a bad dog", *SHORT)
    texts, net, pieces = sampled(capsys, *flags, "--int8")[0], language_model.of_weights(folder), []
    small = net._replace(params=int8.unformed(int8.quantise(net.params)))
    assert writer.bytes_per_token(small) < 0.6 * writer.bytes_per_token(net)  # rows of 16: scales of a quarter
    writer.write(
        net._replace(params=formed(small.params)), language_model.ids_of(net, "a bad dog"), FLAGS, show=pieces.append
    )
    assert texts == ["".join(pieces)]


def test_bytes_per_token(here):
    """Written out for a Llama with an output layer of its own, and a T5, of which the decoder alone is read."""
    llama, t5 = language_model.of_weights("llama"), language_model.of_weights("t5")
    block = 16 * (16 + 2 * 8 + 16) + 3 * 16 * 24 + 2 * 16
    assert writer.bytes_per_token(llama) == 4 * (2 * block + 300 * 16 + 16)
    block = (4 + 2) * 16 * 24 + 3 * 16 * 24 + 3 * 16  # without the source's keys and values
    assert writer.bytes_per_token(t5) == 4 * (3 * block + 31 * 16 + 16 + 32 * 4)
    assert writer.bandwidth(torch.device("cpu"), 2**20) > 1e6


def test_refuses_in_one_line(here, capfd, tmp_path):
    (tmp_path / "bytes").write_bytes(b"a\xff")
    for flags, message in (
        ((), "expected either --run DIR or --weights SOURCE"),
        (("--weights", "llama", "--prompt", "a", "--file", "-"), "expected either --prompt TEXT or --file PATH"),
        (("--weights", "llama", "--file", tmp_path / "bytes"), "is no UTF-8 text: byte 1"),
        (("--weights", "llama", "--file", "nowhere"), "nowhere"),
        (("--weights", "llama", "--stop", ""), "--stop '' is no token"),
        (("--weights", "t5", "--draft", "t5"), "a draft is for a GPT or a Llama"),
        (("--weights", "llama", "--draft", "llama", "--max-new-tokens", "99"), "exceed the context of 24"),
        (("--weights", "llama", "--min-p", "2"), "--min-p is 2.0; expected"),
        (("--run", "llama"), "'llama' is not the folder of a run"),
        (("--weights", "llama", "--beam", "2", "--temperature", "0.5"), "--temperature 0.5 is for sampling; --beam"),
        (("--weights", "llama", "--beam", "2", "--top-k", "3"), "--top-k 3 is for sampling; --beam draws nothing"),
        (("--weights", "llama", "--beam", "2", "--draft", "llama"), "--beam searches without a --draft"),
        (("--weights", "llama", "--beam", "2", "--count", "3"), "--count is 3; --beam 2 finds up to 2 texts"),
        (("--weights", "llama", "--beam", "2", "--max-new-tokens", "99"), "exceed the context of 24"),
    ):
        assert message in refused(capfd, "sample", *flags), flags


@pytest.mark.slow
def test_runs_of_other_scripts(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    quick = ("--text", "text.txt", "--batch", "2", "--steps", "2", "--no-compile", "--name", "a")
    for script, more in (("gpt", ()), ("char_rnn", ("--window", "16", "--width", "16"))):
        assert runs.call(script, *quick, *more) == 0
        run = ("--run", f"runs/{script}/a", "--prompt", "The 5", "--max-new-tokens", "9", "--temperature", "0")
        texts, _ = sampled(capfd, *run)
        capfd.readouterr()
        assert runs.call(script, "sample", *run) == 0 and capfd.readouterr().out.rstrip("\n") == texts[0].rstrip("\n")
        assert sampled(capfd, *run, "--beam", "1")[0] == texts and sampled(capfd, *run, "--beam", "4")[0]
    assert "a draft is for a GPT" in refused(capfd, "sample", *run, "--draft", "runs/gpt/a")
    dates = ("--steps", "2", "--tokens", "300", "--eval-every", "1000", "--no-compile", "--name", "a")
    assert runs.call("translate", *dates) == 0
    message = "use: python experiments/translate.py translate --run runs/translate/a"
    assert message in refused(capfd, "sample", "--run", "runs/translate/a")
