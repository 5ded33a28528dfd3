"""Video sessions behind two calls with plain dicts, as a server wants them.

Requests and answers are those of Meta's SAM 3 package 0.1.4, restated from its public behaviour; no code is shared.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.video_state import VideoState

_KEYS: dict[str, set[str]] = {
    "start_session": {
        "resource_path",
        "session_id",
        "offload_video_to_cpu",
        "async_loading_frames",
        "video_loader_type",
        "edit_window",
    },
    "add_prompt": {
        "session_id",
        "frame_index",
        "text",
        "bounding_boxes",
        "bounding_box_labels",
        "points",
        "point_labels",
        "obj_id",
        "rel_coordinates",
    },
    "remove_object": {"session_id", "obj_id", "is_user_action"},
    "reset_session": {"session_id"},
    "close_session": {"session_id"},
    "propagate_in_video": {
        "session_id",
        "propagation_direction",
        "start_frame_index",
        "max_frame_num_to_track",
    },
}
"""Request -> what it may hold beside its type."""
_DIRECTIONS = {"both": (False, True), "forward": (False,), "backward": (True,)}


class SessionError(ValueError):
    """A request that names no session, or lacks or misspells something."""


@dataclass
class _Session:
    session_id: str
    state: VideoState
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while a frame or a prompt is computed, and not between the frames of a propagation."""
    is_closed: bool = False

    def require_open(self) -> None:
        if self.is_closed:
            raise SessionError(f"session {self.session_id!r} was closed")


class Sam3VideoPredictor:
    """Sessions on one model, for any number of threads.

    ``handle_request({"type": ...})`` takes:

    - ``start_session`` (``resource_path``, ``session_id`` if you want to choose it, and what
      `Sam3VideoInference.init_state` takes) -> ``{"session_id"}``
    - ``add_prompt`` (``session_id``, ``frame_index``, and ``text``, ``bounding_boxes`` with ``bounding_box_labels``, or
      ``points`` with ``point_labels`` and ``obj_id``; ``rel_coordinates``) -> ``{"frame_index", "outputs"}``
    - ``remove_object`` (``session_id``, ``obj_id``), ``reset_session``, ``close_session`` (``session_id``) ->
      ``{"is_success": True}``

    ``handle_stream_request`` takes ``propagate_in_video`` (``session_id``, ``propagation_direction`` of ``both``,
    ``forward`` and ``backward``, ``start_frame_index``, ``max_frame_num_to_track``) and yields
    ``{"frame_index", "outputs"}``. ``outputs`` are those of `Sam3VideoInference`.

    Threads that work on different sessions run side by side; on one session they take turns frame by frame. A prompt or
    a removal ends a propagation of its session that runs meanwhile with a ``RuntimeError``.
    """

    def __init__(self, model: Sam3VideoInference) -> None:
        self.model = model
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()
        self._handlers: dict[str, Callable[..., dict[str, Any]]] = {
            "start_session": self._start_session,
            "add_prompt": self._add_prompt,
            "remove_object": self._remove_object,
            "reset_session": self._reset_session,
            "close_session": self._close_session,
        }

    def handle_request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one request; see the class.

        Raises:
            SessionError: If the request is unknown, incomplete, or names no session.
        """
        handler = self._handlers.get(_kind(request))
        if handler is None:
            raise SessionError(f"unknown request type {_kind(request)!r}; there are {sorted(self._handlers)}")
        _require_known_keys(request)
        return handler(dict(request))

    def handle_stream_request(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Answer one request frame by frame; see the class. What is wrong with it is said at once.

        Raises:
            SessionError: If the request is unknown, incomplete, or names no session.
        """
        if _kind(request) != "propagate_in_video":
            raise SessionError(f"unknown stream request type {_kind(request)!r}; there is 'propagate_in_video'")
        _require_known_keys(request)
        session = self._find(request)
        direction = request.get("propagation_direction") or "both"
        if not isinstance(direction, str) or direction not in _DIRECTIONS:
            raise SessionError(f"propagation_direction {direction!r} is not one of {sorted(_DIRECTIONS)}")
        return self._propagate(
            session, _DIRECTIONS[direction], request.get("start_frame_index"), request.get("max_frame_num_to_track")
        )

    @property
    def session_ids(self) -> list[str]:
        """Open sessions, oldest first."""
        with self._lock:
            return list(self._sessions)

    def shutdown(self) -> None:
        """Close all sessions."""
        for session_id in self.session_ids:
            self._close_session({"session_id": session_id})

    # --- requests -----------------------------------------------------------------------------------------------------

    def _start_session(self, request: dict[str, Any]) -> dict[str, Any]:
        resource = _require(request, "resource_path")
        session_id = str(request.get("session_id") or uuid.uuid4())
        given = request.keys() - {"type", "resource_path", "session_id"}
        state = self.model.init_state(resource, **{name: request[name] for name in given})
        with self._lock:
            is_taken = session_id in self._sessions
            if not is_taken:
                self._sessions[session_id] = _Session(session_id, state)
        if is_taken:
            state.frames.close()
            raise SessionError(f"there is a session {session_id!r} already: close it, or choose another session_id")
        return {"session_id": session_id}

    def _add_prompt(self, request: dict[str, Any]) -> dict[str, Any]:
        session = self._find(request)
        frame_index = _require(request, "frame_index")
        with session.lock:
            session.require_open()
            frame_idx, outputs = self.model.add_prompt(
                session.state,
                frame_index,
                text_str=request.get("text"),
                boxes_xywh=request.get("bounding_boxes"),
                box_labels=request.get("bounding_box_labels"),
                points=request.get("points"),
                point_labels=request.get("point_labels"),
                obj_id=request.get("obj_id"),
                rel_coordinates=request.get("rel_coordinates", True),
            )
        return {"frame_index": frame_idx, "outputs": outputs}

    def _remove_object(self, request: dict[str, Any]) -> dict[str, Any]:
        session = self._find(request)
        obj_id = _require(request, "obj_id")
        with session.lock:
            session.require_open()
            self.model.remove_object(session.state, obj_id, is_user_action=request.get("is_user_action", True))
        return {"is_success": True}

    def _reset_session(self, request: dict[str, Any]) -> dict[str, Any]:
        session = self._find(request)
        with session.lock:
            session.require_open()
            self.model.reset_state(session.state)
        return {"is_success": True}

    def _close_session(self, request: dict[str, Any]) -> dict[str, Any]:
        session = self._find(request)
        with self._lock:
            self._sessions.pop(session.session_id, None)
        with session.lock:
            if not session.is_closed:
                session.is_closed = True
                session.state.clear()
                session.state.encoded = None
                session.state.frames.close()
        return {"is_success": True}

    def _propagate(
        self, session: _Session, directions: tuple[bool, ...], start: int | None, max_frames: int | None
    ) -> Iterator[dict[str, Any]]:
        for reverse in directions:
            if reverse and len(directions) > 1 and session.state.frames.is_sequential:
                return  # a live source does not give its frames again
            results = self.model.propagate_in_video(session.state, start, max_frames, reverse)
            while True:
                with session.lock:
                    session.require_open()
                    frame = next(results, None)
                if frame is None:
                    break
                yield {"frame_index": frame[0], "outputs": frame[1]}

    def _find(self, request: Mapping[str, Any]) -> _Session:
        session_id = str(_require(request, "session_id"))
        with self._lock:
            session = self._sessions.get(session_id)
            known = list(self._sessions)
        if session is None:
            raise SessionError(f"there is no session {session_id!r} (it may have been closed); open are {known}")
        return session


def _kind(request: Mapping[str, Any]) -> str:
    if not isinstance(request, Mapping) or not isinstance(request.get("type"), str):
        raise SessionError("a request is a dict with the key 'type', whose value is a word")
    return request["type"]


def _require_known_keys(request: Mapping[str, Any]) -> None:
    kind = _kind(request)
    unknown = sorted(map(repr, request.keys() - _KEYS[kind] - {"type"}))
    if unknown:
        raise SessionError(f"the request {kind!r} takes no {', '.join(unknown)}; it takes {sorted(_KEYS[kind])}")


def _require(request: Mapping[str, Any], name: str) -> Any:
    if request.get(name) is None:
        raise SessionError(f"the request {_kind(request) if 'type' in request else ''!r} lacks {name!r}")
    return request[name]
