"""ImageNet weights for a student's backbone, with a report of what was loaded. Never silently random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sam3.backbones import BackboneSpec
from sam3.checkpoint_io import CheckpointError, read_state_dict
from sam3.checkpoint_keys import BACKBONE_PREFIX, strip_prefixes, student_from_published
from sam3.model.student_encoder import StudentEncoder

# Tables that older files hold and that follow from the window size.
_RECOMPUTED_SUFFIX = "attention_bias_idxs"


@dataclass(frozen=True)
class InitReport:
    """What happened to each tensor of a backbone and of the source it was loaded from."""

    source: str
    """The file, or timm's model name."""
    matched: int
    """Tensors of the backbone that were loaded."""
    missing: tuple[str, ...] = ()
    """Tensors of the backbone that the source lacks, or has in another shape (then with both shapes)."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the source that the backbone has no place for."""
    dropped: tuple[str, ...] = ()
    """The source's classifier and recomputed tables, which a student does not use."""

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"backbone weights from {self.source}: {self.matched} tensors loaded, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.dropped)} of the classifier dropped"
        )


def init_backbone_from(student: StudentEncoder, source: str | Path) -> InitReport:
    """Load ImageNet weights into a student's backbone, in place. The projection head keeps its fresh weights.

    Args:
        student: Not folded.
        source: ``timm`` (weights that timm downloads; ``timm:TAG`` chooses among several, e.g.
            ``timm:dist_450e_in1k``), or a file: a timm state dict, one with the names of the network's own release, or
            a student's checkpoint (``.pth``, ``.pt`` or ``.safetensors``; read without executing anything).

    Returns:
        What was loaded; everything the backbone has, or the call raises.

    Raises:
        CheckpointError: If the download or the file fails, or its tensors are not the backbone's.
    """
    spec = student.backbone.spec
    if student.student.fused:
        raise CheckpointError(f"{spec.name} is folded for deployment and takes no training weights: set fused=False")
    name, _, tag = str(source).partition(":")
    if name == "timm":
        label, weights = _from_timm(spec, tag)
    else:
        label, weights = str(source), _backbone_part(read_state_dict(source)[0], spec, str(source))
    network = student.backbone.model
    report = _compare(network.state_dict(), weights, spec, label)
    if report.missing or report.unexpected:
        raise CheckpointError(_mismatch(report, spec))
    network.load_state_dict({key: weights[key] for key in network.state_dict()}, strict=True)
    return report


def _from_timm(spec: BackboneSpec, tag: str) -> tuple[str, Mapping[str, Tensor]]:
    if spec.timm_name is None:
        raise CheckpointError(
            f"{spec.name} has no ImageNet weights in timm: give a file, or ask for random weights by that name"
        )
    import timm

    timm_name = f"{spec.timm_name}.{tag}" if tag else spec.timm_name
    try:
        network = timm.create_model(timm_name, pretrained=True)
    except Exception as error:  # whatever the hub's client raises when it is offline: the remedy is the same
        raise CheckpointError(
            f"timm could not get the weights of {timm_name} ({type(error).__name__}: {_first_line(error)}). Without a "
            "connection, download the file elsewhere and pass its path (.safetensors or .pth) in place of 'timm'"
        ) from error
    return f"timm {timm_name}", network.state_dict()


def _backbone_part(state_dict: Mapping[str, Tensor], spec: BackboneSpec, source: str) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names, whichever of the known layouts the file has."""
    try:
        weights = strip_prefixes(state_dict, ("module.",))
        if any(key.startswith(BACKBONE_PREFIX) for key in weights):
            weights = {k.removeprefix(BACKBONE_PREFIX): v for k, v in weights.items() if k.startswith(BACKBONE_PREFIX)}
        if spec.key_family == "identity" or not any(key.startswith(spec.marker) for key in weights):
            return weights
        classifier = {key: value for key, value in weights.items() if key.startswith(spec.classifier_prefixes)}
        network = {BACKBONE_PREFIX + key: value for key, value in weights.items() if key not in classifier}
        renamed = student_from_published(network, spec.name)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: not the weights of {spec.name}: {error}") from error
    return {key.removeprefix(BACKBONE_PREFIX): value for key, value in renamed.items()} | classifier


def _compare(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], spec: BackboneSpec, source: str
) -> InitReport:
    missing = []
    for key, value in expected.items():
        if key not in weights:
            missing.append(key)
        elif weights[key].shape != value.shape:
            missing.append(f"{key} {tuple(value.shape)} (there {tuple(weights[key].shape)})")
    surplus = [key for key in weights if key not in expected]
    dropped = [key for key in surplus if key.startswith(spec.classifier_prefixes) or key.endswith(_RECOMPUTED_SUFFIX)]
    unexpected = [key for key in surplus if key not in set(dropped)]
    return InitReport(source, len(expected) - len(missing), tuple(missing), tuple(unexpected), tuple(dropped))


def _mismatch(report: InitReport, spec: BackboneSpec) -> str:
    lines = [f"{report.source}: not the weights of {spec.name}, nothing was loaded. {report.summary()}"]
    for what, keys in (("missing", report.missing), ("unexpected", report.unexpected)):
        if keys:
            more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
            lines.append(f"  {what}: {', '.join(keys[:3])}{more}")
    return "\n".join(lines)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
