"""Rendered heads: pictures whose identity, expression and pose are known exactly.

Real video never says what "the pose of A with the expression of B on person C" looks like; a rendered
head does. `render.render(identity, expression, pose, size)` gives the picture and all true labels.
"""
