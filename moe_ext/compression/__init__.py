"""The whole job: from a checkpoint and text to a smaller checkpoint and what that cost."""
