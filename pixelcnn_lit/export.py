"""Weights to give away: a checkpoint's model as safetensors, with what rebuilds it and a SHA-256 of it all."""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("export")

from pathlib import Path
from typing import Literal

from pixelcnn_lit.checkpoints.int8 import rounded
from pixelcnn_lit.checkpoints.safetensors import write_weights
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import plain_name
from pixelcnn_lit.lit.density_module import load
from pixelcnn_lit.runs.machine import Threads, take_threads
from pixelcnn_lit.runs.run_dir import shown


def main(ckpt: str, out: str, dtype: Literal["float32", "float16", "int8"], threads: Threads) -> None:
    take_threads(threads)
    if not out.endswith(".safetensors"):
        raise UserError(f"out={out}: type a name that ends in .safetensors")
    model = load(ckpt)
    # Where the data lay is an affair of the machine it was trained on.
    dataset = {key: value for key, value in model.hparams["dataset"].items() if key not in ("root", "path")}
    dataset["name"] = plain_name(dataset["name"])
    width = model.hparams["model"].get("hidden_channels")
    if dtype == "int8" and not width:
        raise UserError("dtype=int8: this network has no hidden_channels; type dtype=float16")
    write_weights(Path(out), rounded(model.state_dict(), dtype, width), dict(model.hparams) | {"dataset": dataset})
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters in {Path(out).stat().st_size:,} bytes"
    print(f"{size}, of {model.hparams['label']}: {shown(out)}")
