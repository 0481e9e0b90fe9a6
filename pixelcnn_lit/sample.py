"""Draw class-conditional samples from a checkpoint.

A PNG grid, a row a class, the images themselves as npz and, if wanted, a GIF of the images filling up.
"""

from pixelcnn_lit.launch import launch

if __name__ == "__main__":
    launch("sample")

from typing import Any

import numpy as np
from torch import Tensor

from pixelcnn_lit.lit import load
from pixelcnn_lit.machine import best_device
from pixelcnn_lit.pictures import animate, grid, save
from pixelcnn_lit.run_dir import run_dir, shown
from pixelcnn_lit.samplers import require_known

FRAMES = 60


def main(ckpt: str, classes: list[int] | None, sampler: dict[str, Any], gif: bool) -> None:
    model = load(ckpt).to(best_device())
    asked = model.classes if classes is None else classes
    require_known(f"classes={asked}", asked, model.known_classes)
    directory, filling = run_dir(), Filling()
    images = model.draw(sampler, asked, watch=filling if gif else None, progress=True).cpu()
    save(grid(images, model.levels), directory / "samples.png")
    if gif:
        animate([grid(frame, model.levels) for frame in [*filling.frames, images]], directory / "samples.gif")
    pixels, labels = images.flatten(0, 1).permute(0, 2, 3, 1), np.repeat(asked, images.shape[1])
    np.savez(directory / "samples.npz", images=pixels.numpy(), labels=labels)
    print(f"{len(pixels)} images of classes {asked}: {shown(directory / 'samples.png')} and samples.npz beside it")


class Filling:
    """Watches a sampler: some FRAMES of the images on their way, evenly spaced, however often it is called."""

    def __init__(self) -> None:
        self.frames: list[Tensor] = []
        self.calls, self.every = 0, 1

    def __call__(self, images: Tensor) -> None:
        if self.calls % self.every == 0:
            self.frames.append(images.cpu().clone())
        self.calls += 1
        if len(self.frames) == 2 * FRAMES:
            self.frames, self.every = self.frames[::2], 2 * self.every
