"""The Lightning Trainer of a config, and what the machine it runs on is fast at."""

import contextlib
import ctypes
import logging
import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from pixelcnn_lit.build import check
from pixelcnn_lit.errors import UserError


def make_trainer(config: dict[str, Any], **extra: Any) -> L.Trainer:
    """A Trainer from conf/trainer. `precision: auto` becomes bf16 where the machine is fast at it."""
    settings = dict(config)
    if settings.get("precision") == "auto":
        settings["precision"] = "bf16-mixed" if fast_bf16(settings.get("accelerator", "auto")) else "32-true"
    if settings.get("enable_progress_bar") is None:
        settings["enable_progress_bar"] = sys.stdout.isatty()
    own = {**extra, "use_distributed_sampler": False, "enable_model_summary": False}
    for key in own.keys() & settings.keys():
        raise UserError(f"trainer.{key}: is set by the program; leave it out")
    check("trainer", L.Trainer, settings)
    if settings.get("accumulate_grad_batches", 1) < 1:
        raise UserError("trainer.accumulate_grad_batches=0: must be a whole number >= 1")
    # Lightning's own tips and notes bury the result.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Our loaders stride over the ranks themselves; gathering whole batches needs few workers.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.15
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # renamed in torch 2.15, not yet in 2.11
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # as it is when a run goes on
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # see resume.LastCheckpoint
    try:
        trainer = L.Trainer(**settings, **own)
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())} (trainer=auto fits any machine)") from error
    if isinstance(trainer.strategy, DDPStrategy):
        # Validation runs through the wrapper; its broadcast of buffers waits for ever for ranks without a batch left.
        trainer.strategy._ddp_kwargs["broadcast_buffers"] = False
    return trainer


def share_buffers(trainer: L.Trainer, net: nn.Module) -> None:
    """BatchNorm's statistics are each process's own; let those be scored that are saved, which are the first one's."""
    if trainer.world_size > 1:
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, src=0)


def fast_bf16(accelerator: str) -> bool:
    """Whether bf16 is native there: CUDA since Ampere; CPUs with AMX or AVX-512 BF16. Apple's GPUs train in float32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def keep_freed_memory() -> None:
    """Let glibc's malloc keep the memory of tensors that are gone, those of up to 1 GiB, for those that come.

    It hands large blocks back to the kernel at once, and each step then pays for thousands of new pages. No other
    system's malloc has these settings, and none is touched there.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # all that an old glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def best_device() -> torch.device:
    """Where to sample: the accelerator of this machine, if it has one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
