"""The students' backbones: a name -> a network without its classifier, its feature taps, its published key names.

Nine come from timm and carry the names of the released students; ``demo_cnn`` is a small extra one for the CPU demo.

    es_rv_s repvit_m0_9      es_tv_s tiny_vit_5m       es_ev_s efficientvit_b0
    es_rv_m repvit_m1_1      es_tv_m tiny_vit_11m      es_ev_m efficientvit_b1
    es_rv_l repvit_m2_3      es_tv_l tiny_vit_21m      es_ev_l efficientvit_b2

Adding another takes one file in this folder; every module here is imported on first use, so nothing else has to change.
``demo_cnn.py`` is the example to copy. The file

1. defines a function that builds the network (an ``nn.Module``, random weights, no classifier);
2. defines a function from the network and an image batch (B, 3, S, S) to the maps of its last two stages;
3. calls ``register(BackboneSpec(...))`` with both, the strides and channels of the two maps, and a marker: the
   beginning of a parameter name that no other family has, by which a checkpoint without a description is recognised.

Then ``MODEL.BACKBONE: your_name`` in a training config (or ``StudentConfig(backbone="your_name")``) is enough:
projection head, key names, folding of BatchNorm, merge, loading and reports follow from the spec. A network whose
published files use other names than its modules also gets a rule in ``sam3.checkpoint_keys``; a network with parallel
branches that fold into one convolution gives its spec a ``fold`` function.
"""

from __future__ import annotations

from sam3.backbones.registry import (
    BackboneSpec,
    UnknownBackboneError,
    backbone_names,
    backbone_spec,
    build_backbone,
    register,
    student_names,
)

__all__ = [
    "BackboneSpec",
    "UnknownBackboneError",
    "backbone_names",
    "backbone_spec",
    "build_backbone",
    "register",
    "student_names",
]
