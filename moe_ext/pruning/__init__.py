"""A plan applied: to a live model, or from folder to folder."""
