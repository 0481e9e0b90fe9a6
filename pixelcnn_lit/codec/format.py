"""A lossless image codec: a model's probabilities, a range coder, and a file that knows what it takes to be read.

Both directions go through the pixels as the cached sampler does, batch by batch. At each step the probabilities of the
levels become whole numbers of 24 bits, which a range coder (constriction's) needs to write a level, or to read it.
So writer and reader must compute the same probabilities to the bit. The file says where it was written, and is refused
elsewhere; and it holds a digest of the images, so that nothing wrong is ever returned.

A file, little-endian:
    4 bytes    b"PLC3", format and version
    header     HEADER, below
    n bytes    where it was written: device, its instructions, torch, constriction, this program; ASCII
    uint32     CRC-32 of all that precedes
    payload    uint32 for each batch: the words of its stream; and then all streams. A stream is 32-bit words of the
               range coder: the classes of the batch, each as likely as the others; where the header says so, a bit
               an image, 1 where it is written mirrored; and then, step by step and channel by channel: image by image,
               pixel by pixel of a wavefront
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.runs.machine import MOST_THREADS
from pixelcnn_lit.runs.release import RELEASE, WRITTEN_BY

MAGIC = b"PLC3"
# Digest of weights and settings; channels, height, width, largest level; images; images a batch; threads; payload's
# bytes and CRC-32; digest of the images; whether some may be mirrored; length of the text that follows.
HEADER = struct.Struct("<16s4HI2HII16s2B")
CRC = struct.Struct("<I")
BITS = 24
MAX_BATCH = 1024  # images


class Header(NamedTuple):
    weights: bytes
    channels: int
    height: int
    width: int
    largest: int
    images: int
    batch_size: int
    threads: int
    payload_bytes: int
    payload_crc: int
    digest: bytes
    flip: int
    text_bytes: int


def parse(model: Density, content: bytes, where: str) -> tuple[Header, bytes]:
    """Header and payload. Raises UserError for a file that is damaged, of another model, or written elsewhere."""
    damaged = _damaged(where)
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
        raise UserError(
            f"{where}: written with another model, or before its run trained on; type the ckpt of that time"
        )
    # The rest is untrusted: checksums can be computed. No image takes fewer bits than if every level but one had the
    # least weight; half of that, for what the range coder rounds.
    surest = math.log2(1 - (model.levels - 1) / 2**BITS)
    least = class_bits(model) - model.dims * surest / 2
    asked = 1 <= header.threads <= MOST_THREADS and 1 <= header.batch_size <= MAX_BATCH
    if not asked or header.images * least > 8 * len(payload) + 64:
        raise damaged
    if text.decode("ascii", "replace") != platform_tag(model.device):
        raise UserError(f"{where}: written on {text.decode('ascii', 'replace')}, here is {platform_tag(model.device)}")
    return header, payload


def _damaged(where: str) -> UserError:
    return UserError(f"{where}: damaged or cut off; copy it again")


def joined(streams: Sequence[np.ndarray]) -> bytes:
    """Return the payload of streams, of uint32 each."""
    lengths = np.array([len(words) for words in streams], dtype="<u4")
    return b"".join(words.astype("<u4").tobytes() for words in (lengths, *streams))


def taken_apart(payload: bytes, n: int, where: str) -> list[np.ndarray]:
    """Return the n streams of a payload. Raises UserError where it has others."""
    words = np.frombuffer(payload, dtype="<u4").astype(np.uint32)
    lengths, streams = words[:n].astype(np.int64), words[n:]
    if len(lengths) < n or lengths.sum() != len(streams):
        raise _damaged(where)
    return np.split(streams, lengths.cumsum()[:-1]) if n else []


def platform_tag(device: torch.device) -> str:
    """Return what bits depend on beside the model: device, its instructions, torch, range coder, program."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    packages = {"torch": torch.__version__, "constriction": version("constriction"), WRITTEN_BY: RELEASE}
    return " ".join([device.type, name, *(f"{package} {its_version}" for package, its_version in packages.items())])


def class_bits(model: Density) -> float:
    """Return the bits of one image's class."""
    return math.log2(len(model.classes))


def model_digest(model: Density) -> bytes:
    """16 bytes of its SHA-256."""
    return bytes.fromhex(model.digest())[:16]


def images_digest(images: Split) -> bytes:
    """16 bytes of SHA-256."""
    content = images.x.contiguous().numpy().tobytes() + images.y.numpy().astype("<i8").tobytes()
    return hashlib.sha256(content).digest()[:16]
