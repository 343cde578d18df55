"""Quality: perplexity, skip rates, checkpoints side by side, lm-eval's tasks."""
