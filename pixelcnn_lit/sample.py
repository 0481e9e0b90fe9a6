"""Draw class-conditional samples from a checkpoint.

A PNG grid, a row a class, the images themselves as npz and, if wanted, a GIF of the images filling up.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("sample")

import shutil
from typing import Any

import numpy as np
from torch import Tensor

from pixelcnn_lit.data.grids import animate, grid, save
from pixelcnn_lit.density.load import load
from pixelcnn_lit.runs.machine import Threads, best_device, processes_of, say_threads, take_threads
from pixelcnn_lit.runs.pace import Pace
from pixelcnn_lit.runs.run_dir import relative, run_dir
from pixelcnn_lit.runs.signals import Stopped

FRAMES = 60
PARTS = "samples.parts"  # finished batches: the same command with the same run_dir takes them up


def main(
    ckpt: str, classes: int | str | list[int | str] | None, sampler: dict[str, Any], gif: bool, threads: Threads
) -> None:
    threads = take_threads(threads)
    model = load(ckpt).to(best_device())
    asked = model.classes
    if classes is not None:
        asked = model.class_numbers(classes if isinstance(classes, list) else [classes])
    directory, filling, pace = run_dir(), Filling(), Pace()
    processes = 1 if gif else processes_of(threads)
    say_threads(model.device, threads, processes)
    given: dict[str, Any] = {"watch": filling} if gif else {"parts": directory / PARTS}
    try:
        images = model.draw(sampler, asked, threads, **given, progress=True, processes=processes, pace=pace).cpu()
    except Stopped:
        if (directory / PARTS).is_dir():
            print(f"finished batches are kept; to resume, type the same with run_dir={relative(directory)}")
        raise
    names = model.called(asked)
    save(grid(images, model.levels, names), directory / "samples.png")
    if gif:
        animate([grid(frame, model.levels, names) for frame in [*filling.frames, images]], directory / "samples.gif")
    pixels, labels = images.flatten(0, 1).permute(0, 2, 3, 1), np.repeat(asked, images.shape[1])
    np.savez(directory / "samples.npz", images=pixels.numpy(), labels=labels)
    shutil.rmtree(directory / PARTS, ignore_errors=True)
    print(
        f"{len(pixels)} images of {', '.join(names)}{pace}: "
        f"{relative(directory / 'samples.png')} and samples.npz beside it"
    )


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
