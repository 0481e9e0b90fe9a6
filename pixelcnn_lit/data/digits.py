"""scikit-learn's handwritten digits: 1797 real 8×8 images of 17 levels, shipped with the library."""

import torch
from sklearn.datasets import load_digits

from pixelcnn_lit.data.images import Images, Split


def digits() -> Images:
    """1297 / 250 / 250 images by a fixed permutation, since the set has no official split.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test part).
    """
    bunch = load_digits()
    everything = Split(
        torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1),  # [1797,1,8,8]
        torch.from_numpy(bunch.target).long(),
    )
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return Images(
        train=everything[order[:1297]],
        validation=everything[order[1297:1547]],
        test=everything[order[1547:]],
        class_names=[str(name) for name in bunch.target_names],
        levels=17,
    )
