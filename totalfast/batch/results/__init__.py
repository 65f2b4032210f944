"""What a batch writes beside the results of its cases: manifest, table, report."""
