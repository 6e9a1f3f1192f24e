"""A plan's figures put together, and said in words."""

from __future__ import annotations

from typing import Any

from dexportrait_jax.chips import Chip
from dexportrait_jax.collectives import seconds_at_best

EVALUATION = "evaluation"  # the program that makes samples between steps
# Keys whose figures only a program that fits has; null in the plan of one that does not.
OF_WHAT_FITS = (
    "collectives",
    "between_slices_bytes",
    "bound_seconds",
    "bound_step_seconds",
    "bound_mfu",
    "recompute_overhead",
    "executed_overhead",
)


def summary(
    programs: list[dict[str, Any]], chip: Chip, devices: int, effort: str = "exact"
) -> dict[str, Any]:
    """Of all programs together: memory of the largest, the rest a sum, each times its share.

    In training that is the mean over the steps; of a clip, whose shares are how often a program runs, it is the whole.
    What goes to and from memory bounds a step at exact effort alone: at the quick one XLA keeps nothing in the chip's
    own small memory between two operations, and what `train` runs moves less.
    """
    fits = all(program["fits"] for program in programs)
    model = sum(program["share"] * program["model_tflops"] for program in programs)
    needed = [program["hbm_gib_per_device"] for program in programs]
    found: dict[str, Any] = {
        # None where XLA does not say how much too much it is.
        "hbm_gib_per_device": None if None in needed else max(needed),
        "fits": fits,
        "model_tflops_per_step": round(model, 3),
        "compile_seconds": round(sum(program["compile_seconds"] for program in programs), 1),
    }
    if not fits:
        return found | dict.fromkeys(OF_WHAT_FITS)
    bound = {"compute": 0.0, "memory": 0.0, "network": 0.0}
    collectives: dict[str, dict[str, float]] = {}
    step_seconds = executed = again = between = 0.0
    for program in programs:
        share = program["share"]
        inside = {
            tuple(map(int, axes.split(","))): each for axes, each in program["link_bytes"].items()
        }
        outside = program["between_slices_bytes_per_device"]
        seconds = {
            "compute": program["matrix_tflops_per_device"] * 1e12 / chip.flops,
            "memory": program["hbm_bytes_per_device"] / chip.hbm_bytes,
            # Links within a slice and cards between slices work at the same time.
            "network": max(
                seconds_at_best(inside, chip.link_bytes),
                outside / (chip.dcn_bytes or float("inf")),
            ),
        }
        bound = {name: bound[name] + share * seconds[name] for name in bound}
        step_seconds += share * max(seconds[name] for name in _bounding(effort))
        again += share * program["rematerialised_tflops"]
        executed += share * program["executed_tflops_per_device"] * devices
        between += share * outside
        for kind, each in program["collectives"].items():
            mean = collectives.setdefault(kind, {"count": 0.0, "bytes": 0.0})
            for key in mean:
                mean[key] += share * each[key]
    return found | {
        "collectives": {
            kind: {"count": round(mean["count"], 2), "bytes": round(mean["bytes"])}
            for kind, mean in sorted(collectives.items())
            if mean["count"]  # some are of the program between the steps alone
        },
        "between_slices_bytes": round(between),
        "bound_seconds": bound,
        "bound_step_seconds": step_seconds,
        "bound_mfu": model * 1e12 / (step_seconds * devices * chip.flops),
        # What the step is told to compute twice; and all that is done, also by padding, by XLA's own doing and by
        # kernels, beside the model's own products.
        "recompute_overhead": round(1 + again / model, 4),
        "executed_overhead": round(executed / model, 4),
    }


def _bounding(effort: str) -> tuple[str, ...]:
    return ("compute", "network") if effort == "quick" else ("compute", "memory", "network")


def in_words(found: dict[str, Any]) -> str:
    """The plan for people; everything in it stands in the JSON too."""
    used, limit = found["hbm_gib_per_device"], found["hbm_limit_gib"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    clip = found["job"] == "animate"
    unit = f"for {found['frames']} frames" if clip else "a step"
    lines = [
        "  devices    1: animate works on one chip; others can make other clips"
        if clip
        else f"  devices    {found['devices']} (mesh {mesh})",
        f"  weights    {sum(found['params'].values()) / 1e6:,.1f} M parameters",
        f"  model      {found['model_tflops_per_step']:,.4g} TFLOP {unit}",
    ]
    if not clip:
        batch = found["batch"]
        parts = f" in {batch['accumulate']} parts" if batch["accumulate"] > 1 else ""
        lines.insert(1, f"  batch      {batch['sources']} x {batch['targets']}{parts}")
    if not found["fits"]:
        needs = f"more than {limit:.2f}" if used is None else f"{used:.2f} of {limit:.2f}"
        samples = not clip and steps_fit(found)
        what = "steps fit, but not the samples between them" if samples else "does not fit"
        lines.append(f"  memory     {what}: needs {needs} GiB; {_advice(found)}")
        return "\n".join(lines)
    seconds = found["bound_seconds"]
    slowest = max(_bounding(found["effort"]), key=seconds.get)
    lines += [
        f"  memory     {used:.2f} of {limit:.2f} GiB a device: fits",
        "  at best    "
        + ", ".join(f"{name} {value * 1e3:,.3g} ms" for name, value in seconds.items())
        + f": {slowest} bounds it",
        f"             {found['bound_step_seconds'] * 1e3:,.3g} ms {unit}, {found['bound_mfu']:.1%} of the chips' peak",
    ]
    if found["effort"] == "quick":
        lines.append(
            "             (memory is too much at quick effort and does not count here; --effort=exact says what it is)"
        )
    executed = f"{found['executed_overhead']:.2f} times with all that is padded or done twice"
    if clip:
        lines += [
            f"             {found['bound_seconds_per_frame'] * 1e3:,.3g} ms a frame",
            f"  computed   the model's FLOPs {executed}",
        ]
    else:
        lines.append(
            f"  recomputed {found['recompute_overhead']:.2f} times the model's FLOPs by rematerialisation, {executed}"
        )
    tensor = found["mesh"]["tensor"]
    if tensor > 1 and found["tensor_cuts"]:
        lines.append(
            "             tensor shares heads and feed-forward widths alone "
            f"({found['tensor_cuts']:.0%} of the weights); {tensor} devices do all else alike"
        )
    elif tensor > 1:
        lines.append(
            f"             tensor shares nothing of this stage: {tensor} devices do all alike, and a batch of {tensor} "
            f"times the sources, or 1 of {tensor} chips, would do as well"
        )
    for kind, each in found["collectives"].items():
        lines.append(
            f"  {kind:<18} {each['count']:>5,.4g} a step, {each['bytes'] / 2**20:,.3g} MiB to each device"
        )
    if found["between_slices_bytes"]:
        lines.append(
            f"  between slices     {found['between_slices_bytes'] / 2**20:,.3g} MiB to each device a step"
        )
    for key, what in (
        ("loops_counted_once", "loops of unknown length, counted once"),
        ("kernels_not_counted", "kernels whose work is not counted"),
    ):
        names = sorted({name for program in found["programs"] for name in program[key]})
        if names:
            lines.append(f"  {what}: {', '.join(names)}")
    for rare in found.get("left_out", ()):
        lines.append(
            f"  left out   steps with {', '.join(rare['events'])}, {rare['share']:.2%} of all; "
            "--effort=exact plans them too"
        )
    lines.append(f"  compiled, not run: {found['compile_seconds']:.0f} s, effort {found['effort']}")
    return "\n".join(lines)


def steps_fit(found: dict[str, Any]) -> bool:
    """Whether a training step fits, whatever the samples between the steps do."""
    return all(each["fits"] for each in found["programs"] if each.get("events") != [EVALUATION])


def _advice(found: dict[str, Any]) -> str:
    if found["job"] == "animate":
        return "try a kind of chip with more memory, or shorter windows (--config.data.frames)"
    if found["job"] == "train" and steps_fit(found):
        return "try --config.evaluate.at_end=False --config.evaluate.every_steps=0, and evaluate its exports elsewhere"
    if not found["advice"]:
        return "this batch cannot be spread further: try more chips, or a kind with more memory"
    return f"try {' or '.join(found['advice'][:3])}"
