"""Models and networks: load, normalise, run tile by tile."""
