"""Face videos -> a dataset of clips."""

from data_pipelines.prepare.clips import clip_from_image, clip_from_video, clips_from_video
from data_pipelines.prepare.crop import Settings
from data_pipelines.prepare.detect import Landmarker

__all__ = ["Landmarker", "Settings", "clip_from_image", "clip_from_video", "clips_from_video"]
