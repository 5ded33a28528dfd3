"""Follow objects through a video: a checkpoint and clicks, boxes, masks or a text, to an overlay video and masks.

    python -m sam3.track clip.mp4 --checkpoint sam3.pt --point 210,350 --output out
    python -m sam3.track clip.mp4 --checkpoint sam3.pt --box 90,60,300,420 --box 400,80,520,400 --frame 30 --output out
    python -m sam3.track frames/ --checkpoint sam3.pt --mask first_frame.png --output out
    python -m sam3.track clip.mp4 --checkpoint sam3.pt --prompts prompts.json --output out
    python -m sam3.track clip.mp4 --checkpoint sam3.pt --text "yellow bus" --output out

Coordinates are in pixels of the video. Points may end with a label, 1 (the default) on the object and 0 off it; all
points belong to one object, each box is an object, and a mask with a palette holds one object for each value, as
DAVIS's annotations do. For several objects, on several frames, there is a JSON file with a list of entries:

    [{"object": 1, "frame": 0, "points": [[210, 350], [250, 220, 0]], "box": [90, 60, 300, 420]},
     {"object": 2, "frame": 12, "mask": "second.png", "value": 1}]

The output folder gets overlay.mp4, Annotations/NAME/00000.png ... (0 is background, k the object k), and tracks.json:
for each frame its objects with id, score, bbox (x, y, width, height) and segmentation (COCO run lengths). A text's
objects count from 0, and their masks have the value id + 1. A folder with results of the same kind for a video of this
name is refused; with --overwrite they are removed first, whatever --save says, and nothing else is.

Memory stays the same however long the video is, but for the list of its frames: 8 bytes for each frame of a file,
beside FFmpeg's own list, and a path for each picture of a folder. Results of going backward wait in the output folder.
If a frame cannot be decoded, what was tracked is kept and the exit code is 2. Ctrl-C keeps what is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sam3.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, CommandError, run_command
from sam3.predict import Marks, join_marks, make_folder, parse_device, parse_marks

if TYPE_CHECKING:
    from sam3.model.sam3_image import Sam3Image
    from sam3.video.frame_source import FrameSource
    from sam3.video.prompts import ObjectPrompt
    from sam3.video.tracking import PromptedTracker, TextTracker, TrackRun
    from sam3.video.writer import FrameWriter

_DTYPES = ("float32", "bfloat16", "float16")
_RESULTS = ("overlay", "masks", "tracks")
_PREFETCHED_FRAMES = 4


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    summary, *_ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m sam3.track",
        description=summary,
        epilog=(__doc__ or "").removeprefix(summary).strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("video", metavar="VIDEO", type=_path("VIDEO"), help="a video file, or a folder of pictures")
    parser.add_argument("--checkpoint", required=True, help="a file that sam3.load_model opens, or a model on the Hub")
    parser.add_argument("--output", required=True, type=_path("--output"), metavar="DIR", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in that folder")
    parser.add_argument(
        "--point", action="append", default=[], metavar="X,Y[,LABEL]", help="click on the object; may be repeated"
    )
    parser.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1", help="an object; may be repeated")
    parser.add_argument(
        "--mask", type=_path("--mask"), metavar="FILE", help="a picture of the video's size with the objects"
    )
    parser.add_argument("--frame", type=int, metavar="N", help="what --point, --box and --mask mark (default 0)")
    parser.add_argument(
        "--prompts", type=_path("--prompts"), metavar="FILE", help="objects and frames as JSON, see below"
    )
    parser.add_argument("--text", metavar="TEXT", help="follow everything that it describes, from the first frame on")
    parser.add_argument(
        "--direction", choices=("both", "forward", "backward"), default="both", help="from the first marked frame"
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="at most N frames beyond the first, each way")
    parser.add_argument("--save", nargs="+", choices=_RESULTS, default=_RESULTS, help="which results (default: all)")
    parser.add_argument(
        "--fps",
        type=float,
        help="of the overlay, where frames have no times of their own (a folder of pictures; default 24)",
    )
    parser.add_argument(
        "--memory",
        choices=("efficient", "full"),
        help="of a file with two: the compressed one (default) or SAM 3's own",
    )
    parser.add_argument("--decoder", choices=("decord", "av"), help="default: decord where it can be relied on")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights and the computation")
    return parser


def _path(name: str) -> Callable[[str], Path]:
    """The type of an option: a path that is not empty, which would be the current folder."""

    def parse(text: str) -> Path:
        if not text.strip():
            raise CommandError(f"{name} {text!r}: the path is empty")
        return Path(text)

    return parse


def track(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring.

    Raises:
        CommandError: If an option cannot be used; nothing has been computed then.
    """
    args = build_parser().parse_args(join_marks(sys.argv[1:] if argv is None else argv))
    problems: list[str] = []
    points, boxes = parse_marks(args.point, 2, "--point", problems), parse_marks(args.box, 4, "--box", problems)
    _check_options(args, boxes, problems)
    device = parse_device(args.device, problems)
    if problems:
        raise CommandError.from_problems(problems)

    from sam3.video.frame_source import open_frames
    from sam3.video.prompts import check_prompts
    from sam3.video.writer import BackgroundWriter, results_in

    prompts = _collect_prompts(args, points, boxes, problems)
    with open_frames(args.video, decoder=args.decoder, prefetch=_PREFETCHED_FRAMES) as frames:
        problems += check_prompts(prompts, frames)
        if args.fps is not None and frames.time_s(0) is not None:
            problems.append(
                f"--fps {args.fps:g}: {args.video} has times of its own, which the overlay keeps: leave it out"
            )
        earlier = results_in(args.output, _mask_folder_name(args))
        if earlier and not args.overwrite:
            first, count = earlier[0].relative_to(args.output), len(earlier)
            problems.append(
                f"--output {args.output}: holds results of an earlier run ({first}{', ...' if count > 1 else ''}; "
                f"files: {count}): choose another folder, or replace them with --overwrite"
            )
        if not problems:
            make_folder(args.output, problems)
        if problems:
            raise CommandError.from_problems(problems)

        import torch

        from sam3.loading import load_model
        from sam3.video.tracking import track_video

        model = load_model(args.checkpoint, device=device, dtype=getattr(torch, args.dtype), memory=args.memory)
        tracker = _build_tracker(model, frames, prompts, args)
        try:
            for path in earlier:
                path.unlink()
            writers = _open_writers(args, frames)
            run = track_video(tracker, tracker.frames, BackgroundWriter(writers))
        except OSError as error:
            raise CommandError(f"--output {args.output}: cannot be written ({error.strerror or error})") from error
    return _report(run, writers, args)


def _check_options(args: argparse.Namespace, boxes: Marks, problems: list[str]) -> None:
    marks = [name for name in ("point", "box", "mask") if getattr(args, name)]
    if not (marks or args.prompts or args.text is not None):
        problems.append("no prompt: give --point, --box, --mask, --prompts or --text")
    if args.text is not None:
        if not args.text.strip():
            problems.append(f"--text {args.text!r}: the text is empty")
        others = [*marks, *(["prompts"] if args.prompts else []), *(["frame"] if args.frame is not None else [])]
        problems += [f"--{name} does not go with --text, which finds its objects itself" for name in others]
        if args.direction == "backward":
            problems.append("--direction backward does not go with --text, which starts at the first frame")
    if args.prompts and (marks or args.frame is not None):
        problems.append(f"--prompts {args.prompts}: holds all marks, so --point, --box, --mask and --frame stay away")
    if args.mask and len(marks) > 1:
        problems.append(f"--mask {args.mask}: says where the objects are, so --point and --box stay away")
    if len(args.box) > 1 and args.point:
        problems.append("--point: all points belong to one object, so give at most one --box with them")
    if 0 in boxes.labels:
        problems.append("--box with label 0: each box is an object to follow")
    problems += [
        f"--box {','.join(f'{value:g}' for value in box)}: must be X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1"
        for box in boxes.values
        if box[2] <= box[0] or box[3] <= box[1]
    ]
    for option, value, lowest in (("--frame", args.frame, 0), ("--max-frames", args.max_frames, 0)):
        if value is not None and value < lowest:
            problems.append(f"{option} {value}: must be at least {lowest}")
    if args.fps is not None and not 0 < args.fps <= 1000:
        problems.append(f"--fps {args.fps:g}: must lie above 0 and be at most 1000")
    if args.output.exists() and not args.output.is_dir():
        problems.append(f"--output {args.output}: is a file, not a folder")


def _collect_prompts(args: argparse.Namespace, points: Marks, boxes: Marks, problems: list[str]) -> list[ObjectPrompt]:
    """Prompts from the options or the file, in the order of objects."""
    from sam3.video.prompts import ObjectPrompt, read_mask_prompts, read_prompts

    frame_idx = args.frame or 0
    if args.prompts:
        return read_prompts(args.prompts, problems)
    if args.mask:
        return read_mask_prompts(args.mask, frame_idx, problems)
    places = tuple((x, y) for x, y in points.values)
    if places:
        box = tuple(boxes.values[0]) if boxes.values else None
        return [
            ObjectPrompt(
                "--point" if box is None else "--point and --box", 1, frame_idx, places, tuple(points.labels), box
            )
        ]
    return [
        ObjectPrompt("--box", obj_id, frame_idx, box_xyxy_px=tuple(box))
        for obj_id, box in enumerate(boxes.values, start=1)
    ]


def _build_tracker(
    model: Sam3Image, frames: FrameSource, prompts: list[ObjectPrompt], args: argparse.Namespace
) -> PromptedTracker | TextTracker:
    """Refuse before the first frame what no frame can repair."""
    from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
    from sam3.video.prompts import are_prompted_together
    from sam3.video.tracking import PromptedTracker, RecentFrames, TextTracker

    if not model.has_tracker:
        raise CommandError(f"{args.checkpoint}: holds no tracker, which following objects needs")
    if args.text is None:
        predictor = Sam3TrackerPredictor(
            model, objects="joint" if are_prompted_together(prompts) else "independent", memory_policy="no_late_edits"
        )
        recent = RecentFrames(frames, 2)
        return PromptedTracker(predictor, recent, prompts, args.direction, args.max_frames, spool_folder=args.output)

    from sam3.model.sam3_video_inference import Sam3VideoInference

    if not model.has_detector or model.backbone.language_backbone is None:
        raise CommandError(
            f"{args.checkpoint}: holds no detector and text encoder, which --text needs; mark the objects instead"
        )
    video_model = Sam3VideoInference(model)
    return TextTracker(
        video_model, RecentFrames(frames, video_model.config.hotstart_delay + 2), args.text, args.max_frames
    )


def _mask_folder_name(args: argparse.Namespace) -> str:
    return args.video.resolve().stem


def _open_writers(args: argparse.Namespace, frames: FrameSource) -> list[FrameWriter]:
    from sam3.video import writer as results

    first_id = 0 if args.text is not None else 1
    fps = args.fps or frames.frames_per_second
    writers: list[FrameWriter] = []
    if "masks" in args.save:
        writers.append(results.MaskFolder(args.output / results.MASK_FOLDER / _mask_folder_name(args), first_id))
    if "tracks" in args.save:
        header = {
            "video": args.video.name,
            "height": frames.size_hw[0],
            "width": frames.size_hw[1],
            "num_frames": frames.num_frames,
            "frames_per_second": fps,
        } | ({} if args.text is None else {"text": args.text})
        writers.append(results.TrackList(args.output / results.TRACKS_FILE, header, first_id))
    if "overlay" in args.save:
        writers.append(results.OverlayVideo(args.output / results.OVERLAY_FILE, frames.size_hw, fps, first_id))
    return writers


def _report(run: TrackRun, writers: list[FrameWriter], args: argparse.Namespace) -> int:
    speed = run.num_frames / run.seconds if run.seconds else 0.0
    print(f"frames: {run.num_frames}, {speed:.1f} per second, results: {args.output}")
    dropped = sorted(obj_id for writer in writers for obj_id in getattr(writer, "dropped_ids", ()))
    if dropped:
        print(f"objects {dropped} are in tracks.json alone: a PNG holds 255", file=sys.stderr)
    if run.is_interrupted:
        print(f"interrupted; {args.output} holds what was done", file=sys.stderr)
        return EXIT_INTERRUPTED
    if run.failure is not None:
        print(f"error: {run.failure}; {_describe_kept(run, args)}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _describe_kept(run: TrackRun, args: argparse.Namespace) -> str:
    if not run.num_frames:
        return "nothing was tracked"
    which = f"frame {run.last_frame}"
    if run.num_frames > 1:
        which = f"{run.num_frames} frames, {run.first_frame} to {run.last_frame}"
    return f"{args.output} holds {which}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(track, argv)


if __name__ == "__main__":
    raise SystemExit(main())
