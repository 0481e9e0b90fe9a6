"""Images to bits and back by a model's probabilities and a range coder; `format` has the file."""

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import constriction
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from tqdm import tqdm

from pixelcnn_lit.codec.format import (
    BITS,
    CRC,
    HEADER,
    MAGIC,
    Header,
    class_bits,
    images_digest,
    model_digest,
    parse,
    platform_tag,
)
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.runs.machine import on_threads
from pixelcnn_lit.runs.terminal import progress
from pixelcnn_lit.samplers.walk import GuidedModel, Pick, eval_mode, walk

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS promises no order of sums

stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] (an extension, without types)
FAMILY = stream.model.Categorical(perfect=False)


class Compressed(NamedTuple):
    """A file, and what of it would be needed at least: bits of all levels by the model, and of all classes."""

    content: bytes
    model_bits: float
    class_bits: float


def compress(model: Density, images: Split, batch_size: int) -> Compressed:
    """Images uint8 [N,C,H,W] of classes int64 [N]; those do not matter to a model that was trained without."""
    encoder, bits = stream.queue.RangeEncoder(), 0.0
    if len(model.classes) == 1:
        images = Split(images.x, torch.full_like(images.y, model.classes[0]))
    elif len(images):
        encoder.encode(images.y.numpy().astype(np.int32), stream.model.Uniform(len(model.classes)))

    def write(x: Tensor) -> Pick:
        def pick(logits: Tensor, c: int, pixels: slice) -> Tensor:
            nonlocal bits
            levels = x[:, c, pixels]
            bits -= float(logits.gather(1, levels[:, None].to(logits.device, torch.int64)).sum()) / math.log(2)
            encoder.encode(levels.flatten().cpu().numpy().astype(np.int32), FAMILY, frequencies(logits))
            return levels

        return pick

    with _bar(len(images), model, "compressing") as bar:
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size]
            canvas = torch.zeros_like(part.x, device=model.device)
            given = part.x.to(model.device).flatten(2)
            _walk(model, part.y, canvas, write(given), torch.get_num_threads(), bar)
    payload, text = encoder.get_compressed().tobytes(), platform_tag(model.device).encode()
    channels, height, width = model.image_shape
    header = Header(
        weights=model_digest(model),
        channels=channels,
        height=height,
        width=width,
        largest=model.levels - 1,
        images=len(images),
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        payload_bytes=len(payload),
        payload_crc=zlib.crc32(payload),
        digest=images_digest(images),
        text_bytes=len(text),
    )
    head = MAGIC + HEADER.pack(*header) + text
    return Compressed(head + CRC.pack(zlib.crc32(head)) + payload, bits, len(images) * class_bits(model))


def decompress(model: Density, content: bytes, where: str) -> Split:
    """The images in the `content` of a file. Raises UserError, naming it as `where`, unless they are those written."""
    header, payload = parse(model, content, where)
    decoder = stream.queue.RangeDecoder(np.frombuffer(payload, dtype=np.uint32))

    def pick(logits: Tensor, c: int, pixels: slice) -> Tensor:
        levels = torch.from_numpy(decoder.decode(FAMILY, frequencies(logits)))
        return levels.view(len(logits), -1).to(model.device, model.level_dtype)

    differs = UserError(f"{where}: this machine computes other probabilities than the one that wrote it")
    x, y, classes = [], [], torch.zeros(0, dtype=torch.int64)
    try:
        if len(model.classes) > 1 and header.images:
            classes = torch.from_numpy(decoder.decode(stream.model.Uniform(len(model.classes)), header.images)).long()
        with _bar(header.images, model, "decompressing") as bar:
            for first in range(0, header.images, header.batch_size):  # no more memory than what has been read
                n = min(header.batch_size, header.images - first)
                y.append(classes[first : first + n] if len(classes) else torch.full((n,), model.classes[0]))
                canvas = torch.zeros(n, *model.image_shape, dtype=model.level_dtype, device=model.device)
                _walk(model, y[-1], canvas, pick, header.threads, bar)
                x.append(canvas.cpu())
    except AssertionError:  # constriction's, of bits that nothing could have written under such probabilities
        raise differs from None
    none = torch.zeros(0, *model.image_shape, dtype=model.level_dtype)
    images = Split(torch.cat([none, *x]), torch.cat([classes[:0], *y]))
    if images_digest(images) != header.digest:
        raise differs
    return images


def frequencies(logits: Tensor) -> np.ndarray:
    """Probabilities of logits [B,V,n] in whole numbers, none of them 0, of about 2^24 in all: float64 [B*n,V]."""
    levels = logits.shape[1]
    p = logits.movedim(1, -1).softmax(-1)  # levels last, as likelihoods have them in memory
    return p.mul_(2**BITS - levels).floor_().add_(1).reshape(-1, levels).cpu().numpy()


def _bar(images: int, model: Density, what: str) -> tqdm:
    pixels = images * math.prod(model.image_shape[1:])
    return progress(total=pixels, unit=" pixels", unit_scale=True, desc=what)


def _walk(model: Density, y: Tensor, canvas: Tensor, pick: Pick, threads: int, bar: tqdm) -> None:
    in_float32 = torch.autocast(model.device.type, enabled=False)
    with on_threads(threads), _same_bits(), eval_mode(model), in_float32, parametrize.cached():
        guided = GuidedModel(model, y.to(model.device))
        walk(guided, pick, canvas, stepwise=model.can_step, watch=lambda pixels: bar.update(len(y) * pixels))


@contextmanager
def _same_bits() -> Iterator[None]:
    """Sums are taken in the same order as elsewhere, as far as torch can promise it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
