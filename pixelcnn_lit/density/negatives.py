"""Pictures that are much likelier as their own negatives: drawings on paper, to a model of white on black."""

from torch import Tensor

from pixelcnn_lit.density.density import Density

MUCH_LIKELIER = 0.8  # times the nats: photographs and their negatives are much closer


def likelier_as_negatives(model: Density, x: Tensor, y: Tensor, nats: Tensor) -> Tensor:
    """Return whether each image [B,C,H,W] of a class [B], of -log p = `nats` [B], would be much likelier inverted."""
    return model.nats(model.levels - 1 - x, y).cpu() < MUCH_LIKELIER * nats.cpu()


def hint_at_negatives(likelier: Tensor) -> None:
    """Print a line where pictures are much likelier inverted."""
    count = int(likelier.sum())
    if count:
        those = "the picture is" if len(likelier) == 1 else f"{count} of {len(likelier)} pictures are"
        print(f"{those} much likelier inverted (black on white?): type invert=true")
