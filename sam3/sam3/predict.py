"""Find and cut out objects in images: a checkpoint and a text, boxes or clicks, to pictures and COCO results.

    python -m sam3.predict --checkpoint sam3.pt --image street.jpg --text "yellow bus" --output out
    python -m sam3.predict --checkpoint sam3.pt --image photos/ --text dog --text cat --threshold 0.4 --output out
    python -m sam3.predict --checkpoint sam3.pt --image street.jpg --box 40,60,180,150 --output out
    python -m sam3.predict --checkpoint sam3.pt --image street.jpg --point 95,110 --interactive --output out

Boxes and points are in pixels and may end with a label: 1 (the default) means find the like, 0 exclude the like. With
--interactive they mean one object, as in Segment Anything: each box is one object, points are clicks on one.

For every image the output folder gets NAME_overlay.png and NAME_mask.png, in which 0 is background and the pixel value
k the k-th object, best first (with several texts one mask file each: NAME_mask_1.png, ...). predictions.json holds all
objects as COCO results (image_id, category_id, bbox as x, y, width, height, score, segmentation as run lengths) with
the image's name, the prompt, and the mask file and value. category_id counts the texts from 1.

Images that cannot be used are listed at the end and the exit code is 2; the others are done. Ctrl-C keeps what is done.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sam3.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, CommandError, run_command

if TYPE_CHECKING:
    import torch

    from sam3.model.sam3_image import Sam3Image

_DTYPES = ("float32", "bfloat16", "float16")


class Marks(NamedTuple):
    """Boxes or points of the command line, in pixels."""

    values: list[list[float]]
    labels: list[int]


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    summary, *_ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m sam3.predict",
        description=summary,
        epilog=(__doc__ or "").removeprefix(summary).strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a file that sam3.load_model opens, or a model on the Hub")
    parser.add_argument("--image", required=True, nargs="+", type=Path, metavar="PATH", help="image files and folders")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="what to find; may be repeated")
    parser.add_argument(
        "--box", action="append", default=[], metavar="X0,Y0,X1,Y1[,LABEL]", help="in pixels; may be repeated"
    )
    parser.add_argument("--box-format", choices=("xyxy", "xywh"), default="xyxy", help="xywh: x, y, width, height")
    parser.add_argument(
        "--point", action="append", default=[], metavar="X,Y[,LABEL]", help="in pixels; may be repeated"
    )
    parser.add_argument("--interactive", action="store_true", help="masks of the boxed or clicked objects themselves")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="keep scores above it (default 0.5)")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep at most K objects for each prompt")
    parser.add_argument("--nms", type=float, metavar="IOU", help="drop objects that overlap a better one by more")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights and the computation")
    return parser


def predict(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring.

    Raises:
        CommandError: If an option cannot be used, which is said before anything is computed; if the checkpoint computes
            numbers that are not finite, or results cannot be written.
    """
    args = build_parser().parse_args(join_marks(sys.argv[1:] if argv is None else argv))
    problems: list[str] = []
    boxes, points = parse_marks(args.box, 4, "--box", problems), parse_marks(args.point, 2, "--point", problems)
    _check_options(args, problems)
    if args.interactive and 0 in boxes.labels:
        problems.append("--box with label 0 does not go with --interactive: each box is an object to cut out")
    device = parse_device(args.device, problems)
    images = _find_images(args.image, args.output, problems)
    if not problems:
        make_folder(args.output, problems)
    if problems:
        raise CommandError.from_problems(problems)

    import torch

    from sam3.finite import NonFiniteError
    from sam3.loading import load_model
    from sam3.prediction import Clicker, Detector, Folder, predict_images

    model = load_model(args.checkpoint, device=device, dtype=getattr(torch, args.dtype))
    _check_model(model, args)
    predictor: Detector | Clicker
    if args.interactive:
        predictor = Clicker(model, boxes, points, args.box_format)
    else:
        predictor = Detector(
            model, args.text, boxes, points, args.box_format, _default(args.threshold, 0.5), args.top_k, args.nms
        )
    try:
        run = predict_images(predictor, images, Folder(args.output))
    except NonFiniteError as error:
        raise CommandError(f"{args.checkpoint}: {error}") from error
    print(f"objects: {run.num_objects}, images: {run.num_images} of {len(images)}, results: {args.output}")
    if run.is_interrupted:
        print(f"interrupted; {args.output} holds what was done", file=sys.stderr)
        return EXIT_INTERRUPTED
    if run.failures:
        print(f"error: {len(run.failures)} of {len(images)} images could not be used:", file=sys.stderr)
        print("\n".join(f"  - {message}" for message in run.failures), file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def join_marks(words: Sequence[str]) -> list[str]:
    """``--box -20,5,30,30`` as ``--box=-20,5,30,30``: argparse takes a word that starts with a minus for an option."""
    joined: list[str] = []
    for word in words:
        is_value = re.match(r"-[\d.][^,]*,", word) and joined and re.fullmatch(r"--\w[\w-]*", joined[-1])
        if is_value:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def parse_marks(words: list[str], count: int, option: str, problems: list[str]) -> Marks:
    """``1,2,3,4`` or ``1,2,3,4,0`` to numbers and labels."""
    marks = Marks([], [])
    for word in words:
        try:
            numbers = [float(part) for part in word.split(",")]
        except ValueError:
            numbers = []
        label = numbers[count] if len(numbers) == count + 1 else 1
        if len(numbers) not in (count, count + 1) or label not in (0, 1):
            problems.append(f"{option} {word}: expected {count} numbers with commas, and optionally a label 1 or 0")
            continue
        marks.values.append(numbers[:count])
        marks.labels.append(int(label))
    return marks


def _check_options(args: argparse.Namespace, problems: list[str]) -> None:
    if not (args.text or args.box or args.point):
        problems.append("no prompt: give --text, --box or --point")
    problems += [f"--text {text!r}: the text is empty" for text in args.text if not text.strip()]
    for option, value in (("--threshold", args.threshold), ("--nms", args.nms)):
        if value is not None and not 0.0 <= value <= 1.0:
            problems.append(f"{option} {value:g}: must lie in 0..1")
    if args.top_k is not None and args.top_k < 1:
        problems.append(f"--top-k {args.top_k}: must be at least 1")
    if args.interactive:
        given = [
            option
            for option, is_given in (
                ("--text", bool(args.text)),
                ("--threshold", args.threshold is not None),
                ("--top-k", args.top_k is not None),
                ("--nms", args.nms is not None),
            )
            if is_given
        ]
        problems += [f"{option} does not go with --interactive, which cuts out what is marked" for option in given]
        if len(args.box) > 1 and args.point:
            problems.append("--interactive: points belong to one object, so give at most one --box with them")
    if args.output.exists() and not args.output.is_dir():
        problems.append(f"--output {args.output}: is a file, not a folder")


def make_folder(path: Path, problems: list[str]) -> None:
    """Make the output folder, or say why it cannot be used."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problems.append(f"--output {path}: cannot be made ({error.strerror})")
    else:
        if not os.access(path, os.W_OK):
            problems.append(f"--output {path}: cannot be written to")


def parse_device(name: str | None, problems: list[str]) -> torch.device | None:
    """The device of ``--device``, if it is there; None leaves the choice to the loader."""
    from sam3.devices import DeviceError, find_device

    try:
        return None if name is None else find_device(name)
    except DeviceError as error:
        problems.append(f"--{error}")
        return None


def _find_images(paths: list[Path], output: Path, problems: list[str]) -> list[tuple[Path, str]]:
    """Image files and their names in the results; folders are searched to any depth, without hidden files."""
    from sam3.image_input import IMAGE_SUFFIXES

    found: dict[Path, str] = {}
    for path in paths:
        if path.is_file():
            found.setdefault(path, path.name)
        elif path.is_dir():
            inside = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and output.resolve() not in file.resolve().parents
            ]  # fmt: skip
            if not inside:
                problems.append(f"--image {path}: the folder holds no image ({', '.join(IMAGE_SUFFIXES)})")
            for file in inside:
                found.setdefault(file, file.relative_to(path).as_posix())
        else:
            problems.append(f"--image {path}: no such file or folder")
    return list(found.items())


def _check_model(model: Sam3Image, args: argparse.Namespace) -> None:
    """Refuse before the first image what no image can repair."""
    from sam3.checkpoint_parts import POINT_PROMPTS

    if args.interactive and model.inst_interactive_predictor is None:
        raise CommandError(f"{args.checkpoint}: holds no SAM heads, which --interactive needs")
    if not args.interactive and not model.has_detector:
        raise CommandError(
            f"{args.checkpoint}: holds no detector, so it cannot search by text, box or point; --interactive cuts out "
            "what is marked"
        )
    if not args.interactive and model.backbone.language_backbone is None:
        raise CommandError(f"{args.checkpoint}: holds no text encoder, which the detector needs")
    if args.point and not args.interactive and POINT_PROMPTS in model.missing_parts:
        raise CommandError(
            f"{args.checkpoint}: holds no weights for --point without --interactive: files in Hugging Face's layout "
            "lack them. Use --box, or the released file"
        )


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(predict, argv)


if __name__ == "__main__":
    raise SystemExit(main())
