"""Members of Detectron2's classes that public subclasses call, read or override are there."""

import importlib
import inspect
import re

import pytest
import torch

from d2kit.as_detectron2.redirect import real_name
from d2kit.as_detectron2.scan import has_member

MEMBERS = """
modeling.GeneralizedRCNN: preprocess_image inference visualize_training _postprocess device
  _move_to_current_device
modeling.ProposalNetwork: device _move_to_current_device
modeling.PanopticFPN: inference
modeling.SemanticSegmentor: device
modeling.RetinaNet: losses label_anchors forward_training forward_inference inference_single_image
  _ema_update _transpose_dense_predictions preprocess_image visualize_training
modeling.meta_arch.dense_detector.DenseDetector: preprocess_image _transpose_dense_predictions
  _ema_update _decode_per_level_predictions _decode_multi_level_predictions visualize_training
  forward_training forward_inference _move_to_current_device
modeling.meta_arch.fcos.FCOS: label_anchors losses compute_ctrness_targets forward_training
  forward_inference inference_single_image _match_anchors _transpose_dense_predictions
modeling.proposal_generator.StandardRPNHead: _get_rpn_conv conv objectness_logits anchor_deltas
modeling.proposal_generator.RPN: _subsample_labels label_and_sample_anchors losses
  predict_proposals _decode_proposals
modeling.roi_heads.ROIHeads: _sample_proposals label_and_sample_proposals
modeling.roi_heads.StandardROIHeads: _init_box_head _init_mask_head _init_keypoint_head
  _forward_box _forward_mask _forward_keypoint forward_with_given_boxes
modeling.roi_heads.CascadeROIHeads: _init_box_head _forward_box _match_and_label_boxes _run_stage
  _create_proposals_from_boxes
modeling.roi_heads.Res5ROIHeads: _build_res5_block _shared_roi_transform forward_with_given_boxes
modeling.roi_heads.fast_rcnn.FastRCNNOutputLayers: losses box_reg_loss inference predict_boxes
  predict_probs predict_boxes_for_gt_classes get_fed_loss_classes sigmoid_cross_entropy_loss
modeling.roi_heads.FastRCNNConvFCHead: conv_norm_relus fcs output_shape
modeling.roi_heads.MaskRCNNConvUpsampleHead: conv_norm_relus deconv predictor layers
modeling.roi_heads.KRCNNConvDeconvUpsampleHead: score_lowres up_scale layers
modeling.roi_heads.BaseMaskRCNNHead: layers
modeling.roi_heads.BaseKeypointRCNNHead: layers
modeling.backbone.FPN: size_divisibility padding_constraints output_shape
modeling.backbone.ResNet: freeze make_stage make_default_stages output_shape
modeling.anchor_generator.DefaultAnchorGenerator: _calculate_anchors generate_cell_anchors
  _grid_anchors num_cell_anchors num_anchors box_dim
modeling.anchor_generator.RotatedAnchorGenerator: _calculate_anchors generate_cell_anchors
  _grid_anchors num_cell_anchors num_anchors box_dim
modeling.matcher.Matcher: set_low_quality_matches_
modeling.GeneralizedRCNNWithTTA: _turn_off_roi_heads _batch_inference _inference_one_image
  _get_augmented_inputs _get_augmented_boxes _merge_detections _rescale_detected_boxes
  _reduce_pred_masks
engine.DefaultTrainer: build_hooks build_writers build_model build_optimizer build_lr_scheduler
  build_train_loader build_test_loader build_evaluator test auto_scale_workers resume_or_load
engine.TrainerBase: register_hooks train before_train after_train before_step after_step
  after_backward run_step state_dict load_state_dict
engine.SimpleTrainer: _data_loader_iter _write_metrics write_metrics run_step reset_data_loader
engine.AMPTrainer: run_step
engine.hooks.EvalHook: _do_eval
engine.hooks.BestCheckpointer: _update_best _best_checking _logger best_metric best_iter
engine.hooks.LRScheduler: get_best_param_group_id scheduler
engine.hooks.PreciseBN: update_stats
engine.hooks.PeriodicWriter: after_step after_train
evaluation.COCOEvaluator: reset process evaluate _tasks_from_predictions _eval_predictions
  _eval_box_proposals _derive_coco_results
  _metadata _coco_api _predictions _results _cpu_device _logger _do_evaluation
evaluation.SemSegEvaluator: encode_json_sem_seg reset process evaluate _mask_to_boundary
  _compute_boundary_iou _conf_matrix input_file_to_gt_file _class_names
evaluation.LVISEvaluator: _tasks_from_predictions _eval_predictions _eval_box_proposals _lvis_api
evaluation.RotatedCOCOEvaluator: process instances_to_json _eval_predictions
  _evaluate_predictions_on_coco
evaluation.PascalVOCDetectionEvaluator: _anno_file_template _image_set_path _is_2007 _cpu_device
evaluation.CityscapesInstanceEvaluator: _working_dir _temp_dir _cpu_device _logger _metadata
evaluation.CityscapesSemSegEvaluator: _working_dir _temp_dir _cpu_device _logger _metadata
evaluation.COCOPanopticEvaluator: _convert_category_id reset process evaluate
data.MapDataset: _rng _dataset _map_func _fallback_candidates
data.common.AspectRatioGroupedDataset: _buckets dataset batch_size
data.DatasetMapper: _transform_annotations from_config
utils.visualizer.Visualizer: draw_instance_predictions draw_sem_seg draw_panoptic_seg
  draw_dataset_dict overlay_instances overlay_rotated_instances draw_and_connect_keypoints
  draw_text draw_box draw_rotated_box_with_label draw_circle draw_line draw_binary_mask
  draw_soft_mask draw_polygon _jitter _create_grayscale_image _change_color_brightness
  _convert_boxes _convert_masks _draw_text_in_mask _convert_keypoints get_output
utils.video_visualizer.VideoVisualizer: _assign_colors _assign_colors_by_id
  draw_instance_predictions draw_sem_seg draw_panoptic_seg_predictions _old_instances
  _assigned_colors _max_num_instances _instance_mode
utils.visualizer.VisImage: fig ax canvas scale get_image save reset_image
utils.events.EventStorage: put_image put_scalar put_scalars put_histogram history histories latest
  latest_with_smoothing_hint smoothing_hints count_samples step name_scope clear_images
  clear_histograms _history _latest_scalars _smoothing_hints _current_prefix _vis_data _histograms
utils.events.JSONWriter: _file_handle _window_size
utils.events.TensorboardXWriter: _writer _window_size
utils.events.CommonMetricPrinter: _get_eta write
checkpoint.DetectionCheckpointer: _torch_load path_manager _load_file _load_model load save
  resume_or_load tag_last_checkpoint get_checkpoint_file has_checkpoint get_all_checkpoint_files
data.samplers.TrainingSampler: _infinite_indices
data.samplers.RepeatFactorTrainingSampler: _get_epoch_indices
  repeat_factors_from_category_frequency
data.samplers.InferenceSampler: _get_local_indices
data.samplers.RandomSubsetTrainingSampler: _infinite_indices
data.transforms.Augmentation: _init _rand_range get_transform
data.transforms.TransformGen: _init _rand_range
structures.Boxes: area clip nonempty inside_box get_centers scale cat device __iter__ clone to
structures.Instances: image_size set get has remove get_fields to cat
structures.PolygonMasks: area crop_and_resize nonempty get_bounding_boxes device cat
tracking.BBoxIOUTracker: _prev_instances _video_height _create_prediction_pairs
  _initialize_extra_fields _reset_fields _assign_new_id _merge_untracked_instances update
tracking.BaseHungarianTracker: _prev_instances _video_height _initialize_extra_fields
  _process_matched_idx _process_unmatched_idx _process_unmatched_prev_idx build_cost_matrix update
tracking.vanilla_hungarian_bbox_iou_tracker.VanillaHungarianBBoxIOUTracker: build_cost_matrix
  assign_cost_matrix_values
tracking.IOUWeightedHungarianBBoxIOUTracker: assign_cost_matrix_values
layers.Conv2d: forward
layers.FrozenBatchNorm2d: convert_frozen_batchnorm _version
solver.lr_scheduler.WarmupMultiStepLR: get_lr _compute_values
solver.lr_scheduler.WarmupCosineLR: get_lr _compute_values
solver.lr_scheduler.LRMultiplier: state_dict load_state_dict get_lr
engine.DefaultPredictor: __call__
modeling.box_regression.Box2BoxTransform: get_deltas apply_deltas
modeling.backbone.SimpleFeaturePyramid: padding_constraints stages scale_factors
modeling.backbone.ViT: _init_weights pos_embed blocks patch_embed
modeling.backbone.MViT: _init_weights _last_block_indexes
modeling.backbone.BasicStem: forward
modeling.backbone.swin.SwinTransformer: train _init_weights _freeze_stages frozen_stages num_layers
  num_features ape patch_norm embed_dim
modeling.meta_arch.semantic_seg.SemSegFPNHead: scale_heads layers losses in_features
projects.point_rend.PointRendMaskHead: _init_roi_head _init_point_head _roi_pooler
  _sample_train_points _get_point_logits _subdivision_inference _feature_scales mask_point_on
  roi_pooler_in_features mask_point_train_num_points mask_point_subdivision_steps
projects.point_rend.ImplicitPointRendMaskHead: _init_point_head _uniform_sample_train_points
  _get_point_logits _subdivision_inference
projects.panoptic_deeplab.PanopticDeepLab: device forward
projects.deeplab.DeepLabV3PlusHead: layers losses decoder_only
projects.panoptic_deeplab.PanopticDeepLabInsEmbedHead: layers center_losses offset_losses
projects.panoptic_deeplab.PanopticDeepLabSemSegHead: layers losses
"""
TABLE = [row.split(":") for row in MEMBERS.replace("\n  ", " ").strip().splitlines()]


SIGNATURES = """
modeling.GeneralizedRCNN: _postprocess(instances, batched_inputs, image_sizes)
modeling.meta_arch.dense_detector.DenseDetector:
  _transpose_dense_predictions(predictions, dims_per_anchor)
  _ema_update(name, value, initial_value, momentum)
  _decode_per_level_predictions(anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, \
image_size)
  _decode_multi_level_predictions(anchors, pred_scores, pred_deltas, score_thresh, \
topk_candidates, image_size)
modeling.meta_arch.fcos.FCOS: _match_anchors(gt_boxes, anchors)
modeling.proposal_generator.RPN: _subsample_labels(label)
  _decode_proposals(anchors, pred_anchor_deltas)
modeling.proposal_generator.StandardRPNHead: _get_rpn_conv(in_channels, out_channels)
modeling.roi_heads.ROIHeads: _sample_proposals(matched_idxs, matched_labels, gt_classes)
modeling.roi_heads.StandardROIHeads: _init_box_head(cfg, input_shape)
  _init_mask_head(cfg, input_shape) _init_keypoint_head(cfg, input_shape)
  _forward_box(features, proposals) _forward_mask(features, instances)
  _forward_keypoint(features, instances)
modeling.roi_heads.CascadeROIHeads: _forward_box(features, proposals, targets)
  _match_and_label_boxes(proposals, stage, targets) _run_stage(features, proposals, stage)
  _create_proposals_from_boxes(boxes, image_sizes)
modeling.roi_heads.Res5ROIHeads: _build_res5_block(cfg) _shared_roi_transform(features, boxes)
modeling.GeneralizedRCNNWithTTA: _turn_off_roi_heads(attrs)
  _batch_inference(batched_inputs, detected_instances) _inference_one_image(input)
  _get_augmented_inputs(input) _get_augmented_boxes(augmented_inputs, tfms)
  _merge_detections(all_boxes, all_scores, all_classes, shape_hw)
  _rescale_detected_boxes(augmented_inputs, merged_instances, tfms)
  _reduce_pred_masks(outputs, tfms)
modeling.anchor_generator.DefaultAnchorGenerator: _calculate_anchors(sizes, aspect_ratios)
  _grid_anchors(grid_sizes)
modeling.anchor_generator.RotatedAnchorGenerator: _calculate_anchors(sizes, aspect_ratios, angles)
utils.visualizer.Visualizer: _jitter(color) _create_grayscale_image(mask)
  _change_color_brightness(color, brightness_factor) _convert_boxes(boxes)
  _convert_masks(masks_or_polygons) _draw_text_in_mask(binary_mask, text, color)
  _convert_keypoints(keypoints)
utils.video_visualizer.VideoVisualizer: _assign_colors(instances)
  _assign_colors_by_id(instances)
engine.hooks.BestCheckpointer: _update_best(val, iteration) _best_checking()
engine.SimpleTrainer: _write_metrics(loss_dict, data_time, prefix)
evaluation.COCOEvaluator: _tasks_from_predictions(predictions)
  _eval_predictions(predictions, img_ids) _eval_box_proposals(predictions)
  _derive_coco_results(coco_eval, iou_type, class_names)
evaluation.SemSegEvaluator: _mask_to_boundary(mask, dilation_ratio)
evaluation.RotatedCOCOEvaluator: _evaluate_predictions_on_coco(coco_gt, coco_results)
data.DatasetMapper: _transform_annotations(dataset_dict, transforms, image_shape)
data.samplers.RepeatFactorTrainingSampler: _get_epoch_indices(generator)
data.samplers.InferenceSampler: _get_local_indices(total_size, world_size, rank)
tracking.BBoxIOUTracker: _initialize_extra_fields(instances)
  _create_prediction_pairs(instances, iou_all) _reset_fields() _assign_new_id(instances)
  _merge_untracked_instances(instances)
tracking.BaseHungarianTracker: _initialize_extra_fields(instances)
  _process_matched_idx(instances, matched_idx, matched_prev_idx)
  _process_unmatched_idx(instances, matched_idx)
  _process_unmatched_prev_idx(instances, matched_prev_idx)
checkpoint.DetectionCheckpointer: _load_file(filename) _load_model(checkpoint) _torch_load(f)
modeling.backbone.ViT: _init_weights(m)
modeling.backbone.swin.SwinTransformer: _init_weights(m) _freeze_stages()
projects.point_rend.PointRendMaskHead: _roi_pooler(features, boxes)
  _sample_train_points(coarse_mask, instances)
  _subdivision_inference(features, mask_representations, instances)
"""
METHODS = [
    (row.partition(":")[0].strip(), *method)
    for row in SIGNATURES.replace("\n  ", " ").strip().splitlines()
    for method in re.findall(r"(\w+)\(([^)]*)\)", row.partition(":")[2])
]


def class_of(path):
    module, _, name = real_name(path).rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("path", "name", "wanted"), METHODS)
def test_protected_methods_take_the_arguments(path, name, wanted):
    bound = inspect.getattr_static(class_of(path), name)
    parameters = list(inspect.signature(getattr(bound, "__func__", bound)).parameters.values())
    if not isinstance(bound, staticmethod):
        parameters = parameters[1:]
    names = [argument for argument in re.split(r",\s*", wanted) if argument]
    assert [p.name for p in parameters[: len(names)]] == names
    assert all(
        p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in parameters[len(names) :]
    )


@pytest.mark.parametrize(("path", "members"), TABLE, ids=[path for path, _ in TABLE])
def test_members_are_there(path, members):
    cls = class_of(path)
    assert [member for member in members.split() if not has_member(cls, member)] == []


def test_a_member_that_is_nowhere_is_missed():
    from d2kit.modeling import GeneralizedRCNN

    assert not has_member(GeneralizedRCNN, "_no_such_member")


def test_overrides_take_effect():
    from d2kit.data.samplers import RepeatFactorTrainingSampler
    from d2kit.modeling.anchor_generator import DefaultAnchorGenerator

    class Doubled(DefaultAnchorGenerator):
        def _calculate_anchors(self, sizes, aspect_ratios):
            return [2 * cell for cell in super()._calculate_anchors(sizes, aspect_ratios)]

    arguments = {"sizes": [[32]], "aspect_ratios": [[1.0]], "strides": [8]}
    ours, doubled = DefaultAnchorGenerator(**arguments), Doubled(**arguments)
    assert torch.equal(doubled.cell_anchors[0], 2 * ours.cell_anchors[0])

    class OnlyFirst(RepeatFactorTrainingSampler):
        def _get_epoch_indices(self, generator):
            return super()._get_epoch_indices(generator)[:1] * 0

    sampler = iter(OnlyFirst(torch.ones(5), seed=1))
    assert [next(sampler) for _ in range(3)] == [0, 0, 0]
