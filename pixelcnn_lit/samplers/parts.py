"""Finished batches of a drawing, kept as files until all of it is there."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pixelcnn_lit.runs.atomic import atomic_write


class Parts:
    """The batches of one drawing in a directory, which the first of them makes; without a directory, none is kept.

    Args:
        drawing: all that the images depend on, as JSON knows it: files of another drawing are not found.
    """

    def __init__(self, directory: Path | None, drawing: object) -> None:
        self.directory = directory
        self.drawing = hashlib.sha256(json.dumps(drawing).encode()).hexdigest()[:16]

    def find(self, part: slice, canvas: Tensor) -> bool:
        """Copy a batch to its place in `canvas` [N,C,H,W]; false where there is no whole file of it."""
        if not self.directory:
            return False
        try:
            with (
                open(self.directory / self._name(part), "rb") as file,  # numpy leaves open what is no archive
                np.load(file) as archive,  # which has checksums
            ):
                canvas[part] = torch.from_numpy(archive["images"])
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile):
            return False
        return True

    def keep(self, part: slice, canvas: Tensor) -> None:
        """Write a batch of `canvas`, whole or not at all."""
        if self.directory:
            with atomic_write(self.directory / self._name(part)) as file:
                np.savez(file, images=canvas[part].cpu().numpy())

    def _name(self, part: slice) -> str:
        return f"{self.drawing}-{part.start}.npz"
