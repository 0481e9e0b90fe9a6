"""Checkpoint files that are whole or absent."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to the disk, rename: a kill at any moment leaves the earlier file whole.

    Lightning's own goes through $TMPDIR, and where that is another filesystem (Colab's Drive, a cluster's network
    disk) a kill inside the final copy leaves a damaged last.ckpt in place of a good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=target.parent, prefix=".tmp-", delete=False) as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
