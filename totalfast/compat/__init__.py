"""Programs that call or start TotalSegmentator, run on totalfast."""
