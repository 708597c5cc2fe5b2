"""The command line, comparisons and benchmarks."""
