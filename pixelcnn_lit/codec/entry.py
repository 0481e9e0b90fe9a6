"""An entry of a race, checked: which images were scored, what they score, and whether a file proves the bits."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from pixelcnn_lit.codec.coder import decompress
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import saved_or_given
from pixelcnn_lit.data.images import Split, fingerprint
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.load import load
from pixelcnn_lit.runs.machine import best_device, take_threads
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.terminal import progress

PROOF = "proof.plc"  # beside result.json: what `compress` makes of the first test images
AT_LEAST = 100  # images in it
TOLERANCE = 1e-4  # bpd: other processors add in another order
BATCH = 64


def check_all(directory: Path) -> None:
    """Print what is right of each entry in a directory, or end with what is not."""
    entries = sorted(path.parent for path in directory.rglob("result.json"))
    if not entries:
        sys.exit(f"error: {relative(directory)}: no result.json in it")
    try:
        for entry in entries:
            print(check(entry))
    except UserError as error:
        sys.exit(f"error: {error}")


def check(run: Path) -> str:
    """Return what was found to be right of a run's directory. Raises UserError, which names it, where anything is not.

    All test images are scored once more, and those in the file restored.
    """
    where = relative(run)
    try:
        result = json.loads((run / "result.json").read_bytes())
        claimed, scored, images = (result[f"test/{key}"] for key in ("bpd", "images", "fingerprint"))
        proof = (run / PROOF).read_bytes()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"check={where}: needs result.json of a whole run, and {PROOF} ({error})") from error
    take_threads(None)
    model = load(str(run)).to(best_device())
    test = saved_or_given(str(run), model.settings, {}).test
    if (found := fingerprint(test)) != images:
        raise UserError(f"check={where}: result.json is of {images}, here are {found}")
    if scored != len(test):
        raise UserError(f"check={where}: result.json is of {scored} images, the test set has {len(test)}")
    bpd_of_each = _bpd_of_each(model, test)
    bpd = float(bpd_of_each.mean())
    if not abs(bpd - claimed) <= TOLERANCE:
        raise UserError(f"check={where}: test {bpd:.4f} bpd, but result.json says {claimed:.4f}")
    restored = decompress(model, proof, f"check={where}: {PROOF}")
    first = test[: len(restored)].held()
    if len(restored) < min(AT_LEAST, len(test)) or not torch.equal(restored.x, first.x):
        raise UserError(f"check={where}: {PROOF} must hold the first {AT_LEAST} test images, or more")
    in_file, by_model = 8 * len(proof) / (len(restored) * model.dims), bpd_of_each[: len(restored)].mean()
    return (
        f"{where}: test {bpd:.4f} bpd on {found}, as result.json says; {len(restored)} of them restored to the bit "
        f"from {in_file:.4f} bits per dimension ({by_model:.4f} by the model)"
    )


def _bpd_of_each(model: Density, images: Split) -> Tensor:
    device = model.device
    parts = progress(images.parts(BATCH), desc="scoring")
    nats = torch.cat([model.nats(part.x.to(device), part.y.to(device)).double().cpu() for part in parts])
    return bits(nats) / model.dims
