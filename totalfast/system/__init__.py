"""The operating system: cores, memory, progress, pending files."""
