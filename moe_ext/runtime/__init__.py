"""Running a model: on the operators, with skipping, over batches, in several processes, layer after layer."""
