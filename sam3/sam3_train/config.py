"""Settings: YAML with BASE inheritance and ``--opts`` pairs -> a yacs CfgNode, checked against typed defaults.

A stage writes its defaults once as a CfgNode (starting from `training_defaults`) and calls `load_config`. Every key
that a file or ``--opts`` sets must exist in the defaults and have the default's type: a typo is an error that names
the nearest keys. Precedence: BASE files first, then the file, then ``--opts``, then dedicated flags (`apply_flags`).
"""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from sam3_train.errors import UserError
from sam3_train.run_record import environment_record, package_versions, write_json_record

__all__ = [
    "add_common_args",
    "apply_flags",
    "config_changes",
    "config_to_dict",
    "environment_record",
    "load_config",
    "package_versions",
    "set_key",
    "training_defaults",
    "write_run_record",
]


def load_config(defaults: CfgNode, cfg_file: str | Path | None, opts: Sequence[str] = ()) -> CfgNode:
    """Read a config file over defaults.

    Args:
        defaults: All known keys with their default values; not modified.
        cfg_file: YAML file; its ``BASE`` (a path or a list of paths, relative to the file itself) is read first.
            None reads no file.
        opts: Alternating dotted keys and values, e.g. ``["TRAIN.EPOCHS", "3"]``; values are Python literals or text.

    Returns:
        A copy of the defaults with the settings applied.

    Raises:
        UserError: If a file is missing or not YAML, a key is unknown, or a value has the wrong type. All problems are
            reported at once.
    """
    cfg = defaults.clone()
    cfg.defrost()
    problems: list[str] = []
    if cfg_file is not None:
        for path, settings in _read_with_bases(Path(cfg_file), ()):
            for key, value in _leaves(settings):
                _set(cfg, key, value, str(path), problems)
    if len(opts) % 2:
        problems.append(f"--opts: expected KEY VALUE pairs, got an odd number of words: {' '.join(map(str, opts))}")
    for key, text in zip(opts[::2], opts[1::2], strict=False):
        _set(cfg, key, _literal(text), "--opts", problems, text)
    if problems:
        raise UserError.from_problems("config", problems)
    return cfg


def set_key(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one dotted key with the checks of `load_config`; ``source`` names the flag or file in the error."""
    problems: list[str] = []
    _set(cfg, key, value, source, problems)
    if problems:
        raise UserError.from_problems("config", problems)


def config_to_dict(cfg: CfgNode) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return {key: config_to_dict(value) if isinstance(value, CfgNode) else _plain(value) for key, value in cfg.items()}


def training_defaults() -> CfgNode:
    """The settings that the loop itself reads; a stage adds its own nodes (DATA, MODEL, DISTILL, ...)."""
    cfg = CfgNode()
    cfg.OUTPUT = ""  # the run's own folder
    cfg.SEED = 0  # decides initial weights, data order and everything random
    cfg.PRINT_FREQ = 10  # optimizer steps between two log lines; 0: only at the end of an epoch
    cfg.SAVE_FREQ = 1  # epochs between two checkpoints; the last and the best are always saved
    cfg.AMP_ENABLE = True  # False: float32 throughout
    cfg.AMP_DTYPE = "auto"  # bf16, fp16 (CUDA, with loss scaling), fp32; auto: bf16 on CUDA, fp32 elsewhere
    cfg.DETERMINISTIC = False  # deterministic kernels and no cuDNN autotuning: slower
    train = cfg.TRAIN = CfgNode()
    train.EPOCHS = 50
    # End after so many optimizer steps, as if the epoch ended there (saved as ckpt_step_N.pth); 0: no limit.
    train.MAX_STEPS = 0
    train.ACCUMULATION_STEPS = 1  # micro-batches per optimizer step
    train.BASE_LR = 1e-3  # the three rates are those of LR_REFERENCE_BATCH if LR_SCALING is on
    train.WARMUP_LR = 1e-6
    train.MIN_LR = 1e-5
    train.WARMUP_EPOCHS = 5.0  # at most half the run
    train.LR_SCALING = "none"  # none, linear or sqrt in global batch / LR_REFERENCE_BATCH
    train.LR_REFERENCE_BATCH = 512
    # NAME: cosine, linear, step (by DECAY_RATE each DECAY_EPOCHS) or constant
    train.LR_SCHEDULER = CfgNode({"NAME": "cosine", "DECAY_EPOCHS": 30.0, "DECAY_RATE": 0.1})
    # NAME: adamw, or sgd (Nesterov if MOMENTUM is not 0)
    train.OPTIMIZER = CfgNode({"NAME": "adamw", "EPS": 1e-8, "BETAS": [0.9, 0.999], "MOMENTUM": 0.9})
    train.WEIGHT_DECAY = 0.01  # not for biases and norms
    train.CLIP_GRAD = 5.0  # largest gradient norm; 0: no clipping
    train.EMA_DECAY = 0.0  # average of the weights, e.g. 0.999; 0: none
    train.EVAL_BN_WHEN_TRAINING = False  # BatchNorm keeps its statistics
    train.USE_SYNC_BN = False  # BatchNorm statistics over all processes
    train.FIND_UNUSED_PARAMETERS = False  # for tasks that leave some parameters unused in some steps
    train.MAX_NONFINITE_STEPS = 20  # so many bad steps in a row end the run; 0: never
    train.REPLICA_CHECK_STEPS = 500  # steps between two comparisons of the processes' weights; 0: only per epoch
    train.AUTO_RESUME = True  # continue the run that OUTPUT holds
    train.SAVE_EVERY_STEPS = 0  # checkpoints inside an epoch; 0: not by steps
    train.SAVE_EVERY_MINUTES = 15.0  # the same by time; 0: not by time
    train.KEEP_LAST = 2  # newest checkpoints that stay (at least 2)
    train.KEEP_EVERY = 0  # every n-th epoch's checkpoint stays; 0: none
    return cfg


def add_common_args(parser: argparse.ArgumentParser, cfg_required: bool = True) -> argparse.ArgumentParser:
    """Add the flags that every entry point has; `apply_flags` writes them into the config.

    Flags have no defaults of their own, so that what a YAML file says holds unless the flag is given.
    """
    parser.add_argument("--cfg", required=cfg_required, metavar="FILE", help="YAML config")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="override any config key")
    parser.add_argument("--data-path", metavar="DIR", help="DATA.DATA_PATH")
    parser.add_argument("--output", metavar="DIR", help="OUTPUT: the run's own folder")
    parser.add_argument("--batch-size", type=int, metavar="N", help="DATA.BATCH_SIZE: images per process and step")
    parser.add_argument("--resume", metavar="FILE", help="continue from this training checkpoint")
    parser.add_argument("--pretrained", metavar="FILE", help="start from these weights")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or mps; default: the best there is")
    parser.add_argument("--seed", type=int, metavar="N", help="SEED")
    parser.add_argument("--max-steps", type=int, metavar="N", help="TRAIN.MAX_STEPS: stop after N optimizer steps")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, compute nothing")
    return parser


def add_distillation_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of stages that train a student on a teacher's embeddings; `apply_flags` writes them, too."""
    parser.add_argument("--teacher-embed-path", metavar="DIR", help="DISTILL.TEACHER_EMBED_PATH: the export's store")
    parser.add_argument("--accumulation-steps", type=int, metavar="N", help="TRAIN.ACCUMULATION_STEPS")
    parser.add_argument("--use-sync-bn", action="store_true", help="TRAIN.USE_SYNC_BN: BatchNorm over all ranks")
    parser.add_argument("--online-teacher", action="store_true", help="DISTILL.ONLINE_TEACHER: no store, slower")
    return parser


def add_merge_args(parser: argparse.ArgumentParser, teacher_of: str) -> argparse.ArgumentParser:
    """Add the flags of commands that put a trained student into a whole model's file.

    Args:
        parser: Gets the flags.
        teacher_of: Where the trunk is described that the student should have learned from, for the help.
    """
    parser.add_argument(
        "--use-ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the averaged weights; default: if the checkpoint has them",
    )
    parser.add_argument(
        "--allow-other-teacher",
        action="store_true",
        help=f"only warn if the student learned from another trunk than that {teacher_of}",
    )
    parser.add_argument("--image", metavar="FILE", help="photo for the final check; default: a generated one")
    return parser


_FLAG_KEYS = {
    "data_path": "DATA.DATA_PATH",
    "output": "OUTPUT",
    "batch_size": "DATA.BATCH_SIZE",
    "resume": "MODEL.RESUME",
    "pretrained": "MODEL.PRETRAINED",
    "seed": "SEED",
    "max_steps": "TRAIN.MAX_STEPS",
    "sam3_checkpoint": "MODEL.SAM3_CHECKPOINT",
    "subset_fraction": "DATA.SUBSET_FRACTION",
    "teacher_embed_path": "DISTILL.TEACHER_EMBED_PATH",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_sync_bn": "TRAIN.USE_SYNC_BN",
    "online_teacher": "DISTILL.ONLINE_TEACHER",
}


def apply_flags(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write the flags of `add_common_args` and `add_distillation_args` that were given into the config.

    Raises:
        UserError: If a given flag's key does not exist in this config.
    """
    for flag, key in _FLAG_KEYS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            set_key(cfg, key, value, "--" + flag.replace("_", "-"))


def read_run_config(
    defaults: CfgNode, cfg_file: str | Path, args: argparse.Namespace, output_root: str = ""
) -> CfgNode:
    """The settings of a run, ``args.opts`` and flags applied; a run without a name has that of its file.

    Args:
        defaults: As for `load_config`.
        cfg_file: Likewise.
        args: Parsed flags, among them those of `add_common_args`.
        output_root: A run without a folder gets one of the file's name in here; empty: ``OUTPUT`` stays as it is.

    Raises:
        UserError: If a file, key or value is wrong.
    """
    cfg, stem = load_config(defaults, cfg_file, args.opts), Path(cfg_file).stem
    apply_flags(cfg, args)
    cfg.MODEL.NAME = cfg.MODEL.NAME or stem
    if output_root:
        cfg.OUTPUT = cfg.OUTPUT or f"{output_root}/{stem}"
    return cfg


def write_run_record(output: str | Path, cfg: CfgNode, extra: dict[str, Any] | None = None) -> Path:
    """Write ``config.json``: the whole config, the environment, and what the caller adds.

    A resumed run replaces the file, keeping the earlier records under ``previous``.

    Args:
        output: The run's folder; made if missing.
        cfg: The final config.
        extra: Plain values, e.g. world size, number of images, model description.

    Returns:
        Path of the file.

    Raises:
        UserError: If it cannot be written.
    """
    record = {"config": config_to_dict(cfg), "environment": environment_record(), **(extra or {})}
    return write_json_record(Path(output) / "config.json", record)


def config_changes(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key to (mine, theirs) for each leaf that differs between two plain configs."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*mine, *theirs}):
        a, b, name = mine.get(key), theirs.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            changes.update(config_changes(a, b, name + "."))
        elif a != b:
            changes[name] = (a, b)
    return changes


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file and what it inherits from, base first."""
    real = path.resolve()
    if real in chain:
        raise UserError(f"config: {path} inherits from itself: {' -> '.join(p.name for p in (*chain, real))}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        by = f" (BASE of {chain[-1]})" if chain else ""
        raise UserError(f"config: there is no file {path}{by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"config: {path} must hold KEY: value settings, got {type(settings).__name__}")
    bases = settings.pop("BASE", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        if base:
            yield from _read_with_bases(path.parent / str(base), (*chain, real))
    yield path, settings


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _known_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _known_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _set(cfg: CfgNode, key: str, value: Any, source: str, problems: list[str], text: str | None = None) -> None:
    known = list(_known_keys(cfg))
    if key not in known:
        problems.append(f"{source}: unknown key {key!r}{_suggestion(key, known)}")
        return
    node = cfg
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node[parent]
    if isinstance(node[leaf], str) and isinstance(text, str) and not isinstance(value, str):
        value = text  # a version such as 1.10 must not become 1.1 on its way through a number
    try:
        node[leaf] = _coerced(value, node[leaf])
    except TypeError:
        expected = type(node[leaf]).__name__
        problems.append(f"{source}: {key} must be of type {expected} (default {node[leaf]!r}), got {value!r}")


def _suggestion(key: str, known: Sequence[str]) -> str:
    by_leaf = [name for name in known if name.rsplit(".", 1)[-1].lower() == key.rsplit(".", 1)[-1].lower()]
    by_case = [name for name in known if name.lower() == key.lower()]
    near = list(dict.fromkeys(by_case + by_leaf + difflib.get_close_matches(key, known, n=3, cutoff=0.6)))[:3]
    group = key.split(".", 1)[0] + "."
    if not near:
        near = [name for name in known if name.startswith(group)][:12]
    return (
        f"; did you mean {' or '.join(near)}?"
        if near
        else f"; known groups: {sorted({k.split('.')[0] for k in known})}"
    )


def _coerced(value: Any, default: Any) -> Any:
    """``value`` in the type of ``default``; raises TypeError if that would change its meaning."""
    if default is None:
        return value
    if isinstance(default, bool) or isinstance(value, bool):
        if isinstance(value, type(default)) and isinstance(default, bool):
            return value
        raise TypeError
    if isinstance(default, float):
        # YAML 1.1 reads 1e-3 (without a dot) as text.
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise TypeError from None
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        inner = default[0] if default else None
        return [_coerced(item, inner) for item in value]
    if isinstance(default, str) and (value is None or isinstance(value, (int, float))):
        return "" if value is None else str(value)
    if type(value) is not type(default):
        raise TypeError
    return value


def _literal(text: Any) -> Any:
    if not isinstance(text, str) or not text.strip():
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
