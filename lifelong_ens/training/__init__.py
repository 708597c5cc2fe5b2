"""One training loop over in-memory batches."""
