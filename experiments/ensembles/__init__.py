"""The comparison of efficient ensembles: data, cells, evaluation, records. Importing this loads no torch."""
