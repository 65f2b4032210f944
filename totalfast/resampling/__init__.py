"""The scan to the model grid."""
