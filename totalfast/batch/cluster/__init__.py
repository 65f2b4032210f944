"""A batch on the nodes of a Ray cluster."""
