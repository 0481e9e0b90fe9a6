"""Export a model for sharing, as one safetensors file.

It holds the weights, the settings that rebuild the model and a SHA-256 of it all.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("export")

from pathlib import Path
from typing import Literal

from pixelcnn_lit.checkpoints.int8 import hidden_matrices, quantize
from pixelcnn_lit.checkpoints.safetensors import write_weights
from pixelcnn_lit.density.load import load
from pixelcnn_lit.runs.machine import Threads, take_threads
from pixelcnn_lit.runs.run_dir import plain_name, relative


def main(ckpt: str, out: str, dtype: Literal["float32", "float16", "int8"], threads: Threads) -> None:
    take_threads(threads)
    model = load(ckpt)
    # Where the data lay is an affair of the machine it was trained on.
    dataset = {k: value for k, value in (model.settings["dataset"] or {}).items() if k not in ("root", "path")}
    if "name" in dataset:
        dataset["name"] = plain_name(dataset["name"])
    width = model.settings["model"].get("hidden_channels")
    hidden = (
        {f"network.{name}" for name in hidden_matrices(model.get_submodule("network"), width)}
        if dtype == "int8"
        else set()
    )
    write_weights(Path(out), quantize(model.state_dict(), dtype, hidden), model.settings | {"dataset": dataset})
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters in {Path(out).stat().st_size:,} bytes"
    print(f"{size}, of {model.label}: {relative(out)}")
