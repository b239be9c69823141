"""Nothing in the source turns bytes into code."""

from __future__ import annotations

import ast
from pathlib import Path

import kvferry

SOURCE = Path(kvferry.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "eval", "exec"}
ALLOWED: set[str] = set()


def found(path: Path) -> set[str]:
    """What a file does of that kind, however it is spelled."""
    seen = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        seen |= MODULES.intersection(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            allows = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            seen |= {called} if called in CALLS or allows else set()
    return seen


def test_nothing_in_the_source_turns_bytes_into_code(tmp_path: Path) -> None:
    offenders = {
        f"{path.relative_to(SOURCE)}: {what}" for path in SOURCE.rglob("*.py") for what in found(path)
    } - ALLOWED
    assert not offenders
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\nfrom pickle import loads\ntorch.load('x')\nnp.load('x', allow_pickle=True)\n")
    assert found(bad) == {"pickle", "torch.load", "np.load"}
