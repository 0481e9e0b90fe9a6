"""A trained density scored by Lightning's Trainer: on any device, and in several processes."""

from typing import Any

from pixelcnn_lit.data.datamodule import ImageData
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs.machine import step_work
from pixelcnn_lit.training.trainer import make_trainer, require_batches, settle_threads


def score_test_images(
    model: Density, data: ImageData, trainer: dict[str, Any], threads: int | None
) -> dict[str, Any] | None:
    """Return the figures of the test images, and `bpd_per_class`, by name, of each class that has some.

    None in all processes but the first.
    """
    scorer = make_trainer(trainer, logger=False, enable_checkpointing=False)
    require_batches(scorer, "test", len(data.test), data.batch_size)
    settle_threads(scorer, threads, step_work(model, model.image_shape, data.batch_size))
    module = DensityModule(model)
    scorer.test(module, data, verbose=False)
    if not scorer.is_global_zero:
        return None
    figures = {key.removeprefix("test/"): value for key, value in module.figures.items()}
    # A class without images has no bpd, which is NaN.
    per_class = {name: bpd for name, bpd in zip(data.class_names, module.bpd_per_class, strict=True) if bpd == bpd}
    return {**figures, "bpd_per_class": per_class}
