"""The recogniser tells people apart, or no figure of identity that it gives would mean anything."""

import numpy as np

from data_pipelines import video
from data_pipelines.prepare.detect import Landmarker
from dexportrait_jax import assets
from tests import mobileface


def test_people_of_real_clips(shared_data):
    recognise = mobileface.load(shared_data / "models")
    faces, people = [], []
    with Landmarker(assets.fetch("face_landmarker", say=lambda text: None)) as landmarker:
        for person, path in enumerate(sorted((shared_data / "clips").glob("*.mp4"))[:6]):
            for number, frame in enumerate(video.read_frames(path)):
                if number in (0, 40) and (found := landmarker.detect(frame.image)):
                    faces.append(mobileface.aligned(frame.image, found[0].landmarks[:, :2]))
                    people.append(person)
                if number == 40:
                    break
    vectors, people = recognise(np.stack(faces)), np.array(people)
    cosine = vectors @ vectors.T
    same = (people[:, None] == people) & ~np.eye(len(people), dtype=bool)
    other = people[:, None] != people
    assert np.count_nonzero(same) >= 8
    assert cosine[same].mean() > 0.6 and abs(cosine[other].mean()) < 0.15
    assert cosine[same].min() > cosine[other].mean() + 0.2
