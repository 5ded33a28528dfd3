"""The file that a compressed memory is trained in front of: what of it the memory learns to work with.

Backbone, SAM heads and object pointers are frozen in stage 2, and a memory understands no others. Their hash is in the
checkpoints of a run, so that a memory is merged only into a file that holds the same.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from sam3.checkpoint_fit import RECOMPUTED_SUFFIX
from sam3.checkpoint_keys import TRUNK_PREFIX
from sam3.checkpoint_parts import HEADS_PREFIXES, POINTER_PREFIXES, SAM2_NECK_PREFIX
from sam3.recognition import Recognised
from sam3_train.checkpoint import state_dict_sha256

FROZEN_PREFIXES = (TRUNK_PREFIX, SAM2_NECK_PREFIX, *HEADS_PREFIXES, *POINTER_PREFIXES)
"""Beginnings of the released names of what stage 2 runs and does not train."""


def frozen_weights(base: Recognised) -> dict[str, Tensor]:
    """What of a file stage 2 runs and does not train, under the released names."""
    return {
        key: value
        for key, value in base.weights.items()
        if key.startswith(FROZEN_PREFIXES) and not key.endswith(RECOMPUTED_SUFFIX)
    }


def frozen_sha256(base: Recognised) -> str:
    """Hash of `frozen_weights` as a training computes with them: in float32, whatever the file's precision.

    The same weights in a file of another format or layout have the same hash.
    """
    digest = hashlib.sha256()
    for key, value in sorted(frozen_weights(base).items()):
        one = {key: value.float() if value.is_floating_point() else value}  # one at a time: a trunk fills gigabytes
        digest.update(state_dict_sha256(one).encode())
    return digest.hexdigest()
