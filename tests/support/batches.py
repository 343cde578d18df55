"""Random batches of tokens, with and without padding."""

import torch


def random_tokens(batch: int, length: int, seed: int = 0, vocabulary: int = 96) -> torch.Tensor:
    """(batch, length) int64 token ids."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batches() -> list[dict[str, torch.Tensor]]:
    """Three ragged batches: right padding, left padding, none."""
    batches = [{"input_ids": random_tokens(2, 13, seed=seed)} for seed in (1, 2, 3)]
    batches[0]["attention_mask"] = torch.tensor([[1] * 13, [1] * 5 + [0] * 8])
    batches[1]["attention_mask"] = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
    return batches


def five_batches() -> list[dict[str, torch.Tensor]]:
    """Of different lengths, the second with padding: enough for the shares of several processes to differ."""
    batches = [{"input_ids": random_tokens(2, 9 + seed, seed=seed)} for seed in range(5)]
    batches[1]["attention_mask"] = torch.tensor([[1] * 10, [1] * 4 + [0] * 6])
    return batches
