"""Draw class-conditional samples from a checkpoint.

A PNG grid, a row a class, the images themselves as npz and, if wanted, a GIF of the images filling up.
"""

import math
from typing import Any

import numpy as np
from torch import Tensor

from pixelcnn_lit.command import command, run_dir, shown
from pixelcnn_lit.lit import load
from pixelcnn_lit.machine import best_device
from pixelcnn_lit.pictures import animate, grid, save
from pixelcnn_lit.samplers import require_known

FRAMES = 60


@command("sample")
def main(ckpt: str, classes: list[int] | None, sampler: dict[str, Any], gif: bool) -> None:
    model = load(ckpt).to(best_device())
    asked = model.classes if classes is None else classes
    require_known(f"classes={asked}", asked, model.known_classes)
    directory, n, filling = run_dir(), sampler.get("n_per_class", 1), []
    every = -(-math.prod(model.image_shape[1:]) // FRAMES)

    def watch(canvas: Tensor, pixel: int) -> None:
        if pixel % every == 0:
            filling.append(grid(canvas, model.levels, n))

    images = model.draw(sampler, asked, watch=watch if gif else None, progress=True).cpu()
    save(grid(images, model.levels, n), directory / "samples.png")
    if gif:
        animate([*filling, grid(images, model.levels, n)], directory / "samples.gif")
    np.savez(directory / "samples.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=np.repeat(asked, n))
    print(f"{len(images)} images of classes {asked}: {shown(directory / 'samples.png')} and samples.npz beside it")


if __name__ == "__main__":
    main()
