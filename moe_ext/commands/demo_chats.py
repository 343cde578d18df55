"""The demo's chat-formatted source: the calibration text as conversations, calibrated on beside the text itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_ext.calibration.calibrate import calibrate
from moe_ext.data import batches
from moe_ext.decision.agreement import rank_agreement
from moe_ext.decision.criteria import score
from moe_ext.runtime.batches import read_domains
from moe_ext.storage.files import replace_file

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
PART = 600  # characters of a conversation
TOKENS = 24_000
CRITERION = "man"


def calibrate_on_chats(
    model: PreTrainedModel, tokenizer: Any, folder: Path, output: Path, *, window: int
) -> dict[str, Any]:
    """Writes ``chats.jsonl`` and ``domains.safetensors``, the statistics of a mix of both, half the tokens each.

    Returns:
        Tokens by domain, and how much alike the two domains rank a layer's experts: Spearman's correlation by the
        criterion, mean over the layers.
    """
    chats = output / "chats.jsonl"
    with replace_file(chats) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in _conversations(folder)), encoding="utf-8")
    data = batches(
        [f"chats={chats}@1", f"text={folder}@1"],
        tokenizer,
        template=TEMPLATE,
        tokens=TOKENS,
        window=window,
        batch_tokens=16 * window,
        seed=0,
    )
    stats = calibrate(model, data, progress=False, dataset="demo chats and text")
    stats.save(output / "domains.safetensors")
    scores = [score(stats.domain(name), CRITERION) for name in stats.domains]
    return {
        "tokens": {name: int(part.tokens.max()) for name, part in stats.domains.items()},
        "criterion": CRITERION,
        "rank_agreement": rank_agreement(scores)[0, 1].item() if len(scores) == 2 else None,
        "waiting": data.waiting,
    }


def _conversations(folder: Path) -> Iterator[dict[str, Any]]:
    """A user begins a piece of text, and the assistant goes on."""
    for text in read_domains([folder]).values():
        for start in range(0, len(text), PART):
            half = text[start : start + PART // 2], text[start + PART // 2 : start + PART]
            if all(part.strip() for part in half):
                roles = zip(("user", "assistant"), half, strict=True)
                yield {"messages": [{"role": role, "content": part} for role, part in roles]}
