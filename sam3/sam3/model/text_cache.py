"""A bounded store of text features, so that a prompt that comes back costs a look-up."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from sam3.model.text_encoder import VETextEncoder

Key = tuple[tuple[int, ...], torch.dtype | None]


class TextFeatureCache:
    """The prompt tokens of the texts that were used last, for one state of a text encoder's weights.

    What is kept is keyed by the token ids (so spelling that the tokenizer ignores does not matter) and by the
    precision it was computed in. It is dropped when a weight was replaced or changed in place. An entry of the released
    model takes 32 KB. Threads may share it.
    """

    def __init__(self, max_entries: int = 256) -> None:
        self.max_entries = max_entries
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._entries: OrderedDict[Key, Tensor] = OrderedDict()
        self._weights: list[Tensor] = []
        self._states: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def memory(self, encoder: VETextEncoder, ids: Tensor, embeds: Tensor) -> Tensor:
        """``encoder.encode(embeds)``, computed only for texts that are not here.

        Without cache where gradients are recorded, in training mode and under ``torch.compile``.

        Args:
            encoder: The text encoder, always the same.
            ids: On the CPU, (n, L).
            embeds: Their embeddings, (L, n, width).

        Returns:
            A tensor of its own, (L, n, C).
        """
        if torch.is_grad_enabled() or encoder.training or torch.compiler.is_compiling():
            return encoder.encode(embeds)
        precision = _autocast_dtype(embeds.device.type)
        keys: list[Key] = [(tuple(row), precision) for row in ids.tolist()]
        with self._lock:
            self._forget_if_changed(encoder)
            entries = self._entries
            found = {key: entries[key] for key in keys if key in entries}
        missing = {key: i for i, key in enumerate(keys) if key not in found}
        if missing:
            computed = encoder.encode(embeds[:, list(missing.values())])
            found.update(zip(missing, computed.unbind(1), strict=True))
        with self._lock:
            self._keep(entries, keys, found)
        return torch.stack([found[key] for key in keys], dim=1)

    def _keep(self, entries: OrderedDict[Key, Tensor], keys: list[Key], found: dict[Key, Tensor]) -> None:
        """``entries`` are those that were searched: if another thread has cleared the cache since, nothing is kept."""
        for key in keys:
            if key not in entries:  # cloned: a view would keep its whole batch alive
                entries[key] = found[key].clone()
            entries.move_to_end(key)
        while len(entries) > self.max_entries:
            entries.popitem(last=False)

    def _forget_if_changed(self, encoder: VETextEncoder) -> None:
        weights: list[Tensor] = list(encoder.parameters())
        states = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        is_same = len(weights) == len(self._weights) and all(
            a is b for a, b in zip(weights, self._weights, strict=True)
        )
        if not is_same or states != self._states:
            self.clear()
            self._weights, self._states = weights, states

    def __deepcopy__(self, memo: dict[int, object]) -> TextFeatureCache:
        return TextFeatureCache(self.max_entries)

    def __reduce__(self) -> tuple[type[TextFeatureCache], tuple[int]]:
        return TextFeatureCache, (self.max_entries,)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
