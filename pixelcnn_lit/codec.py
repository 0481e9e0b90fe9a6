"""A lossless image codec: a model's probabilities, a range coder, and a file that knows what it takes to be read.

Both directions go through the pixels as the cached sampler does, batch by batch. At each step the probabilities of the
levels become whole numbers of 24 bits, which a range coder (constriction's) needs to write a level, or to read it.
So writer and reader must compute the same probabilities to the bit. The file says where it was written, and is refused
elsewhere; and it holds a digest of the images, so that nothing wrong is ever returned.

A file, little-endian:
    4 bytes    b"PLC1", format and version
    header     HEADER, below
    n bytes    where it was written: device, its instructions, torch, constriction; ASCII
    uint32     CRC-32 of all that precedes
    payload    32-bit words of the range coder: the classes of all images, each as likely as the others, and then,
               batch by batch and step by step, channel by channel: image by image, pixel by pixel of a front
"""

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import constriction
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from tqdm import tqdm

from pixelcnn_lit.checkpoints import digest
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.lit import DensityModel
from pixelcnn_lit.machine import MOST_THREADS, on_threads
from pixelcnn_lit.samplers import Conditioned, Pick, evaluating, walk
from pixelcnn_lit.terminal import progress

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS promises no order of sums

MAGIC = b"PLC1"
# Digest of weights and settings; channels, height, width, levels; images; images a batch; threads; payload's bytes and
# CRC-32; digest of the images; length of the text that follows.
HEADER = struct.Struct("<16s4HI2HII16sB")
CRC = struct.Struct("<I")
BITS = 24
MOST = 1024  # images a batch
stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] (an extension, without types)
FAMILY = stream.model.Categorical(perfect=False)


class Header(NamedTuple):
    weights: bytes
    channels: int
    height: int
    width: int
    levels: int
    images: int
    batch_size: int
    threads: int
    payload_bytes: int
    payload_crc: int
    digest: bytes
    text_bytes: int


class Compressed(NamedTuple):
    """A file, and what of it would be needed at least: bits of all levels by the model, and of all classes."""

    content: bytes
    model_bits: float
    class_bits: float


def compress(model: DensityModel, images: Split, batch_size: int) -> Compressed:
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
            encoder.encode(levels.flatten().cpu().numpy().astype(np.int32), FAMILY, weights(logits))
            return levels

        return pick

    with _bar(len(images), model, "compressing") as bar:
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size]
            canvas = torch.zeros_like(part.x, device=model.device)
            given = part.x.to(model.device).flatten(2)
            _walk(model, part.y, canvas, write(given), torch.get_num_threads(), bar)
    payload, text = encoder.get_compressed().tobytes(), place(model.device).encode()
    channels, height, width = model.image_shape
    header = Header(
        weights=model_digest(model),
        channels=channels,
        height=height,
        width=width,
        levels=model.levels,
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


def decompress(model: DensityModel, content: bytes, where: str) -> Split:
    """The images in the `content` of a file. Raises UserError, naming it as `where`, unless they are those written."""
    header, payload = parse(model, content, where)
    decoder = stream.queue.RangeDecoder(np.frombuffer(payload, dtype=np.uint32))

    def pick(logits: Tensor, c: int, pixels: slice) -> Tensor:
        levels = torch.from_numpy(decoder.decode(FAMILY, weights(logits)))
        return levels.view(len(logits), -1).to(model.device, torch.uint8)

    differs = UserError(f"{where}: this machine computes other probabilities than the one that wrote it")
    x, y, classes = [], [], torch.zeros(0, dtype=torch.int64)
    try:
        if len(model.classes) > 1 and header.images:
            classes = torch.from_numpy(decoder.decode(stream.model.Uniform(len(model.classes)), header.images)).long()
        with _bar(header.images, model, "decompressing") as bar:
            for first in range(0, header.images, header.batch_size):  # no more memory than what has been read
                n = min(header.batch_size, header.images - first)
                y.append(classes[first : first + n] if len(classes) else torch.full((n,), model.classes[0]))
                canvas = torch.zeros(n, *model.image_shape, dtype=torch.uint8, device=model.device)
                _walk(model, y[-1], canvas, pick, header.threads, bar)
                x.append(canvas.cpu())
    except AssertionError:  # constriction's, of bits that nothing could have written under such probabilities
        raise differs from None
    none = torch.zeros(0, *model.image_shape, dtype=torch.uint8)
    images = Split(torch.cat([none, *x]), torch.cat([classes[:0], *y]))
    if images_digest(images) != header.digest:
        raise differs
    return images


def parse(model: DensityModel, content: bytes, where: str) -> tuple[Header, bytes]:
    """Header and payload. Raises UserError for a file that is damaged, of another model, or written elsewhere."""
    damaged = UserError(f"{where}: damaged or cut off; copy it again")
    if content[: len(MAGIC)] != MAGIC:
        raise UserError(f"{where}: no file of this codec, or of another version ({content[:4]!r}, not {MAGIC!r})")
    try:
        header = Header(*HEADER.unpack_from(content, len(MAGIC)))
        end = len(MAGIC) + HEADER.size + header.text_bytes
        (crc,) = CRC.unpack_from(content, end)
    except struct.error:
        raise damaged from None
    payload, text = content[end + CRC.size :], content[end - header.text_bytes : end]
    checked = len(payload), zlib.crc32(payload)
    if crc != zlib.crc32(content[:end]) or checked != (header.payload_bytes, header.payload_crc) or len(payload) % 4:
        raise damaged
    if header.weights != model_digest(model):
        raise UserError(f"{where}: written with another model; type its ckpt")
    # The rest is of a stranger who can compute checksums. No image takes fewer bits than if every level but one had the
    # least weight; half of that, for what the range coder rounds.
    surest = math.log2(1 - (model.levels - 1) / 2**BITS)
    least = class_bits(model) - model.dims * surest / 2
    asked = 1 <= header.threads <= MOST_THREADS and 1 <= header.batch_size <= MOST
    if not asked or header.images * least > 8 * len(payload) + 64:
        raise damaged
    if text.decode("ascii", "replace") != place(model.device):
        raise UserError(f"{where}: written on {text.decode('ascii', 'replace')}, here is {place(model.device)}")
    return header, payload


def place(device: torch.device) -> str:
    """What bits depend on beside the model: device, its instructions, torch, and the range coder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {name} torch {torch.__version__} constriction {version('constriction')}"


def weights(logits: Tensor) -> np.ndarray:
    """Probabilities of logits [B,V,n] in whole numbers, none of them 0, of about 2^24 in all: float64 [B*n,V]."""
    levels = logits.shape[1]
    p = logits.movedim(1, -1).softmax(-1)  # levels last, as likelihoods have them in memory
    return p.mul_(2**BITS - levels).floor_().add_(1).reshape(-1, levels).cpu().numpy()


def class_bits(model: DensityModel) -> float:
    """Of one image's class."""
    return math.log2(len(model.classes))


def _bar(images: int, model: DensityModel, what: str) -> tqdm:
    pixels = images * math.prod(model.image_shape[1:])
    return progress(total=pixels, unit=" pixels", unit_scale=True, desc=what)


def _walk(model: DensityModel, y: Tensor, canvas: Tensor, pick: Pick, threads: int, bar: tqdm) -> None:
    target = Conditioned(model.net, model.likelihood, y.to(model.device), model.num_classes)
    plainly = torch.autocast(model.device.type, enabled=False)
    with on_threads(threads), _same_bits(), evaluating(target.net, target.likelihood), plainly, parametrize.cached():
        watch = partial(_advance, bar, len(y))
        walk(target, pick, canvas, stepwise=hasattr(model.net, "step"), watch=watch)


def _advance(bar: tqdm, images: int, pixels: int) -> None:
    bar.update(images * pixels)


@contextmanager
def _same_bits() -> Iterator[None]:
    """Sums are taken in the same order as elsewhere, as far as torch can promise it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def model_digest(model: DensityModel) -> bytes:
    """16 bytes of SHA-256, of the weights and of what decides how they are used."""
    settings: dict[str, Any] = {key: model.hparams[key] for key in ("model", "likelihood", "image_shape", "levels")}
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return bytes.fromhex(digest(state, json.dumps(settings, sort_keys=True)))[:16]


def images_digest(images: Split) -> bytes:
    """16 bytes of SHA-256."""
    content = images.x.contiguous().numpy().tobytes() + images.y.numpy().astype("<i8").tobytes()
    return hashlib.sha256(content).digest()[:16]
