"""Translation: a Transformer against its BatchEnsemble, on line-aligned text; what ``reproduce translation`` runs."""
