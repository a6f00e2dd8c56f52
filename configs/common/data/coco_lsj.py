"""COCO's instances with large-scale jitter: 0.1 to 2 times, then a crop of 1024 x 1024 pixels.

Source: Ghiasi et al. 2021, section 3.1 (arXiv 2012.07177).
"""

import d2kit.data.transforms as T
from d2kit.config import LazyCall as L

from .coco import dataloader

image_size = 1024
dataloader.train.mapper.augmentations = [
    L(T.ResizeScale)(
        min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size
    ),
    L(T.FixedSizeCrop)(crop_size=(image_size, image_size)),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.train.mapper.recompute_boxes = True  # crops cut objects
dataloader.train.total_batch_size = 64
