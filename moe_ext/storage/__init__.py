"""Bytes on this machine: files whole or absent, tensors in them, fingerprints, the machine itself. Knows no model."""
