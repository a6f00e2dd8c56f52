"""Video: decode, detect, associate, draw and encode, in one pass of bounded memory."""

from d2kit.video.association import TRACKERS, Associator, TrackedFrame, start_score
from d2kit.video.detections import BatchDetector, DetectionStore, DetectionWriter, FrameDetections
from d2kit.video.outputs import CSV_COLUMNS, PRESETS, VideoEncoder
from d2kit.video.plan import DETECTIONS, VideoOptions
from d2kit.video.privacy import BLUR_MODES, LEAST_DIFFERENCE, Anonymizer
from d2kit.video.run import COMPLETE, DAMAGED, INTERRUPTED, track_video
from d2kit.video.sources import open_source
from d2kit.video.video_file import Frame, Selection, SourceInfo

__all__ = [
    "BLUR_MODES",
    "COMPLETE",
    "CSV_COLUMNS",
    "DAMAGED",
    "DETECTIONS",
    "INTERRUPTED",
    "LEAST_DIFFERENCE",
    "PRESETS",
    "TRACKERS",
    "Anonymizer",
    "Associator",
    "BatchDetector",
    "DetectionStore",
    "DetectionWriter",
    "Frame",
    "FrameDetections",
    "Selection",
    "SourceInfo",
    "TrackedFrame",
    "VideoEncoder",
    "VideoOptions",
    "open_source",
    "start_score",
    "track_video",
]
