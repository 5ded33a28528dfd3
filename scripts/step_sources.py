"""Which source files of this repository a script runs: what it imports, and what that imports in turn.

Read from the syntax tree, without importing anything, so that a job can tell in a second whether the code behind a step
has changed. Imports inside functions count; so do all modules of a package in `LOADED_WHOLE`, and the modules that a
package's ``__init__`` names in strings (its lazy exports) where the package itself is imported by name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

IMPORT_ROOTS = (Path(), Path("sam3"))
"""Where the project's packages lie, below the repository's root."""
LOADED_WHOLE = ("sam3.backbones",)
"""Packages that import all of their modules by listing their folder."""


def sources_of(script: Path, root: Path, more_roots: Sequence[Path] = ()) -> list[Path]:
    """The script and every file of the repository that it imports, sorted.

    Args:
        script: Relative to ``root``.
        root: The repository.
        more_roots: Further folders that imports are looked up in, relative to ``root``; the script's own is among them.

    Returns:
        Paths relative to ``root``.

    Raises:
        FileNotFoundError: If there is no such script.
    """
    roots = (script.parent, *more_roots, *IMPORT_ROOTS)
    found, waiting = {script}, [script]
    while waiting:
        for name in _imported_names(root / waiting.pop()):
            for path in _files_of(name, root, roots):
                if path not in found:
                    found.add(path)
                    waiting.append(path)
    return sorted(found)


@cache
def _imported_names(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports; the last part may be a name inside a module."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names += [f"{alias.name}.*" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def _files_of(name: str, root: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """The files behind a dotted name of `_imported_names`, packages on the way to it included."""
    *parents, last = name.split(".")
    for base in roots:
        folder, package = base, ""
        for part in parents:
            if (root / folder / f"{part}.py").is_file():
                yield folder / f"{part}.py"
                return
            folder, package = folder / part, f"{package}.{part}".lstrip(".")
            init = folder / "__init__.py"
            if not (root / init).is_file():
                break
            yield init
            if package in LOADED_WHOLE:
                yield from (path.relative_to(root) for path in (root / folder).glob("*.py"))
        else:
            if (root / folder / f"{last}.py").is_file():
                yield folder / f"{last}.py"
            elif parents:
                yield from _lazy_exports(folder / "__init__.py", last, root, roots)
            return


def _lazy_exports(init: Path, name: str, root: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """Modules that a package's ``__init__`` names in a dict of strings: those of ``name``, or all for ``*``."""
    for node in ast.walk(ast.parse((root / init).read_bytes())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and name in (key.value, "*"):
                    yield from _files_of(str(value.value) + ".", root, roots)
