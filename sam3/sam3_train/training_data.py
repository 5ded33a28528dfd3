"""What a distillation reads, found and checked before anything is computed: images, embeddings, free disk.

Each check adds lines to a list; `sam3_train.errors.require_no_problems` makes one error of them. What the checks open
(image indices, the embedding store) is what the run then reads.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from yacs.config import CfgNode

from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import AugmentSpec
from sam3_train.data.distillation_loader import image_index_from_config
from sam3_train.data.image_index import ImageIndex
from sam3_train.distillation_config import augment_config, preprocess_config, teacher_config
from sam3_train.embeddings import EmbeddingStore
from sam3_train.errors import UserError, attempt
from sam3_train.teacher import require_teacher_of_store

LISTED_KEYS = 10
"""Most images without an embedding that a message names."""


@dataclass(frozen=True)
class TrainingData:
    """What a run reads, opened and checked against each other."""

    preprocess: Preprocess
    grid_size: int
    train: ImageIndex
    val: ImageIndex | None
    store: EmbeddingStore | None
    """None with an online teacher."""
    augment: AugmentSpec | None
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Images that are left out because they have no embedding: keys by split (``DISTILL.MAX_MISSING_FRACTION``)."""
    num_quarantined: dict[str, int] = field(default_factory=dict)
    """How many more are left out because the export could not use them, by split; the store lists the reasons."""


def check_data(
    cfg: CfgNode,
    world_size: int,
    problems: list[str],
    heads_file: str = "",
    heads_remedy: str = "",
    missing: dict[str, list[str]] | None = None,
) -> TrainingData | None:
    """Open images and embeddings and check that they belong together.

    Args:
        cfg: The settings.
        world_size: Processes that share an epoch.
        problems: Receives what is wrong.
        heads_file: The teacher's file whose heads the run uses; compared with the store. Empty: not compared.
        heads_remedy: What else the user can do if it is of another teacher; ends the message.
        missing: Receives the keys of the images without an embedding by split, also if they are too many.

    Returns:
        None if anything is wrong; the reasons are then among the problems.
    """
    teacher = attempt(problems, lambda: teacher_config(cfg))
    preprocess = attempt(problems, lambda: preprocess_config(cfg)) if teacher else None
    train = attempt(problems, lambda: image_index_from_config(cfg.DATA, "train"))
    val = attempt(problems, lambda: _val_index(cfg)) if cfg.VAL.ENABLE and train is not None else None
    store, missing, quarantined = None, {} if missing is None else missing, dict[str, int]()
    if teacher and not cfg.DISTILL.ONLINE_TEACHER:
        store = attempt(problems, lambda: EmbeddingStore(cfg.DISTILL.TEACHER_EMBED_PATH, shape=teacher.embedding_shape))
        if store is None:
            return None
    if not (teacher and preprocess and train):
        return None
    augment = attempt(problems, lambda: augment_config(cfg))
    if augment is None and not cfg.DISTILL.NO_RAND:
        return None
    if store is not None:
        _check_store(store, preprocess, augment, problems)
        limit = cfg.DISTILL.MAX_MISSING_FRACTION
        train = _covered(store, train, limit, missing, quarantined, problems)
        val = _covered(store, val, limit, missing, quarantined, problems) if val is not None else None
        if train is None:
            return None
    if heads_file and Path(heads_file).is_file():
        attempt(problems, lambda: require_teacher_of_store(heads_file, teacher, preprocess, store, heads_remedy))
    if len(train) < cfg.DATA.BATCH_SIZE * world_size:
        problems.append(
            f"DATA.BATCH_SIZE {cfg.DATA.BATCH_SIZE} over {world_size} processes is more than the {len(train)} training "
            "images: an epoch would have no step"
        )
    if problems:
        return None
    return TrainingData(preprocess, teacher.grid_size, train, val, store, augment, missing, quarantined)


def _val_index(cfg: CfgNode) -> ImageIndex:
    try:
        return image_index_from_config(cfg.DATA, "val")
    except UserError as error:
        raise UserError(f"{error} (VAL.ENABLE False trains without validation)") from None


def _check_store(
    store: EmbeddingStore, preprocess: Preprocess, augment: AugmentSpec | None, problems: list[str]
) -> None:
    where = f"the embedding store {store.directory}"
    if store.info is None:
        return  # the public layout says nothing about itself
    theirs = Preprocess.from_dict(store.spec.preprocess)
    attempt(problems, lambda: preprocess.require_equal(theirs, "the training config (DATA.PREPROCESS)", where))
    stored = None if store.spec.augmentation is None else AugmentSpec.from_dict(store.spec.augmentation)
    if stored != augment:
        problems.append(
            f"{where} was exported with views {_views(stored)}, the training config asks for {_views(augment)}: set "
            "DISTILL.NO_RAND, FLIP_PROB and MIN_CROP_AREA to the export's"
        )


def _views(augment: AugmentSpec | None) -> str:
    return "NO_RAND True" if augment is None else f"NO_RAND False {augment.to_dict()}"


def _covered(
    store: EmbeddingStore,
    index: ImageIndex,
    limit: float,
    missing: dict[str, list[str]],
    quarantined: dict[str, int],
    problems: list[str],
) -> ImageIndex | None:
    """The index without the images that the export quarantined; a problem if too many others lack an embedding (D-42).

    Args:
        store: The embeddings.
        index: The images.
        limit: Share of the images that may lack one.
        missing: Receives the keys of those that do.
        quarantined: Receives how many images the export could not use.
        problems: Receives what is wrong.
    """
    coverage = store.check_coverage(index.keys)
    absent = coverage.missing
    if absent:
        missing[index.split] = absent
    if coverage.quarantined:
        quarantined[index.split] = len(coverage.quarantined)
    hint = " (or VAL.ENABLE False)" if index.split == "val" else ""
    if len(absent) > limit * coverage.num_wanted:
        problems.append(
            f"{store.directory}: {len(absent)} of {coverage.num_wanted} {index.split} images have no embedding, first "
            f"{', '.join(absent[:LISTED_KEYS])}: run the export for the {index.split} split again{hint}; it adds what "
            f"is missing. DISTILL.MAX_MISSING_FRACTION {limit:g} allows {int(limit * coverage.num_wanted)}"
        )
        return None
    if coverage.quarantined and not coverage.num_present:
        key, reason = next(iter(coverage.quarantined.items()))
        problems.append(
            f"{store.directory}: no {index.split} image has an embedding, {len(coverage.quarantined)} were quarantined "
            f"by the export, such as {key} ({reason}): repair them and export again{hint}"
        )
        return None
    return index.without({*coverage.quarantined, *absent})


def check_disk(output: Path, num_bytes: int, what: str, problems: list[str]) -> None:
    """A problem if the file system of ``output`` has less than ``num_bytes`` free."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        problems.append(
            f"OUTPUT {output}: {what} take {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: choose another "
            "folder or lower TRAIN.KEEP_LAST"
        )
