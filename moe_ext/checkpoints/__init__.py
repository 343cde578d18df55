"""Folders of tensors: what lies in them, which parameter a key feeds, models loaded whole or a layer at a time."""
