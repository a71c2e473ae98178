"""Which source files of the project a module reads when it is imported, by following its import statements."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("wtflow", "pipelines", "serving")


def module_file(name: str) -> Path | None:
    """The file of a dotted name inside the project, or None for another one."""
    if name.split(".")[0] not in PACKAGES:
        return None
    base = ROOT / Path(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, at the top and inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def closure(module: str) -> set[str]:
    """Files behind `module`, itself included, relative to the root; empty `__init__.py` files left out."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = module_file(waiting.pop())
        if path is None or path in found:
            continue
        found.add(path)
        waiting += imported(path)
    return {str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"}
