"""The module that stage 2 trains: a compressed memory between a frozen image backbone and frozen heads.

Names are those of the published EfficientSAM3 stage-2 checkpoints: the tracker's at the top, the image model's backbone
below ``backbone.``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sam3.config import Sam3Config
from sam3.efficient_keys import OWN_PREFIXES
from sam3.model.clip_forward import ClipPlan, ClipPrompting, ClipResult, forward_clip
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.tracker_memory import TrackerFeatures
from sam3.model.vl_backbone import SAM3VLBackbone
from sam3.preprocess import Preprocess

NOT_TRAINED = {
    "no_mem_embed": "prompted frames show it to a decoder that knows it, and single images do too; the published code "
    "optimises it and never reads it",
    "no_mem_pos_enc": "nothing reads it",
}
"""Tables that the published optimiser has and this one has not, and why."""


class EfficientSam3Train(EfficientSam3Tracker):
    """`EfficientSam3Tracker` with a backbone, of SAM 3 or of a student, of which the memory alone is trained.

    Trained are the memory encoder, resampler, memory attention, both projections and the tables that stored memories
    are made with. Backbone, SAM heads and object pointers are frozen and stay in eval mode whatever `train` says, so
    that stochastic depth or batch statistics cannot act in them.

    Attributes:
        backbone: From image to the second neck's maps.
        preprocess: How images are prepared for it.
    """

    def __init__(
        self,
        config: Sam3Config,
        backbone: SAM3VLBackbone,
        memory_dtype: torch.dtype = torch.float32,
        preprocess: Preprocess | None = None,
    ) -> None:
        """
        Args:
            config: With a compressed memory; the backbone is the one that it describes.
            backbone: With the neck of the SAM heads.
            memory_dtype: Of stored memories. Trackers round them to bfloat16, which would round gradients too.
            preprocess: How images are prepared for the backbone; default: stretched to the model's size.

        Raises:
            ValueError: If the description has no compressed memory, or the backbone no such neck.
        """
        super().__init__(config, memory_dtype)
        if backbone.vision_backbone.sam2_convs is None:
            raise ValueError("the backbone has no neck for the SAM heads: build it with enable_inst_interactivity=True")
        self.backbone = backbone
        self.preprocess = preprocess or Preprocess(size_px=config.image_size_px)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(name))
        self.train(self.training)

    def train(self, mode: bool = True) -> EfficientSam3Train:
        """Training mode for what is trained; everything frozen stays in eval mode."""
        super().train(mode)
        for name, child in self.named_children():
            if not is_trained(name + "."):
                child.eval()
        return self

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {name: value for name, value in self.state_dict().items() if is_trained(name)}

    def forward(
        self,
        images_ct3ss: Tensor | Sequence[TrackerFeatures],
        coverage_tbhw: Tensor,
        clip_of_object: Tensor,
        plan: ClipPlan,
        prompting: ClipPrompting | None = None,
        *,
        video_frames: int | None = None,
        force_presence: bool = False,
        generator: torch.Generator | None = None,
        frames_at_once: int = 8,
        feature_dtype: torch.dtype | None = None,
    ) -> ClipResult:
        """Track the objects of C clips of T frames.

        Args:
            images_ct3ss: Images as the model takes them, (C, T, 3, S, S), or what `clip_features` made of them.
            coverage_tbhw: Share of each cell that each of the B objects covers, (T, B, h, w).
            clip_of_object: Which clip each object is in, (B,).
            plan: As for `forward_clip`, and so are the next four.
            prompting: As there.
            video_frames: As there.
            force_presence: As there.
            generator: As there.
            frames_at_once: As for `clip_features`, and so is the next.
            feature_dtype: As there.

        Raises:
            ValueError: If numbers of frames, clips or objects differ.
        """
        if isinstance(images_ct3ss, Tensor):
            features = self.clip_features(images_ct3ss, frames_at_once, feature_dtype)
        else:
            features = list(images_ct3ss)
        if len(clip_of_object) != coverage_tbhw.shape[1]:
            raise ValueError(f"{len(clip_of_object)} objects have a clip, {coverage_tbhw.shape[1]} have masks")
        rows = features_of_objects(features, clip_of_object)
        return forward_clip(
            self,
            rows,
            coverage_tbhw,
            plan,
            prompting,
            video_frames=video_frames,
            force_presence=force_presence,
            generator=generator,
        )

    @torch.no_grad()
    def clip_features(
        self, images_ct3ss: Tensor, frames_at_once: int = 8, dtype: torch.dtype | None = None
    ) -> list[TrackerFeatures]:
        """What the tracker reads of each frame of C clips, without gradients: T times C rows.

        Args:
            images_ct3ss: (C, T, 3, S, S).
            frames_at_once: Images that pass the backbone together; bounds the memory.
            dtype: The backbone computes in it (autocast); None: in that of its weights. The result is in the dtype of
                the tracker's weights.

        Raises:
            ValueError: If the images are no clips.
        """
        if images_ct3ss.ndim != 5 or not images_ct3ss.numel():
            raise ValueError(f"images must be (clips, frames, 3, S, S), got {tuple(images_ct3ss.shape)}")
        num_clips, num_frames = images_ct3ss.shape[:2]
        images = images_ct3ss.transpose(0, 1).flatten(0, 1)
        parts = [self._features(chunk, dtype) for chunk in images.split(frames_at_once)]
        maps = (torch.cat(level).unflatten(0, (num_frames, num_clips)) for level in zip(*parts, strict=True))
        return [TrackerFeatures(*frame) for frame in zip(*maps, strict=True)]

    def _features(self, images: Tensor, dtype: torch.dtype | None) -> TrackerFeatures:
        precision: AbstractContextManager[object] = nullcontext()
        if dtype is not None:
            precision = torch.autocast(images.device.type, dtype)
        with precision:
            out = self.backbone.forward_image(images, need_detector=False)["sam2_backbone_out"]
            features = self.frame_features(out)
        return TrackerFeatures(*(m.to(self.no_mem_embed.dtype) for m in features))


def is_trained(name: str) -> bool:
    """Whether stage 2 trains the parameter, or all below the name that ends in a dot."""
    return name.startswith(OWN_PREFIXES)


def features_of_objects(features: Sequence[TrackerFeatures], clip_of_object: Tensor) -> list[TrackerFeatures]:
    """Features with a row for each object from those with a row for each clip; a single clip's row stays shared.

    Raises:
        ValueError: If an object is in a clip that there is not.
    """
    num_clips = len(features[0].coarse)
    if clip_of_object.numel() and not 0 <= int(clip_of_object.min()) <= int(clip_of_object.max()) < num_clips:
        raise ValueError(f"objects are in clips {clip_of_object.tolist()}, and there are {num_clips}")
    if num_clips == 1:
        return list(features)
    return [TrackerFeatures(*(m[clip_of_object] for m in frame)) for frame in features]
