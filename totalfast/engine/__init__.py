"""From a model image to labels: normalise, place tiles, run networks, sum up."""
