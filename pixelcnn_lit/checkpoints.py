"""Files that are data: checkpoints of a run, and weights to give away."""

import errno
import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pixelcnn_lit.budget import MemoryBudget
from pixelcnn_lit.errors import UserError, first_line
from pixelcnn_lit.files import whole
from pixelcnn_lit.rounding import restored
from pixelcnn_lit.runs import checkpoint_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent.

    Lightning's own goes through $TMPDIR, and where that is another filesystem (Colab's Drive, a cluster's network
    disk) a kill inside the final copy leaves a damaged last.ckpt in place of a good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with whole(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            needed, free = _size(checkpoint), shutil.disk_usage(Path(path).parent).free
            # torch may hide a full disk behind a RuntimeError of its zip writer.
            hidden = isinstance(error, RuntimeError) and free < needed
            if not hidden and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{path}: the disk is full: {needed:,} bytes are needed, {free:,} are free; the earlier checkpoint is "
                "whole: make room and go on from it"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """One file; Lightning's own would remove a whole directory that a stranger's checkpoint names."""
        Path(path).unlink(missing_ok=True)


class _Counter:
    """A file that only counts."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, content: Any) -> int:
        self.bytes += len(content)
        return len(content)

    def flush(self) -> None: ...


def _size(checkpoint: dict[str, Any]) -> int:
    counter = _Counter()
    torch.save(checkpoint, counter)  # pyright: ignore[reportArgumentType]
    return counter.bytes


def read_checkpoint(path: str) -> dict[str, Any]:
    """The plain dict in a .ckpt or .safetensors file, with at least `hyper_parameters` and `state_dict`.

    Whatever else may stand for the file does: see `runs.checkpoint_file`.

    Nothing in the file can run code, and a flipped bit is noticed: a .ckpt is a zip archive, whose checksums are
    verified first; a .safetensors file of `write_weights` holds the SHA-256 of its contents. Raises UserError.
    """
    path = str(checkpoint_file(path))
    try:
        content = _read_weights(path) if path.endswith(".safetensors") else _read_archive(path)
    except UserError:
        raise
    except Exception as error:  # zip, pickle and safetensors name their troubles in a dozen classes
        raise UserError(
            f"ckpt={path}: damaged, or not a checkpoint of plain values ({first_line(error)}); type another ckpt"
        ) from error
    parts = [content.get(key) if isinstance(content, dict) else None for key in ("hyper_parameters", "state_dict")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"ckpt={path}: not a checkpoint of this program; type another ckpt")
    weights = [weight for weight in content["state_dict"].values() if isinstance(weight, Tensor)]
    if any(weight.layout != torch.strided for weight in weights):
        raise UserError(f"ckpt={path}: its weights are sparse, as none of this program are; type another ckpt")
    if sum(weight.nbytes for weight in weights) > Path(path).stat().st_size:
        raise UserError(f"ckpt={path}: its weights are larger than the file; type another ckpt")  # by strides of zero
    return content


def rebuild(path: str, kind: Any, **changed: Any) -> Any:
    """The model of a .ckpt or .safetensors file, from the file alone, in eval mode on the CPU.

    Nothing in the file can run code: its values are plain, its targets as `build` allows them. Raises UserError.

    Args:
        kind: a LightningModule class whose arguments are the file's `hyper_parameters`, with what is `changed` in them.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"] | changed
    if not settings.keys() >= set(kind.IDENTITY):
        raise UserError(f"ckpt={path}: not a checkpoint of this program's {kind.TITLE}s; type another")
    try:
        model = _built(kind, settings, restored(checkpoint["state_dict"]))
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's values lead to
        raise UserError(f"ckpt={path}: not a checkpoint of this program ({first_line(error)})") from error
    if not all(bool(values.isfinite().all()) for values in model.state_dict().values() if isinstance(values, Tensor)):
        raise UserError(f"ckpt={path}: some of its weights are not finite; type another ckpt")
    return model.eval()


def _built(kind: Any, settings: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A module of its settings, with its weights. Settings that ask for far more memory than these do not get it."""
    tensors = [weight for weight in weights.values() if isinstance(weight, Tensor)]
    held = sum(weight.nbytes for weight in tensors)
    with MemoryBudget(8 * held + 2**29):  # networks take three times their weights to start; masks may be large
        module = kind(**settings)
    if any(weight.dtype == torch.float64 for weight in tensors):
        module.double()
    module.load_state_dict(weights)
    return module


def require_loadable(module: Any) -> None:
    """Raise UserError unless a checkpoint of `module` could be loaded: before it is trained, and not afterwards."""
    file = io.BytesIO()
    try:
        torch.save(dict(module.hparams), file)
        file.seek(0)
        with torch.random.fork_rng(devices=[]):
            _built(type(module), torch.load(file, weights_only=True), module.state_dict())
    except Exception as error:  # whatever its constructor leads to
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"{module.IDENTITY[0]}: cannot be built again from its settings, and so no checkpoint of it loaded "
            f"({cause}); its constructor must make the same of the same plain values"
        ) from error


def require_same(path: str, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise UserError unless the settings saved in checkpoint `path` are those at present, as far as given."""
    for key, value in present.items():
        if saved.get(key) != value:
            raise UserError(
                f"ckpt={path}: its {key} is {saved.get(key)}, here it is {value}; type the same, or another ckpt"
            )


def _read_archive(path: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, as no checkpoint is")  # and might unpack to any size
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"bad checksum in {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_weights(path: Path, weights: dict[str, Tensor], hyper_parameters: dict[str, Any]) -> None:
    """Weights and what rebuilds their model as safetensors, which any program can read."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    config = json.dumps(hyper_parameters)
    metadata = {"format": "pt", "hyper_parameters": config, "sha256": digest(weights, config)}
    with whole(path) as file:
        file.write(safetensors_bytes(weights, metadata))


def _read_weights(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    if not {"hyper_parameters", "sha256"} <= metadata.keys():
        raise UserError(f"ckpt={path}: not written by pixelcnn_lit.export; type another ckpt")
    if digest(weights, metadata["hyper_parameters"]) != metadata["sha256"]:
        raise ValueError("its SHA-256 is not the one written in it")
    return {"hyper_parameters": json.loads(metadata["hyper_parameters"]), "state_dict": weights}


def digest(weights: dict[str, Tensor], config: str) -> str:
    """SHA-256 of the config and of each weight's name, type, shape and bytes."""
    hashed = hashlib.sha256(config.encode())
    for name, weight in sorted(weights.items()):
        hashed.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        hashed.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
