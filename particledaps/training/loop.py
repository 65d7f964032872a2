"""One training loop for every stage: EMA, curves, atomic checkpoints, exact resume."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from particledaps.checks import DataError
from particledaps.runs.progress import step_progress


class DivergedError(RuntimeError):
    """A loss or a weight is not finite any more; the message says at which step, the likely cause and what to do."""


LossFunction = Callable[[int], dict[str, "torch.Tensor"]]
ValidationFunction = Callable[[nn.Module], dict[str, float]]


@dataclass
class LoopSettings:
    """Settings of one stage.

    Attributes:
        num_steps: optimisation steps; the learning rate falls to 0 over them as a half cosine.
        batch_size: images a step.
        learning_rate: peak learning rate of AdamW.
        warmup_steps: steps of linear warm-up.
        ema_decay: decay of the exponential moving average (shorter at the start: ``(1 + k) / (10 + k)``).
        gradient_clip: largest global gradient norm.
        log_every: steps between rows of ``curve.csv``.
        checkpoint_every: steps between checkpoints; each is followed by a validation.
        bfloat16: run the networks in bfloat16 (autocast); weights and losses stay float32.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    log_every: int = 50
    checkpoint_every: int = 500
    bfloat16: bool = True


def first_broken(weights: dict[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity; None if there is none."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def load_weights(network: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load ``weights`` that come from ``path``.

    Raises:
        DataError: they belong to another network, or are not finite.
    """
    if broken := first_broken(weights):
        raise DataError(f"{path}: {broken} is not finite: remove its folder and train that stage anew")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(
            f"{path} holds another network than these settings describe; choose another name= or remove its folder"
        ) from error


class TrainingLoop:
    """Runs ``loss_function`` to ``num_steps``; the model, its EMA and the optimiser live in one checkpoint."""

    def __init__(self, model: nn.Module, ema: nn.Module, settings: LoopSettings, folder: Path) -> None:
        self.model = model
        self.ema = ema
        self.settings = settings
        self.folder = folder
        self.ema.load_state_dict(model.state_dict())
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.step = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, loss_function: LossFunction, validate: ValidationFunction, device: torch.device) -> None:
        """Train to the last step, logging to ``curve.csv`` and saving ``checkpoint.pt``.

        Raises:
            DivergedError: at the first loss that is not finite, or before weights that are not would be saved.
        """
        settings, started = self.settings, time.monotonic() - self.seconds
        with closing(step_progress(settings.num_steps, self.step, self.folder.name)) as bar:
            while self.step < settings.num_steps:
                terms = self._advance(loss_function, device)
                bar.update()
                if self.step % settings.log_every == 0:
                    values = {name: value.item() for name, value in terms.items()}
                    self._log({"step": self.step, **values})
                    bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
                if self.step % settings.checkpoint_every == 0 or self.step == settings.num_steps:
                    self.seconds = time.monotonic() - started
                    self.save()
                    self._log({"step": self.step, **validate(self.ema)})

    def _advance(self, loss_function: LossFunction, device: torch.device) -> dict[str, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            terms = loss_function(self.step)
        if not torch.isfinite(terms["loss"]):
            raise DivergedError(self._diverged(f"its loss is {terms['loss'].item()}"))
        self._update(terms["loss"])
        self.step += 1
        return terms

    def save(self) -> None:
        """Write ``checkpoint.pt`` atomically.

        Raises:
            DivergedError: a weight is not finite; the last checkpoint stays.
        """
        for network in (self.model, self.ema):
            if broken := first_broken(network.state_dict()):
                raise DivergedError(self._diverged(f"the weight {broken} is not finite"))
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": json.dumps(asdict(self.settings)),
        }
        temporary = self.folder / "checkpoint.pt.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "checkpoint.pt")

    def _diverged(self, what: str) -> str:
        """One sentence of what happened, why it probably did, and what is kept."""
        stage, path = self.folder.name, self.folder / "checkpoint.pt"
        key, rate = f"{stage}.loop.learning_rate", f"{self.settings.learning_rate:g}"
        kept = "no checkpoint was written yet, and the same command with a lower one starts anew"
        if path.exists():
            step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
            kept = (
                f"{path} still holds the last good state, of step {step}: the same command with a lower one goes on "
                "from there (remove that folder to start the stage anew)"
            )
        return (
            f"the training of the {stage} diverged after {self.step} steps: {what}; most likely {key}={rate} is "
            f"too large: {kept}"
        )

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_weights(self.model, state["model"], path)
        load_weights(self.ema, state["ema"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._rewind_curve()

    def _update(self, loss: torch.Tensor) -> None:
        settings = self.settings
        rate = settings.learning_rate * min(1.0, (self.step + 1) / settings.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * self.step / settings.num_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        norm = nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
        if torch.isfinite(norm):  # a bad batch must not poison the weights
            self.optimizer.step()
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages, values = list(self.ema.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averages, values, 1 - decay)

    def _log(self, row: dict[str, float]) -> None:
        with open(self.folder / "curve.csv", "a", newline="") as handle:
            csv.writer(handle).writerows([row["step"], k, f"{v:.6g}"] for k, v in row.items() if k != "step")

    def _rewind_curve(self) -> None:
        path = self.folder / "curve.csv"
        if path.exists():
            with open(path, newline="") as handle:
                rows = [r for r in csv.reader(handle) if int(r[0]) <= self.step]
            with open(path, "w", newline="") as handle:
                csv.writer(handle).writerows(rows)


def plot_curve(folder: Path) -> None:
    """Draw every series of ``curve.csv`` to ``curve.png`` (log scale where positive)."""
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = {}
    with open(folder / "curve.csv", newline="") as handle:
        for step, name, value in csv.reader(handle):
            series.setdefault(name, []).append((int(step), float(value)))
    figure = Figure(figsize=(4 * len(series), 3), layout="constrained")
    for axis, (name, points) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        axis.plot(*zip(*points, strict=True), linewidth=0.8)
        axis.set(title=name, xlabel="step", yscale="log" if all(v > 0 for _, v in points) else "linear")
    figure.savefig(folder / "curve.png", dpi=100)
