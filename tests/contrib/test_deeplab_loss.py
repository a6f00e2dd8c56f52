"""Cross entropy of the hardest pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2kit.contrib.deeplab.semantic_seg import DeepLabCE

LOGITS = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(2)) * 3
TARGET = torch.randint(0, 4, (2, 5, 7), generator=torch.Generator().manual_seed(3))


def test_all_pixels_are_cross_entropy():
    plain = F.cross_entropy(LOGITS, TARGET)
    torch.testing.assert_close(DeepLabCE()(LOGITS, TARGET), plain)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5])
    each = F.cross_entropy(LOGITS, TARGET, weight=weight, reduction="none")
    loss = DeepLabCE(weight=weight)(LOGITS, TARGET)
    torch.testing.assert_close(loss, each.mean())


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.2, 14), (0.5, 35), (1.0, 70)])
@pytest.mark.parametrize("weighted", [False, True])
def test_mean_of_the_largest(share, count, weighted):
    target = TARGET.clone()
    target[0, :2] = 9
    weights = torch.rand(target.shape, generator=torch.Generator().manual_seed(4)) * 3
    losses = []
    for n, y, x in np.ndindex(*target.shape):
        label = int(target[n, y, x])
        loss = -LOGITS[n, :, y, x].log_softmax(0)[label].item() if label != 9 else 0.0
        losses.append(loss * (weights[n, y, x].item() if weighted else 1.0))
    loss = DeepLabCE(9, share)(LOGITS, target, weights if weighted else None)
    expected = np.mean(sorted(losses, reverse=True)[:count])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, 20])
def test_share_is_checked(share):
    with pytest.raises(ValueError, match="share"):
        DeepLabCE(top_k_percent_pixels=share)
