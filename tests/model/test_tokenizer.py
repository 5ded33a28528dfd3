"""Ids of the original tokenizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sam3.model.tokenizer import SimpleTokenizer, _vocabulary

START, END = 49406, 49407
VECTORS = {
    "visual": [7195],
    "a cat": [320, 2368],
    "A  Red   Apple": [320, 736, 3055],
    "yellow school bus": [4481, 1228, 2840],
    "player in white": [2477, 530, 1579],
    "kid's toy 42": [3551, 568, 5988, 275, 273],
    "don't": [847, 713],
    "snake_case": [8798, 318, 2068],
    "a!b": [320, 256, 321],
    "wow!?": [2781, 6004],
    "&lt;b&gt; x": [283, 321, 285, 343],
    "Café ☕": [15304, 26561],
    "": [],
}


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.mark.parametrize("text", VECTORS)
def test_ids(tokenizer: SimpleTokenizer, text: str) -> None:
    ids = [START, *VECTORS[text], END]
    assert tokenizer(text).tolist() == [ids + [0] * (32 - len(ids))]


def test_long_text_is_cut_and_still_ends(tokenizer: SimpleTokenizer) -> None:
    assert tokenizer(" ".join(["dog"] * 50)).tolist() == [[START, *[1929] * 30, END]]
    assert tokenizer(" ".join(["dog"] * 30)).tolist() == [[START, *[1929] * 30, END]]
    assert tokenizer("x" * 10_000)[0, -1] == END


def test_batch_and_other_lengths(tokenizer: SimpleTokenizer) -> None:
    ids = tokenizer(["a cat", "", "yellow school bus"])
    assert ids.shape == (3, 32) and ids.dtype == torch.int64
    assert torch.equal(ids[0], tokenizer("a cat")[0])
    assert tokenizer("a cat", context_length=6).tolist() == [[START, 320, 2368, END, 0, 0]]
    assert SimpleTokenizer(context_length=3)("a cat").tolist() == [[START, 320, END]]


@pytest.mark.parametrize("text", ["红色的圆", "красный круг", "दो लाल वृत्त", "🔴🟦", "e\u0301", "\x00\ud800", "\n\t "])
def test_any_text_has_ids(tokenizer: SimpleTokenizer, text: str) -> None:
    ids = tokenizer(text)[0]
    used = int((ids != 0).sum())
    assert ids[0] == START and ids[used - 1] == END and not ids[used:].any()
    assert (used > 2) == bool(text.strip("\x00\n\t "))


def test_spelling_that_is_cleaned_away(tokenizer: SimpleTokenizer) -> None:
    assert torch.equal(tokenizer(" A\tcat \n"), tokenizer("a cat"))
    assert torch.equal(tokenizer("caf\u00e9"), tokenizer("cafe\u0301"))


@pytest.mark.parametrize(
    ("texts", "what"), [(["a", 3], r"text 1 is 3 \(int\)"), ([b"a"], "bytes"), ([None], "NoneType")]
)
def test_what_is_no_text_is_refused(tokenizer: SimpleTokenizer, texts: list[object], what: str) -> None:
    with pytest.raises(TypeError, match=f"{what}.*a text prompt is a str"):
        tokenizer(texts)  # type: ignore[arg-type]


def test_default_device_does_not_matter(tokenizer: SimpleTokenizer) -> None:
    with torch.device("meta"):
        assert tokenizer("a cat").device.type == "cpu"


def test_first_call_imports_no_models_and_leaves_the_environment() -> None:
    script = (
        "import os, sys; from sam3.model.tokenizer import SimpleTokenizer; tokenizer = SimpleTokenizer();"
        "assert 'regex' not in sys.modules; tokenizer('a cat');"
        "print({'open_clip', 'transformers', 'timm'} & {*sys.modules}, os.environ.get('TOKENIZERS_PARALLELISM'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["set()", "None"]


def test_setting_of_other_tokenizers_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    _vocabulary.__wrapped__()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        _vocabulary.__wrapped__()
