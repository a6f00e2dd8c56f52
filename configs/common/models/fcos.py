"""FCOS: RetinaNet's pyramid without anchors (Tian et al. 2019, arXiv 1904.01355)."""

from d2kit.config import LazyCall as L
from d2kit.modeling.meta_arch.fcos import FCOS, FCOSHead

from .retinanet import model

model._target_ = FCOS
for name in ("anchor_generator", "box2box_transform", "anchor_matcher", "smooth_l1_beta"):
    del model[name]
model.head = L(FCOSHead)(
    input_shape=model.head.input_shape,
    num_classes="${..num_classes}",
    conv_dims=[256, 256, 256, 256],
    prior_prob=0.01,
    norm="GN",
)
