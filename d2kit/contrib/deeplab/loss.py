"""Cross entropy of the hardest pixels."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DeepLabCE"]


class DeepLabCE(nn.Module):
    """Mean cross entropy of the share of a batch's pixels whose cross entropy is largest.

    Args:
        ignore_label: label of pixels whose loss is 0; they count among all pixels.
        top_k_percent_pixels: the share of all pixels, in (0, 1]; 1 takes all.
        weight: (K,) factors of the classes.

    Raises:
        ValueError: a share that is not in (0, 1].

    Source: Yang et al., DeeperLab (2019), the weighted bootstrapped cross entropy.
    """

    def __init__(
        self,
        ignore_label: int = -1,
        top_k_percent_pixels: float = 1.0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < top_k_percent_pixels <= 1.0:
            raise ValueError(
                "DeepLabCE: top_k_percent_pixels is a share of the pixels (the config key "
                f"LOSS_TOP_K): expected a number in (0, 1], got {top_k_percent_pixels}"
            )
        self.ignore_label = ignore_label
        self.top_k_percent_pixels = top_k_percent_pixels
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss, 0-dim float32.

        Args:
            logits: (N, K, H, W).
            labels: int64 (N, H, W).
            weights: (N, H, W), factors of the pixels' losses, which are chosen after it.
        """
        losses = F.cross_entropy(
            logits.float(),
            labels,
            weight=self.weight,  # type: ignore[arg-type]
            ignore_index=self.ignore_label,
            reduction="none",
        )
        if weights is not None:
            losses = losses * weights
        losses = losses.flatten()
        if self.top_k_percent_pixels < 1.0:
            count = max(1, int(self.top_k_percent_pixels * losses.numel()))
            losses = losses.topk(count, sorted=False).values
        return losses.mean()
