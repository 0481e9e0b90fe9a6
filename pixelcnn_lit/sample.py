"""Draw class-conditional samples from a checkpoint: a PNG grid, a row a class, and the images themselves as npz."""

from typing import Any

import numpy as np

from pixelcnn_lit.command import command, run_dir, shown
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.lit import load
from pixelcnn_lit.machine import best_device
from pixelcnn_lit.pictures import grid, save


@command("sample")
def main(ckpt: str, classes: list[int] | None, sampler: dict[str, Any]) -> None:
    model = load(ckpt).to(best_device())
    asked = model.classes if classes is None else classes
    if not asked or set(asked) - set(model.known_classes):
        raise UserError(f"classes={asked}: this model was trained on {', '.join(map(str, model.known_classes))}")
    images = model.draw(sampler, asked, progress=True).cpu()
    directory, n = run_dir(), sampler["n_per_class"]
    save(grid(images, model.levels, n), directory / "samples.png")
    np.savez(directory / "samples.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=np.repeat(asked, n))
    print(f"{len(images)} images of classes {asked}: {shown(directory / 'samples.png')} and samples.npz beside it")


if __name__ == "__main__":
    main()
