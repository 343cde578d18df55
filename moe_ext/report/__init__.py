"""The page about a model's experts, and its figures."""
