"""Runs `main(arguments)` of the module of this package that is named on the command line."""

import importlib
import pkgutil
import sys

import tests.benchmarks
from dexportrait_jax.errors import UserError

NAMES = [
    module.name
    for module in pkgutil.iter_modules(tests.benchmarks.__path__)
    if not module.name.startswith("_")
]

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        print(f"usage: python -m tests.benchmarks NAME; names: {', '.join(NAMES)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        importlib.import_module(f"tests.benchmarks.{name}").main(sys.argv[2:])
    except UserError as error:
        print(f"tests.benchmarks {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
