"""Sampling as a function of noise: three ways to one answer, and all that steers it.

Image n of class y is a function of (seed, y, n) and of the model: u ~ U[0,1)^[C,H,W], and each value is the inverse of
the cumulative distribution at its u. So the same request gives the same images, whatever the method, the batch or the
device (up to rounding, which can move a draw that lies on a boundary), and whatever else is asked for.
"""

import copy
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.models.protocols import ImageDensity
from pixelcnn_lit.nn.noise import uniform
from pixelcnn_lit.runs.machine import on_threads
from pixelcnn_lit.runs.pace import Pace
from pixelcnn_lit.runs.terminal import progress
from pixelcnn_lit.runs.workers import share
from pixelcnn_lit.samplers.parts import Parts
from pixelcnn_lit.samplers.pick import picker
from pixelcnn_lit.samplers.walk import GuidedModel, Watch, eval_mode, fixed_point, walk

SomeDensity = TypeVar("SomeDensity", bound=ImageDensity)


@dataclass(frozen=True)
class Request:
    """A request to a sampler, beside its own settings.

    Args:
        density: the model.
        y: the classes to draw, int64 [K].
        image, known: uint8 [K,C,H,W], whose pixels are kept where bool [H,W] is true.
        watch: called after each step or evaluation with the images so far, uint8 [K,n_per_class,C,H,W].
        progress: whether to show a bar on a terminal.
        processes: how many may draw on a CPU, this one among them, where nobody watches. It changes nothing but time.
        pace: told how fast it goes.
        parts: a directory where finished batches are kept, and found again by the same request. It is for the caller to
            remove it, and not for completions, whose images do not tell requests apart.
    """

    density: ImageDensity
    y: Tensor
    image: Tensor | None = None
    known: Tensor | None = None
    watch: Callable[[Tensor], None] | None = None
    progress: bool = False
    processes: int = 1
    pace: Pace | None = None
    parts: Path | None = None


def draw(
    request: Request,
    *,
    method: Literal["naive", "cached", "fixed_point"] = "cached",
    n_per_class: Annotated[int, Ge(1)] = 1,
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0,
    temperature: Annotated[float, Ge(0.001)] = 1.0,
    top_k: Annotated[int | None, Ge(1)] = None,
    top_p: Annotated[float, Interval(ge=0.001, le=1)] = 1.0,
    guidance_scale: Annotated[float, Interval(ge=0, le=100)] = 1.0,
    mix_with: Annotated[int | None, Ge(0)] = None,
    mix_weight: Annotated[float, Interval(ge=0.001, le=0.999)] = 0.5,
    batch_size: Annotated[int, Ge(1)] = 64,
    bf16: bool = False,
    flip_mixture: bool = False,
) -> Tensor:
    """Images of each class asked for: uint8 [K,n_per_class,C,H,W].

    Args:
        method: "naive" evaluates the network on the whole image once a pixel; "cached" on the pixel or wavefront alone,
            where the network can step, else as "fixed_point"; "fixed_point" on the whole image until nothing changes.
        temperature, top_k, top_p: see `sharpened`. guidance_scale, mix_with, mix_weight: see `GuidedModel`.
        batch_size: images at a time at most, which changes nothing but time and memory.
        bf16: the network in bfloat16: faster where the machine is, and approximate.
        flip_mixture: each image is mirrored or not, by a coin: a draw from the density that `Density.nats` scores so.
    """
    refuse_steering(request.density, guidance_scale, mix_with)
    if flip_mixture and request.known is not None:
        raise UserError("flip_mixture=true: pixels that are kept cannot be mirrored; leave it out")
    if method == "cached" and not request.density.can_step:
        method = "fixed_point"
    drawing = Drawing(
        density=half_precision(request.density) if bf16 else request.density,
        known=request.known,
        method=method,
        steering={"guidance_scale": guidance_scale, "mix_with": mix_with, "mix_weight": mix_weight},
        sharpening={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        flip_mixture=flip_mixture,
    )
    keys = _keys(request.y, n_per_class, seed)
    image = None if request.image is None else request.image.repeat_interleave(n_per_class, 0)
    density = request.density
    canvas = torch.zeros(len(keys), *density.image_shape, dtype=density.level_dtype, device=request.y.device)
    own = [drawing.method, drawing.steering, drawing.sharpening, flip_mixture]
    own += [keys, batch_size, bf16, torch.get_num_threads()]
    kept = Parts(request.parts, [*own, density.digest()] if request.parts else None)
    parts = [part for part in cut(len(keys), batch_size) if not kept.find(part, canvas)]
    batches = [Batch(keys[part], None if image is None else image[part]) for part in parts]
    images, pace = canvas.unflatten(0, (-1, n_per_class)), request.pace or Pace()

    def here(n: int) -> None:
        began = time.perf_counter()
        drawing.fill(canvas[parts[n]], batches[n], partial(_watched, bar, len(batches[n].keys), request.watch, images))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        pace.add(os.getpid(), len(batches[n].keys), time.perf_counter() - began)
        kept.keep(parts[n], canvas)

    def arrived(n: int, answer: tuple[int, float, np.ndarray]) -> None:
        process, seconds, drawn = answer
        canvas[parts[n]] = torch.from_numpy(drawn)
        pace.add(process, len(drawn), seconds)
        bar.update(drawn[:, 0].size)
        kept.keep(parts[n], canvas)

    divided = request.processes > 1 and canvas.device.type == "cpu" and not request.watch
    there = None
    if divided:
        there = partial(_drawn, replace(drawing, density=picklable(drawing.density)), torch.get_num_threads())
    with _bar(canvas, request) as bar:
        bar.update(canvas[:, 0].numel() - sum(canvas[part, 0].numel() for part in parts))
        share(batches, here, there, arrived, request.processes)
    return images


def cut(n: int, batch_size: int) -> list[slice]:
    """Slices of 0..n-1, as few as do with `batch_size` each, and as equal as can be."""
    parts = -(-n // batch_size)
    return [slice(*edges) for edges in pairwise(n * part // parts for part in range(parts + 1))]


@dataclass(frozen=True)
class Batch:
    """Images to draw together: the key of each one's noise, (seed, class, number, 1), and what is kept of it."""

    keys: list[tuple[int, int, int, int]]
    image: Tensor | None


@dataclass(frozen=True)
class Drawing:
    """The model that is drawn from, and all else that is the same for each batch."""

    density: ImageDensity
    known: Tensor | None
    method: str
    steering: dict[str, Any]  # of GuidedModel
    sharpening: dict[str, Any]  # of picker
    flip_mixture: bool

    def fill(self, canvas: Tensor, batch: Batch, watch: Watch | None = None) -> None:
        """Fill uint8 [B,C,H,W] in place with the images of a batch."""
        y = torch.tensor([label for _, label, _, _ in batch.keys], device=canvas.device)
        model = GuidedModel(self.density, y, **self.steering)
        u = torch.stack([uniform(key, tuple(canvas.shape[1:])) for key in batch.keys]).to(model.noise_device)
        pick = picker(u, batch.image, self.known, **self.sharpening)
        with eval_mode(self.density), torch.autocast(canvas.device.type, enabled=False), parametrize.cached():
            if self.method == "fixed_point":
                fixed_point(model, pick, canvas, watch)
            else:
                walk(model, pick, canvas, stepwise=self.method == "cached", watch=watch)
        if self.flip_mixture:
            mirrored = torch.cat([uniform(_coin(key), (1,)) < 0.5 for key in batch.keys]).to(canvas.device)
            canvas[mirrored] = canvas[mirrored].flip(-1)


def half_precision(density: ImageDensity) -> ImageDensity:
    """A copy whose features are computed in bfloat16, and the likelihood of them as before."""
    half = copy.deepcopy(density)
    for part in (half.embedding, half.network):
        assert isinstance(part, nn.Module)
        part.bfloat16()
    return half


def _keys(y: Tensor, n_per_class: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Keys of the noise of each image; where a class is asked for again, its numbers continue."""
    # The last number of a key sets it apart from shorter ones, which numpy fills up with zeros.
    drawn, keys = Counter[int](), []
    for label in y.repeat_interleave(n_per_class).tolist():
        keys.append((seed, label, drawn[label], 1))
        drawn[label] += 1
    return keys


def _coin(key: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Return the key of the noise that mirrors an image, from that of its levels."""
    return (*key[:3], 2)


def picklable(density: SomeDensity) -> SomeDensity:
    """Return a copy of a model whose parametrized weights are plain tensors: torch pickles no others."""
    parts = [part for part in density.modules() if parametrize.is_parametrized(part)]
    # Not parametrize.remove_parametrizations of a copy: it would change the class, which the copy shares.
    return copy.deepcopy(density, {id(part): _plain(part) for part in parts})


def _plain(part: nn.Module) -> nn.Module:
    """A module that computes the same as one with parametrizations, to be read and not trained."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(part)
    plain = kind.__new__(kind)
    plain.__dict__.update(part.__dict__)
    weights = {name: getattr(part, name).detach() for name in part.parametrizations}  # pyright: ignore
    plain._buffers = part._buffers | weights
    plain._modules = {name: child for name, child in part._modules.items() if name != "parametrizations"}
    return plain


def _drawn(drawing: Drawing, threads: int, batch: Batch) -> tuple[int, float, np.ndarray]:
    """Draw a batch in another process: its number, the seconds that it took, and the images uint8 [B,C,H,W]."""
    density = drawing.density
    canvas = torch.zeros(len(batch.keys), *density.image_shape, dtype=density.level_dtype)
    began = time.perf_counter()
    with on_threads(threads):
        drawing.fill(canvas, batch)
    return os.getpid(), time.perf_counter() - began, canvas.numpy()


def _bar(canvas: Tensor, request: Request) -> tqdm:
    hidden = None if request.progress else True  # None: hidden unless on a terminal
    return progress(total=canvas[:, 0].numel(), unit=" pixels", unit_scale=True, desc="drawing", disable=hidden)


def _watched(bar: tqdm, batch: int, watch: Callable[[Tensor], None] | None, images: Tensor, pixels: int) -> None:
    bar.update(batch * pixels)
    if watch:
        watch(images)


def refuse_steering(
    density: ImageDensity, guidance_scale: float = 1.0, mix_with: int | None = None, prefix: str = ""
) -> None:
    """Raise UserError, with a `prefix` to the names of settings, where a model cannot be steered so."""
    known = density.known_classes
    if guidance_scale != 1 and (density.no_class not in known or len(known) == 1):
        raise UserError(
            f"{prefix}guidance_scale={guidance_scale}: guidance requires a model that was trained with and without its "
            "classes, as this one was not; leave it out, or train one with label_dropout=0.1"
        )
    if mix_with is not None and mix_with not in known:
        trained_on = ", ".join(map(str, known)) if len(known) > 1 else "no classes"
        raise UserError(f"{prefix}mix_with={mix_with}: this model was trained on {trained_on}")
    if guidance_scale != 1 and mix_with is not None:
        raise UserError(f"{prefix}guidance_scale and {prefix}mix_with exclude each other; set one of them")
