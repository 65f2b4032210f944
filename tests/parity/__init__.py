"""totalfast against the real TotalSegmentator, run as a command in a process of its own."""
