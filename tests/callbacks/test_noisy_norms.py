"""The control of internal covariate shift: what it draws, and that measures see what it does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ablab.callbacks.noisy_norms import NoisyNorms
from ablab.lab.loggers.csv_file import read_rows


@pytest.mark.parametrize("shape", [(4000, 3), (4000, 3, 2, 2), (4000, 2, 3)])
def test_each_feature_gets_a_mean_and_a_gain_of_its_own(shape: tuple[int, ...]) -> None:
    noise, layer = NoisyNorms(shift=0.5, scale=1.25), nn.Identity()
    x = torch.randn(shape)

    def of_feature(y: Tensor, i: int) -> Tensor:
        return y[:, i] if y.dim() == 4 else y[..., i]

    given = noise.add_noise(layer, (), x)
    assert given is not None
    assert given.shape == x.shape
    centres = [float(of_feature(given, i).mean()) for i in range(3)]
    gains = [float((of_feature(given, i) * of_feature(x, i)).mean()) for i in range(3)]
    assert all(abs(centre) < 0.6 for centre in centres)
    assert all(0.9 < gain < 1.35 for gain in gains)
    assert len({round(centre, 3) for centre in centres}) == 3, "the features move apart"


def test_it_is_another_in_each_step_and_none_in_evaluation() -> None:
    noise, layer, x = NoisyNorms(), nn.Identity(), torch.zeros(2, 3)
    first, second = noise.add_noise(layer, (), x), noise.add_noise(layer, (), x)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    assert noise.add_noise(layer.eval(), (), x) is None


@pytest.mark.parametrize(("values", "message"), [({"shift": -1.0}, "shift=-1.0"), ({"scale": 0.9}, "scale=0.9")])
def test_impossible_noise_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyNorms(**values)


def test_measures_see_the_noise_of_each_step(run: Callable[..., SimpleNamespace]) -> None:
    words = ["norm=batchnorm", "trainer.max_steps=4", "trainer.limit_train_batches=4", "optimizer.lr=0"]
    words += ["+callbacks/measure=[drift,covariate_shift]", "callbacks.drift.every_n_steps=2"]
    words += ["callbacks.drift.num_samples=64", "callbacks.covariate_shift.every_n_steps=2"]
    for noisy in (False, True):
        done = run(*words, *(["callbacks=noisy_norms"] if noisy else []))
        rows = read_rows(done.folder)
        distances = [row["drift/distance"] for row in rows if "drift/distance" in row]
        cosines = [row["covariate_shift/cosine"] for row in rows if "covariate_shift/cosine" in row]
        assert len(distances) == 2
        assert (min(distances) > 0.2) == noisy, "no weight moves: what moves is the noise"
        # of one step the noise is one: its loss is compared before and after the layers below have stepped
        assert cosines == pytest.approx([1.0] * len(cosines), abs=1e-5)
