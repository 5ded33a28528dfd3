"""What the tests of the fine-tune's command share."""

from __future__ import annotations

import pytest
from finetune_world import FinetuneWorld, make_finetune_world


@pytest.fixture(scope="session")
def finetune_world(tmp_path_factory) -> FinetuneWorld:
    """Six photos and two for validation, the demo's teacher and its embeddings; no test changes it."""
    return make_finetune_world(tmp_path_factory.mktemp("geometry"))
