"""Draw class-conditional samples from a checkpoint: a PNG grid, a row a class, and the images themselves as npz."""

from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from pixelcnn_lit.command import command, run_dir
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.lit import load
from pixelcnn_lit.machine import best_device
from pixelcnn_lit.pictures import grid, save


@command("sample")
def main(cfg: DictConfig) -> None:
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
    model = load(config["ckpt"]).to(best_device())
    classes = model.classes if config["classes"] is None else config["classes"]
    strangers = [c for c in classes if c not in range(model.num_classes + 1)]
    if strangers:
        raise UserError(
            f"classes={classes}: this model knows 0..{model.num_classes - 1}, and {model.num_classes} for none"
        )
    n = config["sampler"]["n_per_class"]
    images = model.draw(config["sampler"], classes, progress=True).cpu()
    directory = run_dir()
    save(grid(images, model.levels, n), directory / "samples.png")
    np.savez(directory / "samples.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=np.repeat(classes, n))
    print(f"{len(images)} images of classes {classes}: {directory / 'samples.png'} and samples.npz beside it")


if __name__ == "__main__":
    main()
