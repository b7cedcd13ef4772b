"""Create a Python file and a YAML that run and pass their tests, as a start for your own code.

    python scripts/new.py norm my_norm            src/ablab/norms/my_norm.py, conf/norm/my_norm.yaml
    python scripts/new.py model my_model          src/ablab/models/my_model.py, conf/model/my_model.yaml
    python scripts/new.py data my_data            src/ablab/data/my_data.py, conf/data/my_data.yaml
    python scripts/new.py task my_task            src/ablab/tasks/my_task.py, conf/task/my_task.yaml
    python scripts/new.py optimizer my_optimizer  src/ablab/optim/my_optimizer.py, conf/optimizer/my_optimizer.yaml
    python scripts/new.py ablation my_ablation    conf/ablation/my_ablation.yaml

No existing file is changed. Next steps: docs/extending.md. Exit code 2: the name is not available, and nothing was
written.

"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib.util
import keyword
import re
from dataclasses import dataclass
from pathlib import Path

from ablab.errors import ConfigError
from ablab.lab.config.errors import menu, readable_errors

ROOT = Path(__file__).parents[1]
TEMPLATES = Path(__file__).parent / "templates"
LONGEST = 40  # longer names would make lines of the templates too long
OTHER_VALUES = {"null", "true", "false", "yes", "no", "on", "off", "nan", "inf"}  # Hydra and YAML parse these as values


@dataclass(frozen=True)
class Kind:
    """A kind of component that can be created.

    Args:
        room: the folder of its Python file; None if it only has a YAML.
        tests: that cover it.
    """

    room: str | None
    tests: str


KINDS = {
    "norm": Kind("src/ablab/norms", "tests/norms tests/models tests/optim tests/test_train.py"),
    "model": Kind("src/ablab/models", "tests/models tests/config tests/test_train.py"),
    "data": Kind("src/ablab/data", "tests/data tests/config tests/test_train.py"),
    "task": Kind("src/ablab/tasks", "tests/tasks tests/config"),
    "optimizer": Kind("src/ablab/optim", "tests/optim tests/config tests/test_train.py"),
    "ablation": Kind(None, "tests/ablation"),
}


def create_files(kind: str, name: str) -> list[Path]:
    """Write the files of a new component; all of them, or none.

    Raises:
        ConfigError: the kind does not exist, or the name is not available.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind}: it is nothing that can be begun; {menu(kind, [*KINDS], 'new.py')}")
    check_name(kind, name)
    texts = render_files(kind, name)
    written: list[Path] = []
    try:
        for file, text in texts.items():
            with file.open("x", encoding="utf-8") as opened:  # fails if the file has been created since
                written.append(file)
                opened.write(text)
    except BaseException:
        for file in written:
            file.unlink()
        raise
    return written


def render_files(kind: str, name: str) -> dict[Path, str]:
    """Return the text of each file; the YAML, which makes the component selectable, comes last."""
    texts = {}
    for file in files(kind, name):
        template = (TEMPLATES / f"{kind}{file.suffix}").read_text(encoding="utf-8")
        texts[file] = re.sub(r"\btemplate\b", name, re.sub(r"\bTemplate", class_name(name), template))
    return texts


def files(kind: str, name: str) -> list[Path]:
    room = KINDS[kind].room
    python = [] if room is None else [ROOT / room / f"{name}.py"]
    return [*python, ROOT / "conf" / kind / f"{name}.yaml"]


def class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def check_name(kind: str, name: str) -> None:
    """Refuse a name that is not available.

    Raises:
        ConfigError: suggests another name, if one is likely.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        meant = suggest_name(name)
        raise ConfigError(f"{name}: small letters, digits and single _ are needed, a letter first; {meant}")
    if len(name) > LONGEST:
        raise ConfigError(f"{name}: it has {len(name)} letters; choose a name of at most {LONGEST}")
    if keyword.iskeyword(name) or name in OTHER_VALUES:
        raise ConfigError(f"{name}: the word means something else to Python, Hydra or YAML; choose {name}_{kind}, say")
    for file in files(kind, name):
        for there in (file, file.with_suffix("")):
            if there.exists():
                raise ConfigError(
                    f"{name}: there is {relative_path(there)} already; choose another name, or change that file"
                )
    room = KINDS[kind].room
    if room is None:
        return
    if importlib.util.find_spec(name) is not None:
        raise ConfigError(f"{name}: a module that can be imported has this name; choose {name}_{kind}, say")
    if name in names_in(ROOT / room / "__init__.py"):
        raise ConfigError(f"{name}: {room} has something else of this name; choose {name}_{kind}, say")
    if class_name(name) in names_in(TEMPLATES / f"{kind}.py") | set(dir(builtins)):
        raise ConfigError(
            f"{name}: its class would be {class_name(name)}, which is another one's name; choose {name}_{kind}, say"
        )


def suggest_name(name: str) -> str:
    """Suggest a similar name that is available."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    likely = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    return f"choose {likely}" if re.match(r"[a-z]", likely) else "choose another, my_idea for example"


def names_in(file: Path) -> set[str]:
    """Return the names that a file imports or uses."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    imported = {
        alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return imported | {node.id for node in nodes if isinstance(node, ast.Name)}


def relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="new.py KIND NAME"
    )
    parser.add_argument("words", nargs="*", metavar="KIND NAME", help="as above; the name in snake_case")
    words = parser.parse_args().words
    if len(words) != 2:
        raise ConfigError(f"a kind ({', '.join(KINDS)}) and a name are needed: python scripts/new.py norm my_norm")
    kind, name = words
    for file in create_files(kind, name):
        print(f"wrote {relative_path(file)}")
    where = "" if Path.cwd() == ROOT else f"cd {ROOT} && "
    print(f"try it:   {where}python train.py {kind}={name}")
    print(f"test it:  {where}python -m pytest {KINDS[kind].tests} -k {name}")
    print("make it yours: docs/extending.md")


if __name__ == "__main__":
    with readable_errors():
        main()
