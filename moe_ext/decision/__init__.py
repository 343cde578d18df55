"""Statistics to a plan: criteria, rankings, thresholds."""
