import json
import shutil

import pytest
import torch

from tests.experiments.gpt_runs import QUICK, TEXT, call, refused, start, state_of
from tests.experiments.runs import finish, finite, flag_id, one_error
from train.run import checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a finished run of 6 steps, runs/gpt/done; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "short.txt").write_text("a few words\n")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "binary.json").write_bytes(b"\x00\xff\x00")
    (folder / "other.json").write_text('{"a": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--steps", "6", "--save-every", "2", "--name", "done") == 0
    return folder


# --- a start that cannot be


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "none.txt"], "none.txt does not exist, expected a text file"),
        (["--text", "empty.txt"], "empty.txt is empty"),
        (["--text", ""], "--text is empty; expected a path"),
        (["--text="], "--text is empty; expected a path"),
        (["--text", "short.txt"], "'short.txt' has 12 tokens; a context of 64 needs over 640"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (["--preset", "huge"], "invalid choice 'huge' for argument '--preset'. Expected one of ('tiny', "),
        (["--device", "abacus"], "--device 'abacus' cannot be used; available here: cpu"),
        (["--device", "meta"], "--device 'meta' cannot be used"),
        (["--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
        (["--dtype", "float8"], "invalid choice 'float8' for argument '--dtype'. Expected one of ('float32', "),
        (["--name", "a/b"], "--name 'a/b' is not the name of a folder"),
        (["--name", ".."], "--name '..' is not the name of a folder"),
        (["--tokenizer", "none.json"], "none.json"),
        (["--tokenizer", "binary.json"], "binary.json"),
        (["--tokenizer", "other.json"], "other.json is not a tokenizer"),
        (["--tokenizer", "runs"], "no tokenizer in runs: expected tokenizer.json, or vocab.json and merges.txt"),
        (["--weights", "runs"], "'runs' has none of the files config.json"),
        (["--resume", "--name", "nothing"], "nothing to resume: 'runs/gpt/nothing' has no config.json"),
    ],
    ids=flag_id,
)
def test_start_is_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *QUICK, *flags)


def test_refusal_of_a_real_process(here):
    code, out, err = finish(start(here, *QUICK, "--preset", "huge"))
    assert code == 2 and out == "" and "Expected one of ('tiny', " in one_error(err)


def test_resume_where_no_run_is(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "nothing to resume: no run in 'runs/gpt'" in refused(capfd, "--resume")


# --- resume that cannot be


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "nanogpt-cpu"], "with --preset nanogpt-cpu: it was started with tiny"),
        (["--beta2", "0.9"], "with --beta2 0.9: it was started with 0.99"),
        (["--text", "short.txt"], "'short.txt' has 12 tokens; a context of 64 needs over 640"),
        (["--dtype", "bfloat16"], "with --dtype bfloat16: it was started with float32"),
        (["--seed=1"], "with --seed 1: it was started with 0"),
        (["--steps", "3"], "--steps is 3, but 'runs/gpt/done' has done 6"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resume_with_a_contradicting_flag(flags, message, here, capfd):
    assert message in refused(capfd, "--resume", "--name", "done", *flags)


def test_contradiction_by_an_explicit_default(here, capfd):
    assert call(*QUICK, "--steps", "1", "--name", "seeded", "--seed", "5") == 0
    assert "with --seed 0: it was started with 5" in refused(capfd, "--resume", "--name", "seeded", "--seed", "0")


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2", "[]", '{"args": 3}', '{"args": {"steps": "many"}}', '{"args": {"lightbulbs": 4}}'],
)
def test_config_that_is_no_config(content, here, capfd):
    (here / "runs/gpt/done/config.json").write_text(content)
    assert "runs/gpt/done/config.json'" in refused(capfd, "--resume", "--name", "done")


def test_text_that_has_changed(here, capfd):
    (here / "text.txt").write_text(TEXT + "more", encoding="utf-8")
    for flags in ((), ("--text", "text.txt")):
        assert "its checkpoint has data " in refused(capfd, "--resume", "--name", "done", *flags)


def test_text_of_the_same_size_and_text_that_has_moved(here, capfd):
    """The identity of a text is its content: other words are noticed, another place is not."""
    (here / "other.txt").write_text(TEXT.replace("lazy", "yzal"), encoding="utf-8")
    (here / "moved.txt").write_text(TEXT, encoding="utf-8")
    assert "its checkpoint has data " in refused(capfd, "--resume", "--name", "done", "--text", "other.txt")
    assert call("--resume", "--name", "done", "--text", "moved.txt", "--steps", "7", "--learning-rate", "1e-3") == 0
    out = capfd.readouterr().out
    assert "resumed with --text moved.txt (it was started with text.txt)" in out
    assert "resumed with --learning-rate 0.001 (it was started with 0.003)" in out


def test_checkpoint_of_another_config(here, capfd):
    assert call(*QUICK, "--steps", "6", "--name", "other", "--dropout", "0.2") == 0
    shutil.rmtree(here / "runs/gpt/done/checkpoints")
    shutil.copytree(here / "runs/gpt/other/checkpoints", here / "runs/gpt/done/checkpoints")
    line = refused(capfd, "--resume", "--name", "done")
    assert "cannot resume 'runs/gpt/done': its checkpoint has net dropout 0.2, expected 0.0" in line


def test_checkpoint_of_another_net(here, capfd):
    """Its config claims to be ours, its tensors are not."""
    folder = here / "runs/gpt/done/checkpoints"
    config, state = checkpoints.read_config(folder), state_of(here / "runs/gpt/done")
    shutil.rmtree(folder)
    wider = state._replace(params={**state.params, "tokens": {"weight": torch.zeros(40, 128)}})
    with checkpoints.Checkpoints(folder, config) as saved:
        saved.save(6, wider, {"seconds": 1.0})
    for argv in (("--resume", "--name", "done"), ("sample", "--run", "runs/gpt/done")):
        assert "tokens.weight' is float32 (40, 128), expected float32 (41, 128)" in refused(capfd, *argv)


@pytest.mark.parametrize("config", [None, {"net": 3}, {"net": {"pixels": 28}}, [1]])
def test_checkpoint_of_another_experiment(config, here, capfd):
    folder = here / "runs/gpt/done/checkpoints"
    shutil.rmtree(folder)
    with checkpoints.Checkpoints(folder, config) as saved:
        saved.save(6, {"w": torch.ones(3)})
    assert "its checkpoint has " in refused(capfd, "--resume", "--name", "done")
    line = refused(capfd, "sample", "--run", "runs/gpt/done")
    assert "the configuration of 'runs/gpt/done' does not fit: expected 'net' with the fields vocabulary, " in line


def truncate(folder):
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(folder):
    for path in (folder / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0x5A
        path.write_bytes(content)


def forget_manifest(folder):
    shutil.rmtree(folder / "manifest")


def replace_by_a_pickle(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"w": torch.ones(3)}, folder / "checkpoint.pt")


@pytest.mark.parametrize(
    "damage",
    [truncate, *(pytest.param(f, marks=pytest.mark.slow) for f in (garble, forget_manifest, replace_by_a_pickle))],
)
def test_damaged_checkpoint(damage, here, capfd):
    damage(here / "runs/gpt/done/checkpoints/6")
    line = refused(capfd, "--resume", "--name", "done")
    assert "checkpoints/6 is " in line and "damaged" in line
    assert "checkpoints/6 is " in refused(capfd, "sample", "--run", "runs/gpt/done")
    # What the advice says: without the damaged one the run continues.
    shutil.rmtree(here / "runs/gpt/done/checkpoints/6")
    assert call("--resume", "--name", "done") == 0
    assert checkpoints.latest(here / "runs/gpt/done/checkpoints") == 6


# --- sample that cannot be


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "Tea or ☕?"], "character '☕' at position 7 is not among the 41 of the vocabulary"),
        (["--prompt", "\udcff"], "is not among the 41 of the vocabulary"),
        (["--temperature", "-1"], "--temperature is -1.0; expected at least 0"),
        (["--temperature", "nan"], "--temperature is nan; expected at least 0"),
        (["--top-k", "0"], "--top-k is 0; expected at least 1"),
        (["--top-p", "1.5"], "--top-p is 1.5; expected a number in (0, 1]"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        (["--stop", ""], "--stop '' is no token; expected a text"),
        (["--stop", "☕"], "character '☕' at position 0 is not among the 41 of the vocabulary"),
        (["--min-p", "2"], "--min-p is 2.0; expected a number in (0, 1]"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--weights", "runs"], "expected either --run DIR or --weights SOURCE"),
    ],
    ids=flag_id,
)
def test_sample_is_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, "sample", "--run", "runs/gpt/done", *flags)


def test_sample_of_nothing(here, capfd):
    assert "expected either --run DIR or --weights SOURCE" in refused(capfd, "sample")
    for folder in ("no", "text.txt"):
        line = refused(capfd, "sample", "--run", folder)
        assert f"'{folder}' is not the folder of a run; the runs in 'runs/gpt' are done" in line
    (here / "runs/gpt/done/tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capfd, "sample", "--run", "runs/gpt/done")


def test_tokenizer_of_another_run(here, capfd):
    characters = "".join(chr(0x100 + i) for i in range(60))
    (here / "runs/gpt/done/tokenizer.json").write_text(
        json.dumps({"format": "functree characters 1", "chars": characters})
    )
    line = refused(capfd, "sample", "--run", "runs/gpt/done", "--prompt", characters[59])
    assert "the tokenizer has 60 tokens, expected up to the 41 of the net" in line


# --- a run that ends early


@pytest.mark.parametrize("rate", ["1e13", "1e39"])
def test_loss_that_is_not_finite_stops_the_run(rate, here, capfd):
    code = call(*QUICK, "--steps", "9", "--save-every", "1", "--name", "wild", "--learning-rate", rate)
    line, newest = one_error(capfd.readouterr().err), checkpoints.latest(here / "runs/gpt/wild/checkpoints")
    assert code == 2
    if rate == "1e13":
        assert "step 2 is not finite (loss nan" in line and "the last good checkpoint is that of step 1" in line
        assert newest == 1 and finite(state_of(here / "runs/gpt/wild"))
    else:  # the loss is that of the initial values, but the update spoils them
        assert "step 1 is not finite (loss 3." in line and "there is no checkpoint yet" in line
        assert newest is None
