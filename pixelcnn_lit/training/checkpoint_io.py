"""Checkpoints that are whole or absent."""

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.atomic import atomic_write
from pixelcnn_lit.runs.release import RELEASE, WRITTEN_BY


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent.

    Lightning's own goes through $TMPDIR, and where that is another filesystem (Colab's Drive, a cluster's network
    disk) a kill inside the final copy leaves a damaged last.ckpt in place of a good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        try:
            with atomic_write(Path(path)) as file:
                torch.save({**checkpoint, WRITTEN_BY: RELEASE}, file)
        except (OSError, RuntimeError) as error:
            needed, free = _size(checkpoint), shutil.disk_usage(Path(path).parent).free
            # torch may hide a full disk behind a RuntimeError of its zip writer.
            hidden = isinstance(error, RuntimeError) and free < needed
            if not hidden and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{path}: the disk is full: {needed:,} bytes are needed, {free:,} are free; the earlier checkpoint is "
                "whole: make room and resume from it"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """One file; Lightning's own would remove a whole directory that an untrusted checkpoint names."""
        Path(path).unlink(missing_ok=True)


class _Counter:
    """A file that only counts."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, content: bytes) -> int:
        self.bytes += len(content)
        return len(content)

    def flush(self) -> None: ...


def _size(checkpoint: dict[str, Any]) -> int:
    counter = _Counter()
    torch.save(checkpoint, counter)  # pyright: ignore[reportArgumentType]
    return counter.bytes
