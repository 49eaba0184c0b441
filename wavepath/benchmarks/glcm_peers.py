"""The contenders of the co-occurrence benchmark: the dense form of the patchwise loss in torch, and scikit-image's counting.

The dense form follows the published procedure step by step (METHODS 2.2): memberships of every pixel in every level, for both pixels of
each offset's pairs, by differences of sigmoids with mirror terms; a matrix product for each patch; re-weighting; mean squared difference.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Membership tensors alive at the peak of the dense form's gradient, as a multiple of one [patches, pairs, levels] tensor of float32.
_DENSE_TENSORS = 28


def dense_bytes(patches: int, side: int, levels: int, offsets: int) -> int:
    """A rough count of what the dense form holds at its peak: enough to decide whether a whole batch can be tried."""
    return 4 * patches * offsets * (_DENSE_TENSORS // 2 * side * (side - 1) * levels + 6 * levels * levels)


def _memberships(x: "torch.Tensor", levels: int, low: float, high: float, sharpness: float) -> "torch.Tensor":
    """[n, pairs] -> [n, pairs, levels]: pi_k of METHODS 2.2, mirror terms included; each row sums to 1."""
    import torch

    width = (high - low) / levels
    centres = low + width * (torch.arange(levels, dtype=x.dtype) + 0.5)
    total = 0.0
    for source in (x, 2 * low - x, 2 * high - x):
        distance = source[..., None] - centres
        total = total + torch.sigmoid((distance + width / 2) * (sharpness / width)) - torch.sigmoid((distance - width / 2) * (sharpness / width))
    return total


def _matrix(x: "torch.Tensor", offset: tuple[int, int], levels: int, low: float, high: float, sharpness: float) -> "torch.Tensor":
    """[n, h, w] -> re-weighted matrices [n, levels, levels] of one offset (down and right only)."""
    down, right = offset
    height, width = x.shape[1:]
    first, second = x[:, : height - down, : width - right], x[:, down:, right:]
    a = _memberships(first.reshape(len(x), -1), levels, low, high, sharpness)
    b = _memberships(second.reshape(len(x), -1), levels, low, high, sharpness)
    counts = a.transpose(1, 2) @ b
    return counts * (1 - counts / counts.sum((1, 2), keepdim=True))


def dense_loss(
    prediction: "torch.Tensor", target: "torch.Tensor", levels: int, offsets: tuple[tuple[int, int], ...], low: float, high: float, sharpness: float
) -> "torch.Tensor":
    """The loss of each patch, [n]: mean over offsets and matrix entries of the squared difference of the re-weighted matrices."""
    import torch

    prediction = prediction.clamp(low, high)
    ours = torch.stack([_matrix(prediction, offset, levels, low, high, sharpness) for offset in offsets], 1)
    theirs = torch.stack([_matrix(target, offset, levels, low, high, sharpness) for offset in offsets], 1)
    return ((ours - theirs) ** 2).mean((1, 2, 3))


def dense_value_and_gradient(
    prediction: np.ndarray, target: np.ndarray, levels: int, offsets: tuple[tuple[int, int], ...], low: float, high: float, sharpness: float
) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each patch [n], gradient of their sum to the prediction [n, h, w]) in the type of `prediction`, by torch's autograd."""
    import torch

    leaf = torch.from_numpy(prediction).clone().requires_grad_(True)
    loss = dense_loss(leaf, torch.from_numpy(target), levels, offsets, low, high, sharpness)
    return loss.detach().numpy(), torch.autograd.grad(loss.sum(), leaf)[0].numpy()


def counted(images: np.ndarray, levels: int, distances: list[float], angles: list[float]) -> np.ndarray:
    """scikit-image's counts, image by image: uint8[n, h, w] -> uint32[n, offsets, levels, levels]."""
    from skimage.feature import graycomatrix

    counts = [graycomatrix(image, distances, angles, levels=levels) for image in images]
    return np.stack(counts).reshape(len(images), levels, levels, -1).transpose(0, 3, 1, 2)
