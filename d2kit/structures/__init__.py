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
from d2kit.structures.keypoints import Keypoints, heatmaps_to_keypoints
from d2kit.structures.masks import (
    BitMasks,
    PolygonMasks,
    ROIMasks,
    polygons_to_bitmask,
    rasterize_polygons_within_box,
)
from d2kit.structures.rotated_boxes import RotatedBoxes
from d2kit.structures.rotated_boxes import pairwise_iou as pairwise_iou_rotated
