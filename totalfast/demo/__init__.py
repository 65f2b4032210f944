"""Made data to try totalfast with: no patient, no download."""
