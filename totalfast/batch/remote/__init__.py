"""Places elsewhere, such as s3:// and https://, through fsspec: names, calls, files."""
