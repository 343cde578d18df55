"""Text to a plan, by what a layer's output loses (arXiv 2402.14800)."""
