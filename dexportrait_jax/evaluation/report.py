"""The report of a run: one HTML file with everything inside, opened from disk without network.

Videos and pictures are embedded as data URIs, so the file can be mailed and still plays; nothing is
fetched and no script runs. `write_report(path, Report(...))` is the whole interface.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipelines.files import write_bytes, writing_to
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation.curves import Curve, curve_svg
from dexportrait_jax.evaluation.report_style import STYLE

COLOURS = ("#2f6f6d", "#b4552d", "#4a5d9c", "#8a6d1f", "#7a4a78", "#3f7d44")


@dataclass(frozen=True)
class Video:
    """One video, or one picture, with what stands over and under it."""

    path: str | Path
    title: str
    note: str = ""
    panels: Sequence[str] = ()  # what stands side by side in it, from left to right
    command: str = ""  # the command that makes it again


@dataclass(frozen=True)
class Quality:
    """Held-out figures of one model beside those of repeating the source frame.

    ``values``: psnr, psnr_copy (dB), ssim, lpips, lpips_copy and, where known, ssim_copy.
    """

    model: str
    values: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Figures in words: ``columns`` is the head, each row begins with what it is about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """One part of the run: how long, how much memory, how to do it alone, what its losses did."""

    name: str
    seconds: float
    peak_memory_gb: float | None
    command: str
    curves: Sequence[Curve] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything a report shows; parts that are empty are left out."""

    title: str
    headline: str
    facts: Sequence[tuple[str, str]] = ()  # (figure, what it is), shown large under the headline
    videos: Sequence[Video] = ()
    grids: Sequence[Video] = ()  # wide pictures
    pictures: Sequence[Video] = ()
    quality: Sequence[Quality] = ()
    tables: Sequence[Table] = ()
    stages: Sequence[Stage] = ()
    limits: Sequence[str] = ()
    provenance: str = ""
    footer: str = field(default="Made by dexportrait_jax.")


def write_report(path: str | Path, report: Report, *, overwrite: bool = True) -> Path:
    """Write ``report`` as one HTML file, atomically.

    UserError where it cannot be written or a video is missing.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; add --overwrite to replace it")
    text = _page(report)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
    return path


def sample_grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]], *, cell: int = 128, gap: int = 4
) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures in rows and columns on white, each ``cell`` pixels wide and high."""
    columns = max(len(row) for row in rows)
    pitch = cell + gap
    canvas = np.full((len(rows) * pitch - gap, columns * pitch - gap, 3), 255, np.uint8)
    for index, row in enumerate(rows):
        for column, picture in enumerate(row):
            shrink = picture.shape[0] > cell
            method = cv2.INTER_AREA if shrink else cv2.INTER_CUBIC
            top, left = index * pitch, column * pitch
            canvas[top : top + cell, left : left + cell] = cv2.resize(
                picture, (cell, cell), interpolation=method
            )
    return canvas


def write_png(path: str | Path, picture: UInt8[np.ndarray, "h w 3"]) -> Path:
    """Write an RGB picture as PNG, atomically."""
    path = Path(path)
    data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    return path


# --- the page -------------------------------------------------------------------------


def _page(report: Report) -> str:
    sections = [
        _section("Animated", _videos(report.videos), "videos"),
        _section("Faces and drivers", _videos(report.grids), "grids"),
        _section("Samples", _videos(report.pictures), "samples"),
        _section("On frames it was not trained on", _quality(report.quality), "quality"),
        _section("Figures", "".join(_table(table) for table in report.tables), "figures"),
        _section("Training", _curves(report.stages), "training"),
        _section("Time and memory", _costs(report.stages), "cost"),
        _section("Do a part again", _commands(report), "commands"),
        _section("What this does not show", _list(report.limits), "limits"),
        _section("Synthetic", _paragraph(report.provenance), "provenance"),
    ]
    facts = "".join(
        f"<div><b>{escape(figure)}</b><span>{escape(what)}</span></div>"
        for figure, what in report.facts
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="title">{escape(report.title)}</p><h1>{escape(report.headline)}</h1>'
        + (f'<div class="facts">{facts}</div>' if facts else "")
        + f"</header>{''.join(sections)}<footer>{escape(report.footer)}</footer>"
        "</main></body></html>\n"
    )


def _section(heading: str, body: str, name: str) -> str:
    return f'<section id="{name}"><h2>{escape(heading)}</h2>{body}</section>' if body else ""


def _data_uri(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"the report needs {path}: {error.strerror}") from error
    kind = mimetypes.guess_type(str(path))[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _videos(videos: Sequence[Video]) -> str:
    cards = []
    for video in videos:
        uri, label = _data_uri(video.path), escape(video.title, quote=True)
        if uri.startswith("data:video"):
            media = (
                f'<video src="{uri}" aria-label="{label}" '
                "autoplay muted loop playsinline controls></video>"
            )
        else:
            media = f'<img src="{uri}" alt="{label}">'
        panels = "".join(f"<span>{escape(panel)}</span>" for panel in video.panels)
        cards.append(
            f"<figure><h3>{escape(video.title)}</h3>"
            + (f'<div class="panels">{panels}</div>' if panels else "")
            + media
            + (f"<figcaption>{escape(video.note)}</figcaption>" if video.note else "")
            + "</figure>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _quality(models: Sequence[Quality]) -> str:
    if not models:
        return ""
    measures = (("psnr", ".2f", 1), ("ssim", ".3f", 1), ("lpips", ".3f", -1))
    rows, notes = [], []
    for model in models:
        cells, copies = "", ""
        for name, form, sign in measures:
            value, copy = model.values.get(name), model.values.get(f"{name}_copy")
            gain = ""
            if value is not None and copy is not None:
                better = sign * (value - copy) > 0
                gain = f' <i class="{"good" if better else "bad"}">{value - copy:+{form}}</i>'
            cells += f"<td>{'–' if value is None else format(value, form)}{gain}</td>"
            copies += f"<td>{'–' if copy is None else format(copy, form)}</td>"
        rows.append(
            f"<tr><th>{escape(model.model)}</th>{cells}</tr>"
            f'<tr class="copy"><th>repeat the source frame</th>{copies}</tr>'
        )
        if model.note:
            notes.append(f'<p class="note">{escape(model.model)}: {escape(model.note)}</p>')
    return (
        '<div class="scroll"><table><thead><tr><th></th><th>PSNR, dB ↑</th><th>SSIM ↑</th>'
        f"<th>LPIPS ↓</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>{''.join(notes)}"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.columns)
    rows = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>"
        for first, *cells in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3>{note}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _curves(stages: Sequence[Stage]) -> str:
    parts = []
    for stage in stages:
        drawn = [
            (curve, curve_svg(curve, colour=_colour(i))) for i, curve in enumerate(stage.curves)
        ]
        panels = "".join(
            f"<div><h4>{escape(curve.name.replace('_', ' '))}</h4>{svg}</div>"
            for curve, svg in drawn
            if svg
        )
        if panels:
            parts.append(f'<h3>{escape(stage.name)}</h3><div class="curves">{panels}</div>')
    if not parts:
        return ""
    return (
        '<p class="note">Pale: every logged step. Strong: its running mean. Where values span more '
        "than a decade the axis is logarithmic.</p>" + "".join(parts)
    )


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _costs(stages: Sequence[Stage]) -> str:
    if not stages:
        return ""
    longest = max(stage.seconds for stage in stages) or 1.0
    rows = "".join(
        f"<tr><th>{escape(stage.name)}{_small(stage.note)}</th><td>{_duration(stage.seconds)}"
        f'<span class="bar" style="width:{100 * stage.seconds / longest:.0f}%"></span></td>'
        f"<td>{'–' if stage.peak_memory_gb is None else f'{stage.peak_memory_gb:.2f} GB'}</td></tr>"
        for stage in stages
    )
    total = sum(stage.seconds for stage in stages)
    peaks = [stage.peak_memory_gb for stage in stages if stage.peak_memory_gb is not None]
    peak = f"{max(peaks):.2f} GB" if peaks else "–"
    return (
        '<div class="scroll"><table class="costs"><thead><tr><th></th><th>time</th>'
        "<th>peak memory</th>"
        f"</tr></thead><tbody>{rows}</tbody><tfoot><tr><th>together</th><td>{_duration(total)}</td>"
        f"<td>{peak}</td></tr></tfoot></table></div>"
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {seconds - 60 * minutes:02.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _commands(report: Report) -> str:
    named = [(stage.name, stage.command) for stage in report.stages if stage.command]
    named += [(video.title, video.command) for video in report.videos if video.command]
    return "".join(
        f"<h4>{escape(name)}</h4><pre><code>{escape(command)}</code></pre>"
        for name, command in named
    )


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""
