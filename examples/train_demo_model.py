"""Train the demo models: stock models of some 5 million parameters on five domains of text, to try pruning on.

    python examples/collect_corpus.py --out DIR
    python examples/train_demo_model.py --corpus DIR --out examples/demo_model
    python examples/train_demo_model.py --corpus DIR --out examples/fine_grained_model --model fine_grained

Trains a byte-level BPE tokenizer and the model (float32, seeded, a fixed number of steps, every domain with the same
share of every batch), saves the model in bfloat16, evaluates what was saved, and writes OUT with held-out and
calibration text, training.json and a README.md whose numbers come from it. OUT is replaced at the end in one go. An
interrupted run goes on from its checkpoint in DIR.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from collect_corpus import DOMAINS, SEPARATOR
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class Settings:
    """Everything the result depends on besides the corpus."""

    family: str = "mixtral"
    steps: int = 2600
    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 224
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2
    experts: int = 8
    experts_per_token: int = 2
    context: int = 256  # tokens of a training window
    windows_per_domain: int = 3  # of a batch
    learning_rate: float = 3e-3  # at the end of the warm-up; falls linearly to 0
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance: float = 0.01  # coefficient of the load-balancing loss, averaged over layers


MODELS = {
    "demo": Settings(),
    "fine_grained": Settings(family="qwen3_moe", experts=16, experts_per_token=4, intermediate_size=128, steps=2200),
}
TITLES = {"mixtral": ("Demo model", "Mixtral"), "qwen3_moe": ("Fine-grained demo model", "Qwen3-MoE")}

# ---- text to tokens -------------------------------------------------------------------------------------------------


def read_domains(folder: Path) -> dict[str, str]:
    return {domain: (folder / f"{domain}.txt").read_text(encoding="utf-8") for domain in DOMAINS}


def train_tokenizer(texts: dict[str, str], settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE from equally long beginnings of the domains; adds <s> in front, as Mixtral's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    size = min(map(len, texts.values()))
    tokenizer.train_from_iterator((part for text in texts.values() for part in text[:size].split(SEPARATOR)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """(N,) the documents' tokens one after another, each as <s> ... </s>."""
    tokens: list[int] = []
    for document in text.split(SEPARATOR):
        tokens += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(tokens)


def windows(tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> torch.Tensor:
    """(N, context) a text cut into windows that each begin with <s>; an incomplete last one is dropped."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    body = tokens[: len(tokens) // (context - 1) * (context - 1)].view(-1, context - 1)
    return torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], dim=1)


def batch(tokens: dict[str, torch.Tensor], settings: Settings, step: int) -> torch.Tensor:
    """(windows, context) the step's batch: windows at random offsets, as many from every domain."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    span = torch.arange(settings.context)
    rows = []
    for stream in tokens.values():
        starts = torch.randint(len(stream) - settings.context, (settings.windows_per_domain, 1), generator=generator)
        rows.append(stream[starts + span])
    return torch.cat(rows)


# ---- training -------------------------------------------------------------------------------------------------------


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shared = {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.key_value_heads,
        "head_dim": settings.hidden_size // settings.heads,
        "num_experts_per_tok": settings.experts_per_token,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "router_aux_loss_coef": settings.balance,
        "initializer_range": 0.04,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config: PreTrainedConfig
    if settings.family == "mixtral":
        config = MixtralConfig(
            intermediate_size=settings.intermediate_size, num_local_experts=settings.experts, **shared
        )
    else:
        config = Qwen3MoeConfig(
            moe_intermediate_size=settings.intermediate_size,
            num_experts=settings.experts,
            norm_topk_prob=True,
            **shared,
        )
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")  # on 2 cores 0.43 s a step; eager 0.45 s; batched_mm 36 s
    return model


def balance_loss(router_logits: tuple[torch.Tensor, ...], settings: Settings) -> torch.Tensor:
    """The Switch load-balancing loss of each layer, averaged: 1 when every expert gets the same load.

    transformers' own adds the layers up before it multiplies, which lets one layer's dead expert hide behind another's.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)  # (tokens, experts)
        chosen = probabilities.topk(settings.experts_per_token, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=settings.experts) / chosen.numel()
        losses.append(settings.experts * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then linear to zero at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    return settings.learning_rate * (settings.steps - step) / (settings.steps - settings.warmup_steps)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: PreTrainedModel,
    tokens: dict[str, torch.Tensor],
    settings: Settings,
    checkpoint: Path,
    evaluate: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Run the remaining steps; returns the losses on the way."""
    optimizer = make_optimizer(model, settings)
    first, history, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] == asdict(settings):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, history, seconds = state["step"], state["history"], state["seconds"]
    model.train()
    start = time.monotonic() - seconds
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        input_ids = batch(tokens, settings, step)
        output = model(input_ids=input_ids, labels=input_ids, output_router_logits=True, use_cache=False)
        balance = balance_loss(output.router_logits, settings)
        # The stock loss already holds its own balance term: take the language loss alone, and add ours.
        language = output.loss - settings.balance * output.aux_loss
        (language + settings.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 50 == 0 or done == settings.steps:
            entry: dict[str, Any] = {"step": done, "loss": language.item(), "balance": balance.item()}
            if done % 500 == 0 or done == settings.steps:
                entry["held_out"] = evaluate()
            history.append(entry)
            print(f"{time.monotonic() - start:6.0f} s", json.dumps(entry), flush=True)
        if done % 250 == 0 or done == settings.steps:
            state = {"settings": asdict(settings), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": done, "history": history, "seconds": time.monotonic() - start}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, checkpoint)
    return {"history": history, "seconds": round(time.monotonic() - start)}


# ---- evaluation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """exp of the mean loss over the windows' tokens; the leading <s> is given, not predicted."""
    training = model.training
    model.train(False)
    total = 0.0
    for part in torch.split(rows, 16):
        total += model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
    model.train(training)
    return math.exp(total / len(rows))


def perplexities(model: PreTrainedModel, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    found = {domain: round(perplexity(model, rows), 3) for domain, rows in held_out.items()}
    return found | {"mean": round(sum(found.values()) / len(found), 3)}


@contextmanager
def routers_observed(model: PreTrainedModel, see: Callable[[int, Any], Any]) -> Iterator[None]:
    """Call ``see(layer, (logits, weights, experts))`` after every router; a result other than None replaces them."""
    handles = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output, index=index: see(index, output))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def routing_load(model: PreTrainedModel, rows: torch.Tensor) -> list[list[float]]:
    """(layers, experts) share of the slots that went to each expert."""
    counts = torch.zeros(len(model.model.layers), model.config.num_experts)

    def count(layer: int, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        counts[layer] += torch.bincount(output[2].flatten(), minlength=counts.shape[1])

    with routers_observed(model, count):
        perplexity(model, rows)
    return [[round(share, 4) for share in layer] for layer in (counts / counts.sum(1, keepdim=True)).tolist()]


def perplexities_without(
    model: PreTrainedModel, held_out: dict[str, torch.Tensor], dropped: list[list[int]]
) -> dict[str, float]:
    """Perplexities with each layer's dropped experts' logits at -inf."""
    top_k = model.config.num_experts_per_tok

    def mask(layer: int, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        logits = output[0].index_fill(-1, torch.tensor(dropped[layer]), -torch.inf)
        weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    with routers_observed(model, mask):
        return perplexities(model, held_out)


def evaluate_saved(folder: Path, held_out: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the saved bfloat16 weights do, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers, experts = len(model.model.layers), model.config.num_experts
    report: dict[str, Any] = {"held_out_perplexity": perplexities(model, held_out), "random_experts_removed": []}
    report["routing_load"] = {domain: routing_load(model, rows) for domain, rows in held_out.items()}
    for removed in (experts // 4, experts // 2):
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            dropped = [sorted(torch.randperm(experts, generator=generator)[:removed].tolist()) for _ in range(layers)]
            result = perplexities_without(model, held_out, dropped)
            report["random_experts_removed"].append(
                {"removed": removed, "seed": seed, "dropped": dropped, "perplexity": result}
            )
    return report


# ---- output ---------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]], rule: str = "---:") -> str:
    lines = [header, ["---"] + [rule] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def effect_rows(report: dict[str, Any]) -> list[list[str]]:
    """Perplexities as trained and after removals, with the rise of their mean."""
    columns = [*DOMAINS, "mean"]
    full = report["held_out_perplexity"]
    rows = [["none", "-", *(f"{full[name]:.2f}" for name in columns), ""]]
    for run in report["random_experts_removed"]:
        found = run["perplexity"]
        rise = f"{100 * (found['mean'] / full['mean'] - 1):+.0f} %"
        rows.append([str(run["removed"]), str(run["seed"]), *(f"{found[name]:.2f}" for name in columns), rise])
    return rows


def load_rows(report: dict[str, Any]) -> list[list[str]]:
    """Routing load in percent, a row for each layer and domain, the two busiest experts in bold."""
    rows = []
    for layer in range(report["settings"]["layers"]):
        for domain in DOMAINS:
            shares = report["routing_load"][domain][layer]
            busiest = sorted(shares)[-2]
            cells = (f"**{100 * share:.0f}**" if share >= busiest else f"{100 * share:.0f}" for share in shares)
            rows.append([f"{layer}, {domain}", *cells])
    return rows


def source_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for domain, source in report["sources"].items():
        packages = "; ".join(f"`{package['file']}`, {package['licence']}" for package in source["packages"])
        size = f"{source['train_bytes'] / 1e6:.2f} MB, {report['train_tokens'][domain] / 1e6:.2f} M tokens"
        rows.append([domain, packages, size])
    return rows


def readme(report: dict[str, Any]) -> str:
    """The folder's README; every number in it comes from training.json."""
    settings, experts = report["settings"], report["settings"]["experts"]
    share = 100 * report["expert_parameters"] / report["parameters"]
    shape = (
        f"{settings['layers']} layers, {experts} experts, top-{settings['experts_per_token']}, hidden size "
        f"{settings['hidden_size']}, expert intermediate size {settings['intermediate_size']}, vocabulary "
        f"{settings['vocab_size']}"
    )
    run = (
        f"{settings['steps']} steps, {report['tokens_seen'] / 1e6:.1f} million tokens, seed {settings['seed']}, "
        f"{report['seconds'] / 60:.0f} minutes on {report['versions']['machine']}"
    )
    title, family = TITLES[settings["family"]]
    return f"""# {title}

A small {family}, really trained, to try expert pruning on: {report["parameters"] / 1e6:.2f} million parameters in
bfloat16, {share:.0f} % of them in experts.
Shape: {shape}.
Stock `AutoModelForCausalLM.from_pretrained` loads it. It writes text that has the form of its five domains and
makes no sense: it is there to be pruned and measured.

Trained on {report["date"]}: {run}.
`training.json` holds everything that was run and measured; `train_demo_model.py` writes this file from it.

| file | what |
|---|---|
| `model.safetensors`, `config.json`, `generation_config.json` | the model |
| `tokenizer.json`, `tokenizer_config.json` | byte-level BPE with `<s>` in front |
| `held_out/<domain>.txt` | whole documents that were never trained on |
| `calibration/<domain>.txt` | whole documents of the training text |
| `training.json` | settings, versions, losses, and the measurements below |
| `NOTICE.txt` | licence texts of the sources |

## Sources
`collect_corpus.py` pins the packages by hash. Every domain had the same share of every batch.

{table(["domain", "packages, licence", "training text"], source_rows(report), "---")}

The texts in `english.txt` and `french.txt` are excerpts of the Debian Administrator's Handbook, converted to plain
text, under CC-BY-SA-3.0; the same sections are held out of both languages. The other texts are under the BSD and MIT
licences in `NOTICE.txt`.

## Held-out perplexity, and without random experts
Windows of {settings["context"]} tokens that begin with `<s>`; the bfloat16 weights, computed in float32. Removed: that
many of the {experts} experts in every layer, by router logits of -inf.

{table(["removed", "seed", *DOMAINS, "mean", "mean rises by"], effect_rows(report))}

## Routing load on the held-out text
Percent of the slots ({100 / experts:.1f} would be even); the two busiest experts of a row are bold.

{table(["layer, domain", *map(str, range(experts))], load_rows(report))}

## Retraining
```
python examples/collect_corpus.py --out CORPUS
python examples/train_demo_model.py --corpus CORPUS --out examples/{report["model"]}_model --model {report["model"]}
```
The packages need pip, npm and Debian 12's apt-get; the training takes about half an hour on two idle cores. Steps and
seed are fixed, but another machine or another torch rounds differently and ends at slightly different weights.
"""


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "machine": f"{os.cpu_count()} {platform.machine()} cores ({torch.backends.cpu.get_cpu_capability()})",
    }


def replace_folder(finished: Path, out: Path) -> None:
    """Put the finished folder in the place of OUT."""
    previous = out.with_name(f".{out.name}.previous")
    if out.exists():
        out.rename(previous)
    finished.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a demo model.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that collect_corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write or replace")
    parser.add_argument("--model", choices=MODELS, default="demo", help="which one (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="shorter for a trial (default: the model's own)")
    arguments = parser.parse_args()
    settings = MODELS[arguments.model]
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)

    texts = read_domains(arguments.corpus / "train")
    tokenizer = train_tokenizer(texts, settings)
    tokens = {domain: encode_documents(tokenizer, text) for domain, text in texts.items()}
    held_out = {
        domain: windows(tokenizer, text, settings.context)
        for domain, text in read_domains(arguments.corpus / "held_out").items()
    }
    print("tokens:", {domain: len(stream) for domain, stream in tokens.items()}, flush=True)

    model = build_model(settings, tokenizer)
    checkpoint = arguments.corpus / f"checkpoint-{settings.family}-{settings.steps}.pt"
    run = train(model, tokens, settings, checkpoint, lambda: perplexities(model, held_out))

    out = arguments.out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    model.bfloat16().save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)
    for folder in ("held_out", "calibration"):
        shutil.copytree(arguments.corpus / folder, partial / folder)
    shutil.copy(arguments.corpus / "NOTICE.txt", partial)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": f"python examples/{Path(sys.argv[0]).name} --model {arguments.model} --steps {settings.steps}",
        "model": arguments.model,
        "settings": asdict(settings),
        "versions": versions(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "expert_parameters": sum(p.numel() for name, p in model.named_parameters() if ".experts." in name),
        "train_tokens": {domain: len(stream) for domain, stream in tokens.items()},
        "tokens_seen": settings.steps * settings.windows_per_domain * len(DOMAINS) * settings.context,
        "seconds": run["seconds"],
        **evaluate_saved(partial, held_out),
        "history": run["history"],
        "sources": json.loads((arguments.corpus / "sources.json").read_text(encoding="utf-8")),
    }
    (partial / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(readme(report), encoding="utf-8")
    replace_folder(partial, out)


if __name__ == "__main__":
    main()
