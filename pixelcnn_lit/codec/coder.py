"""Images to bits and back by a model's probabilities and a range coder; `format` has the file."""

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import constriction
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pixelcnn_lit.codec.format import (
    BITS,
    CRC,
    HEADER,
    MAGIC,
    Header,
    class_bits,
    images_digest,
    joined,
    model_digest,
    parse,
    platform_tag,
    taken_apart,
)
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.runs.machine import on_threads
from pixelcnn_lit.runs.terminal import progress
from pixelcnn_lit.runs.workers import share
from pixelcnn_lit.samplers.draw import picklable
from pixelcnn_lit.samplers.walk import GuidedModel, Pick, Watch, eval_mode, walk

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS promises no order of sums

stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] (an extension, without types)
FAMILY = stream.model.Categorical(perfect=False)
BIT = stream.model.Uniform(2)
AT_ONCE = 64  # images that are scored, which takes more memory than steps do


class Compressed(NamedTuple):
    """A file, and what of it would be needed at least: bits of all levels by the model, of all classes, of flips."""

    content: bytes
    model_bits: float
    class_bits: float
    flip_bits: float


class Stream(NamedTuple):
    """A batch as the words of a range coder, uint32, and its bits by the model, of which a reader knows nothing."""

    words: np.ndarray
    images: int
    model_bits: float = 0.0


Done = TypeVar("Done", Stream, Split)


@dataclass(frozen=True)
class Coder:
    """What writes and reads a batch, which is a stream of its own.

    Args:
        flip: whether an image may be written mirrored, which takes a bit to say. That is not the mixture of the two, as
            `Density.nats` scores it: of two images of alike probability, the mixture would take no more bits.
    """

    model: Density
    threads: int
    flip: bool = False

    def write(self, images: Split, watch: Watch | None = None) -> Stream:
        """Images uint8 [B,C,H,W] and their classes, if the model knows more than one."""
        encoder, bits = stream.queue.RangeEncoder(), 0.0
        if len(self.model.classes) > 1:
            encoder.encode(images.y.numpy().astype(np.int32), stream.model.Uniform(len(self.model.classes)))
        x = images.x
        if self.flip:
            mirrored = self._shorter_mirrored(images)
            encoder.encode(mirrored.numpy().astype(np.int32), BIT)
            x = flipped(x, mirrored)
        given = x.to(self.model.device).flatten(2)

        def pick(logits: Tensor, c: int, pixels: slice) -> Tensor:
            nonlocal bits
            levels = given[:, c, pixels]
            bits -= float(logits.gather(1, levels[:, None].to(logits.device, torch.int64)).sum()) / math.log(2)
            encoder.encode(levels.flatten().cpu().numpy().astype(np.int32), FAMILY, frequencies(logits))
            return levels

        self._walk(images.y, pick, watch)
        return Stream(encoder.get_compressed(), len(images), bits)

    def read(self, written: Stream, watch: Watch | None = None) -> Split:
        """The images and classes of a stream. Raises AssertionError where these probabilities cannot have written it.

        No more memory is asked for than by the images of one batch.
        """
        decoder = stream.queue.RangeDecoder(written.words)
        y = torch.full((written.images,), self.model.classes[0])
        if len(self.model.classes) > 1:
            y = torch.from_numpy(decoder.decode(stream.model.Uniform(len(self.model.classes)), written.images)).long()
        mirrored = torch.zeros(written.images, dtype=torch.bool)
        if self.flip:
            mirrored = torch.from_numpy(decoder.decode(BIT, written.images)) > 0

        def pick(logits: Tensor, c: int, pixels: slice) -> Tensor:
            levels = torch.from_numpy(decoder.decode(FAMILY, frequencies(logits)))
            return levels.view(len(logits), -1).to(self.model.device, self.model.level_dtype)

        return Split(flipped(self._walk(y, pick, watch), mirrored), y)

    def _shorter_mirrored(self, images: Split) -> Tensor:
        """Return which images take fewer bits mirrored, bool [B]."""
        nats, parts = self.model.nats, images.parts(AT_ONCE)
        return torch.cat([nats(part.x.flip(-1), part.y) < nats(part.x, part.y) for part in parts]).cpu()

    def _walk(self, y: Tensor, pick: Pick, watch: Watch | None) -> Tensor:
        """Go through images of classes y as the cached sampler does, and return them."""
        model = self.model
        canvas = torch.zeros(len(y), *model.image_shape, dtype=model.level_dtype, device=model.device)
        in_float32 = torch.autocast(model.device.type, enabled=False)
        with on_threads(self.threads), _same_bits(), eval_mode(model), in_float32, parametrize.cached():
            walk(GuidedModel(model, y.to(model.device)), pick, canvas, stepwise=model.can_step, watch=watch)
        return canvas.cpu()

    def of_all(
        self, kind: Callable[..., Done], tasks: Sequence[Split | Stream], processes: int, what: str
    ) -> list[Done]:
        """Return what `write` or `read` makes of each batch, of which several processes may take their share."""
        done: dict[int, Done] = {}
        images = [len(task) if isinstance(task, Split) else task.images for task in tasks]
        area = math.prod(self.model.image_shape[1:])

        def here(n: int) -> None:
            done[n] = kind(self, tasks[n], lambda pixels: bar.update(images[n] * pixels))

        def arrived(n: int, answer: Done) -> None:
            done[n] = answer
            bar.update(images[n] * area)

        there = None
        if processes > 1 and self.model.device.type == "cpu":
            with on_threads(self.threads):
                there = partial(kind, replace(self, model=picklable(self.model)))
        with progress(total=sum(images) * area, unit=" pixels", unit_scale=True, desc=what) as bar:
            share(tasks, here, there, arrived, processes)
        return [done[n] for n in range(len(tasks))]


def flipped(x: Tensor, mirrored: Tensor) -> Tensor:
    """Images [B,C,H,W], mirrored where bool [B] says so."""
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def compress(model: Density, images: Split, batch_size: int, processes: int = 1, flip: bool = False) -> Compressed:
    """Images uint8 [N,C,H,W] of classes int64 [N]; those do not matter to a model that was trained without.

    `flip`: see `Coder`.
    """
    if len(model.classes) == 1:
        images = Split(images.x, torch.full_like(images.y, model.classes[0]))
    coder = Coder(model, torch.get_num_threads(), flip)
    streams = coder.of_all(Coder.write, [part.held() for part in images.parts(batch_size)], processes, "compressing")
    payload, text = joined([each.words for each in streams]), platform_tag(model.device).encode()
    channels, height, width = model.image_shape
    header = Header(
        weights=model_digest(model),
        channels=channels,
        height=height,
        width=width,
        largest=model.levels - 1,
        images=len(images),
        batch_size=batch_size,
        threads=coder.threads,
        payload_bytes=len(payload),
        payload_crc=zlib.crc32(payload),
        digest=images_digest(images),
        flip=flip,
        text_bytes=len(text),
    )
    head = MAGIC + HEADER.pack(*header) + text
    content = head + CRC.pack(zlib.crc32(head)) + payload
    model_bits = sum(each.model_bits for each in streams)
    return Compressed(content, model_bits, len(images) * class_bits(model), flip * len(images))


def decompress(model: Density, content: bytes, where: str, processes: int = 1) -> Split:
    """The images in the `content` of a file. Raises UserError, naming it as `where`, unless they are those written."""
    header, payload = parse(model, content, where)
    firsts = range(0, header.images, header.batch_size)
    apart = taken_apart(payload, len(firsts), where)
    sizes = (min(header.batch_size, header.images - first) for first in firsts)
    streams = [Stream(words, n) for words, n in zip(apart, sizes, strict=True)]
    differs = UserError(f"{where}: this machine computes other probabilities than the one that wrote it")
    try:
        read = Coder(model, header.threads, bool(header.flip)).of_all(Coder.read, streams, processes, "decompressing")
    except AssertionError:  # constriction's, of bits that nothing could have written under such probabilities
        raise differs from None
    x, y = [part.x for part in read], [part.y for part in read]
    none = torch.zeros(0, *model.image_shape, dtype=model.level_dtype)
    images = Split(torch.cat([none, *x]), torch.cat([torch.zeros(0, dtype=torch.int64), *y]))
    if images_digest(images) != header.digest:
        raise differs
    return images


def frequencies(logits: Tensor) -> np.ndarray:
    """Probabilities of logits [B,V,n] in whole numbers, none of them 0, of about 2^24 in all: float64 [B*n,V]."""
    levels = logits.shape[1]
    p = logits.movedim(1, -1).softmax(-1)  # levels last, as likelihoods have them in memory
    return p.mul_(2**BITS - levels).floor_().add_(1).reshape(-1, levels).cpu().numpy()


@contextmanager
def _same_bits() -> Iterator[None]:
    """Sums are taken in the same order as elsewhere, as far as torch can promise it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
