"""Rendered clips by number: the same `records.Clip`s as of a dataset, drawn when they are looked at.

`config.data.path = "synthetic:identities=2000,frames=8,cameras=2,size=64"` trains on them without any
file. Labels are worked out at once; a frame is drawn, as a JPEG, when it is first asked for.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines import records
from data_pipelines.prepare import crop, masks, splits
from data_pipelines.synthetic import expression as expressions
from data_pipelines.synthetic import identity as identities
from data_pipelines.synthetic.motion import Motion
from data_pipelines.synthetic.render import LARGEST, SMALLEST, canonical_landmarks, render
from dexportrait_jax.errors import UserError

PREFIX = "synthetic:"
TIGHTEST, WIDEST = 1.5, 6.0  # crops in faces; in a tighter one chins would be cut
_MOST = 1_000_000  # identities a seed


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which clips there are.

    Attributes:
        identities: how many people.
        clips: sessions of each.
        frames: of a clip.
        cameras: that watch a session; each gives a clip.
        size: side of the pictures in pixels.
        fps: frames per second of the motion; low for frames that differ much.
        seed: other seeds, other people.
        holdout: which part of the people validation keeps, chosen by a hash of their names.
        face_scale: side of the crop in faces, chin to brow, as of `prepare`; heads stay within the crop.
    """

    identities: int = 100
    clips: int = 1
    frames: int = 8
    cameras: int = 1
    size: int = 64
    fps: float = 2.0
    seed: int = 0
    holdout: float = 0.1
    face_scale: float = crop.Settings.face_scale

    def __post_init__(self):
        for name in ("identities", "clips", "frames", "cameras"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"rendered heads: {name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.identities > _MOST:
            raise UserError(f"rendered heads: identities is {self.identities}; at most {_MOST}")
        if not SMALLEST <= self.size <= LARGEST:
            raise UserError(
                f"rendered heads: size is {self.size}; it must lie between {SMALLEST} and "
                f"{LARGEST} pixels"
            )
        if not 0 < self.fps <= 1000:
            raise UserError(f"rendered heads: fps is {self.fps}; it must lie between 0 and 1000")
        if self.seed < 0:
            raise UserError(f"rendered heads: seed is {self.seed}; it must be 0 or more")
        if not 0 <= self.holdout < 1:
            raise UserError(
                f"rendered heads: holdout is {self.holdout}; it must be 0 or more, below 1"
            )
        if not TIGHTEST <= self.face_scale <= WIDEST:
            raise UserError(
                f"rendered heads: face_scale is {self.face_scale}; it must lie between {TIGHTEST} and {WIDEST} faces"
            )

    @property
    def made_with(self) -> dict[str, float]:
        """Its keys as datasets note them; `face_scale` only where it is another, as older ones have none."""
        values = dataclasses.asdict(self)
        if self.face_scale == crop.Settings.face_scale:
            del values["face_scale"]
        return values

    @property
    def seeds(self) -> list[int]:
        """The people, as seeds of `identity.make_identity`."""
        return [self.seed * _MOST + number for number in range(self.identities)]

    def split(self) -> dict[str, list[int]]:
        """split name -> seeds of its people, in order."""
        names = {identities.name_of(seed): seed for seed in self.seeds}
        held = splits.held_out(set(names), self.holdout)
        chosen = {"train": [seed for name, seed in names.items() if name not in held]}
        return chosen | (
            {"validation": [names[name] for name in names if name in held]} if held else {}
        )

    def clips_of(self, seed: int) -> Iterator[records.Clip]:
        """All clips of a person, drawn when their frames are looked at."""
        for session in range(self.clips):
            for camera in range(self.cameras):
                yield make_clip(self, seed, session, camera)


def parse(path: str) -> Plan:
    """The plan of a path such as "synthetic:identities=2000,frames=8".

    Raises:
        UserError: an unknown key, or a value that cannot be.
    """
    known = {field.name: type(field.default) for field in dataclasses.fields(Plan)}
    values = {}
    for part in filter(None, path.removeprefix(PREFIX).split(",")):
        name, _, text = part.partition("=")
        if name not in known:
            raise UserError(f"{path}: there is no key '{name}', only {', '.join(known)}")
        try:
            values[name] = known[name](text)
        except ValueError:
            raise UserError(f"{path}: {name} is '{text}', which is no number of its kind") from None
    return Plan(**values)


class Frames(Sequence):
    """The JPEG frames of a clip, each drawn when it is first asked for."""

    def __init__(self, draw, numbers: range, done: dict[int, bytes] | None = None):
        self._draw, self._numbers = draw, numbers
        self._done = {} if done is None else done

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Frames(self._draw, self._numbers[index], self._done)
        number = self._numbers[index]
        if number not in self._done:
            self._done[number] = self._draw(number)
        return self._done[number]


def make_clip(plan: Plan, seed: int, session: int, camera: int) -> records.Clip:
    """One camera's clip of a session of the person `seed`; `settings["synthetic"]` holds the truth."""
    motion = Motion((seed, session), plan.cameras, plan.face_scale)
    # Sessions start anywhere, so that their first frames are no key moments of the motion.
    start = float(np.random.default_rng((seed, session, 9)).uniform(0, 1))
    times = start + np.arange(plan.frames) / plan.fps
    return drawn_clip(
        seed,
        np.stack([motion.expression(time) for time in times]),
        np.stack([motion.seen_pose(time, camera) for time in times]),
        size=plan.size,
        fps=plan.fps,
        session=session,
        camera=camera,
        rotation=motion.camera(camera),
        face_scale=plan.face_scale,
    )


def drawn_clip(
    seed: int,
    expression: np.ndarray,
    pose: np.ndarray,
    *,
    size: int,
    fps: float = 1.0,
    session: int = 0,
    camera: int = 0,
    rotation: np.ndarray | None = None,
    face_scale: float = crop.Settings.face_scale,
) -> records.Clip:
    """A clip of the person `seed` with (T, K) expressions and (T, 3, 4) poses in the picture.

    Args:
        rotation: (3, 3) from the room to the camera; None: it stands straight in front.
        face_scale: crop of real pictures whose faces are as large as these, which the settings say.
    """
    person = identities.make_identity(seed)
    rotation = np.eye(3) if rotation is None else rotation
    count = len(expression)
    points = np.stack([canonical_landmarks(person, one) for one in expression])
    landmarks = (points @ pose[:, :, :3].swapaxes(1, 2) + pose[:, None, :, 3]).astype(np.float32)

    def draw(number: int) -> bytes:
        drawn = render(
            identities.make_identity(seed),
            expression[number],
            pose[number],
            size,
            camera=rotation,
        )
        return crop.encode_jpeg(drawn.image, crop.Settings.jpeg_quality)

    name = f"{person.name}-{session:04d}"
    truth = {
        "identity_seed": seed,
        "expression_names": list(expressions.EXPRESSION_PARAMETERS.names),
        "expression": expression.tolist(),
        "pose": pose.tolist(),
        "camera_rotation": rotation.tolist(),
    }
    return records.Clip(
        clip_id=f"{name}-c{camera}-{0:06d}-{count - 1:06d}",
        identity=person.name,
        session=name,
        camera=str(camera),
        source=PREFIX + person.name,
        fps=fps,
        size=size,
        frames=Frames(draw, range(count)),
        landmarks=landmarks,
        blendshapes=expressions.blendshapes(expression),
        head_pose=pose.astype(np.float32),
        face_boxes=np.concatenate(
            [landmarks[..., :2].min(axis=1), landmarks[..., :2].max(axis=1)], axis=1
        ),
        mask_polygons=masks.polygons(landmarks),
        timestamps=(np.arange(count) / fps).astype(np.float32),
        crop_box=np.array([0, 0, size, size], np.float32),
        original_size=np.array([size, size], np.float32),
        # A face fills these crops as it does in prepared video.
        settings=dataclasses.asdict(crop.Settings(size=size).scaled(face_scale))
        | {"synthetic": truth},
    )


class RenderedClips:
    """The clips of one split of a plan by number; stands in for `dataset.ClipDataset`.

    Raises:
        UserError: the plan cannot be read, or has no such split.
    """

    def __init__(self, path: str, split: str, *, cache_bytes: int = 256 << 20):
        self.directory, self.split = path, split
        self.plan = parse(path)
        chosen = self.plan.split()
        if split not in chosen:
            raise UserError(f"{path} has no split '{split}' (only {', '.join(chosen)})")
        self.seeds = chosen[split]
        self.frames = np.full(
            len(self.seeds) * self.plan.clips * self.plan.cameras, self.plan.frames, np.int64
        )
        drawn = self.plan.frames * (self.plan.size**2 // 4 + 9000)  # bytes: JPEGs and labels
        self._kept = max(1, cache_bytes // drawn)
        self._forget()

    def _forget(self) -> None:
        self._cache: collections.OrderedDict[int, records.Clip] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_cache", "_lock")
        }

    def __setstate__(self, state) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: int) -> records.Clip:
        number = int(number)
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        rest, camera = divmod(number, self.plan.cameras)
        person, session = divmod(rest, self.plan.clips)
        clip = make_clip(self.plan, self.seeds[person], session, camera)
        with self._lock:
            self._cache[number] = clip
            while len(self._cache) > self._kept:
                self._cache.popitem(last=False)
        return clip

    @functools.cached_property
    def index(self) -> dict[str, list]:
        """One list per key, as in a dataset's index file."""
        columns: dict[str, list] = {
            name: []
            for name in (
                "clip_id",
                "identity",
                "session",
                "camera",
                "frames",
                "fps",
                "start",
                "size",
            )
        }
        for seed in self.seeds:
            name = identities.name_of(seed)
            for session in range(self.plan.clips):
                for camera in range(self.plan.cameras):
                    both = f"{name}-{session:04d}"
                    values = (
                        f"{both}-c{camera}-{0:06d}-{self.plan.frames - 1:06d}",
                        *(name, both, str(camera)),
                        *(self.plan.frames, self.plan.fps, 0.0, self.plan.size),
                    )
                    for column, value in zip(columns.values(), values, strict=True):
                        column.append(value)
        return columns

    def background_motion(self, number: int) -> None:
        """None: it would have to be drawn to be known."""

    def fingerprint(self) -> dict[str, str]:
        """The plan by which everything is drawn."""
        keys = ", ".join(f"{name}={value!r}" for name, value in self.plan.made_with.items())
        return {"rendered": f"Plan({keys})"}
