"""Programs that measure: `python -m tests.benchmarks NAME [options]`. Tests assert, these print."""
