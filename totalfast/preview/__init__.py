"""A picture of a scan and its labels; ``page.draw_preview`` draws it."""
