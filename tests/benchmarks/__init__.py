"""Measurements, to be run by hand on an idle machine: `python -m tests.benchmarks NAME`."""
