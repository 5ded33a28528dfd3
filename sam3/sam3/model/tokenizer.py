"""Text to token ids: CLIP's byte-pair encoding, from the package open_clip, which carries the vocabulary."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer as OpenClipTokenizer

PADDING_ID = 0


class SimpleTokenizer:
    """Lower-cased, cleaned text as ids: start, the text, end, then padding with 0 up to the context length.

    The vocabulary is read at the first call; a model without text prompts never needs it.
    """

    def __init__(self, context_length: int = 32) -> None:
        """``context_length`` counts start and end; a longer text is cut, and its last id becomes the end."""
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """
        Args:
            texts: One text or several. An empty one is legal: start and end alone.
            context_length: Default: the constructor's.

        Returns:
            int64 on the CPU, (n, context_length).

        Raises:
            TypeError: If something is not a string.
        """
        texts = _checked(texts)
        length = self.context_length if context_length is None else context_length
        with torch.device("cpu"):  # whatever the caller's default device
            return _vocabulary()(texts, context_length=length)


def _checked(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {text!r:.80} ({type(text).__name__}): a text prompt is a str")
    return texts


@functools.cache
def _vocabulary() -> OpenClipTokenizer:
    """The tokenizer of open_clip: 49,408 entries, shared by all models of the process."""
    variable = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(variable)
    module = _tokenizer_module()
    # The import switches off the threads of another package's tokenizers, for the process and all its children.
    if before is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = before
    return module.SimpleTokenizer(clean="lower")


def _tokenizer_module() -> ModuleType:
    """The file ``open_clip/tokenizer.py`` on its own.

    ``import open_clip`` would import its models, timm, torchvision and transformers first: seconds, at a first prompt.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ImportError("text prompts need the package open_clip_torch: pip install open_clip_torch")
    path = Path(package.submodule_search_locations[0], "tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip.tokenizer", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported: reinstall open_clip_torch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
