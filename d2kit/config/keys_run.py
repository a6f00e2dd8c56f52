"""Config keys of input, datasets, solver, test and the run: name -> (default, meaning).

Keys, order and defaults are Detectron2's, except those in `d2kit.config.keys.OWN_KEYS`.
"""

from typing import Any

_INPUT: dict[str, tuple[Any, str]] = {
    "INPUT.MIN_SIZE_TRAIN": ((800,), "Lengths of the short side to draw from, pixels, training."),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": (
        "choice",
        "choice: one of MIN_SIZE_TRAIN; range: an integer between its two entries.",
    ),
    "INPUT.MAX_SIZE_TRAIN": (1333, "Largest long side, pixels, training."),
    "INPUT.MIN_SIZE_TEST": (800, "Length of the short side, pixels, inference; 0: no resizing."),
    "INPUT.MAX_SIZE_TEST": (1333, "Largest long side, pixels, inference."),
    "INPUT.RANDOM_FLIP": ("horizontal", "Flips in training: horizontal, vertical or none."),
    "INPUT.ROTATION_ANGLES": (
        [],
        "Least and largest angle of random rotations, degrees; []: none.",
    ),
    "INPUT.FIXED_SIZE": (
        [],
        "Height and width that images are resized to, pixels; []: short side.",
    ),
    "INPUT.CROP.ENABLED": (False, "Random crops in training."),
    "INPUT.CROP.TYPE": (
        "relative_range",
        "Meaning of SIZE: relative, relative_range, absolute or absolute_range.",
    ),
    "INPUT.CROP.SIZE": ([0.9, 0.9], "Height and width: shares of the image or pixels, see TYPE."),
    "INPUT.FORMAT": ("BGR", "Channel order of the model's input: BGR, RGB, L or YUV-BT.601."),
    "INPUT.RESIZE": (
        "pillow",
        "pillow: with antialiasing, sides rounded; torchvision: without, sides rounded down.",
    ),
    "INPUT.MASK_FORMAT": ("polygon", "How the mapper keeps masks: polygon or bitmask."),
}

_DATA: dict[str, tuple[Any, str]] = {
    "DATASETS.REGISTER_COCO": (
        [],
        "Datasets of your own in COCO format: [name, annotations.json, folder of images] each; "
        "relative paths count from the current folder, else from D2KIT_DATASETS.",
    ),
    "DATASETS.STRICT_ANNOTATIONS": (
        True,
        "A defect in a COCO JSON file is an error; False counts it and leaves it out.",
    ),
    "DATASETS.KEYPOINT_NAMES": (
        [],
        "Names of the keypoints of the datasets, in order; empty: those of the annotation file.",
    ),
    "DATASETS.KEYPOINT_FLIP_MAP": (
        [],
        "Pairs of keypoints that change places in a mirrored image, [[left_eye, right_eye], ...]; "
        "empty: the dataset's, else pairs by the words left and right in the names.",
    ),
    "DATASETS.TRAIN": ((), "Names of registered datasets to train on."),
    "DATASETS.PROPOSAL_FILES_TRAIN": ((), "Proposal files, one per dataset of TRAIN."),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": (2000, "Proposals used per image, training."),
    "DATASETS.TEST": ((), "Names of registered datasets to evaluate on."),
    "DATASETS.PROPOSAL_FILES_TEST": ((), "Proposal files, one per dataset of TEST."),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": (1000, "Proposals used per image, inference."),
    "DATALOADER.NUM_WORKERS": (4, "Loader processes per training process; 0 loads in place."),
    "DATALOADER.ASPECT_RATIO_GROUPING": (True, "Batches are all-wide or all-tall images."),
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler",
        "TrainingSampler, RepeatFactorTrainingSampler, RandomSubsetTrainingSampler, Weighted"
        "TrainingSampler or WeightedCategoryTrainingSampler (by DATASETS.TRAIN_REPEAT_FACTOR).",
    ),
    "DATALOADER.REPEAT_THRESHOLD": (
        0.0,
        "Repeat-factor sampler: classes in a smaller share of images are repeated.",
    ),
    "DATALOADER.REPEAT_SQRT": (True, "Repeat factors are square roots of threshold / share."),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": (True, "Leave out training images without objects."),
    "DATALOADER.MAX_SKIPPED_IMAGES": (
        0,
        "How many damaged training images each process replaces by others; listed at the end.",
    ),
}

_SOLVER: dict[str, tuple[Any, str]] = {
    "SOLVER.OPTIMIZER": ("SGD", "SGD, Adam or AdamW."),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupMultiStepLR, WarmupCosineLR or WarmupStepWithFixedGammaLR.",
    ),
    "SOLVER.MAX_ITER": (40000, "Training iterations."),
    "SOLVER.MAX_EPOCHS": (
        0.0,
        "Training length in passes over the training images, in place of MAX_ITER; 0: MAX_ITER.",
    ),
    "SOLVER.BASE_LR": (0.001, "Learning rate after the warm-up."),
    "SOLVER.BASE_LR_END": (0.0, "Learning rate at the end of WarmupCosineLR."),
    "SOLVER.MOMENTUM": (0.9, "Momentum of SGD."),
    "SOLVER.NESTEROV": (False, "Nesterov's variant of the momentum."),
    "SOLVER.WEIGHT_DECAY": (0.0001, "Weight decay."),
    "SOLVER.WEIGHT_DECAY_NORM": (0.0, "Weight decay of normalisation layers; None: WEIGHT_DECAY."),
    "SOLVER.GAMMA": (0.1, "Factor of the learning rate at each step."),
    "SOLVER.STEPS": ((30000,), "Iterations of the steps of WarmupMultiStepLR."),
    "SOLVER.STEPS_EPOCHS": ((), "The steps in epochs, in place of STEPS; needs MAX_EPOCHS."),
    "SOLVER.NUM_DECAYS": (3, "Number of steps of WarmupStepWithFixedGammaLR."),
    "SOLVER.WARMUP_FACTOR": (0.001, "Learning rate at the start of the warm-up over BASE_LR."),
    "SOLVER.WARMUP_ITERS": (1000, "Iterations of the warm-up."),
    "SOLVER.WARMUP_METHOD": ("linear", "linear: grows evenly; constant: stays at the factor."),
    "SOLVER.RESCALE_INTERVAL": (
        False,
        "True: the schedule is squeezed in after the warm-up; False: the warm-up hides its start.",
    ),
    "SOLVER.CHECKPOINT_PERIOD": (5000, "Iterations between checkpoints."),
    "SOLVER.IMS_PER_BATCH": (16, "Images per iteration, over all processes together."),
    "SOLVER.ACCUMULATE_STEPS": (
        1,
        "Parts that the images of an iteration are computed in, one after another, before the one "
        "update: memory of IMS_PER_BATCH / ACCUMULATE_STEPS images; 1: all at once.",
    ),
    "SOLVER.REFERENCE_WORLD_SIZE": (
        0,
        "Number of processes that batch and schedule were written for; 0: do not auto-scale.",
    ),
    "SOLVER.REFERENCE_BATCH": (
        0,
        "Images per iteration that BASE_LR was written for: BASE_LR x IMS_PER_BATCH / "
        "REFERENCE_BATCH is used, whatever the optimizer (for Adam the square root of the ratio "
        "is also common: set BASE_LR yourself); 0: BASE_LR as it is.",
    ),
    "SOLVER.BIAS_LR_FACTOR": (1.0, "Factor of the learning rate of biases."),
    "SOLVER.LR_FACTORS": (
        [],
        "Pairs [module name, factor]: they learn at factor x BASE_LR; the longest name wins.",
    ),
    "SOLVER.WEIGHT_DECAY_BIAS": (None, "Weight decay of biases; None: WEIGHT_DECAY."),
    "SOLVER.CLIP_GRADIENTS.ENABLED": (False, "Clip gradients before each step."),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (
        "value",
        "value: each element; norm: each parameter; full_model: all parameters together.",
    ),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (1.0, "Largest absolute value or norm."),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (2.0, "p of the p-norm; inf is allowed."),
    "SOLVER.AMP.ENABLED": (False, "Train with automatic mixed precision."),
    "SOLVER.AMP.PRECISION": (
        "float16",
        "float16 (GPU) or bfloat16 (GPU; CPU with AVX512-BF16 or AMX, slow on others).",
    ),
    "SOLVER.EARLY_STOPPING.PATIENCE": (
        0,
        "End the training after so many evaluations in a row without a better METRIC; 0: never.",
    ),
    "SOLVER.EARLY_STOPPING.METRIC": (
        "bbox/AP",
        "task/metric, with several test sets dataset/task/metric; larger is better, of a name "
        "with loss in it smaller.",
    ),
    "SOLVER.EARLY_STOPPING.MIN_DELTA": (0.0, "A better METRIC is better by more than this."),
    "SOLVER.EMA.ENABLED": (
        False,
        "Keep an exponential moving average of the weights, evaluate with it, and write it as "
        "model_final_ema.safetensors beside model_final.pth.",
    ),
    "SOLVER.EMA.DECAY": (0.9998, "Share of the average that an iteration keeps, in [0, 1)."),
    "SOLVER.EMA.WARMUP": (
        True,
        "After t iterations keep no more than (1 + t) / (10 + t), so that the start is forgotten.",
    ),
}

_TEST: dict[str, tuple[Any, str]] = {
    "TEST.EXPECTED_RESULTS": (
        [],
        "Results that must come out: [[task, metric, value, tolerance], ...].",
    ),
    "TEST.EVAL_PERIOD": (0, "Iterations between evaluations during training; 0: at the end only."),
    "TEST.EVAL_EPOCHS": (
        0.0,
        "Epochs between evaluations, in place of EVAL_PERIOD; 0: EVAL_PERIOD.",
    ),
    "TEST.BEST_METRIC": (
        "",
        "Keep the checkpoint with the best value of it as model_best.pth, named as "
        "SOLVER.EARLY_STOPPING.METRIC; empty: none.",
    ),
    "TEST.VALIDATION_LOSS": (
        False,
        "Also report the mean losses of the test sets when the training evaluates, without "
        "augmentation, as validation/total_loss and so on.",
    ),
    "TEST.VIS_IMAGES": (
        0,
        "Images of each test set, evenly spaced, that every evaluation of the training draws with "
        "ground truth beside prediction: one JPEG each per evaluation in OUTPUT_DIR/vis, and in "
        "the events; 0: none.",
    ),
    "TEST.CLASSIFICATION_REPORT": (
        False,
        "Also report precision, recall, F1, confusion and best threshold of the classes.",
    ),
    "TEST.REPORT": (
        True,
        "Write the results page report.html, and README.md, into OUTPUT_DIR when train_net ends.",
    ),
    "TEST.DTYPE": (
        "float32",
        "What models compute in at inference (predict, track, evaluations): float32, bfloat16 or "
        "float16; float32 where the device would emulate it.",
    ),
    "TEST.KEYPOINT_OKS_SIGMAS": ([], "Sigma of each keypoint in COCO's OKS; empty: COCO's own."),
    "TEST.DETECTIONS_PER_IMAGE": (100, "Best detections kept per image, all classes together."),
    "TEST.AUG.ENABLED": (False, "Test-time augmentation."),
    "TEST.AUG.MIN_SIZES": (
        (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "Lengths of the short side, pixels.",
    ),
    "TEST.AUG.MAX_SIZE": (4000, "Largest long side, pixels."),
    "TEST.AUG.FLIP": (True, "Also run on the mirrored image."),
    "TEST.PRECISE_BN.ENABLED": (False, "Recompute BatchNorm statistics before evaluations."),
    "TEST.PRECISE_BN.NUM_ITER": (200, "Batches to compute them from."),
}

_TRACKER: dict[str, tuple[Any, str]] = {
    "TRACKER_HEADS.TRACKER_NAME": (
        "ByteTrack",
        "ByteTrack, OCSORT, BoTSORT, BBoxIOUTracker, VanillaHungarianBBoxIOUTracker or "
        "IOUWeightedHungarianBBoxIOUTracker.",
    ),
    "TRACKER_HEADS.VIDEO_HEIGHT": (0, "Height of the video, pixels; 0: that of its first frame."),
    "TRACKER_HEADS.VIDEO_WIDTH": (0, "Width of the video, pixels; 0: that of its first frame."),
    "TRACKER_HEADS.MAX_NUM_INSTANCES": (200, "Most objects in memory (IoU trackers)."),
    "TRACKER_HEADS.MAX_LOST_FRAME_COUNT": (30, "Frames for which a lost object is remembered."),
    "TRACKER_HEADS.MIN_BOX_REL_DIM": (
        0.02,
        "Least width and height of a lost object that is remembered, share of the video's "
        "(IoU trackers).",
    ),
    "TRACKER_HEADS.MIN_INSTANCE_PERIOD": (
        1,
        "IoU trackers: a lost object is remembered if it was seen in more frames; others: an "
        "object gets its identity when it was found again so often.",
    ),
    "TRACKER_HEADS.TRACK_IOU_THRESHOLD": (
        0.3,
        "Least overlap of a good pair of detections of two frames, in [0, 1] (IoU trackers).",
    ),
    "TRACKER_HEADS.MIN_MATCH_IOU": (
        0.1,
        "Least overlap of a pair that the Hungarian trackers take for want of a good one; 0: any.",
    ),
    "TRACKER_HEADS.ASSOCIATION": ("box", "What overlaps in the IoU trackers: box or mask."),
    "TRACKER_HEADS.PARAMS": (
        [],
        "ByteTrack, OCSORT, BoTSORT: other arguments of the class in the package trackers, "
        "[name, value, name, value, ...].",
    ),
    "TRACKER_HEADS.SCORE_THRESH": (0.3, "Detections below this score are not tracked."),
    "TRACKER_HEADS.FILL_GAP": (
        5,
        "Longest gap of a track, in frames, that is filled with interpolated boxes; 0: none.",
    ),
    "TRACKER_HEADS.MIN_TRACK_LENGTH": (3, "Number of detections that make a track."),
}

_GLOBAL: dict[str, tuple[Any, str]] = {
    "OUTPUT_DIR": ("./output", "Folder for everything that a run writes."),
    "RESUME_CHANGED": (
        False,
        "Resume although the config differs from the checkpoint's in keys that change the result.",
    ),
    "SEED": (-1, "Seed of sample order, augmentation, initial weights; negative: a random one."),
    "PREFLIGHT.ENABLED": (
        True,
        "Log datasets, classes, anchors, parameters, rates and memory before the first iteration.",
    ),
    "PREFLIGHT.MAX_IMAGES": (5000, "Most training images that it looks at; 0: all."),
    "DETERMINISTIC": (
        False,
        "Use algorithms that give the same numbers in every run with the same SEED, slower; "
        "CUDNN_BENCHMARK is then off.",
    ),
    "DETERMINISTIC_STRICT": (
        False,
        "With DETERMINISTIC: refuse operations that have no such algorithm, instead of a warning.",
    ),
    "CUDNN_BENCHMARK": (False, "Let cuDNN try algorithms; pays off where image sizes are fixed."),
    "FLOAT32_PRECISION": ("", "Passed to torch.set_float32_matmul_precision; empty: unchanged."),
    "VIS_PERIOD": (0, "Iterations between pictures of the training in the events; 0: none."),
    "WRITERS.WANDB.ENABLED": (
        False,
        "Also send scalars, pictures and config to Weights & Biases (pip install d2kit[wandb]).",
    ),
    "WRITERS.WANDB.PROJECT": ("d2kit", "Project of the run."),
    "WRITERS.WANDB.ENTITY": ("", "User or team of the project; empty: your default one."),
    "WRITERS.WANDB.NAME": ("", "Name of the run; empty: that of the folder OUTPUT_DIR."),
    "WRITERS.WANDB.MODE": ("online", "online; offline: into OUTPUT_DIR/wandb, for `wandb sync`."),
    "WRITERS.MLFLOW.ENABLED": (
        False,
        "Also send scalars, pictures and config to MLflow (pip install d2kit[mlflow]).",
    ),
    "WRITERS.MLFLOW.TRACKING_URI": (
        "",
        "Server (http://...) or local store (sqlite:///FILE); empty: MLFLOW_TRACKING_URI of the "
        "environment, which is also the place for passwords.",
    ),
    "WRITERS.MLFLOW.EXPERIMENT": ("d2kit", "Experiment of the run; made if need be."),
    "WRITERS.MLFLOW.NAME": ("", "Name of the run; empty: that of the folder OUTPUT_DIR."),
    "GLOBAL.HACK": (1.0, "For quick experiments of users; the library does not read it."),
}

RUN_KEYS: dict[str, tuple[Any, str]] = {
    **_INPUT,
    **_DATA,
    **_SOLVER,
    **_TEST,
    **_TRACKER,
    **_GLOBAL,
}
