"""Metrics: continual (of one accuracy matrix, numpy), and of an ensemble's predictions (torch) the others."""
