"""Many scans in one process: which cases there are, what is done, and what came of it."""
