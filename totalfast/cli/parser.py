"""Parser of the main command; its flags are in the module ``flags``."""

from __future__ import annotations

import argparse

from totalfast import about, upstream
from totalfast.cli.flags import FLAG_GROUPS

DESCRIPTION = """\
Segment anatomical structures in CT and MR images with TotalSegmentator's models: same flags, same
files, identical results, faster, with less memory."""

EXAMPLES = """\
examples:
  totalfast -i ct.nii.gz -o segmentations          one mask per structure
  totalfast -i ct.nii.gz -o seg.nii.gz -ml         one label map
  totalfast -i ct.nii.gz -o segmentations --fast   3 mm model, for a laptop
  totalfast -i mr.nii.gz -o segmentations -ta total_mr
  totalfast -i dicom_folder -o seg.dcm -ot dicom_seg

other commands (each has a --help):
  totalfast batch -i scans/ -o results/            many scans: resumable, one table of statistics
  totalfast serve                                  keep models loaded; commands start at once
  totalfast demo                                   try it without a scan or a download
  totalfast preview ct.nii.gz seg.nii.gz out.png   draw a scan and its labels
  totalfast weights list                           models on this machine: download, verify, import
  totalfast cache                                  converted models: where, how large; clear
  totalfast nnunet -i DIR -o DIR -m MODEL          run any nnU-Net v2 model
  totalfast shim DIR                               a TotalSegmentator command that runs totalfast

The flags are TotalSegmentator's, except --backend, --completion-marker, --deterministic, --export,
--guided, --max-memory, --offline, --precision, --series, --tile_step_size and --trust-model.
Not a medical device. TotalSegmentator is by Jakob Wasserthal et al.; please cite
https://pubs.rsna.org/doi/10.1148/ryai.230024 and nnU-Net."""


def build_parser(
    *, program: str = "totalfast", version: str | None = None
) -> argparse.ArgumentParser:
    """Build the parser of the main command.

    Parameters
    ----------
    program
        Name of the command in its help.
    version
        Text for ``--version``; None for the versions of totalfast and TotalSegmentator.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=version or f"totalfast {about.version()} (TotalSegmentator {upstream.version()})",
    )
    for add_flags in FLAG_GROUPS:
        add_flags(parser)
    return parser
