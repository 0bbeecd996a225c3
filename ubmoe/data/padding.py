"""Token lists in padded batches."""

import torch

IGNORE_INDEX = -100  # the label of a token that is not to be predicted


def batches_by_length(texts: list[list[int]], batch_tokens: int) -> list[list[int]]:
    """Indices of texts, padded to at most `batch_tokens`; the longest first, to fail at once."""
    batches: list[list[int]] = []
    for text in sorted(range(len(texts)), key=lambda text: -len(texts[text])):
        widest = len(texts[batches[-1][0]]) if batches else 0
        if not batches or widest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(text)
    return batches


def padded(rows: list[list[int]], fill: int = 0, left: bool = False) -> torch.Tensor:
    """(B, T) int64, padded on the right or on the left."""
    width = max(map(len, rows))
    fills = [[fill] * (width - len(row)) for row in rows]
    pairs = zip(fills, rows, strict=True) if left else zip(rows, fills, strict=True)
    return torch.tensor([first + second for first, second in pairs], dtype=torch.long)


def padded_with_mask(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """(B, T) input_ids and attention_mask."""
    return {"input_ids": padded(rows), "attention_mask": padded([[1] * len(row) for row in rows])}
