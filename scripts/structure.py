"""Print figures of the code's structure, before and after a redesign.

    python scripts/structure.py
    python scripts/structure.py --frames       also the own stack frames above the model's forward, from a short run

Counted in src/: lines of Python, modules in import cycles, uses of other libraries' private names outside
`ablab.lab.internals`, docstrings that open with a question word, comment lines per 100 lines of code, and functions of
fewer than four lines with a single caller.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
OPENERS = re.compile(r"(What|Whether|How|Of|That|Who|Where|Which|When)\b")
OWN = ("ablab", "hydra_plugins")
FRAMES = """
import sys, traceback
from pathlib import Path
from ablab.models.resnet import ResNet
forward = ResNet.forward
def counting(self, *args, **kwargs):
    if self.training and next(self.parameters()).device.type != "meta":
        frames = [frame.filename for frame in traceback.extract_stack()[:-1]]
        print("frames", sum("/src/ablab/" in name or name.endswith("/train.py") for name in frames), flush=True)
        ResNet.forward = forward
    return forward(self, *args, **kwargs)
ResNet.forward = counting
sys.argv = ["train.py", "trainer=smoke", "logger=csv", "dry_run=false", f"output_dir={sys.argv[1]}"]
import runpy
runpy.run_path(str(Path("train.py").absolute()), run_name="__main__")
"""


def modules() -> dict[str, Path]:
    """Return every module of src/ by its dotted name."""
    found = {}
    for file in SRC.rglob("*.py"):
        parts = file.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """Return the own modules that a module imports, within functions too; imports for type checkers do not count."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    for_types = {inner for block in blocks for inner in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in for_types:
            found |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def in_cycles(imports: dict[str, set[str]]) -> set[str]:
    """Return the modules that import each other, and those above them."""
    left = dict(imports)
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    return set(left)


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield private names of other libraries: imported, or attributes of what is not `self`."""
    own_names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(OWN):
            yield from (alias.name for alias in node.names if re.match(r"_[a-z]", alias.name))
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in own_names:
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not of_self or node.attr not in stored:
                yield node.attr


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def helpers(trees: dict[str, ast.Module]) -> int:
    """Count functions and methods of fewer than four lines, docstring aside, that one place alone mentions."""
    mentions: Counter[str] = Counter()
    small = []
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                mentions[node.id] += 1
            elif isinstance(node, ast.Attribute):
                mentions[node.attr] += 1
            elif isinstance(node, ast.FunctionDef) and not node.decorator_list:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (body[-1].end_lineno or 0) - body[0].lineno < 3:
                    small.append(node.name)
    return sum(mentions[name] == 1 for name in small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", action="store_true", help="count stack frames in a short run")
    options = parser.parse_args()
    known = modules()
    texts = {name: file.read_text(encoding="utf-8") for name, file in known.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = [line.strip() for text in texts.values() for line in text.splitlines()]
    comments = sum(line.startswith("#") or "  # " in line for line in lines)
    code = sum(bool(line) and not line.startswith("#") for line in lines)
    private = [name for name in known if name != "ablab.lab.internals" for _ in private_names(trees[name])]
    all_docstrings = [text for tree in trees.values() for text in docstrings(tree)]
    research = [name for name in known if not name.startswith(("ablab.lab", "hydra_plugins"))]
    rows: dict[str, object] = {
        "lines of Python in src": len(lines),
        "of them on the research floor": sum(len(texts[name].splitlines()) for name in research),
        "modules in import cycles": len(in_cycles({name: imported(tree, known) for name, tree in trees.items()})),
        "private names outside internals.py": f"{len(private)} in {len(set(private))} modules",
        "docstrings": len(all_docstrings),
        "of them with a question word first": sum(bool(OPENERS.match(text)) for text in all_docstrings),
        "comment lines per 100 lines of code": f"{100 * comments / code:.1f}",
        "helpers under 4 lines with one caller": helpers(trees),
    }
    if options.frames:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", FRAMES, folder], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
            )
        [rows["own stack frames above forward"]] = re.findall(r"frames (\d+)", done.stdout)
    for name, value in rows.items():
        print(f"{name:40}{value!s:>16}")


if __name__ == "__main__":
    main()
