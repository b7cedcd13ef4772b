"""The heavy libraries are loaded without what a training does not use, and work as if they had been loaded whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# Each in a process of its own, forked from one that has just loaded what a run needs: what it prints.
USES = {
    "import scipy.signal; print(len(scipy.signal.butter(2, 0.1)))": "2",
    "import scipy.signal; print(scipy.signal.hamming(8).shape)": "(8,)",
    "from scipy.signal import *; print(find_peaks.__name__)": "find_peaks",
    "from scipy.signal.windows import hann; print(hann(4).shape)": "(4,)",
    "from scipy.signal._signaltools import convolve; print(convolve([1], [2]))": "[2]",
    "import scipy.signal as s, inspect; print('signal' in inspect.getsource(s), hasattr(s, 'nothing'))": "True False",
    "from importlib import reload; import scipy.signal; print(len(reload(scipy.signal).butter(2, 0.1)))": "2",
    "from torchmetrics.functional.audio import permutation_invariant_training as pit\n"
    "from torchmetrics.functional import signal_noise_ratio as ratio\n"
    "print(pit(torch.ones(1, 2, 9), torch.ones(1, 2, 9), ratio)[0].shape)": "torch.Size([1])",
    "from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix\n"
    "for metric in (MulticlassAccuracy(2), MulticlassConfusionMatrix(2)):\n"
    "    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1])); print(type(metric.plot()[0]).__name__)": (
        "Figure\nFigure"
    ),
    "import torchmetrics.utilities.plot as p; print(p.trim_axs.__name__, p._AX_TYPE.__name__)": "trim_axs Axes",
    "print(torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(())).item())": "2.0",
}
FORKING = """
import gc, json, os, sys
import torch
from ablab.lab.loading import loading
gc.disable()
with loading():
    import ablab.lab.train
frozen = gc.get_freeze_count()
with loading():  # in a sweep of Hydra's own, for every run
    pass
assert gc.get_freeze_count() == frozen
print(json.dumps([gc.isenabled(), gc.get_freeze_count(), [type(finder).__module__ for finder in sys.meta_path]]))
print(json.dumps(list(sys.modules)), flush=True)
for code in json.load(sys.stdin):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writing, 1)
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, code
    print(json.dumps(said.strip()), flush=True)
"""


def test_what_a_training_does_not_use_is_loaded_once_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING], input=json.dumps([*USES]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (collecting, frozen, finders), modules, *answers = map(json.loads, done.stdout.splitlines())
    assert collecting
    assert frozen > 100_000
    assert "ablab.lab.loading" not in finders
    assert {"torchmetrics", "lightning", "scipy.signal", "torchmetrics.utilities.plot"} <= set(modules)
    assert not {"matplotlib", "scipy.signal._signaltools", "wandb", "pandas", "sklearn"} & set(modules)
    assert answers == list(USES.values())


def test_a_run_with_csv_loads_nothing_of_wandb(command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(
        "import sys\n"
        "from lightning.pytorch import Callback\n"
        "class Seen(Callback):\n"
        "    def on_test_end(self, *arguments):\n"
        "        print('loaded:', *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    words = ["trainer=smoke", "logger=csv", "+callbacks.seen._target_=seen.Seen"]
    fresh = {"PYTHONUNBUFFERED": "1"}  # in a process of its own, not in one with libraries
    done = command(*words, PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}", **fresh)
    assert done.returncode == 0, done.stderr
    [loaded] = [line.split() for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert "lightning" in loaded
    assert not {"wandb", "matplotlib", "datasets", "optuna"} & set(loaded)


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["norm=grupnorm"], ["optimizer.lrr=1"]])
def test_an_answer_without_a_run_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import atexit, runpy, sys; heavy = {'torch', 'lightning', 'torchmetrics', 'numpy', 'wandb', 'pandas'}\n"
        "atexit.register(lambda: print('loaded:', *heavy & set(sys.modules)))\n"
        f"sys.argv = ['train.py', *{words!r}]; sys.path[0] = {str(ROOT)!r}\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].strip() == "loaded:", done.stderr
