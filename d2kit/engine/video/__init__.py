"""Video: decode, detect, associate, draw and encode, in one pass of bounded memory."""

from d2kit.engine.video.association import TRACKERS, Associator, TrackedFrame
from d2kit.engine.video.detections import BatchDetector, FrameDetections
from d2kit.engine.video.encoder import VideoEncoder
from d2kit.engine.video.frames import Frame, Selection, SourceInfo
from d2kit.engine.video.outputs import CSV_COLUMNS
from d2kit.engine.video.plan import DETECTIONS, VideoOptions
from d2kit.engine.video.privacy import BLUR_MODES, LEAST_DIFFERENCE, Anonymizer
from d2kit.engine.video.run import COMPLETE, DAMAGED, INTERRUPTED, track_video
from d2kit.engine.video.sources import open_source
from d2kit.engine.video.store import DetectionStore, DetectionWriter

__all__ = [
    "BLUR_MODES",
    "COMPLETE",
    "CSV_COLUMNS",
    "DAMAGED",
    "DETECTIONS",
    "INTERRUPTED",
    "LEAST_DIFFERENCE",
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
    "track_video",
]
