"""Our plugin inside vLLM: its tokens are those of transformers with ``moe_ext.patch``. Opt-in: ``make test-vllm``."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import moe_ext
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.models.blocks import moe_blocks
from moe_ext.models.config_section import GateScale
from tests.support.batches import random_tokens
from tests.support.families import build, channels_for, keep_of, plan_for
from tests.support.paths import DEMO_MODEL
from tests.support.vllm_process import STOCK, VLLM, environment, generated

pytestmark = pytest.mark.skipif(not VLLM, reason="opt-in: make test-vllm")

TOKENS = 24
# A head size that vLLM's attention for CPUs has.
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
SKIPPING = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "gpt_oss"]
# vLLM chooses a kernel of its own before ours; it has none for gpt-oss's experts of other widths.
WIDTHS: dict[str, dict[str, Any]] = {"gpt_oss": {"intermediate_size": 32}}
SCALES: dict[str, GateScale] = {"mixtral": 4, "qwen3_moe": "none"}
PROMPTS = [random_tokens(1, length, seed=seed, vocabulary=256)[0].tolist() for seed, length in enumerate((5, 24, 61))]
LIBRARY = {"MOE_EXT_VLLM_LIBRARY": str(next(Path(moe_ext.__file__).parent.glob("_C*.so")))}
NO_LIBRARY = {"MOE_EXT_VLLM_LIBRARY": ""}
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 4}


def skipping(family: str, folder: Path, scale: GateScale = "kept") -> Path:
    """A random model with thresholds below which about half of the ratios lie."""
    model = build(family, **SIZES, **WIDTHS.get(family, {}))
    blocks = moe_blocks(model)
    thresholds = torch.linspace(0.75, 0.45, blocks[0].top_k - 1).repeat(len(blocks), 1)
    moe_ext.patch(model, skip=thresholds, renormalise=scale).save_pretrained(folder)
    return folder


def pruned(family: str, folder: Path, skip: bool = False) -> Path:
    """A random model whose second layer has fewer experts than the first."""
    model = build(family, **SIZES)
    moe_ext.prune(model, plan_for(model, keep_of(model, family, fewer=1)))
    if skip:
        blocks = moe_blocks(model)
        moe_ext.patch(model, skip=torch.full((len(blocks), blocks[0].top_k - 1), 0.6))
    model.save_pretrained(folder)
    return folder


def thinned(family: str, folder: Path) -> Path:
    """A random model whose second layer has experts of another width than the others: two checkpoints in one."""
    parts = {}
    for width in (20, 12):
        model = build(family, **SIZES)
        plan = plan_for(model, tuple(tuple(range(block.num_experts)) for block in moe_blocks(model)))
        moe_ext.prune(model, replace(plan, channels=channels_for(model, width, seed=2))).save_pretrained(folder)
        parts[width] = load_file(folder / "model.safetensors")
        if width == 20:
            config = json.loads((folder / "config.json").read_text())
    tensors = {name: parts[12 if ".layers.1." in name else 20][name] for name in parts[20]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    field = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    (folder / "config.json").write_text(json.dumps({**config, "per_layer_config": {"1": {field: 12}}}))
    return folder


def changed(folder: Path, source: Path, **section: Any) -> Path:
    """A checkpoint with another ``moe_ext`` section in its config."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.pop("moe_ext", None)
    config.update({"moe_ext": section["moe_ext"]} if "moe_ext" in section else section)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {f"{family}, skips": skipping(family, folder / f"{family}, skips") for family in SKIPPING}
    made |= {
        f"{family}, {scale}": skipping(family, folder / f"{family}, {scale}", scale) for family, scale in SCALES.items()
    }
    for family in ("mixtral", "qwen3_moe"):
        made[f"{family}, uneven"] = pruned(family, folder / f"{family}, uneven")
        made[f"{family}, thin"] = thinned(family, folder / f"{family}, thin")
    made["mixtral, uneven, skips"] = pruned("mixtral", folder / "mixtral, uneven, skips", skip=True)
    source = made["mixtral, skips"]
    made["novices"] = changed(folder / "novices", source, moe_ext={"experts_left": {"0": 5}})
    made["betas"] = changed(folder / "betas", source, betas={"0": 0.5, "1": 0.6, "2": 0.7})
    rows = [[0.5] * 3] * 2
    made["list"] = changed(folder / "list", made["qwen2_moe, skips"], moe_ext={"skip_thresholds": rows})
    by_layer = {"0": rows[0], "1": rows[0]}
    made["wrong"] = changed(folder / "wrong", made["qwen2_moe, skips"], moe_ext={"skip_thresholds": by_layer})
    made["scale"] = changed(folder / "scale", source, moe_ext={"renormalise": 99})
    return made


def job(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    return {"checkpoint": str(checkpoint), "prompts": PROMPTS, "settings": settings}


@pytest.fixture(scope="module")
def with_our_kernel(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = {name: job(path) for name, path in checkpoints.items()}
    jobs["chunked"] = job(checkpoints["qwen3_moe, skips"], **CHUNKED)
    jobs["prefix"] = job(checkpoints["mixtral, skips"], enable_prefix_caching=True)
    jobs["prefix"]["prompts"] = [PROMPTS[2], [*PROMPTS[2][:48], *PROMPTS[0]]]
    jobs["experts"] = job(checkpoints["mixtral, uneven"], enable_expert_parallel=True)
    jobs["shared out"] = job(checkpoints["mixtral, skips"], enable_expert_parallel=True, tensor_parallel_size=2)
    jobs["other code"] = job(checkpoints["mixtral, skips"], model_impl="transformers")
    return generated(tmp_path_factory.mktemp("ours"), jobs, TOKENS, {**LIBRARY, "MOE_EXT_VLLM_COUNT": "60"})


@pytest.fixture(scope="module")
def with_its_kernel(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = {name: job(path) for name, path in checkpoints.items() if "skips" in name}
    return generated(tmp_path_factory.mktemp("its"), jobs, TOKENS, NO_LIBRARY)


def greedy(checkpoint: Path, prompts: list[list[int]], skip: bool = True) -> list[list[int]]:
    """The tokens of a patched model in transformers; no step is near a tie."""
    model: PreTrainedModel = moe_ext.from_pretrained(checkpoint, dtype=torch.float32).eval()
    moe_ext.patch(model) if skip else moe_ext.patch(model, skip=None)
    model.generation_config.eos_token_id = None
    tokens = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(out.logits).topk(2).values
        # float32 sums in another order move logits of about 10 by 1e-5: no tie can turn
        assert float((best[..., 0] - best[..., 1]).min()) > 2e-4
        tokens.append(out.sequences[0, len(prompt) :].tolist())
    return tokens


NAMES = [
    *(f"{family}, skips" for family in SKIPPING),
    *(f"{family}, {scale}" for family, scale in SCALES.items()),
    *(f"{family}, {what}" for family in ("mixtral", "qwen3_moe") for what in ("uneven", "thin")),
    "mixtral, uneven, skips",
    "betas",
]


@pytest.mark.parametrize("name", NAMES)
def test_vllm_generates_the_tokens_of_a_patched_model(
    name: str, checkpoints: dict[str, Path], with_our_kernel: dict[str, Any]
) -> None:
    assert "tokens" in with_our_kernel[name], with_our_kernel[name]
    assert with_our_kernel[name]["tokens"] == greedy(checkpoints[name], PROMPTS)


@pytest.mark.parametrize("name", [name for name in NAMES if "skips" in name])
def test_a_skipped_slot_of_vllms_kernel_gives_the_same_tokens(
    name: str, with_our_kernel: dict[str, Any], with_its_kernel: dict[str, Any]
) -> None:
    assert "tokens" in with_its_kernel[name], with_its_kernel[name]
    assert with_its_kernel[name]["tokens"] == with_our_kernel[name]["tokens"]


def test_the_kernels_are_those_that_were_asked_for(
    with_our_kernel: dict[str, Any], with_its_kernel: dict[str, Any]
) -> None:
    assert "Using moe_ext's experts kernel" in with_our_kernel["log"]
    assert "Not using moe_ext's experts kernel: MOE_EXT_VLLM_LIBRARY is empty" in with_its_kernel["log"]


def test_vllms_backend_of_transformers_code_skips_too(with_our_kernel: dict[str, Any]) -> None:
    assert with_our_kernel["other code"]["tokens"] == with_our_kernel["mixtral, skips"]["tokens"]


def test_experts_shared_out_among_ranks_give_the_same_tokens(with_our_kernel: dict[str, Any]) -> None:
    assert with_our_kernel["shared out"].get("tokens") == with_our_kernel["mixtral, skips"]["tokens"]


def test_prompts_in_pieces_give_the_same_tokens(with_our_kernel: dict[str, Any]) -> None:
    assert with_our_kernel["chunked"]["tokens"] == with_our_kernel["qwen3_moe, skips"]["tokens"]


def test_prompts_with_a_cached_beginning_give_the_tokens_of_a_patched_model(
    checkpoints: dict[str, Path], with_our_kernel: dict[str, Any]
) -> None:
    prompts = [PROMPTS[2], [*PROMPTS[2][:48], *PROMPTS[0]]]
    assert with_our_kernel["prefix"]["tokens"] == greedy(checkpoints["mixtral, skips"], prompts)


def test_skipped_slots_are_said_at_exit(with_our_kernel: dict[str, Any]) -> None:
    assert "moe_ext: slots skipped: model.layers.0.block_sparse_moe.experts " in with_our_kernel["log"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("novices", "means in the place of experts"),
        ("list", "has 2 rows and does not say to which of the 3 decoder layers"),
        ("wrong", "has none skip thresholds of this layer; expected 3"),
        ("scale", "renormalise is 99; expected 2 to 8 experts"),
        ("experts", "different numbers of experts, which vLLM's expert parallelism"),
    ],
)
def test_what_vllm_would_serve_otherwise_than_the_checkpoint_says_is_refused_by_name(
    name: str, said: str, with_our_kernel: dict[str, Any]
) -> None:
    assert said in with_our_kernel[name].get("error", "no error")


def scores(checkpoint: Path, prompts: list[list[int]], skip: bool) -> torch.Tensor:
    """What a patched model in bfloat16 gives the tokens of the prompts, but for the first of each."""
    model = moe_ext.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    moe_ext.patch(model) if skip else moe_ext.patch(model, skip=None)
    found = []
    for prompt in prompts:
        tokens = torch.tensor(prompt)
        with torch.no_grad():
            said = model(tokens[None]).logits[0, :-1].float().log_softmax(-1)
        found.append(said.gather(1, tokens[1:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("kernel", [LIBRARY, NO_LIBRARY], ids=["ours", "its"])
def test_bfloat16_scores_are_those_of_a_patched_model(kernel: dict[str, str], tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(DEMO_MODEL)
    folder = tmp_path / "demo"
    moe_ext.patch(model, skip=torch.full((4, 1), 0.9)).save_pretrained(folder)
    texts = [path.read_text()[:300] for path in sorted((DEMO_MODEL / "held_out").iterdir())[:4]]
    prompts = [tokenizer(text).input_ids[:100] for text in texts]
    jobs = {"demo": {"checkpoint": str(folder), "prompts": prompts, "scores": True, "settings": {"dtype": "bfloat16"}}}
    got = torch.cat([torch.tensor(row) for row in generated(tmp_path, jobs, 1, kernel)["demo"]["scores"]])
    off = (got - scores(folder, prompts, skip=True)).abs().mean()
    # Roundings of bfloat16, which may also skip another expert where a ratio is near its threshold; not skipping at all
    # is farther away.
    assert off < 0.05
    assert off < 0.3 * (got - scores(folder, prompts, skip=False)).abs().mean()


REFUSED = """
from types import SimpleNamespace as Fields
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
import moe_ext_vllm
moe_ext_vllm.register()
from moe_ext_vllm.checkpoint import Checkpoint
from moe_ext_vllm.model import _look_over, _refuse
from moe_ext_vllm.runner import SkippingRunner

class OtherRunner(MoERunner):
    def __init__(self):
        pass
    layer_name = "model.layers.0.mlp.experts"

text = Fields(num_hidden_layers=2)
model_config = Fields(hf_text_config=text, get_layers_start_end_indices=lambda parallel: (0, 2))
runner = SkippingRunner.__new__(SkippingRunner)
alone = Fields(moe_parallel_config=Fields(use_ep=False))
runner.__dict__.update(skips=True, moe_config=alone, layer_name="model.layers.0.mlp.experts")
method = Fields(experts_cls=object, is_monolithic=True)
runner.__dict__.update(_modules={}, _parameters={}, _buffers={}, routed_experts=Fields(quant_method=method))
ranks = SkippingRunner.__new__(SkippingRunner)
shared = Fields(moe_parallel_config=Fields(use_ep=True))
ranks.__dict__.update(moe_config=shared, layer_name="model.layers.0.mlp.experts")
rows = Checkpoint({0: (0.5,)})
unequal = Checkpoint({}, unequal=frozenset({"num_experts"}))
for call in (
    lambda: _refuse(rows, Fields(enable_eplb=True, enable_expert_parallel=True)),
    lambda: _refuse(unequal, Fields(enable_eplb=False, enable_expert_parallel=True)),
    lambda: _look_over(Fields(modules=lambda: [OtherRunner.__new__(OtherRunner)]), rows, model_config, None),
    lambda: _look_over(Fields(modules=lambda: [runner]), Checkpoint({0: (0.5,), 1: (0.5,)}), model_config, None),
    lambda: runner._apply_quant_method(),
    lambda: runner._carried_to(type("TrtLlmBf16ExpertsModular", (), {})),
    lambda: ranks._carried_to(type("CPUUnquantizedExperts", (), {})),
):
    try:
        call()
    except ValueError as error:
        print("said:", error)
"""


def test_what_this_processor_cannot_run_is_refused_by_name() -> None:
    result = subprocess.run(
        [VLLM, "-c", REFUSED], env=environment(LIBRARY), capture_output=True, text=True, check=False
    )
    said = [line for line in result.stdout.splitlines() if line.startswith("said: ")]
    assert len(said) == 7, result.stderr[-2000:]
    assert "--enable-eplb" in said[0]
    assert "--enable-expert-parallel" in said[1]
    assert "as OtherRunner, which moe_ext_vllm does not know" in said[2]
    assert "thresholds of decoder layers [1]" in said[3]
    assert "routes by itself. Choose another with --moe-backend" in said[4]
    assert "(TrtLlmBf16ExpertsModular). Choose another with --moe-backend" in said[5]
    assert "Serve without --enable-expert-parallel, or with moe_ext's kernel" in said[6]


def test_a_graph_compiled_without_skipping_is_not_used_with_it(
    checkpoints: dict[str, Path], with_our_kernel: dict[str, Any], tmp_path: Path
) -> None:
    jobs = {"mixtral": job(checkpoints["mixtral, skips"], enforce_eager=False)}
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    skipped_nothing = generated(tmp_path, jobs, TOKENS, {**cache, **STOCK})["mixtral"]["tokens"]
    assert skipped_nothing == greedy(checkpoints["mixtral, skips"], PROMPTS, skip=False)
    skipped = generated(tmp_path, jobs, TOKENS, {**cache, **LIBRARY})["mixtral"]["tokens"]
    assert skipped == with_our_kernel["mixtral, skips"]["tokens"]
    assert skipped != skipped_nothing


MOVED = """
import vllm.model_executor.models.utils as utils
import vllm.model_executor.layers.fused_moe.runner.moe_runner as runner
del utils.make_layers
runner.MoERunner.__init__ = lambda self, name: None
import moe_ext_vllm
try:
    moe_ext_vllm.register()
except RuntimeError as error:
    print("said:", error)
"""


TAKEN = """
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
RoutedExperts.register_oot(type("Another", (RoutedExperts,), {}), name="RoutedExperts")
import moe_ext_vllm
try:
    moe_ext_vllm.register()
except RuntimeError as error:
    print("said:", error)
"""


def test_another_plugin_in_the_same_place_is_an_error() -> None:
    result = subprocess.run([VLLM, "-c", TAKEN], env=environment(LIBRARY), capture_output=True, text=True, check=True)
    assert "in the place of vLLM's RoutedExperts" in result.stdout.partition("said: ")[2]


def test_a_vllm_that_moved_a_hook_is_one_error() -> None:
    result = subprocess.run([VLLM, "-c", MOVED], env=environment(LIBRARY), capture_output=True, text=True, check=True)
    said = result.stdout.partition("said: ")[2]
    assert "lacks vllm.model_executor.models.utils.make_layers, " in said
    assert "moe_runner.MoERunner.__init__" in said
    assert "MOE_EXT_VLLM=0" in said
