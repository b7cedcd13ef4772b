"""The default run, written by hand without any framework: the peer of `startup`.

A ResNet-8 on scikit-learn's digits, with the same stratified splits, SGD with warmup and cosine schedule, and a CSV of
losses. It prints the time after its first step; --epochs 0 ends it there.
"""

from __future__ import annotations

import argparse
import csv
import math
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of one block each."""

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", default="metrics.csv")
    chosen = parser.parse_args()
    torch.manual_seed(chosen.seed)
    torch.use_deterministic_algorithms(True)

    digits = load_digits()
    images, test_images, targets, test_targets = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    images, val_images, targets, val_targets = train_test_split(
        images, targets, test_size=0.2, stratify=targets, random_state=0
    )
    mean, std = images.mean(), images.std()

    def prepared(images: object, targets: object) -> tuple[Tensor, Tensor]:
        inputs = (torch.as_tensor(images, dtype=torch.float32).unsqueeze(1) - mean) / std
        return inputs, torch.as_tensor(targets, dtype=torch.long)

    train, val, test = prepared(images, targets), prepared(val_images, val_targets), prepared(test_images, test_targets)
    model = ResNet()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others}], lr=chosen.lr, momentum=0.9, nesterov=True
    )
    steps_of_epoch = len(train[0]) // chosen.batch_size
    total = max(1, chosen.epochs) * steps_of_epoch

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (chosen.warmup_steps + 1))
        late = max(0, step - chosen.warmup_steps) / max(1, total - chosen.warmup_steps)
        return warm * (1 + math.cos(math.pi * min(1.0, late))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    first = True
    with open(chosen.csv, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss", "lr"])
        for epoch in range(max(1, chosen.epochs)):
            model.train()
            order = torch.randperm(len(train[0]))
            for number in range(steps_of_epoch):
                indices = order[number * chosen.batch_size : (number + 1) * chosen.batch_size]
                loss = F.cross_entropy(model(train[0][indices]), train[1][indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rows.writerow([epoch * steps_of_epoch + number, loss.item(), schedule.get_last_lr()[0]])
                schedule.step()
                if first:
                    print(time.monotonic(), flush=True)
                    if chosen.epochs == 0:
                        return
                    first = False
            print(f"epoch {epoch}: validation accuracy {accuracy(model, *val):.4f}")
    print(f"test accuracy {accuracy(model, *test):.4f}")


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    model.eval()
    return (model(inputs).argmax(-1) == targets).float().mean().item()


if __name__ == "__main__":
    main()
