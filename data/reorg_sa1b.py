"""Unpack SA-1B tars into images/{train,val} and annotations/{train,val}, or only index them for reading in place.

    python data/reorg_sa1b.py --source data/sa-1b-tars --output data/sa-1b --dry-run     what would be done
    python data/reorg_sa1b.py --source data/sa-1b-tars --output data/sa-1b --workers 8   unpack; run again to resume
    python data/reorg_sa1b.py --source data/sa-1b-tars --index-only                      tables only, nothing unpacked

An image is held out by a hash of its name, so images that are added later never move one from train to val. A tar is
read completely (headers) before anything of it is written; one that is damaged, empty or holds a member that points
outside the target folder is left out and reported. `reorg_manifest.json` in the output folder says what is done with
every tar; a run that was interrupted continues there, and one that finds unpacked files deleted unpacks their tars
again. Exit code 2 if any tar could not be used.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from reorg_manifest import Manifest, TarResult, save_names, write_json
from tqdm import tqdm

from sam3_train.data.decode import IMAGE_SUFFIXES
from sam3_train.data.image_tars import TarTableError, load_tar_table, require_whole_tar
from sam3_train.data.process_pool import process_context, run_in_processes
from sam3_train.data.splits import DEFAULT_VAL_FRACTION, split_of_name
from sam3_train.errors import UserError, run_cli

_progress: Any = None
"""Shared count of bytes that the workers have passed; set by `_start_worker`."""


@dataclass(frozen=True)
class Options:
    """What a worker needs to know."""

    output: Path
    val_ratio: float
    folder_per_tar: bool
    is_dry_run: bool


@dataclass(frozen=True)
class _Member:
    name: str
    """File name without folder."""
    size: int
    info: tarfile.TarInfo


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    return run_cli(_main, argv)


def _main(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)
    source = Path(args.source)
    tars = sorted(path for path in source.glob("*.tar") if not path.name.startswith("."))
    if args.index_only:
        _require_tars(tars, source)
        results = _run_tars(tars, partial(index_tar, cache_dir=args.index_cache), args.workers, "index")
        return _finish(dict(results), args.report, f"read them in place: DATA.DATASET sa1b_tar DATA.DATA_PATH {source}")
    if args.output is None:
        raise UserError("--output: say where images/ and annotations/ go (or use --index-only)")
    if not 0.0 <= args.val_ratio < 1.0:
        raise UserError(f"--val-ratio {args.val_ratio} is not in [0, 1)")
    output = Path(args.output)
    manifest = Manifest.load(output, args.val_ratio, args.folder_per_tar)
    deleted = manifest.deleted_from(source)
    if not deleted:
        _require_tars(tars, source)
    lost = manifest.count_lost()
    pending = [tar for tar in tars if not manifest.is_done(tar, lost)]
    gone = f", {len(deleted)} more done and deleted" if deleted else ""
    print(f"{len(tars)} tars in {source}: {len(tars) - len(pending)} done before, {len(pending)} to do{gone}")
    if lost:
        print(f"{sum(lost.values()):,} files that were unpacked are gone from {output}, of {', '.join(sorted(lost))}")
    _check_disk(output, pending, args.workers if args.delete_tars else len(pending))
    options = Options(output, args.val_ratio, args.folder_per_tar, args.dry_run)
    what = "plan" if args.dry_run else "unpack"
    for name, result in _run_tars(pending, partial(unpack_tar, options=options), args.workers, what):
        manifest.results[name] = result
        if not args.dry_run:
            is_deleted = args.delete_tars and result.status == "done"
            result.deleted_from = str(source.resolve()) if is_deleted else ""
            manifest.save()
            if is_deleted:
                (source / name).unlink()
    names = {*deleted, *(tar.name for tar in tars)}
    of_source = {name: result for name, result in manifest.results.items() if name in names}
    for name in lost.keys() & set(deleted):
        problem = (
            f"{source / name}: {lost[name]} of its files are gone from {output}, and so is the tar; fetch it again"
        )
        of_source[name] = replace(of_source[name], status="lost", problems=[problem])
    return _finish(of_source, args.report, "nothing was written (--dry-run)" if args.dry_run else f"in {output}")


def _require_tars(tars: list[Path], source: Path) -> None:
    if not tars:
        raise UserError(f"{source}: holds no *.tar (--source); data/download_sa1b.py fetches them")


def unpack_tar(tar: Path, options: Options) -> TarResult:
    """Unpack one tar; files that are already there in full are passed over.

    Returns:
        What was done. Problems of the tar or the disk are recorded in it, not raised.
    """
    result = TarResult(size=tar.stat().st_size)
    try:
        require_whole_tar(tar)
        with tarfile.open(tar, "r:") as archive:
            members = _checked_members(archive, tar, result)
            if result.status == "done" and not options.is_dry_run:
                _write_members(archive, tar, members, options)
                save_names(options.output, tar.name, [str(_relative_target(m.name, tar, options)) for m in members])
    except TarTableError as error:
        result.status = "damaged"
        result.problems.append(str(error))
    except (OSError, UserError) as error:
        result.status = "failed"
        result.problems.append(f"{tar}: {error}")
    _count(members if result.status == "done" else [], options, result)
    if result.status == "done" and not options.is_dry_run:
        os.sync()  # the manifest must not call done what a power cut could still take back
    return result


def _checked_members(archive: tarfile.TarFile, tar: Path, result: TarResult) -> list[_Member]:
    """The images and annotations of a tar; marks the result if any member is dangerous or a name occurs twice."""
    members: dict[str, _Member] = {}
    for info in archive:
        reason = _danger(info)
        if reason:
            result.status = "refused"
            result.problems.append(f"{tar}: {info.name!r}: {reason}; nothing of this tar is unpacked")
            continue
        name = PurePosixPath(info.name).name
        if not info.isreg() or name.startswith("."):
            continue
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in IMAGE_SUFFIXES and suffix != ".json":
            result.other_members += 1
        elif name in members:
            raise TarTableError(f"{tar}: holds two members called {name}; fetch the tar again")
        else:
            members[name] = _Member(name, info.size, info)
    if result.status == "done" and not any(os.path.splitext(name)[1] != ".json" for name in members):
        raise TarTableError(f"{tar}: holds no image; fetch the tar again or remove it")
    return list(members.values())


def _danger(info: tarfile.TarInfo) -> str:
    """Why a member must not be unpacked, or an empty string."""
    name = info.name.replace("\\", "/")
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "is an absolute path"
    if ".." in name.split("/"):
        return "would leave the target folder"
    if info.issym() or info.islnk():
        return f"is a link to {info.linkname!r}"
    if not (info.isreg() or info.isdir()):
        return "is a device or a pipe"
    return ""


def _write_members(archive: tarfile.TarFile, tar: Path, members: list[_Member], options: Options) -> None:
    for member in members:
        target = options.output / _relative_target(member.name, tar, options)
        if target.exists():
            if target.stat().st_size != member.size:
                raise UserError(
                    f"{target} exists with {target.stat().st_size} bytes, this tar has it with {member.size}: another "
                    "tar's image of the same name; remove one of them"
                )
        else:
            _write_file(archive, member, target)
        _advance(member.size)


def _write_file(archive: tarfile.TarFile, member: _Member, target: Path) -> None:
    """Copy a member; the target appears whole or not at all."""
    stream = archive.extractfile(member.info)
    assert stream is not None, "only regular files are written"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with stream, open(part, "wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
        written = file.tell()
    if written != member.size:
        raise TarTableError(f"{member.name}: {written} of {member.size} bytes; fetch the tar again")
    os.replace(part, target)


def _relative_target(name: str, tar: Path, options: Options) -> Path:
    """Where a member goes, relative to the output."""
    stem, suffix = os.path.splitext(name)
    folder = Path("annotations" if suffix.lower() == ".json" else "images") / split_of_name(stem, options.val_ratio)
    return (folder / tar.stem if options.folder_per_tar else folder) / name


def _count(members: list[_Member], options: Options, result: TarResult) -> None:
    stems: dict[str, set[str]] = {"image": set(), "annotation": set()}
    for member in members:
        stem, suffix = os.path.splitext(member.name)
        stems["annotation" if suffix.lower() == ".json" else "image"].add(stem)
        result.unpacked_bytes += member.size
    result.val = sum(split_of_name(stem, options.val_ratio) == "val" for stem in stems["image"])
    result.train = len(stems["image"]) - result.val
    result.images_without_annotation = len(stems["image"] - stems["annotation"])
    result.annotations_without_image = len(stems["annotation"] - stems["image"])


def index_tar(tar: Path, cache_dir: str | None) -> TarResult:
    """Make or refresh one tar's offset table; problems are recorded in the result, not raised."""
    result = TarResult(size=tar.stat().st_size)
    try:
        table = load_tar_table(tar, Path(cache_dir) if cache_dir else None, must_keep=True)
        result.train = len(table.keys)
        result.images_without_annotation = int((table.offsets[:, 1] < 0).sum())
    except TarTableError as error:
        result.status = "damaged"
        result.problems.append(str(error))
    except (OSError, UserError) as error:
        result.status = "failed"
        result.problems.append(str(error))
    return result


def _run_tars(
    tars: list[Path], work: Callable[[Path], TarResult], num_workers: int, what: str
) -> Iterator[tuple[str, TarResult]]:
    """Do something to each tar, in processes if asked; yields (name, result) as they end."""
    counter: Any = process_context().Value("q", 0)
    with tqdm(total=sum(tar.stat().st_size for tar in tars), desc=what, unit="B", unit_scale=True, disable=None) as bar:
        workers = min(num_workers, len(tars))
        for tar, result in run_in_processes(
            work, tars, workers, _start_worker, (counter,), lambda: bar.update(counter.value - bar.n)
        ):
            yield tar.name, result


def _start_worker(counter: Any) -> None:
    global _progress
    _progress = counter


def _advance(num_bytes: int) -> None:
    if _progress is not None:
        with _progress.get_lock():
            _progress.value += num_bytes


def _check_disk(output: Path, pending: list[Path], num_at_once: int) -> None:
    """Refuse to begin what the disk cannot hold; ``num_at_once`` tars are on it twice at a time."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    sizes = sorted(tar.stat().st_size for tar in pending)
    free, needed = shutil.disk_usage(existing).free, sum(sizes[-max(1, num_at_once) :])
    if needed > free:
        raise UserError(
            f"{output}: {len(pending)} tars unpack to about {needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB "
            "free; choose another --output, or read the tars in place (--index-only)"
        )


def _finish(results: dict[str, TarResult], report: str | None, where: str) -> int:
    bad = {name: result for name, result in sorted(results.items()) if result.status != "done"}
    good = [result for result in results.values() if result.status == "done"]
    if report:
        tars = {name: asdict(result) for name, result in sorted(results.items())}
        write_json(Path(report), {"failed": list(bad), "tars": tars})
    train, val = sum(result.train for result in good), sum(result.val for result in good)
    missing = sum(result.images_without_annotation for result in good)
    split = f" ({train:,} train, {val:,} val)" if val else ""
    print(f"{len(good)} tars, {train + val:,} images{split}, {missing:,} without annotation; {where}")
    if bad:
        raise UserError.from_problems("tars that cannot be used", [p for r in bad.values() for p in r.problems])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder with the tars")
    parser.add_argument("--output", help="folder that gets images/ and annotations/")
    parser.add_argument(
        "--val-ratio",
        type=float,
        default=DEFAULT_VAL_FRACTION,
        help=f"share held out (default: {DEFAULT_VAL_FRACTION})",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="tars at a time (default: all cores)")
    parser.add_argument("--folder-per-tar", action="store_true", help="images/train/<tar>/ instead of one flat folder")
    parser.add_argument("--delete-tars", action="store_true", help="delete each tar once it is unpacked")
    parser.add_argument("--dry-run", action="store_true", help="read the tars, say what would be done, write nothing")
    parser.add_argument("--index-only", action="store_true", help="build the offset tables for DATA.DATASET sa1b_tar")
    parser.add_argument("--index-cache", help="folder for those tables (default: .tar_tables beside the tars)")
    parser.add_argument("--report", help="write counts and problems of every tar to this JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
