"""One run from scan to result."""
