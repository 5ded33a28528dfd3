"""A text on a source that never ends: frames are pushed one at a time, what the text describes is found and followed.

Example::

    stream = TextStream(video, "yellow bus")            # a Sam3VideoInference
    for frame in camera:
        for frame_idx, outputs in stream.push(frame):
            show(outputs["out_obj_ids"], outputs["out_binary_masks"])
    rest = stream.finish()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.streaming import PushedFrames
from sam3.model.video_outputs import FrameResult, HotstartBuffer
from sam3.model.video_state import VideoState
from sam3.sam.prompts import PromptError

FrameOutputs = tuple[int, dict[str, Any]]
"""Frame index and outputs, as `Sam3VideoInference` describes them."""


class TextStream:
    """One stream and one text. The results are those of `Sam3VideoInference.propagate_in_video` on the whole video.

    New objects are on probation for ``hotstart_delay`` frames, and so long results are held back; nothing else is kept
    but what future results depend on. So the text is the only prompt: to click on what was found, open a video with
    `Sam3VideoInference.init_state`, whose ``edit_window`` says how many of the last frames can be corrected.
    """

    def __init__(self, video: Sam3VideoInference, text: str, *, boxes_xywh: Any = None, box_labels: Any = None) -> None:
        """
        Args:
            video: The model; it can serve any number of streams.
            text: What to find.
            boxes_xywh: Examples on the first frame, as for `Sam3VideoInference.add_prompt`.
            box_labels: As there.
        """
        self.video = video
        self._prompt = {"text_str": text, "boxes_xywh": boxes_xywh, "box_labels": box_labels}
        self._frames = PushedFrames(num_kept=1)
        self._state: VideoState | None = None
        self._buffer = HotstartBuffer(video.config.hotstart_delay)

    @property
    def state(self) -> VideoState:
        """The session.

        Raises:
            PromptError: Before the first frame.
        """
        if self._state is None:
            raise PromptError("nothing was pushed yet: the first frame opens the session")
        return self._state

    def push(self, frame: Any) -> list[FrameOutputs]:
        """Process the next frame.

        Args:
            frame: RGB picture, as for `StreamingTracker.push`.

        Returns:
            The frames whose results are settled now: at first none, then one each time.

        Raises:
            VideoInputError: If the frame cannot be used; the stream goes on as if it had not been pushed.
            PromptError: With the first frame, if the text or the boxes cannot be used.
        """
        frame_idx = self._frames.push(frame)
        if self._state is None:
            state = self.video.init_state(self._frames, edit_window=0)
            self.video.add_prompt(state, frame_idx, **self._prompt)
            self._state = state
        result = self.video.process_frame(self.state, frame_idx)
        self.state.prune(frame_idx, reverse=False)
        return [self._outputs(ready) for ready in self._buffer.push(result)]

    def run(self, frames: Iterable[Any]) -> Iterator[FrameOutputs]:
        """Push every frame of a source as it comes, then `finish`."""
        for frame in frames:
            yield from self.push(frame)
        yield from self.finish()

    def remove_object(self, obj_id: int) -> None:
        """Forget an object, also in results that are held back.

        Raises:
            PromptError: If there is no such object.
            EditRefusedError: If other objects were first seen with it and memories were dropped since; see
                `Sam3VideoInference.remove_object`. A model built with ``apply_temporal_disambiguation=False``
                can always remove it.
        """
        self.video.remove_object(self.state, obj_id)

    def finish(self) -> list[FrameOutputs]:
        """No frame follows: the results that were held back."""
        rest = [self._outputs(ready) for ready in self._buffer.flush()]
        self._frames.end()
        self._frames.close()
        return rest

    def _outputs(self, result: FrameResult) -> FrameOutputs:
        state = self.state
        enlarged = result.at_video_size(self.video.model.preprocess, state.size_hw)
        return result.frame_idx, enlarged.outputs(state.scores, state.scores, state.size_hw)
