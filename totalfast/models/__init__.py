"""Trained models: checked, loaded and kept; see the README of this folder."""
