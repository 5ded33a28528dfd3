"""Check once that every photo of a data set can be read, and list those that cannot.

    python -m sam3_train.data.validate --data-path data/sa-1b --output data/sa-1b/bad_images.txt
    python -m sam3_train.data.validate --data-path photos --dataset folder --workers 8 --annotations

Every image is decoded completely. Export and training leave out what the list names: --opts DATA.BAD_IMAGES <list>.
With --annotations the SA-1B annotation of every image is parsed and its masks are decoded too; problems there are
reported but do not enter the list, because distilling the trunk reads no annotation. For training with prompts add
--list-annotations: images without a single valid mask then enter the list.

Exit code 0: all is well. 2: something was found; everything is reported and the list is written first.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from sam3_train.data.bad_images import BAD_IMAGES_FILE
from sam3_train.data.decode import UnreadableImageError
from sam3_train.data.image_index import KINDS, ImageIndex, build_image_index
from sam3_train.data.process_pool import run_in_processes
from sam3_train.data.sa1b import AnnotationError, parse_sa1b_annotation
from sam3_train.data.splits import DEFAULT_VAL_FRACTION, SPLITS
from sam3_train.errors import UserError, run_cli

ANNOTATED_KINDS = ("sa1b", "sa1b_tar")
"""Layouts that have SA-1B annotations beside the photos."""

_CHUNK = 64
_worker_state: tuple[ImageIndex, bool] | None = None

Problem = tuple[str, str, str]
"""``image``, ``annotation`` or (no mask of it can be used) ``unusable annotation``; key; reason."""


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    return run_cli(_main, argv)


def _main(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.list_annotations and not args.annotations:
        raise UserError("--list-annotations lists what --annotations finds: give both")
    if args.annotations and args.dataset not in ANNOTATED_KINDS:
        raise UserError(
            f"--annotations: the layout {args.dataset!r} has no SA-1B annotations, only "
            f"{' and '.join(ANNOTATED_KINDS)} have; leave the flag out"
        )
    output = Path(args.output or Path(args.data_path) / BAD_IMAGES_FILE)
    bad: dict[str, str] = {}
    num_images = num_annotation_problems = 0
    for split in args.splits:
        index = build_image_index(
            args.data_path, args.dataset, split, val_fraction=args.val_fraction, cache_dir=args.index_cache
        )
        num_images += len(index)
        for kind, key, reason in check_images(index, args.workers, args.annotations):
            print(reason, file=sys.stderr)
            if kind == "image" or (kind == "unusable annotation" and args.list_annotations):
                bad[key] = " ".join(reason.split())
            num_annotation_problems += kind != "image"
    _write_list(output, bad)
    what = "unreadable or without a valid mask" if args.list_annotations else "unreadable"
    print(f"{num_images:,} images checked, {len(bad):,} {what}, listed in {output}")
    if args.annotations:
        print(f"{num_annotation_problems:,} annotations are missing, empty or malformed")
    if problems := _problems(bad, what, num_annotation_problems, output):
        raise UserError.from_problems(args.data_path, problems)
    return 0


def _problems(bad: dict[str, str], what: str, num_annotation_problems: int, output: Path) -> list[str]:
    """What the check ends with, if anything was found."""
    problems = []
    if bad:
        problems.append(f"{len(bad):,} photos are {what}; repair them, or leave them out: DATA.BAD_IMAGES {output}")
    if num_annotation_problems:
        problems.append(
            f"{num_annotation_problems:,} missing, empty or malformed annotations, named above; repair them"
        )
    return problems


def check_images(index: ImageIndex, num_workers: int, with_annotations: bool = False) -> Iterator[Problem]:
    """Decode every image of an index, in several processes.

    Args:
        index: The images.
        num_workers: Processes.
        with_annotations: Parse the annotations and decode their masks too.

    Yields:
        What is wrong, in no particular order.
    """
    starts = range(0, len(index), _CHUNK)
    with tqdm(total=len(index), desc=f"check {index.split}", unit="image", disable=None) as bar:
        for start, problems in run_in_processes(
            _check_chunk, starts, num_workers, _set_worker_state, (index, with_annotations)
        ):
            yield from problems
            bar.update(min(_CHUNK, len(index) - start))


def _set_worker_state(index: ImageIndex, with_annotations: bool) -> None:
    global _worker_state
    _worker_state = (index, with_annotations)


def _check_chunk(start: int) -> list[Problem]:
    assert _worker_state is not None
    index, with_annotations = _worker_state
    problems: list[Problem] = []
    for position in range(start, min(start + _CHUNK, len(index))):
        try:
            index.open_image(position)
        except UnreadableImageError as error:
            problems.append(("image", index.key(position), str(error)))
        if with_annotations:
            try:
                _check_annotation(index, position)
            except AnnotationError as error:
                kind = "annotation" if _has_valid_mask(index, position) else "unusable annotation"
                problems.append((kind, index.key(position), str(error)))
    return problems


def _check_annotation(index: ImageIndex, position: int) -> None:
    content = index.read_annotation(position)
    where = index.annotation_where(position) or index.where(position)
    if content is None:
        raise AnnotationError(f"{where}: has no annotation")
    # Not any(): that would stop at the first valid mask.
    if not sum(bool(annotated.mask().any()) for annotated in parse_sa1b_annotation(content, where)):
        raise AnnotationError(f"{where}: every mask is empty")


def _has_valid_mask(index: ImageIndex, position: int) -> bool:
    """Whether anything of a faulty annotation can be used."""
    content, malformed = index.read_annotation(position), list[str]()
    try:
        for annotated in parse_sa1b_annotation(content or b"", "", malformed=malformed):
            try:
                if annotated.mask().any():
                    return True
            except AnnotationError:
                continue
    except AnnotationError:
        return False
    return False


def _write_list(path: Path, bad: dict[str, str]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(f"{key}\t{reason}\n" for key, reason in sorted(bad.items())), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam3_train.data.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-path", required=True, help="root of the data set")
    parser.add_argument("--dataset", default="sa1b", choices=KINDS, help="its layout (default: sa1b)")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS, help="default: train val")
    parser.add_argument("--output", help=f"the list to write (default: {BAD_IMAGES_FILE} in the data set)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--annotations", action="store_true", help="check SA-1B annotations and their masks too")
    parser.add_argument("--list-annotations", action="store_true", help="list images without a valid mask as well")
    parser.add_argument("--val-fraction", type=float, default=DEFAULT_VAL_FRACTION, help="as DATA.VAL_FRACTION")
    parser.add_argument("--index-cache", help="as DATA.INDEX_CACHE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
