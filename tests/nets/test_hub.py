"""A hub that refuses, and a cache that cannot be written: each is one line that says which it is."""

import contextlib

import huggingface_hub
import huggingface_hub.constants
import pytest

from nets.weights import WeightsError, read, read_config
from tests.local_server import serve

GATED, UNKNOWN, EMPTY = ({"X-Error-Code": code} for code in ("GatedRepo", "RepoNotFound", "EntryNotFound"))
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@pytest.fixture
def answering(monkeypatch, tmp_path):
    """A hub that gives the same answer to everything: answering(status, headers, cache)."""

    @contextlib.contextmanager
    def answer(status, headers, cache=tmp_path):
        with serve(tmp_path, status=status, headers=headers) as url:
            options = {"endpoint": url, "cache_dir": cache}
            monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: download(*a, **options, **k))
            yield

    download = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return answer


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, GATED, f"repository 'someone/weights' is gated: accept its terms on its page, and {LOGIN}"),
        (403, GATED, f"repository 'someone/weights' is gated: accept its terms on its page, and {LOGIN}"),
        (401, UNKNOWN, f"nor a repository that everyone may read; if it is a private one, {LOGIN}"),
        (403, {}, "it is not in the local cache, and the hub cannot be reached: 403 Forbidden"),
        (200, {}, "the hub cannot be reached: Response from .* does not seem to be served by a Hugging Face Hub"),
        (404, EMPTY, "repository 'someone/weights' has none of the files model.safetensors, "),
    ],
    ids=["gated", "not-on-the-list", "unknown", "proxy", "page", "empty"],
)
def test_a_hub_that_refuses(status, headers, message, answering):
    with answering(status, headers):
        with pytest.raises(WeightsError, match=message) as raised:
            read("someone/weights")
        assert "\n" not in str(raised.value)
        assert read_config("someone/weights", optional=True) == {}


def test_a_cache_that_cannot_be_written(answering, tmp_path):
    (tmp_path / "file").touch()
    message = "'someone/weights': cannot write '.*file.*': .*; HF_HOME names another folder"
    with answering(200, {"ETag": '"1"', "X-Repo-Commit": "0" * 40}, tmp_path / "file"):
        with pytest.raises(WeightsError, match=message):
            read("someone/weights")
