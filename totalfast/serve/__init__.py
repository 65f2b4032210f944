"""A resident process that keeps models loaded, and the client that hands runs to it."""
