"""Which files ``--source`` means: one file, shards behind an index, or one of the variants in a folder.

transformers and diffusers name a model's file ``model`` or ``diffusion_pytorch_model``, copies of it in other
precision or before averaging ``model.fp16`` or ``diffusion_pytorch_model.non_ema``, each whole or in shards with an
index. The one without a variant's name is taken, and what is left aside is told.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from dexportrait_jax.errors import UserError
from dexportrait_jax.weights import names

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar")

_WHOLE = re.compile(r"(diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors")
_INDEX = re.compile(
    r"(diffusion_pytorch_model|model)(?:\.(\w+))?\.safetensors\.index(?:\.(\w+))?\.json"
)
_SHARD = re.compile(r"-\d+-of-\d+(?=\.)")
# No variant, then precision that loses least; unknown ones before the weights that were not averaged.
_ORDER = ("", "fp32", "fp16", "bf16")
_LAST = "non_ema"


class Chosen(NamedTuple):
    """The files, and what people should know of the choice."""

    files: list[Path]
    notes: tuple[str, ...] = ()


class _Candidate(NamedTuple):
    """A model in a folder: its file or index, whose name has these parts."""

    file: Path
    stem: str
    variant: str
    is_index: bool

    def rank(self) -> tuple[int, str, bool]:
        place = _ORDER.index(self.variant) if self.variant in _ORDER else len(_ORDER)
        return place + (self.variant == _LAST), self.variant, not self.is_index


def choose(source: Path, several: bool, absent: str = "") -> Chosen:
    """The files that a source means.

    Args:
        source: a file, an index of shards, or a folder.
        several: files of other names in a folder are parts of one network, not a network each.
        absent: the folder of a pipeline in which the network would be, and which ``source`` has not.

    Raises UserError, one line, when there is nothing, shards are missing, or more than one model may be meant.
    """
    if source.is_file():
        is_index = _INDEX.fullmatch(source.name) or source.name.endswith(".safetensors.index.json")
        return Chosen(_shards(source) if is_index else [source])
    if not source.is_dir():
        raise UserError(
            f"there is nothing at {source}; give a safetensors file or a folder of them"
        )
    found = sorted(source.glob("*.safetensors"))
    candidates = sorted(_candidates(source), key=_Candidate.rank)
    if not candidates:
        return Chosen(_without_names(source, found, several, absent))
    if len({candidate.stem for candidate in candidates}) > 1:
        _refuse_several(source, [candidate.file for candidate in candidates])
    first = candidates[0]
    files = _shards(first.file) if first.is_index else [first.file]
    aside = [file.name for file in found if file not in files]
    if aside:
        text = (
            f"of {source}, {first.file.name} is taken and {names.listed(aside)} left aside; to take another, name it "
            "(of shards, their index) as --source"
        )
    elif first.variant:
        text = (
            f"of {source}, {first.file.name} is taken: the variant {first.variant} is all there is"
        )
    else:
        return Chosen(files)
    return Chosen(files, (text,))


def _candidates(folder: Path) -> list[_Candidate]:
    found = []
    for file in folder.iterdir():
        whole, index = _WHOLE.fullmatch(file.name), _INDEX.fullmatch(file.name)
        if match := whole or index:
            variant = next((part for part in match.groups()[1:] if part), "")
            found.append(_Candidate(file, match[1], variant, bool(index)))
    return found


def _without_names(folder: Path, found: list[Path], several: bool, absent: str) -> list[Path]:
    """The files of a folder in which none has a name that tells."""
    if not found:
        others = sorted(file for file in folder.iterdir() if file.is_file())
        # Opened, a pickle is refused with how to convert it.
        pickles = [file for file in others if file.suffix.lower() in PICKLES]
        if pickles:
            return pickles[:1]
        below = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
        place = f"one of its folders {', '.join(below)}" if below else "a folder or file that does"
        if below and absent:
            place = f"what does (its folders {', '.join(below)} hold other models, as far as their names tell)"
        lacking = f", nor a folder {absent!r} with any" if absent else ""
        raise UserError(f"{folder} holds no safetensors file{lacking}; give {place}")
    if not several and len({_SHARD.sub("", file.name) for file in found}) > 1:
        _refuse_several(folder, found)
    return found


def _refuse_several(folder: Path, files: list[Path]) -> None:
    raise UserError(
        f"{folder} holds several models: {names.listed([file.name for file in files])}; give one of them as --source"
    )


def _shards(index: Path) -> list[Path]:
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} cannot be read ({' '.join(str(error).split())}); get it again"
        ) from error
    # The names come from a file that may be anybody's: they must not lead out of the folder.
    shards = sorted(index.parent / Path(str(name)).name for name in listed)
    absent = [file.name for file in shards if not file.is_file()]
    if absent:
        raise UserError(f"{index} names files that are missing: {', '.join(absent)}; get them too")
    return shards
