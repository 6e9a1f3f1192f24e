"""The guidance's branches as conditions (method.md 7.2): what each branch of a plan gets to see."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dexportrait_jax.models.animator.conditioning import Conditions


@dataclasses.dataclass(frozen=True)
class NullReading:
    """What is meant by a condition that is not there; the defaults follow method.md 7.2.

    Attributes:
        expression: "null", the denoiser's null tokens (learned or zero, as it was built), or "source",
            the expression of the source portrait.
        reference: in the unconditional branch, "dropped" or "kept".
        pose: in the unconditional branch, "zero" (zero ray maps, no warp) or "source" (as if the
            target had the source's pose).
        context: attn2's context where the reference is dropped, "dropped" or "kept" (``drop_attn2="never"``).
    """

    expression: Literal["null", "source"] = "null"
    reference: Literal["dropped", "kept"] = "dropped"
    pose: Literal["zero", "source"] = "zero"
    context: Literal["dropped", "kept"] = "dropped"


def branch_conditions(
    conditions: Conditions,
    branch: Literal["null", "expression", "reduced", "full"],
    reading: NullReading = NullReading(),  # noqa: B008 - frozen
    source_expression: Float[Array, "batch latent"] | None = None,
) -> Conditions:
    """The conditions of one branch, made from those of "full". Call it outside jit.

    "full" and "reduced" have the same structure, so one compiled program serves both; "null" and
    "expression" drop what they leave out, and share another program that costs less.

    Raises:
        ValueError: an unknown branch, or no ``source_expression`` where the reading asks for one.
    """
    if branch not in ("null", "expression", "reduced", "full"):
        raise ValueError(f"branch {branch!r} is none of null, expression, reduced, full")
    sees_expression = branch in ("expression", "full")
    expression, keep = conditions.expression, None
    if expression is not None:
        if reading.expression == "null":
            keep = jnp.full((expression.shape[0],), 1.0 if sees_expression else 0.0)
        else:
            keep = jnp.ones((expression.shape[0],))
            if source_expression is None:
                raise ValueError("the null expression 'source' needs the source's expression")
            if not sees_expression:
                expression = jnp.broadcast_to(source_expression, expression.shape)
    if branch in ("reduced", "full"):
        return conditions.replace(expression=expression, keep_expression=keep)

    bare = Conditions(expression=expression, keep_expression=keep)
    if reading.reference == "kept":
        bare = bare.replace(
            reference=conditions.reference,
            keys_values=conditions.keys_values,
        )
    if "kept" in (reading.reference, reading.context):
        bare = bare.replace(context=conditions.context)
    if reading.pose == "source" and conditions.source_pose is not None:
        source, driving = conditions.source_pose, conditions.driving_pose
        poses = jnp.repeat(source, driving.shape[0] // source.shape[0], axis=0)
        bare = bare.replace(source_pose=source, driving_pose=poses)
        if reading.reference == "kept" and conditions.keys_values is not None:
            # Made for these poses, not for those of "full": see ``Denoiser.residuals``.
            bare = bare.replace(residuals=conditions.residuals)
    return bare
