"""What is said when a batch of clips fails: its videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sam3_train.errors import UserError, user_error_types
from sam3_train.task import names_of
from stage2.data.clip_batch import ClipBatch


class BatchError(RuntimeError):
    """Something went wrong on a batch; the message names its videos."""


@contextmanager
def naming_videos(batch: Mapping[str, Any]) -> Iterator[None]:
    """Whatever goes wrong inside the block is told with the batch's videos; nothing is skipped."""
    try:
        yield
    except BatchError:
        raise
    except user_error_types():
        raise
    except torch.OutOfMemoryError as error:
        clips: ClipBatch = batch["clips"]
        raise UserError(
            f"out of memory on {clips.num_clips} clips of {clips.length} frames with {clips.num_objects} objects in "
            f"all ({_videos(batch)}): lower the batch size, CLIPS.MAX_OBJECTS or the length of clips"
        ) from error
    except Exception as error:
        raise BatchError(f"a batch of {_videos(batch)} failed: {type(error).__name__}: {error}") from error


def _videos(batch: Mapping[str, Any]) -> str:
    return "the videos " + names_of(batch)
