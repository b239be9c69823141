"""Faults injected between an edge and a cloud, and what became of every one: ``python -m benchmarks.faults``."""
