"""From the inputs of a batch to its cases: files, series, lists, and their names."""
