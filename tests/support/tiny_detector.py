"""A tiny Mask R-CNN with fixed random weights, and a run that kills itself at a frame.

python -m tests.support.tiny_detector VIDEO OUTPUT WEIGHTS KILL_AT
"""

import os
import signal
import sys
from pathlib import Path

import torch

from d2kit.modeling import build_model
from d2kit.video import VideoOptions, track_video
from tests.support.tiny_model import tiny_config


def detector_cfg(weights=""):
    return tiny_config(
        *("MODEL.WEIGHTS", str(weights), "INPUT.MIN_SIZE_TEST", 60),
        *("TEST.DETECTIONS_PER_IMAGE", 6, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.2),
        *("TRACKER_HEADS.SCORE_THRESH", 0.0, "TRACKER_HEADS.MIN_INSTANCE_PERIOD", 0),
        *("TRACKER_HEADS.TRACKER_NAME", "IOUWeightedHungarianBBoxIOUTracker"),
    )


def save_weights(path):
    torch.manual_seed(1)
    torch.save({"model": build_model(detector_cfg()).state_dict()}, path)
    return path


def options(clip, output, **changes):
    settings = {"batch_size": 2, "progress": False, "preset": "ultrafast", **changes}
    return VideoOptions(input=str(clip), output=Path(output), **settings)


def main(video, output, weights, kill_at):
    torch.set_num_threads(1)

    def die(count):
        if count == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    track_video(detector_cfg(weights), options(video, output), on_frame=die)


if __name__ == "__main__":
    main(*sys.argv[1:])
