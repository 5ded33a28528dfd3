"""Which settings a module reads, found in its source: a setting that nothing reads must not exist."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode


def setting_names(cfg: CfgNode, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    nested = [(f"{prefix}{key}", value) for key, value in cfg.items()]
    return [n for key, v in nested for n in (setting_names(v, f"{key}.") if isinstance(v, CfgNode) else [key])]


def upper_chain(node: ast.AST) -> tuple[str, list[str]]:
    """``cfg.TRAIN.OPTIMIZER.EPS`` -> ("cfg", ["TRAIN", "OPTIMIZER", "EPS"])."""
    names: list[str] = []
    while isinstance(node, ast.Attribute) and node.attr.isupper():
        names.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Attribute):  # self.cfg
        return node.attr, names
    return node.id if isinstance(node, ast.Name) else "", names


def settings_read(source: str) -> set[str]:
    """Dotted names of the settings that a module reads.

    A name like ``train`` stands for its section, any other for what it was assigned from in the same function
    (``settings = cfg.TRAIN.OPTIMIZER``). Assigning to a setting is no read, and neither is checking its range
    (``check_settings``).
    """
    found = set()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "check_settings"]
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for scope in [tree, *functions]:
        sections = {name.lower(): [name] for name in ("TRAIN", "DATA", "MODEL", "DISTILL", "PROMPTS", "VAL", "AMP")}
        for node in ast.walk(scope):
            if not isinstance(node, ast.Assign):
                continue
            pairs = [(target, node.value) for target in node.targets]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            for target, value in pairs:
                root, names = upper_chain(value)
                if isinstance(target, ast.Name) and names:
                    sections[target.id] = [*sections.get(root, []), *names]
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                root, names = upper_chain(node)
                if names:
                    found.add(".".join([*sections.get(root, []), *names]))
    return found


def unread_settings(cfg: CfgNode, folders: Sequence[Path]) -> list[str]:
    """Settings that no module below some folders reads."""
    files = [path for folder in folders for path in folder.rglob("*.py")]
    read = {name for path in files for name in settings_read(path.read_text())}
    return [name for name in setting_names(cfg) if name not in read]
