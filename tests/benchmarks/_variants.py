"""What the ablations share: jobs of the command line, seeds, and a table with mean and deviation."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from data_pipelines.files import write_json

# Column title -> (key of the figures, digits).
Columns = Mapping[str, tuple[str, int]]


def options(parser: argparse.ArgumentParser, variants: Iterable[str], chosen: str) -> None:
    """The flags that every ablation has."""
    parser.add_argument("--data", required=True, help="a dataset of `dexportrait render`")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=chosen, help=", ".join(variants))


def compare(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    variants: Iterable[str],
    columns: Columns,
    measured: Callable[[str, int, Path], dict],
) -> None:
    """Figures of every chosen variant and seed by `measured(variant, seed, place)`, and the table after each."""
    chosen = given.variants.split(",")
    unknown = sorted(set(chosen) - set(variants))
    if unknown:
        parser.error(f"there is no variant {', '.join(unknown)}, only {', '.join(variants)}")
    found: dict[str, list[dict]] = {name: [] for name in chosen}
    # Seed by seed, so that a benchmark that is broken off has compared whole seeds.
    for seed in range(given.seeds):
        for name in chosen:
            place = Path(given.out) / f"{name.replace(' ', '_')}-{seed}"
            found[name].append(measured(name, seed, place))
            print(table(found, columns), flush=True)


def job(*arguments: str) -> None:
    """A job of the command line; its failure is the benchmark's."""
    subprocess.run([sys.executable, "-m", "dexportrait_jax", *arguments], check=True)


def train(config: str, place: Path, overrides: Iterable[str]) -> Path:
    """Trains and exports where that has not been done; returns the export.

    Raises:
      SystemExit: `place` holds a run of other settings, whose figures would stand for these.
    """
    run, export = f"--workdir={place / 'run'}", place / "export"
    wanted, settings = [config, *overrides], place / "settings.json"
    if place.exists() and not (settings.exists() and json.loads(settings.read_text()) == wanted):
        raise SystemExit(f"{place} was made with other settings; give another --out")
    place.mkdir(parents=True, exist_ok=True)
    write_json(settings, wanted)
    if not (export / "model.json").exists():
        job("train", f"--config={config}", run, *(f"--config.{value}" for value in wanted[1:]))
        job("export", run, f"--out={export}", "--overwrite")
    return export


def evaluate(export: Path, data: str, protocol: str, *flags: str) -> dict:
    """metrics.json of a protocol, made where it is not there yet."""
    out = export.parent / protocol
    if not (out / "metrics.json").exists():
        where = (f"--weights={export}", f"--data={data}", f"--out={out}")
        job("evaluate", *where, f"--protocol={protocol}", *flags)
    return json.loads((out / "metrics.json").read_text())


def kept(place: Path, measure: Callable[[], dict]) -> dict:
    """What a file says that `measure` has made, now or before."""
    if not place.exists():
        write_json(place, measure())
    return json.loads(place.read_text())


def table(found: Mapping[str, list[dict]], columns: Columns) -> str:
    """Markdown, one row a variant: mean over the seeds, and the deviation of a single one."""
    lines = [f"| {' | '.join(['', *columns])} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, results in found.items():
        if not results:
            continue
        cells = []
        for key, digits in columns.values():
            # No face found in any result of a run: no figure.
            values = np.array([result[key] for result in results if result[key] is not None])
            if not len(values):
                cells.append("–")
                continue
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
