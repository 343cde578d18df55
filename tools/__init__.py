"""What checks the build. Run from a checkout; no part of the package."""
