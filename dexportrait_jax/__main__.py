"""`python -m dexportrait_jax <job>`, the same as `dexportrait <job>`."""

from dexportrait_jax.cli import main

main()
