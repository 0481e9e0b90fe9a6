"""What a classifier takes for what, as a picture."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor


def show_confusion(counted: Tensor, class_names: list[str], path: Path, trainer: L.Trainer | None = None) -> Path:
    """A confusion matrix [class, class that it was taken for] as PNG, each row as shares, and to TensorBoard."""
    shares = (counted / counted.sum(1, keepdim=True).clamp_min(1)).cpu()
    n = len(class_names)
    figure = Figure(figsize=(2 + 0.5 * n, 1.5 + 0.5 * n), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xticks=range(n), yticks=range(n), xlabel="taken for", ylabel="class", yticklabels=class_names)
    axes.set_xticklabels(class_names, rotation=90)
    for row in range(n):
        for column in range(n):
            share = float(shares[row, column])
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color="w" if share > 0.5 else "k")
    figure.savefig(path)
    if trainer and isinstance(trainer.logger, TensorBoardLogger):
        trainer.logger.experiment.add_figure("confusion", figure, trainer.global_step)
        trainer.logger.experiment.flush()  # the run is over: nobody else will
    return path
