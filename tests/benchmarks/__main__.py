"""`python -m tests.benchmarks NAME [options]` calls `main(arguments)` of `tests.benchmarks.NAME`."""

import importlib
import pkgutil
import sys

from tests import benchmarks

known = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
known.remove("__main__")
if len(sys.argv) < 2 or sys.argv[1] not in known:
    sys.exit(f"usage: python -m tests.benchmarks {{{','.join(known)}}} [options]")
importlib.import_module(f"tests.benchmarks.{sys.argv[1]}").main(sys.argv[2:])
