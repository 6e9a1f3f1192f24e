"""The table of method.md 7.2."""

import pytest

from dexportrait_jax.diffusion.guidance import alpha, guidance_plan


def test_alpha_table():
    table = {k: alpha(k, 35, 5) for k in range(1, 36)}
    assert all(table[k] == 1.0 for k in range(30, 36))
    assert [table[k] for k in (29, 28, 27, 26)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert all(table[k] == 0.0 for k in range(1, 26))


def test_published_plan():
    plan = guidance_plan(35, scale=2.5, hold=5)
    assert plan.passes == 74
    assert plan.segments == [
        (0, 6, ("null", "reduced")),
        (6, 10, ("null", "reduced", "full")),
        (10, 35, ("null", "full")),
    ]
    assert plan.steps[0].coefficients == pytest.approx((-1.5, 2.5))
    assert plan.steps[6].coefficients == pytest.approx((-1.5, 2.0, 0.5))
    assert plan.steps[-1].coefficients == pytest.approx((-1.5, 2.5))


@pytest.mark.parametrize("reading", ["hybrid", "expression_in_both", "three_scale"])
@pytest.mark.parametrize(("steps", "hold"), [(35, 5), (10, 2), (7, 0), (10, 5)])
def test_coefficients_sum_to_one(reading, steps, hold):
    plan = guidance_plan(steps, hold=hold, reading=reading, expression_scale=3.0)
    assert len(plan.steps) == steps
    for step in plan.steps:
        assert sum(step.coefficients) == pytest.approx(1.0)


def test_without_hold_it_is_ordinary_guidance():
    plan = guidance_plan(10, scale=2.5, hold=0)
    assert {step.branches for step in plan.steps} == {("null", "full")}
    assert plan.passes == 20


def test_three_scales_with_one_scale_are_the_hybrid():
    hybrid, three = (guidance_plan(35, reading=r) for r in ("hybrid", "three_scale"))
    for one, other in zip(hybrid.steps, three.steps, strict=True):
        assert one.branches == other.branches
        assert one.coefficients == pytest.approx(other.coefficients)


def test_expression_in_both_terms_is_not_amplified_first():
    plan = guidance_plan(35, reading="expression_in_both")
    assert plan.steps[0].branches == ("expression", "full")
    assert plan.steps[-1].branches == ("null", "full")
    assert plan.passes == 74


def test_what_cannot_be():
    with pytest.raises(ValueError, match="half"):
        guidance_plan(10, hold=6)
    with pytest.raises(ValueError, match="none of hybrid"):
        guidance_plan(10, hold=2, reading="other")
