"""Scores as pictures."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pixelcnn_lit.scoring.samples import SampleScores

MOST_NAMES = 20  # lines in a panel that are named: more would leave no room for it
LONGEST = 100  # characters of a name


def show_confusion(counted: Tensor, class_names: list[str], path: Path) -> Path:
    """A confusion matrix [class, class that it was taken for] as PNG, each row as shares."""
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
    return path


def show_histogram(bpd: dict[str, Tensor], path: Path) -> Path:
    """Bits per dimension of each image, by the name of its dataset, as PNG."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    edges = torch.histogram(torch.cat(list(bpd.values())), 60).bin_edges.tolist()
    for name, values in bpd.items():
        axes.hist(values, edges, alpha=0.6, label=name)
    axes.set(xlabel="bits per dimension of a test image", ylabel="images")
    axes.legend()
    figure.savefig(path)
    return path


def show_lines(panels: dict[str, dict[str, list[tuple[float, float]]]], x: str, y: str, path: Path) -> Path:
    """Lines of points (x, y), by name, in panels by title, as PNG."""
    named = [min(len(lines), MOST_NAMES) for lines in panels.values()]
    figure = Figure(figsize=(9, 4 * len(panels) + 0.25 * sum(named)), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), ".-", label=name if len(name) < LONGEST else f"{name[:LONGEST]}…")
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.set_xlim(left=0)
        if len(lines) <= MOST_NAMES:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.15), fontsize="small")
    figure.savefig(path)
    return path


def show_curve(points: dict[str, dict[str, Any]], scores: dict[str, SampleScores], real: str, path: Path) -> Path:
    """Consistency over diversity as PNG: a line of temperatures for each guidance scale, and a star for real images.

    Args:
        points: the settings of the sampler, by name. scores: of each, and of `real` images.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for scale in dict.fromkeys(point["guidance_scale"] for point in points.values()):
        line = [(scores[name], point) for name, point in points.items() if point["guidance_scale"] == scale]
        x, y = [own.diversity for own, _ in line], [own.consistency for own, _ in line]
        axes.plot(x, y, "o-", label=f"guidance {scale:g}")
        for own, point in line:
            where = own.diversity, own.consistency
            axes.annotate(f"{point['temperature']:g}", where, textcoords="offset points", xytext=(6, 4))
    axes.plot(scores[real].diversity, scores[real].consistency, "k*", label=real)
    axes.set(xlabel="diversity: mean distance of two images of a class", ylabel="consistency")
    axes.margins(0.1)
    axes.legend(title="beside a point: its temperature")
    figure.savefig(path)
    return path
