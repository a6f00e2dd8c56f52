"""Pictures: predictions and annotations on images and video frames, curves of training."""

from d2kit.visualization.plots import plot_losses
from d2kit.visualization.visualizer import ColorMode, VideoVisualizer, VisImage, Visualizer

__all__ = ["ColorMode", "VideoVisualizer", "VisImage", "Visualizer", "plot_losses"]
