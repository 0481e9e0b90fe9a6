"""Class-conditional PixelCNN image models: exact likelihoods, fast sampling, tested.

    import pixelcnn_lit

    model = pixelcnn_lit.load("mnist")  # shipped weights, a .ckpt or a .safetensors; on a GPU: .to("cuda")
    images = model.sample(n_per_class=4, classes=[3, 7], temperature=0.9, seed=0)  # uint8 [K,n,C,H,W]
    nats = model.nats(x, y)  # [B]
    bits = model.bits_per_pixel(x, y)  # [B,H,W]: where the bits are spent
    filled = model.complete(x, known, y, n=4, seed=0)  # uint8 [B,n,C,H,W]

A file at the top of the package is a command; a folder is a part, and bears the name of its group in conf/
where it has one:

    data/          conf/dataset      the DataModule, transforms, one source a file, pictures
    models/        conf/model        the contracts (protocols.py) and one network a file
    likelihoods/   conf/likelihood   what happens inside one pixel
    samplers/      conf/sampler      from noise to images
    optim/         conf/optimizer, conf/scheduler, and the average of the weights
    classifiers/   conf/classifier   the judges
    nn/                              what networks are made of
    density/                         embedding + network + likelihood, and how a file becomes one; plain torch
    lit/                             the two LightningModules, and their metrics
    training/      conf/trainer, conf/callbacks    a run: fitting, resuming
    runs/                            commands, run directories, signals, the machine, Lightning from the inside
    checkpoints/                     files that are data
    codec/  scoring/                 images to bits and back; Bayes' rule, samples, plots
    config/                          errors, and from plain values to objects
    weights/                         what the package ships with
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixelcnn_lit.density.density import Density
    from pixelcnn_lit.density.load import load

__all__ = ["Density", "load"]


def __getattr__(name: str) -> Any:
    """Import torch when it is asked for, and not before."""
    if name == "load":
        from pixelcnn_lit.density.load import load

        return load
    if name == "Density":
        from pixelcnn_lit.density.density import Density

        return Density
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
