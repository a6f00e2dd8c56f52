"""Value types of detection: boxes, instances, masks, keypoints, batches of images."""

from d2kit.structures.boxes import (
    Boxes,
    BoxMode,
    pairwise_intersection,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
)
from d2kit.structures.image_list import ImageList
from d2kit.structures.instances import Instances
