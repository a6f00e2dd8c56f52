import pytest
import torch

from d2kit.modeling.postprocessing import (
    detector_postprocess,
    roi_masks_kept,
    sem_seg_postprocess,
)
from d2kit.structures import Boxes, Instances, ROIMasks


def detections() -> Instances:
    """On 20x40: one inside, one across the right border, one outside."""
    boxes = torch.tensor([[2.0, 4, 10, 12], [30, 10, 60, 30], [41, 1, 50, 9]])
    return Instances(
        (20, 40),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        pred_masks=torch.ones(3, 1, 28, 28),
        pred_keypoints=torch.tensor([[[3.0, 5.0, 0.5]]] * 3),
    )


def test_scale_clip_and_drop():
    out = detector_postprocess(detections(), 40, 120)
    assert out.image_size == (40, 120)
    assert out.pred_boxes.tensor.tolist() == [[6, 8, 30, 24], [90, 20, 120, 40]]
    torch.testing.assert_close(out.scores, torch.tensor([0.9, 0.8]))
    assert out.pred_keypoints[0].tolist() == [[9.0, 10.0, 0.5]]


def test_masks_are_pasted_to_full_size():
    out = detector_postprocess(detections(), 40, 120)
    assert out.pred_masks.dtype == torch.bool
    assert out.pred_masks.shape == (2, 40, 120)
    assert out.pred_masks[0, 8:24, 6:30].all()
    assert out.pred_masks[0].sum() == 16 * 24
    assert out.pred_masks[1].sum() == 20 * 30


def test_mask_threshold():
    results = detections()
    results.pred_masks = results.pred_masks * 0.6
    assert detector_postprocess(results, 20, 40, mask_threshold=0.5).pred_masks.any()
    assert not detector_postprocess(results, 20, 40, mask_threshold=0.7).pred_masks.any()


def test_masks_may_stay_small():
    out = detector_postprocess(detections(), 40, 120, paste_masks=False)
    assert isinstance(out.pred_masks, ROIMasks)
    assert out.pred_masks.tensor.shape == (2, 28, 28)
    pasted = detector_postprocess(detections(), 40, 120).pred_masks
    later = out.pred_masks.to_bitmasks(out.pred_boxes.tensor, 40, 120, 0.5).tensor
    assert torch.equal(later, pasted)


def test_callers_may_keep_masks_small_for_a_while():
    with roi_masks_kept():
        assert isinstance(detector_postprocess(detections(), 40, 120).pred_masks, ROIMasks)
        pasted = detector_postprocess(detections(), 40, 120, paste_masks=True).pred_masks
    assert torch.equal(detector_postprocess(detections(), 40, 120).pred_masks, pasted)


def test_the_input_is_not_changed():
    results = detections()
    before = results.pred_boxes.tensor.clone()
    detector_postprocess(results, 7, 9)
    assert torch.equal(results.pred_boxes.tensor, before)
    assert results.image_size == (20, 40)
    assert results.pred_masks.shape == (3, 1, 28, 28)
    assert results.pred_keypoints[0].tolist() == [[3.0, 5.0, 0.5]]


def test_no_detection():
    out = detector_postprocess(detections()[torch.zeros(3, dtype=torch.bool)], 40, 80)
    assert len(out) == 0
    assert out.pred_masks.shape == (0, 40, 80)


def test_proposals():
    boxes = Boxes(torch.tensor([[0.0, 0, 4, 4]]))
    out = detector_postprocess(Instances((8, 8), proposal_boxes=boxes), 16, 8)
    assert out.proposal_boxes.tensor.tolist() == [[0, 0, 4, 8]]


def test_boxes_are_needed():
    with pytest.raises(ValueError, match="pred_boxes"):
        detector_postprocess(Instances((8, 8), scores=torch.ones(1)), 8, 8)


def test_semantic_scores_lose_their_padding():
    scores = torch.zeros(2, 8, 8)
    scores[:, :4, :6] = torch.tensor([1.0, 2.0])[:, None, None]
    out = sem_seg_postprocess(scores, (4, 6), 12, 18)
    assert out.shape == (2, 12, 18)
    torch.testing.assert_close(out[0], torch.ones(12, 18))
    torch.testing.assert_close(out[1], torch.full((12, 18), 2.0))
