"""Metrics: continual (of one accuracy matrix, numpy) and uncertainty (of an ensemble, torch)."""
