"""Prompts of a geometry fine-tune, drawn from annotations."""

from stage1_geometry_finetune.data.annotations import annotation_problems
from stage1_geometry_finetune.data.prompt_drawing import PromptSpec, prompt_spec
from stage1_geometry_finetune.data.prompt_extras import PromptExtras

__all__ = ["PromptExtras", "PromptSpec", "annotation_problems", "prompt_spec"]
