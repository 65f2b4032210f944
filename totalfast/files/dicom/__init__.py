"""DICOM series: find the files, read the scan, write the results."""
