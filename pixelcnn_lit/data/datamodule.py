"""The one LightningDataModule: a source's images, split, transformed and served."""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge, Interval
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from pixelcnn_lit.checkpoints.read import read_checkpoint, require_same
from pixelcnn_lit.config.build import check, resolve
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.arrays import write_arrays
from pixelcnn_lit.data.images import Changed, Images, Split, carve, fingerprint, verify
from pixelcnn_lit.data.loader import Augmentation, Batches, Gather, LazyLoader, Posing, augmented, loader
from pixelcnn_lit.data.transforms import binarize, binarize_by_index, crop, flip, pad, pose, requantize, resize
from pixelcnn_lit.runs.run_dir import expanded, plain_name
from pixelcnn_lit.runs.saved import data_places


class ImageData(L.LightningDataModule):
    """Serve (x uint8 [B,C,H,W], y int64 [B]) for training, validation and test.

    After `setup`, `facts` holds what network and likelihood need to know of the data, `label` the name under which a
    bpd on it may be reported, and `train`, `validation`, `test` the splits. `seed` orders the training batches;
    the validation split is the same for every seed.

    Args:
        load: the source; called once. name: of the dataset; the source's own where there is none.
        batch_size: over all processes together.
        validation_fraction: of the training images, where the source has no validation split; 0 leaves none.
        levels: requantize to so many levels; 2 binarizes, by threshold ("static") or by chance ("dynamic").
        resize, pad, horizontal_flip, random_crop: each changes the label, as fewer levels and no validation do.
        poses: train on images in so many: 2 also mirrored, 8 also turned; a density model is told which.
    """

    def __init__(
        self,
        load: Callable[[], Images],
        *,
        name: str | None = None,
        seed: int = 0,
        batch_size: Annotated[int, Ge(1)] = 128,
        num_workers: Annotated[int, Ge(0)] = 2,
        validation_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.1,
        levels: Annotated[int, Interval(ge=2, le=256)] | None = None,
        binarization: Literal["static", "dynamic"] = "static",
        resize: Annotated[int, Ge(1)] | None = None,
        pad: Annotated[int, Ge(0)] = 0,
        horizontal_flip: bool = False,
        random_crop: Annotated[int, Ge(0)] = 0,
        poses: Literal[1, 2, 8] = 1,
    ) -> None:
        super().__init__()
        self.load, self.name, self.seed = load, name, seed
        self.batch_size, self.num_workers, self.validation_fraction = batch_size, num_workers, validation_fraction
        self._wanted_levels, self.dynamic = levels, levels == 2 and binarization == "dynamic"
        self.resize, self.pad, self.horizontal_flip, self.random_crop = resize, pad, horizontal_flip, random_crop
        self.poses = poses
        self._fingerprints: dict[str, str] = {}  # of the splits that were asked for it
        self.streams = False  # whether no images are held in memory, even where reading them takes long

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train"):
            return
        images = self.load()
        self.title = self.name or images.name or "images"
        self._tell = images.tell or _nothing
        if images.hold and not self.streams:
            images = images.held()
            rank_zero_only(self._tell)()
        verify(images, self.title)
        self._split_validation(images)
        self.class_names = images.class_names
        self.levels = self._require_levels(images)
        self._source_levels, self._source_changes = images.levels, images.changes
        self._as_they_come = images.splits()
        framed = {name: self._framed(split) for name, split in images.splits().items()}
        shown = {name: _held(self._requantized(split)) for name, split in framed.items()}
        self.train, self.validation, self.test = shown["train"], shown["validation"], shown["test"]
        # What training batches are gathered from: under dynamic binarization the grey images, drawn anew each time.
        self.drawn_from = framed["train"] if self.dynamic else self.train
        self._augmentations = self._plan_augmentations()
        self._posing = self._plan_posing()

    def _split_validation(self, images: Images) -> None:
        """Take validation images from the training images, where the source has none and some are wanted."""
        if images.validation is not None and self.validation_fraction == 0:
            raise UserError(
                f"dataset.validation_fraction=0: {self.title} has validation images of its own; leave it out"
            )
        if images.validation is None and self.validation_fraction == 0:
            images.validation = images.train[:0]
        elif images.validation is None:
            setting = "dataset.validation_fraction"
            images.train, images.validation = carve(images.train, self.validation_fraction, setting)

    def _require_levels(self, images: Images) -> int:
        """Return how many levels the images are to have. Raises UserError where they cannot have so many."""
        changes = ("resize", "pad", "horizontal_flip", "random_crop")
        typed = [name for name in changes if getattr(self, name)] + ["levels"] * bool(self._wanted_levels)
        typed += ["poses"] * (self.poses > 1)
        if images.levels > 256 and typed:
            raise UserError(f"dataset.{typed[0]}: {self.title} holds codes, which are no brightness; leave it out")
        levels = self._wanted_levels or images.levels
        if levels > images.levels:
            raise UserError(f"dataset.levels={levels}: {self.title} has {images.levels}; type that or less")
        return levels

    def _framed(self, split: Split) -> Split:
        if self.resize:
            split = split.changed(partial(resize, size=self.resize))
        return split.changed(partial(pad, width=self.pad)) if self.pad else split

    def _requantized(self, split: Split) -> Split:
        if self.dynamic:
            return split.changed(partial(binarize_by_index, levels=self._source_levels, seed=0))
        if self.levels == self._source_levels:
            return split
        return split.changed(partial(requantize, old=self._source_levels, new=self.levels))

    def _plan_augmentations(self) -> list[Augmentation]:
        """In their order, as plain functions that worker processes can be sent."""
        plan: list[tuple[Any, Augmentation]] = [
            (self.horizontal_flip, flip),
            (self.random_crop, partial(crop, margin=self.random_crop)),
            (self.dynamic, partial(binarize, levels=self._source_levels)),
        ]
        return [augmentation for wanted, augmentation in plan if wanted]

    def _plan_posing(self) -> Posing | None:
        """Return what puts images into their poses, if there are more. Raises UserError where they cannot be turned."""
        _, height, width = self.train.image_shape
        if self.poses > 2 and height != width:
            raise UserError(f"dataset.poses={self.poses}: turns images, and {height}×{width} is not square; type 2")
        own = {"poses": self.poses, "num_classes": len(self.class_names)}
        return partial(pose, **own) if self.poses > 1 else None

    FACTS = ("image_shape", "num_classes", "levels", "class_names")

    @property
    def facts(self) -> dict[str, Any]:
        """Return what network and likelihood are built from; stored in the checkpoint."""
        values = (list(self.train.image_shape), len(self.class_names), self.levels, list(self.class_names))
        return dict(zip(self.FACTS, values, strict=True))

    @property
    def changes(self) -> tuple[str, ...]:
        """What was changed in the images that are scored."""
        own = {
            f"resized to {self.resize}": self.resize,
            f"padded by {self.pad}": self.pad,
            f"{'dynamic' if self.dynamic else 'static'} binarization": self.levels == 2 < self._source_levels,
        }
        return (*self._source_changes, *(change for change, made in own.items() if made))

    @property
    def label(self) -> str:
        """The dataset as scored and trained on: a bpd under another label is not comparable."""
        channels, height, width = self.train.image_shape
        parts = [f"{plain_name(self.title)} {channels}×{height}×{width}", f"{self.levels} levels"]
        parts += [] if len(self.validation) else ["trained without validation"]
        parts += self.changes
        parts += ["trained with flips"] if self.horizontal_flip else []
        parts += [f"trained with crops of {self.random_crop}"] if self.random_crop else []
        parts += [f"trained in {self.poses} poses"] if self.poses > 1 else []
        return ", ".join(parts)

    def save(self, folder: Path) -> None:
        """Write the images as a folder of arrays, for `dataset=arrays`. Raises UserError where it cannot be written."""
        if self.dynamic:
            raise UserError("dataset.binarization=dynamic: draws anew in each batch; type it when you train")
        validation = self.validation if len(self.validation) else None
        images = Images(self.train, self.test, self.class_names, self.levels, validation, self.title, self.changes)
        write_arrays(images, folder)
        if self.streams:
            self._tell()

    def state_dict(self) -> dict[str, str]:
        """The fingerprint of each split, which Lightning keeps in a run's checkpoints under the name of this class."""
        return {name: self._fingerprint(name) for name in self._as_they_come}

    def _fingerprint(self, name: str) -> str:
        """That of the images as they come: the last bits of a resized one differ between machines."""
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(self._as_they_come[name])
        return self._fingerprints[name]

    def changed_since(self, checkpoint: dict[str, Any], *splits: str) -> str | None:
        """Return what differs in the first of these splits that is not as in a checkpoint's run, if that is known."""
        kept = checkpoint.get(type(self).__qualname__)
        before = kept if isinstance(kept, dict) else {}  # it has none if it is from before there were fingerprints
        for name in splits:
            if name in before and before[name] != self._fingerprint(name):
                return f"its {name} split was {before[name]}, here it is {self._fingerprint(name)}"
        return None

    def tested_on(self, images: Split) -> "ImageData":
        """Return the same data with other test images."""
        data = copy.copy(self)
        data.test = images
        return data

    def splits(self) -> dict[str, Split]:
        """Return those of the three splits that have images."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if len(split)}

    def split(self, name: str) -> Split:
        """Return one of the three splits. Raises UserError where it is empty."""
        found = self.splits().get(name)
        if found is None:
            raise UserError(f"{name}: {self.label} has no such images; type another split")
        return found

    def augment(self, x: Tensor) -> Tensor:
        """Return images of `drawn_from` as a training batch may have them. Raises UserError where that changes none."""
        if not (self._augmentations or self._posing):
            raise UserError("dataset: no augmentation is switched on; type dataset.random_crop=4, for example")
        return augmented(x, torch.zeros(len(x), dtype=torch.long), self._augmentations, self._posing, seed=0)[0]

    def train_dataloader(self) -> LazyLoader:
        batches = self._batches(self.train, shuffle=True)
        if not len(batches):
            raise UserError(
                f"dataset.batch_size={self.batch_size}: more than the {len(self.train)} training images; type "
                f"dataset.batch_size={max(1, len(self.train) // 4)}, for example"
            )
        return loader(Gather(self.drawn_from, self._augmentations, self._posing), batches, self.num_workers)

    def val_dataloader(self) -> LazyLoader:
        return self.score_dataloader(self.validation)

    def test_dataloader(self) -> LazyLoader:
        return self.score_dataloader(self.test)

    def score_dataloader(self, split: Split) -> LazyLoader:
        """Every image of a split once, in order, as it is scored."""
        return loader(Gather(split), self._batches(split, shuffle=False), self.num_workers)

    def _batches(self, split: Split, *, shuffle: bool) -> Batches:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.batch_size % world:
            raise UserError(f"dataset.batch_size={self.batch_size}: type a multiple of the {world} processes")
        repeat = self.trainer is not None and bool(self.trainer.overfit_batches)  # pyright: ignore[reportAttributeAccessIssue]
        own = {"shuffle": shuffle, "repeat": repeat, "seed": self.seed, "rank": rank, "world": world}
        return Batches(len(split), self.batch_size // world, **own)


def image_data(config: dict[str, Any], seed: int = 0) -> ImageData:
    """The DataModule of a dataset config: keys that its `_target_` names go to the source, the others to ImageData.

    Everything is checked before anything is read.
    """
    source = resolve(config.get("_target_"), Images)
    own = inspect.signature(source).parameters
    arguments = {key: expanded(value) for key, value in config.items() if key in own}
    options = {key: value for key, value in config.items() if key not in own and key != "_target_"}
    check("dataset", source, arguments)
    check("dataset", ImageData, options, known=("load", "seed"))
    return ImageData(partial(source, **arguments), seed=seed, **options)


def saved_or_given(ckpt: str, saved: dict[str, Any], given: dict[str, Any], compared: Sequence[str] = ()) -> ImageData:
    """The dataset of a checkpoint, of whose settings `saved` are, with what was typed changed in it; or another one.

    It is set up. Raises UserError unless its images are of the kind that the checkpoint's model knows. A line tells
    where the `compared` splits of the same dataset are not those of the run that left the checkpoint.
    """
    typed = {key: value for key, value in given.items() if value is not None}
    if not saved["dataset"] and "_target_" not in typed:
        raise UserError(f"ckpt={ckpt}: names no dataset; type dataset=")
    moved = {key: place for key, place in data_places(ckpt).items() if key in saved["dataset"]}
    data = image_data(typed if "_target_" in typed else saved["dataset"] | moved | typed)
    data.setup()
    require_same(ckpt, saved, data.facts)
    if compared and "_target_" not in typed and (difference := data.changed_since(read_checkpoint(ckpt), *compared)):
        rank_zero_only(print)(f"ckpt={ckpt}: {difference}")
        data.title = typed.get("name") or typed.get("path") or data.title  # a file of others bears its own name
    return data


def _held(split: Split) -> Split:
    """Hold images that are in memory as they were changed: once, and not in each batch."""
    return split.held() if isinstance(split.images, Changed) and split.images.in_memory else split


def _nothing() -> None:
    """Tell nothing: no single image was changed."""


def uniform_bpd(levels: int) -> float:
    """The bpd of knowing nothing: log2 of the number of levels."""
    return math.log2(levels)
