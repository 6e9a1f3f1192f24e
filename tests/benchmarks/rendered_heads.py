"""How many heads a core draws in a second, and what a new person costs.

Single-threaded, CPU time, random expressions and poses. `--sizes=64,256` and `--seconds=4` (about, for
each size) can be given.
"""

import argparse
import json
import time

import cv2
import numpy as np

from data_pipelines.synthetic.expression import sample_expression
from data_pipelines.synthetic.identity import Identity
from data_pipelines.synthetic.poses import sample_pose
from data_pipelines.synthetic.render import render

AIMS = {64: 200.0, 256: 20.0}  # frames per second and core


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks rendered_heads")
    parser.add_argument("--sizes", default="64,128,256,512")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    for size in map(int, options.sizes.split(",")):
        result = measure(size, options.seconds)
        if size in AIMS:
            result["aim_frames_per_second"] = AIMS[size]
        print(json.dumps(result), flush=True)


def measure(size: int, seconds: float) -> dict[str, float]:
    """Frames per second of CPU time over several people, and what is made once a person."""
    rng = np.random.default_rng(0)
    render(Identity(0), sample_expression(rng), sample_pose(rng), size)  # what all people share
    people, new = [], []
    for seed in range(1, 6):
        started = time.process_time()
        person = Identity(seed)
        render(person, sample_expression(rng), sample_pose(rng), size)
        new.append(time.process_time() - started)
        people.append(person)
    times: list[float] = []
    while sum(times) < seconds:
        expression, pose = sample_expression(rng), sample_pose(rng)
        started = time.process_time()
        render(people[len(times) % len(people)], expression, pose, size)
        times.append(time.process_time() - started)
    mean = float(np.mean(times))
    return {
        "size": size,
        "frames_per_second": round(1 / mean, 1),
        "milliseconds": round(1e3 * mean, 2),
        "first_frame_of_a_person_milliseconds": round(1e3 * float(np.mean(new)), 1),
        "frames": len(times),
    }
