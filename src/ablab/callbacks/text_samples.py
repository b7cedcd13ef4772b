"""Sample text from a language model after each validation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from ablab.data.token_stream import TokenStream


class TextSamples(L.Callback):
    """Sample a continuation of the first validation token, to `samples.txt` in the run folder and to W&B.

    Sampling uses its own random generator, so that this callback does not affect training.

    Args:
        num_tokens: number of tokens to sample.
        temperature: softmax temperature; lower values are less random.
    """

    def __init__(self, *, num_tokens: int = 200, temperature: float = 1.0) -> None:
        if num_tokens < 1 or temperature <= 0:
            raise ValueError(
                f"num_tokens={num_tokens}, temperature={temperature}: at least one token, and more than 0, are needed"
            )
        self.num_tokens = num_tokens
        self.temperature = temperature
        self.size = 0  # size in bytes of samples.txt at the last checkpoint

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        file = Path(trainer.loggers[0].save_dir or ".") / "samples.txt"
        if trainer.is_global_zero and file.exists():
            os.truncate(file, self.size)  # a resumed run writes later samples again

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.sanity_checking or not isinstance(data, TokenStream):
            return
        assert isinstance(pl_module.model, nn.Module)
        assert data.splits is not None
        prompt = data.splits.val[[0]].inputs[0, :1].to(pl_module.device)
        written = generate(
            pl_module.model,
            prompt,
            self.num_tokens,
            context_length=data.context_length,
            temperature=self.temperature,
        )
        if not trainer.is_global_zero:
            return
        text = data.tokens.decode(written)
        with (Path(trainer.loggers[0].save_dir or ".") / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {trainer.global_step}\n{text}\n\n")
            self.size = file.tell()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("val/sample", columns=["step", "text"], data=[[trainer.global_step, text]])  # type: ignore[list-item]

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.size = state_dict["size"]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    num_tokens: int,
    *,
    context_length: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continue a prompt by sampling one token at a time.

    Args:
        model: maps tokens `(1, L)` to logits `(1, L, vocab_size)`.
        prompt: tokens `(L)`, at least one.
        num_tokens: number of tokens to add.
        context_length: number of latest tokens that the model sees.
        temperature: softmax temperature.
        seed: seed of the sampling.

    Shape:
        -> `(L + num_tokens)`
    """
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    training = model.training
    model.eval()
    tokens = prompt
    for _ in range(num_tokens):
        logits = model(tokens[None, -context_length:])[0, -1].float()
        token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, token])
    model.train(training)
    return tokens
