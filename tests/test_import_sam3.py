"""Importing the model library is cheap and changes nothing in the process."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, logging, os, sys, warnings
import torch

def settings():
    root, ours = logging.getLogger(), logging.getLogger("sam3")
    return {
        "environment": dict(os.environ),
        "logging": [root.level, len(root.handlers), ours.level, len(ours.handlers), ours.propagate, root.disabled],
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "precision": [torch.get_float32_matmul_precision(), str(torch.get_default_dtype())],
        "autocast": [torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.is_grad_enabled()],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "random": torch.initial_seed(),
        "warnings": [str(entry) for entry in warnings.filters],
        "cuda": torch.cuda.is_initialized(),
    }

before, modules = settings(), set(sys.modules)
STATEMENT
after = settings()
print(json.dumps({
    "changed": {key: [before[key], after[key]] for key in before if before[key] != after[key]},
    "imported": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
}))
"""


def probe(statement: str) -> dict:
    """What a statement changed and imported in a fresh process that had imported torch alone."""
    done = subprocess.run([sys.executable, "-c", PROBE.replace("STATEMENT", statement)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


def test_the_probe_sees_what_a_rude_import_does() -> None:
    found = probe("import colorsys; os.environ['X_SAM3'] = '1'; torch.backends.cuda.matmul.allow_tf32 = True")
    assert set(found["changed"]) >= {"environment", "tf32"} and "colorsys" in found["imported"]


def test_importing_the_package_imports_only_itself() -> None:
    found = probe("import sam3; assert sam3.__version__ and 'Sam3Processor' in dir(sam3)")
    assert found == {"changed": {}, "imported": ["sam3"]}


def test_its_public_names_change_nothing_and_import_no_heavy_package() -> None:
    found = probe("from sam3 import *; from sam3 import Sam3Processor, load_model")
    assert found["changed"] == {}
    assert "sam3" in found["imported"]
    heavy = {"open_clip", "transformers", "torchvision", "timm", "scipy", "matplotlib", "pycocotools", "triton"}
    assert not heavy & set(found["imported"])


def test_commands_show_their_help_without_torch() -> None:
    code = """
import contextlib, importlib, io, sys
for name in ("predict", "track", "inspect", "convert"):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module("sam3." + name).main(["--help"])
    assert "usage: python -m sam3." + name in out.getvalue(), (name, out.getvalue())
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_of_the_model_does_not_import_stage_2() -> None:
    """Defect 7.6 (30) of the published stage 2: the compressed memory comes with whoever asks for it alone."""
    named = "from sam3.model import memory, sam3_tracker, vitdet"
    own = "{'sam3.model.perceiver', 'sam3.model.efficient_sam3_tracker', 'sam3.model.efficient_sam3_train', 'stage2'}"
    found = probe(f"{named}; assert not {own} & set(sys.modules), sorted({own} & set(sys.modules))")
    assert found["changed"] == {}
