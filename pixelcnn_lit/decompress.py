"""Restore the images in a file of `compress`, to the bit."""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("decompress")

from pathlib import Path

import numpy as np

from pixelcnn_lit.codec.coder import decompress
from pixelcnn_lit.codec.format import parse
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.pictures import class_folders, to_pil
from pixelcnn_lit.density.load import load
from pixelcnn_lit.runs.atomic import atomic_write
from pixelcnn_lit.runs.machine import Threads, best_device, processes_of, say_threads, take_threads
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.terminal import progress


def main(ckpt: str, file: str, out: str, threads: Threads) -> None:
    take_threads(threads)
    model = load(ckpt).to(best_device())
    if not Path(file).is_file():
        raise UserError(f"file={file}: no such file")
    if not out.endswith(".npz") and Path(out).exists() and (Path(out).is_file() or any(Path(out).iterdir())):
        raise UserError(f"out={out}: is there already; type another folder, or a name that ends in .npz")
    if not out.endswith(".npz") and (model.levels > 256 or model.image_shape[0] not in (1, 3)):
        raise UserError(f"out={out}: the model's images are no pictures; type a name that ends in .npz")
    content = Path(file).read_bytes()
    written_with = parse(model, content, f"file={file}")[0].threads
    if threads not in (None, written_with):
        raise UserError(f"threads={threads}: {file} was written with {written_with}, as it is read; leave threads out")
    processes = processes_of(written_with)
    say_threads(model.device, written_with, processes)
    images = decompress(model, content, f"file={file}", processes)
    if out.endswith(".npz"):
        with atomic_write(Path(out)) as target:
            np.savez(target, images=images.x.permute(0, 2, 3, 1).numpy(), labels=images.y.numpy())
    else:
        folders = dict(zip(model.classes, class_folders(model.called(model.classes)), strict=True))
        for n, (image, label) in enumerate(zip(progress(images.x, desc="writing"), images.y.tolist(), strict=True)):
            path = Path(out) / folders[label] / f"{n:06}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil(image).save(path)
    print(f"{len(images)} images: {relative(out)}")
