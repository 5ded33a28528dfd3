"""Make the demo world: small generated scenes and clips with exact masks over real photos, in SA-1B and SA-V layout.

    python data/demo/demo_world.py --output output/demo/world
    python data/demo/demo_world.py --output output/demo/world --train 200 --val 20 --test 20 --dry-run

It writes ``images/{train,val,test}/sa_<n>.jpg`` with ``annotations/{train,val,test}/sa_<n>.json``,
``clips/{train,val,test}/<clip>/`` (frames and masks) and ``photos/`` (the photos themselves, with ``photos.json``,
which says which ones no training image shows). The same settings give the same bytes on any number of processes. A
second run reuses what is there; an interrupted one continues. ``world.json`` describes the whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_backgrounds import PHOTOS, SPLITS, MissingPhotosError, load_photo
from demo_clips import write_clip
from demo_rle import encode_mask
from demo_scenes import Scene, describe_object, make_scene
from PIL import Image
from tqdm import tqdm

from sam3_train.errors import UserError, run_cli

GENERATOR_VERSION = 2
"""Raise it whenever the same settings give other bytes: worlds made before are then made anew."""
MANIFEST = "world.json"
FOLDERS = ("images", "annotations", "clips", "photos")
BYTES_PER_SCENE, BYTES_PER_FRAME = 45_000, 20_000


@dataclass(frozen=True)
class WorldSettings:
    """What decides the bytes of a world."""

    seed: int = 0
    num_scenes: tuple[int, int, int] = (900, 80, 60)
    """Per split: train, val, test."""
    num_clips: tuple[int, int, int] = (8, 2, 2)
    frames_per_clip: int = 48
    jpeg_quality: int = 92
    generator_version: int = GENERATOR_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain types for the manifest."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def sha256(self) -> str:
        """Hash of the settings: equal worlds have equal hashes."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """One file pair or clip to be written."""

    root: Path
    settings: WorldSettings
    split: str
    index: int
    is_clip: bool


def scene_number(split: str, index: int) -> int:
    """The number in a scene's file name, unique over the splits."""
    return (SPLITS.index(split) + 1) * 1_000_000 + index


def describe_scene(scene: Scene, split: str, index: int) -> dict[str, Any]:
    """The JSON beside an image: SA-1B's fields, and per object what it is."""
    height, width = scene.masks.shape[1:]
    number = scene_number(split, index)
    annotations = []
    for i, (mask, item) in enumerate(zip(scene.masks, scene.objects, strict=True)):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        left, top = int(columns[0]), int(rows[0])
        area = int(mask.sum())
        annotations.append(
            {
                "id": number * 100 + i,
                "segmentation": encode_mask(mask),
                "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
                "area": area,
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "crop_box": [0, 0, width, height],
                "point_coords": [[float(value) for value in scene.point_coords[i]]],
                **describe_object(item),
                "visible_share": round(min(1.0, area / item.full_area_px), 4),
            }
        )
    image = {"image_id": number, "width": width, "height": height, "file_name": f"sa_{number}.jpg"}
    return {"image": image, "annotations": annotations, "background": scene.background}


def run_job(job: Job) -> None:
    """Write one scene or clip, unless it is there; every file appears whole or not at all."""
    settings = job.settings
    if job.is_clip:
        clips = job.root / "clips" / job.split
        write_clip(clips, settings.seed, job.split, job.index, settings.frames_per_clip, settings.jpeg_quality)
        return
    stem = f"sa_{scene_number(job.split, job.index)}"
    image_path = job.root / "images" / job.split / f"{stem}.jpg"
    annotation_path = job.root / "annotations" / job.split / f"{stem}.json"
    if image_path.is_file() and annotation_path.is_file():
        return
    scene = make_scene(settings.seed, job.split, job.index)
    picture = Image.fromarray(scene.image)
    _write_whole(image_path, lambda path: picture.save(path, format="JPEG", quality=settings.jpeg_quality))
    text = json.dumps(describe_scene(scene, job.split, job.index))
    _write_whole(annotation_path, lambda path: path.write_text(text))


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


def list_jobs(root: Path, settings: WorldSettings) -> list[Job]:
    """All scenes and clips of a world."""
    jobs = [
        Job(root, settings, split, index, is_clip=False)
        for split, count in zip(SPLITS, settings.num_scenes, strict=True)
        for index in range(count)
    ]
    jobs += [
        Job(root, settings, split, index, is_clip=True)
        for split, count in zip(SPLITS, settings.num_clips, strict=True)
        for index in range(count)
    ]
    return jobs


def make_world(root: Path, settings: WorldSettings, num_workers: int = 1) -> bool:
    """Make a world below ``root``, or reuse the one that is there.

    Returns:
        False if a whole world of the same settings was there already.

    Raises:
        UserError: If ``root`` holds files of somebody else, or the photos are not installed.
    """
    manifest_path = root / MANIFEST
    known = read_manifest(manifest_path)
    if known is None and root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root} is not empty and holds no {MANIFEST} of a demo world: choose another --output")
    same = known is not None and known.get("settings_sha256") == settings.sha256
    jobs = list_jobs(root, settings)
    if known is not None and same and known.get("complete") and _count_outputs(root) == len(jobs):
        return False
    if known is not None and not same:
        for folder in FOLDERS:
            shutil.rmtree(root / folder, ignore_errors=True)
    try:
        for kind in ("images", "annotations", "clips"):
            for split in SPLITS:
                (root / kind / split).mkdir(parents=True, exist_ok=True)
        _write_manifest(manifest_path, settings, is_complete=False)
        write_photos(root / "photos")
        for _ in tqdm(_run_jobs(jobs, num_workers), total=len(jobs), desc="demo world", unit="scene"):
            pass
        _write_manifest(manifest_path, settings, is_complete=True)
    except MissingPhotosError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"can't write the demo world to {root}: {error}") from error
    return True


def _run_jobs(jobs: list[Job], num_workers: int) -> Iterator[None]:
    if num_workers < 2:
        yield from map(run_job, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        yield from pool.imap_unordered(run_job, jobs, chunksize=8)


def _count_outputs(root: Path) -> int:
    """Scenes (image and annotation both there) and clips that ``root`` holds."""
    scenes = {path.stem for path in root.glob("images/*/sa_*.jpg")}
    scenes &= {path.stem for path in root.glob("annotations/*/sa_*.json")}
    return len(scenes) + len(list(root.glob("clips/*/sav_*")))


def write_photos(folder: Path) -> None:
    """The photos as JPEG files, and ``photos.json``: file name to the split whose backgrounds come from it."""
    folder.mkdir(parents=True, exist_ok=True)
    listing = {}
    for split, names in PHOTOS.items():
        for name in names:
            target = folder / f"{Path(name).stem}.jpg"
            listing[target.name] = split
            if not target.is_file():
                photo = load_photo(name)
                _write_whole(target, functools.partial(photo.save, format="JPEG", quality=95))
    held_out = sorted(name for name, split in listing.items() if split != "train")
    text = json.dumps({"split": listing, "held_out": held_out}, indent=2)
    _write_whole(folder / "photos.json", lambda path: path.write_text(text))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The world's manifest, or None if there is none.

    Raises:
        UserError: If it can't be read.
    """
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): delete the world's folder and make it again") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is no manifest of a demo world: delete the world's folder and make it again")
    return manifest


def _write_manifest(path: Path, settings: WorldSettings, is_complete: bool) -> None:
    manifest = {
        "settings": settings.to_dict(),
        "settings_sha256": settings.sha256,
        "backgrounds": {split: list(names) for split, names in PHOTOS.items()},
        "complete": is_complete,
    }
    _write_whole(path, lambda partial: partial.write_text(json.dumps(manifest, indent=2)))


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = WorldSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("output/demo/world"), metavar="DIR", help="the world's folder"
    )
    parser.add_argument("--seed", type=_count, default=defaults.seed)
    for split, scenes, clips in zip(SPLITS, defaults.num_scenes, defaults.num_clips, strict=True):
        parser.add_argument(f"--{split}", type=_count, default=scenes, metavar="N", help=f"scenes in {split}")
        parser.add_argument(f"--{split}-clips", type=_count, default=clips, metavar="N", help=f"clips in {split}")
    parser.add_argument("--frames", type=_count, default=defaults.frames_per_clip, metavar="N", help="frames per clip")
    parser.add_argument("--workers", type=_count, default=min(4, os.cpu_count() or 1), metavar="N", help="processes")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    return parser


def _main(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    settings = WorldSettings(
        args.seed,
        (args.train, args.val, args.test),
        (args.train_clips, args.val_clips, args.test_clips),
        args.frames,
    )
    if not sum(settings.num_scenes) + sum(settings.num_clips):
        raise UserError("nothing to make: all of --train, --val, --test and the numbers of clips are 0")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file: name a folder")
    num_scenes, num_clips = sum(settings.num_scenes), sum(settings.num_clips)
    megabytes = (num_scenes * BYTES_PER_SCENE + num_clips * settings.frames_per_clip * BYTES_PER_FRAME) / 1e6
    plan = f"{num_scenes} scenes and {num_clips} clips of {settings.frames_per_clip} frames, about {megabytes:.0f} MB"
    if args.dry_run:
        print(f"would make {plan} in {args.output}")
        return 0
    is_new = make_world(args.output, settings, args.workers)
    print(f"{'made' if is_new else 'reused'} {plan} in {args.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_cli(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
