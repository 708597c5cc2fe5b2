"""Layers with members, and the banks that hold what is private to each."""
