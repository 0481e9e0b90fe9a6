"""Weights to give away: a checkpoint's model as safetensors, with what rebuilds it and a SHA-256 of it all."""

from pathlib import Path

from torch import Tensor

from pixelcnn_lit.checkpoints import write_weights
from pixelcnn_lit.command import command, shown
from pixelcnn_lit.data.module import plain_name
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.lit import load


@command("export")
def main(ckpt: str, out: str, half: bool) -> None:
    if not out.endswith(".safetensors"):
        raise UserError(f"out={out}: type a name that ends in .safetensors")
    model = load(ckpt)
    # Where the data lay is an affair of the machine it was trained on.
    dataset = {key: value for key, value in model.hparams["dataset"].items() if key not in ("root", "path")}
    dataset["name"] = plain_name(dataset["name"])
    weights = {name: in_half(name, weight) if half else weight for name, weight in model.state_dict().items()}
    write_weights(Path(out), weights, dict(model.hparams) | {"dataset": dataset})
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters in {'float16' if half else 'float32'}"
    print(f"{size} of {model.hparams['label']}: {shown(out)}")


def in_half(name: str, weight: Tensor) -> Tensor:
    """Rounded to float16, which moves a score in its fourth decimal or so; UserError where a value is too large."""
    halved = weight.half() if weight.is_floating_point() else weight
    if not bool(halved.isfinite().all()):
        raise UserError(f"half=true: some values of {name} are too large for float16; type half=false")
    return halved


if __name__ == "__main__":
    main()
