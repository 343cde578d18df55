"""Text to statistics: one pass over a model, whole or a layer at a time."""
