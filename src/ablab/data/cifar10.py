"""CIFAR-10 as the Hugging Face Hub serves it: parquet files with encoded images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ablab.data.datamodule import Kind, Splits, StandardizedData, TensorSplit, stratified_holdout

HUB_NAME = "uoft-cs/cifar10"


class CIFAR10(StandardizedData):
    """50,000 training and 10,000 test images of 32x32 in ten classes; the official split is kept.

    Args:
        root: a folder with train*.parquet and test*.parquet (columns `img` and `label`), at most one folder deeper;
            None loads them from the Hub.
        val_fraction: held out of the training images for validation, with the classes in equal shares.
        split_seed: decides which.
        batch_size, seed, num_workers: see `DataModule`.

    Shape:
        inputs `(N, 3, 32, 32)`, targets `(N)`

    Raises:
        ValueError: a missing folder or file, a file that cannot be read, or other columns.

    References:
        Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
    """

    kind: ClassVar[Kind] = "images"

    def __init__(
        self,
        *,
        root: str | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.root = root
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def read(self) -> Splits:
        images, targets = self.decode("train")
        kept, held_out = stratified_holdout(targets, self.val_fraction, self.split_seed)
        self.standardize(images[kept], keep=(1,))
        return Splits(
            train=TensorSplit(images[kept], targets[kept]),
            val=TensorSplit(images[held_out], targets[held_out]),
            test=TensorSplit(*self.decode("test")),
        )

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 3, "num_classes": len(self.class_names)}

    def decode(self, split: str) -> tuple[Tensor, Tensor]:
        """Images `(N, 3, 32, 32)` of bytes, and their classes `(N)`."""
        import numpy as np

        table = self.open(split)
        if missing := {"img", "label"} - set(table.column_names):
            raise ValueError(
                f"root={self.root}: the {split} split has the columns {', '.join(table.column_names)}, and "
                f"{', '.join(sorted(missing))} is missing; give the files of {HUB_NAME}"
            )
        self.class_names = table.features["label"].names
        images = np.stack([np.asarray(image.convert("RGB")) for image in table["img"]])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"][:])

    def open(self, split: str) -> Any:
        """The split as a `datasets.Dataset`."""
        try:
            import datasets
            import PIL  # noqa: F401  (datasets decodes with it, and says so only then)
        except ImportError as error:
            raise ValueError("reading it needs two more packages: pip install -e '.[hf]'") from error
        datasets.disable_progress_bars()
        if self.root is None:
            try:
                return datasets.load_dataset(HUB_NAME, split=split)
            except (ConnectionError, OSError) as error:
                raise ValueError(
                    f"root=null: {HUB_NAME} could not be loaded from the Hugging Face Hub ({error}); "
                    "give a folder that has its parquet files as data.root"
                ) from error
        folder = Path(self.root)
        if not folder.is_dir():
            raise ValueError(f"root={self.root}: there is no such folder; give one with the parquet files")
        files = sorted(map(str, [*folder.glob(f"{split}*.parquet"), *folder.glob(f"*/{split}*.parquet")]))
        if not files:
            raise ValueError(f"root={self.root}: no {split}*.parquet there; give the folder that has them")
        try:
            return datasets.load_dataset("parquet", data_files={split: files}, split=split)
        except Exception as error:  # the library raises whatever its parts raise
            raise ValueError(
                f"root={self.root}: {', '.join(files)} cannot be read as parquet ({error.__cause__ or error}); "
                "fetch it again"
            ) from error
