"""The folder of TotalSegmentator's models: what is there, is it whole, and how it gets there."""
