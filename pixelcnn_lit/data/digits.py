"""scikit-learn's handwritten digits: 1797 real 8×8 images of 17 levels, shipped with the library."""

import torch
from sklearn.datasets import load_digits

from pixelcnn_lit.data.images import Images, Split


def digits() -> Images:
    """1297 / 250 / 250 images by a fixed permutation, since the set has no official split.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test part).
    """
    x, y = load_digits(return_X_y=True)
    everything = Split(torch.from_numpy(x).to(torch.uint8).reshape(1797, 1, 8, 8), torch.from_numpy(y).long())
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return Images(
        train=everything[order[:1297]],
        validation=everything[order[1297:1547]],
        test=everything[order[1547:]],
        class_names=[str(digit) for digit in range(10)],
        levels=17,
    )
