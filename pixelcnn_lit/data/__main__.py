"""Look at a dataset: statistics, images, loading speed; or write it as arrays, for dataset=arrays."""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("data")

import time
from itertools import islice
from pathlib import Path
from typing import Any

from pixelcnn_lit.data.datamodule import ImageData, image_data, uniform_bpd
from pixelcnn_lit.data.grids import grid, save
from pixelcnn_lit.data.images import Split, channel_statistics, first_of_each_class, level_counts
from pixelcnn_lit.runs.machine import Threads, take_threads
from pixelcnn_lit.runs.run_dir import relative, run_dir
from pixelcnn_lit.runs.terminal import progress


def main(dataset: dict[str, Any], augmented: bool, out: str | None, threads: Threads) -> None:
    take_threads(threads)
    data = image_data(dataset)
    if out is not None:
        write(data, Path(out))
        return
    data.setup()
    nine = first_of_each_class(data.drawn_from if augmented else data.train, len(data.class_names), 9)
    if augmented:
        nine = data.augment(nine.flatten(0, 1)).view_as(nine)
    splits = data.splits()
    print(f"{data.label} ({uniform_bpd(data.levels):.4f} bpd for a uniform model)")
    for name, split in splits.items():
        print(f"{name:>10}: {len(split)} images, per channel: {statistics(split, data.levels)}")
    print(f"{'class':>12}" + "".join(f"{name:>12}" for name in splits))
    for label, class_name in enumerate(data.class_names):
        print(f"{class_name:>12}" + "".join(f"{int((split.y == label).sum()):>12}" for split in splits.values()))
    save(grid(nine, data.levels, data.class_names), run_dir() / "images.png")
    print(relative(run_dir() / "images.png"))
    if len(data.train) >= data.batch_size:
        print(f"data loader: {loader_speed(data):,.0f} training images/s in batches of {data.batch_size}")
    else:
        print(f"too few to train on in batches of dataset.batch_size={data.batch_size}")


def write(data: ImageData, folder: Path) -> None:
    """Write the images as they are scored, whatever their number, as a folder of arrays."""
    data.streams = True
    data.setup()
    data.save(folder)
    sizes = ", ".join(f"{len(split)} {name}" for name, split in data.splits().items())
    print(f"{data.label}, {sizes} images, to be read with dataset=arrays: {relative(folder)}")


def statistics(split: Split, levels: int) -> str:
    """Mean and deviation of each channel, in levels and as shares of the brightest one; of codes, how many are used."""
    if levels > 256:
        used = (level_counts(split, levels) > 0).sum(1).tolist()
        return f"codes in use: {', '.join(map(str, used))} of {levels}"

    def shown(values: list[float]) -> str:
        in_levels = ", ".join(f"{value:.2f}" for value in values)
        shares = ", ".join(f"{value / (levels - 1):.4f}" for value in values)
        return f"{in_levels} (in [0, 1]: {shares})"

    mean, std = channel_statistics(split)
    return f"mean {shown(mean)}, standard deviation {shown(std)}"


def loader_speed(data: ImageData) -> float:
    """Images/s of the training loader alone, over some batches, its start included."""
    began = time.perf_counter()
    images = sum(len(y) for _, y in progress(islice(data.train_dataloader(), 300), desc="loading"))
    return images / (time.perf_counter() - began)
