"""Face videos -> a dataset of clips."""

from data_pipelines.prepare.clips import clip_from_image, clips_from_video
from data_pipelines.prepare.crop import Settings
from data_pipelines.prepare.detect import Landmarker
from data_pipelines.prepare.driver import driver_from_video

__all__ = ["Landmarker", "Settings", "clip_from_image", "clips_from_video", "driver_from_video"]
