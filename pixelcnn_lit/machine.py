"""What the machine is fast at."""

import torch


def fast_bf16(accelerator: str) -> bool:
    """Whether bf16 is native there: CUDA since Ampere; CPUs with AMX or AVX-512 BF16. Apple's GPUs train in float32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def best_device() -> torch.device:
    """Where to sample: the accelerator of this machine, if it has one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
