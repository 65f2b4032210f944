"""Synthetic data to try totalfast without a scan and without a download."""
