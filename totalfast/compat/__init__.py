"""Lets programs that call or start TotalSegmentator use totalfast."""
