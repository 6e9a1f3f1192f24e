"""Configs: a Python file with `get_config(variant)`, addressed as `configs/motion.py:tiny`.

`configs/motion.py:full@v5e:16x16` spreads it over such a slice (see `configs/meshes.py`).

Every knob of a run stands in one ConfigDict. Overrides come from the command line as `--config.a.b=value`;
a key that does not exist or a value of another type is an error that names the nearest key. What values a key may have
is in `config_values.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import ml_collections

from configs import meshes
from dexportrait_jax import config_values
from dexportrait_jax.choices import nearest
from dexportrait_jax.errors import UserError

ABSENT: Any = object()
ADDRESS_KEYS = ("stage", "variant")  # what file and variant are, and no key's own
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def load_config(address: str, overrides: list[str] | None = None) -> ml_collections.ConfigDict:
    """Reads `file.py[:variant][@topology]`, applies `a.b=value` overrides, and locks the result.

    Args:
      address: path of a config file, relative to the working directory or to the project's root, and
        the variant after a colon; without one, the file's default. A topology sets mesh, accumulate, remat and the
        batch as far as the overrides do not.
      overrides: `dotted.key=value` strings (what follows `--config.` on the command line).

    Raises:
      UserError: the file, the variant, the topology or a key does not exist, or a value has the wrong type.
    """
    path_text, variant, topology = _parts(address)
    path = _find(path_text)
    if path.suffix != ".py":
        raise UserError(f"config {path} is not a Python file; is it a config file?")
    spec = importlib.util.spec_from_file_location(f"dexportrait_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"config {path} cannot be read as Python: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config {path} has no function get_config(variant); is it a config file?")
    known = getattr(module, "VARIANTS", None)
    if variant and known is not None and variant not in known:
        raise UserError(
            f"config {path_text} has no variant {variant!r}; it has {', '.join(known)}"
            + nearest(variant, known)
        )
    takes_variant = bool(inspect.signature(module.get_config).parameters)
    config = module.get_config(variant) if variant and takes_variant else module.get_config()
    config.lock()
    for override in overrides or []:
        apply_override(config, override)
    if topology:
        config_values.check(config)  # its sizes are computed with
        given = {override.partition("=")[0] for override in overrides or []}
        meshes.set_mesh(config, topology, given)
    return config


def topology_of(address: str) -> tuple[str, int] | None:
    """The topology that an address ends with, and how many slices of it; None where it has none."""
    topology = _parts(address)[2]
    return meshes.address(topology) if topology else None


def what_topology_changed(
    address: str, config: ml_collections.ConfigDict, overrides: list[str] | None = None
) -> str | None:
    """A sentence where the topology of an address gave its config another batch, and not one of the overrides."""
    path, variant, topology = _parts(address)
    if not topology:
        return None
    before = load_config(f"{path}:{variant}" if variant else path, overrides).data.batch_size
    if before == config.data.batch_size:
        return None
    now = config.data.batch_size
    return f"@{topology}: a batch has {now} sources instead of {before}, so that its chips can share it"


def _parts(address: str) -> tuple[str, str, str]:
    """File, variant and topology, the latter two "" where they are left out."""
    start, _, topology = address.rpartition("@")
    if not start or "/" in topology:  # no @, or one in the name of a folder
        start, topology = address, ""
    path, _, variant = start.partition(":")
    return path, variant, topology


def apply_override(config: ml_collections.ConfigDict, override: str) -> None:
    """Sets one `a.b=value` in place; the value is read as a Python literal, else as a string."""
    dotted, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--config.{dotted} has no value; write --config.{dotted}=VALUE")
    node: Any = config
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(["config", *parts[:depth]])
        if not isinstance(node, ml_collections.ConfigDict):
            raise UserError(f"--config.{dotted}: {here} is a single value and has no keys")
        if part not in node:
            raise UserError(
                f"--config.{dotted}: {here} has no key {part!r}"
                + (nearest(part, node.keys()) or f"; its keys are {', '.join(sorted(node.keys()))}")
            )
        if depth < len(parts) - 1:
            node = node[part]
    old = node[parts[-1]]
    if isinstance(old, ml_collections.ConfigDict):
        raise UserError(
            f"--config.{dotted} is a group of keys; set one of {', '.join(sorted(old.keys()))}"
        )
    if dotted in ADDRESS_KEYS:
        raise UserError(
            f"--config.{dotted}={text}: it is {old!r} by the address, --config=FILE.py:VARIANT; give another address"
        )
    value = _read(text, old, dotted)
    with node.ignore_type():  # which it knows from the old value alone, where that may be None
        node[parts[-1]] = value


def _read(text: str, old: Any, dotted: str) -> Any:
    rule = config_values.rule_of(dotted)
    if isinstance(old, str) and not (rule and None in rule.words and text.lower() == "none"):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return config_values.as_kind(dotted, value, old)


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict(), default=list))


def from_json(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """A locked config from what `to_json` gave; lists become tuples, as configs write them."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        if isinstance(value, list):
            return tuple(tuples(item) for item in value)
        return value

    config = ml_collections.ConfigDict(tuples(values))
    config.lock()
    return config


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """The (dotted key, old, new) of all that differs between two JSON configs; ABSENT where one has no such key."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, ABSENT), new.get(key, ABSENT)
        groups = [value for value in (a, b) if value is not ABSENT]
        if all(isinstance(value, dict) for value in groups):
            a, b = ({} if value is ABSENT else value for value in (a, b))
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, a, b))
    return found


def _find(text: str) -> Path:
    for candidate in (Path(text), PROJECT_ROOT / text):
        if candidate.is_file():
            return candidate.resolve()
    known = sorted(
        f"configs/{path.name}"
        for path in (PROJECT_ROOT / "configs").glob("*.py")
        if "def get_config(" in path.read_text()
    )
    raise UserError(f"no config file {text}; the project has {', '.join(known)}")
