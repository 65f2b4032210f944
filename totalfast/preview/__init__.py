"""A picture of a scan and its labels; ``page`` lays it out."""
