"""Everything that reads or writes scans and results."""
