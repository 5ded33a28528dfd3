"""What a run reads, opened as its settings say: videos, held-out videos, images beside them, and their loaders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from yacs.config import CfgNode

from sam3.model.efficient_sam3_train import EfficientSam3Train
from sam3.preprocess import Preprocess
from sam3_train.data.bad_images import read_bad_images
from sam3_train.data.epoch_loader import EpochLoader
from sam3_train.data.image_index import ImageIndex, build_image_index
from sam3_train.distributed import RunContext
from sam3_train.errors import UserError, attempt
from sam3_train.precision import pick_dtype
from stage2.data.clip_loader import BAD_VIDEOS_FILE, bad_video_log, build_train_loader, build_val_loader
from stage2.data.clip_sampler import ClipSampler
from stage2.data.clip_sources import ImageClips, VideoClips
from stage2.data.sav_dataset import ClipDataset
from stage2.data.video_set import VideoSet, open_video_set
from stage2.feature_cache import FeatureCache, fill_feature_cache, release_backbone
from stage2.settings import clip_spec, look_spec, val_clip_spec, video_settings

IMAGE_KINDS = ("sa1b", "sa1b_tar")


@dataclass(frozen=True)
class TrainingClips:
    """The videos and images of a run."""

    train: VideoSet
    val: VideoSet | None
    images: ImageIndex | None

    def identity(self) -> dict[str, str | None]:
        """What must stay the same for a run to be continued."""
        return {
            "train_videos_sha256": self.train.sha256,
            "images_sha256": None if self.images is None else self.images.sha256,
        }

    def left_out(self) -> dict[str, str]:
        """Videos that the indices know to be bad: reason by name."""
        return {name: reason for videos in (self.train, self.val) if videos for name, reason in videos.index.bad()}

    def write_left_out(self, output: Path) -> None:
        """List them in a run's folder, each once.

        Raises:
            UserError: If that cannot be written.
        """
        path = output / BAD_VIDEOS_FILE
        known = read_bad_images(path)
        lines = [f"{name}\t{' '.join(why.split())}\n" for name, why in self.left_out().items() if name not in known]
        if not lines:
            return
        try:
            output.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def open_clips(cfg: CfgNode, problems: list[str]) -> TrainingClips | None:
    """Find videos and images. Collective over ranks.

    Args:
        cfg: The settings.
        problems: Receives what is wrong.

    Returns:
        None if anything is wrong.
    """
    num_before, workers = len(problems), max(1, cfg.DATA.NUM_WORKERS)
    if not cfg.DATA.DATA_PATH:
        problems.append("DATA.DATA_PATH is empty: name the folder of videos (--data_path)")
        return None
    train = attempt(problems, lambda: open_video_set(video_settings(cfg), "train", cfg.CLIPS.MIN_AREA, workers))
    val = None
    if cfg.VAL.ENABLE and train is not None:
        val = attempt(problems, lambda: _val_set(cfg, workers))
    images = attempt(problems, lambda: _images(cfg)) if cfg.DATA.IMAGES_PATH else None
    if train is None or len(problems) > num_before:
        return None
    return TrainingClips(train, val, images)


def _val_set(cfg: CfgNode, num_workers: int) -> VideoSet:
    settings = video_settings(cfg, is_val_set=bool(cfg.DATA.VAL_PATH))
    try:
        found = open_video_set(settings, "val", cfg.CLIPS.MIN_AREA, num_workers)
    except UserError as error:
        raise UserError(f"{error} (VAL.ENABLE False trains without validation)") from None
    if cfg.DATA.VAL_NUM_VIDEOS < 0:
        return found
    return VideoSet(found.layout, found.index, found.positions[: cfg.DATA.VAL_NUM_VIDEOS], found.split)


def _images(cfg: CfgNode) -> ImageIndex:
    data = cfg.DATA
    if data.IMAGES_DATASET not in IMAGE_KINDS:
        raise UserError(
            f"DATA.IMAGES_DATASET {data.IMAGES_DATASET!r} is not one of {', '.join(IMAGE_KINDS)}: images are trained "
            "on with the masks of their annotations"
        )
    return build_image_index(
        data.IMAGES_PATH, data.IMAGES_DATASET, "train", val_fraction=0.0, cache_dir=data.INDEX_CACHE or None
    )


def clip_sampler(cfg: CfgNode, clips: TrainingClips, rank: int, world_size: int) -> ClipSampler:
    """The order of the clips of a run on one rank.

    Raises:
        UserError: If a setting is impossible.
    """
    return ClipSampler(
        len(clips.train),
        0 if clips.images is None else len(clips.images),
        batch_size=cfg.DATA.BATCH_SIZE,
        clips_per_video=cfg.DATA.CLIPS_PER_VIDEO,
        image_share=cfg.DATA.IMAGE_SHARE,
        seed=cfg.SEED,
        rank=rank,
        world_size=world_size,
    )


def fill_cache(
    cfg: CfgNode, clips: TrainingClips, cache: FeatureCache, model: EfficientSam3Train, run: RunContext
) -> None:
    """Compute the features that the cache lacks, and let the backbone go if nothing else needs it. Collective.

    Videos that cannot be read are met again, counted and replaced when clips of them are drawn.

    Raises:
        UserError: If the disk is too small, or a file cannot be written.
    """
    for videos in filter(None, (clips.train, clips.val)):
        fill_feature_cache(
            cache,
            model,
            videos,
            frames_at_once=cfg.FORWARD.FRAMES_AT_ONCE,
            dtype=trunk_dtype(cfg, run),
            rank=run.rank,
            world_size=run.world_size,
            shows_progress=run.is_main,
        )
    if clips.images is None:
        release_backbone(model)


def trunk_dtype(cfg: CfgNode, run: RunContext) -> torch.dtype | None:
    """What the frozen backbone computes in; None: in float32."""
    dtype = pick_dtype(cfg, run.device)
    return None if dtype == torch.float32 else dtype


def build_loaders(
    cfg: CfgNode,
    clips: TrainingClips,
    preprocess: Preprocess,
    mask_side: int,
    run: RunContext,
    output: Path,
    cache: FeatureCache | None = None,
) -> tuple[EpochLoader, EpochLoader | None]:
    """Loaders of this rank for training and, where wanted, validation.

    Args:
        cfg: The settings.
        clips: From `open_clips`.
        preprocess: That of the backbone.
        mask_side: That of the mask decoder's logits.
        run: This process.
        output: The run's folder, which lists the videos that turn out to be bad.
        cache: Features of all annotated frames, which then are not decoded; None: there is none.
    """
    data, spec, look = cfg.DATA, clip_spec(cfg), look_spec(cfg)
    log_folder = output if run.is_main else None
    images = None if clips.images is None else ImageClips(clips.images, spec, preprocess, mask_side, look)
    videos = VideoClips(clips.train, spec, preprocess, mask_side, look, cache)
    how = {"num_workers": data.NUM_WORKERS, "prefetch_factor": data.PREFETCH_FACTOR, "pin_memory": data.PIN_MEMORY}
    train = build_train_loader(
        ClipDataset(videos, images, seed=cfg.SEED, on_bad=data.ON_BAD),
        clip_sampler(cfg, clips, run.rank, run.world_size),
        data.BATCH_SIZE,
        bad_log=bad_video_log(log_folder, data.MAX_BAD_FRACTION, len(clips.train), clips.left_out()),
        **how,
    )
    if clips.val is None:
        return train, None
    held_out = VideoClips(clips.val, val_clip_spec(cfg), preprocess, mask_side, features=cache)
    val = build_val_loader(
        ClipDataset(held_out, seed=cfg.SEED, on_bad=data.ON_BAD, is_fixed=True),
        data.BATCH_SIZE,
        run.rank,
        run.world_size,
        bad_log=bad_video_log(log_folder, data.MAX_BAD_FRACTION, len(clips.val), clips.left_out()),
        **how,
    )
    return train, val
