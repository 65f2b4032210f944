"""A ``TotalSegmentator`` command that runs totalfast, for programs that start that command."""
