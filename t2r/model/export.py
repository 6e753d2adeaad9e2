"""The code that a saved model brings along, so that transformers can load it where t2r is not installed.

It is this package, flat as it is, and of `t2r_kernels` what runs in plain PyTorch: `t2r_kernels/api.py` becomes
`t2r_kernels_api.py`. Only imports between the two change. Triton's kernels stay behind: who has t2r installed is given
its own class, and with it those.
"""

import ast
from collections.abc import Callable, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

KERNELS = "t2r_kernels"
AUTO_MAP = {
    "AutoConfig": "configuration_t2r.T2RConfig",
    "AutoModel": "modeling_t2r.T2RModel",
    "AutoModelForCausalLM": "modeling_t2r.T2RForCausalLM",
}


def write_code(folder: str | Path) -> None:
    """Write the code into a model folder, over what is there."""
    for name, text in code_files().items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def code_files() -> dict[str, str]:
    """Name and content of each file of the code."""
    ours = dict(_modules(Path(__file__).parent))
    if __package__ != "t2r.model":  # this one came with a model: all that it takes is beside it
        return ours
    ours = {name: _rewritten(text, _either_kernels) for name, text in ours.items()}
    kernels = dict(_modules(files(KERNELS)))
    kernels["__init__.py"] = (files(KERNELS) / "__init__.py").read_text(encoding="utf-8")
    for name, text in kernels.items():
        flat = f"{KERNELS}.py" if name == "__init__.py" else f"{KERNELS}_{name}"
        ours[flat] = _rewritten(text, _bundled_kernels)
    for module in {entry.split(".")[0] for entry in AUTO_MAP.values()}:
        ours[f"{module}.py"] += _own_class_first(module)
    return ours


def _modules(folder: Traversable) -> Iterator[tuple[str, str]]:
    for file in folder.iterdir():
        if file.name.endswith(".py") and file.name != "__init__.py":
            yield file.name, file.read_text(encoding="utf-8")


def _rewritten(text: str, rewrite: Callable[[str, str], list[str]]) -> str:
    """The text with other lines for its imports from `t2r_kernels`: what `rewrite` makes of a module and its names."""
    lines = text.splitlines()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and not node.level]
    for node in sorted(imports, key=lambda node: -node.lineno):
        if node.module.split(".")[0] == KERNELS:
            new = rewrite(node.module, ", ".join(map(ast.unparse, node.names)))
            lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new]
    return "\n".join(lines) + "\n"


def _either_kernels(module: str, names: str) -> list[str]:
    """The installed kernels if there are any. What is imported within `try` transformers does not ask for."""
    (bundled,) = _bundled_kernels(module, names)
    return ["try:", f"    from {module} import {names}", "except ImportError:", f"    {bundled}"]


def _bundled_kernels(module: str, names: str) -> list[str]:
    if module.startswith(f"{KERNELS}.triton"):
        return [f"{name} = None" for name in names.split(", ")]
    return [f"from .{module.replace('.', '_')} import {names}"]


def _own_class_first(module: str) -> str:
    names = sorted({entry.split(".")[1] for entry in AUTO_MAP.values() if entry.startswith(f"{module}.")})
    lines = ["try:  # where t2r is installed, it is its own classes that are loaded"]
    lines += [f"    from t2r.model import {', '.join(names)}", "except ImportError:", "    pass"]
    return "\n".join(["", *lines, ""])
