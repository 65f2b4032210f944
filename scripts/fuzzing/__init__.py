"""Damaged inputs for ``fuzz_inputs.py``: one module per family of formats, and one shared loop."""
