"""Read scans and write results."""
