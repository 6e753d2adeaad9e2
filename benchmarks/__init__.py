"""Measurements behind every claim of speed or quality; each writes a JSON file into benchmarks/results."""
