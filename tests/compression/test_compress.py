"""One command for the whole job: what the single commands give, whatever interrupts it, and what is refused."""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ext
from moe_ext import PruningPlan
from moe_ext.calibration import calibrate as calibration
from moe_ext.calibration.statistics import ExpertStatistics
from moe_ext.checkpoints.load_save import load_checkpoint, save_checkpoint
from moe_ext.compression import compress as stages
from moe_ext.compression import work_folder
from moe_ext.compression.texts import check_judged, held_back
from moe_ext.data.tokens import Templated
from moe_ext.pruning import refit_layers
from moe_ext.reconstruction.layer_search import LayerSearch
from moe_ext.runtime.batches import read_domains
from moe_ext.storage.files import replace_folder
from tests.support.checkpoints import declare_float8, quantise, rewritten
from tests.support.command_line import inside, moe_json
from tests.support.letters import LETTERS, letter_tokenizer

METHODS = {
    "thin": "--size 0.5 --multiple 4",
    "thin-obs": "--size 0.5 --multiple 4",
    "experts": "--keep 3",
    "experts+thin": "--ratio 0.25 --size 0.5 --multiple 4",
    "search": "--keep 3",
}
DECISIONS = {
    "thin": ("--channels energy", "plan {s} --size 0.5 --multiple 4 --out {p}"),
    "thin-obs": ("--channels gram", "plan {s} --size 0.5 --multiple 4 --select obs --out {p}"),
    "experts": ("", "plan {s} --keep 3 --criterion weighted_ean --out {p}"),
    "experts+thin": (
        "--channels energy",
        "plan {s} --ratio 0.25 --criterion weighted_ean --size 0.5 --multiple 4 --out {p}",
    ),
    "search": (
        "",
        "search model --text {t} --keep 3 --loss fisher --statistics {s} --window 16 --sequential --out {p}",
    ),
}
"""What calibration observes of channels, and the command that makes the plan."""


def small_model(top_k: int = 2) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=top_k,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, text of two domains, and other text to judge on."""
    folder = tmp_path_factory.mktemp("source")
    save_checkpoint(small_model(), letter_tokenizer(bos=True), folder / "model")
    drawn = random.Random(0)
    for name, lengths in (("text", (333, 250)), ("judge", (90, 70))):
        (folder / name).mkdir()
        for domain, length in zip(("a", "b"), lengths, strict=True):
            (folder / name / f"{domain}.txt").write_text("".join(drawn.choices(LETTERS, k=length)))
    return folder


@pytest.fixture
def here(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a copy of them."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few calibration tokens
        yield tmp_path


def content(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def answer(command: str) -> Any:
    return moe_json(*command.split())


def run(command: str) -> None:
    assert inside(*command.split(), "--json") == 0, command


def single_commands(method: str, text: str, folder: str) -> None:
    """What a user types without `compress`."""
    Path(folder).mkdir()
    channels, decide = DECISIONS[method]
    names = {"s": f"{folder}/statistics.safetensors", "p": f"{folder}/plan.json", "t": text}
    run(f"calibrate model --text {text} {channels} --window 16 --sequential --out {names['s']}")
    run(decide.format(**names))
    out = f"{folder}/out"
    run(f"prune model {names['p']} --refit --text {text} --window 16 --out {out}")
    run(f"calibrate {out} --text {text} --window 16 --sequential --out {folder}/result-statistics.safetensors")
    run(f"skip {out} {folder}/result-statistics.safetensors --in-place")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_what_the_single_commands_write_byte_for_byte(method: str, here: Path) -> None:
    asked = f"{METHODS[method]} --method {method} --window 16"
    found = answer(f"compress model --text text --judge judge --out out {asked} --keep-files kept")
    single_commands(method, "text", "single")
    assert content("out") == content("single/out")
    kept = content("kept")
    assert json.loads(kept.pop("result.json")) == found
    if method == "search":
        kept["plan.safetensors"] = kept.pop("search.safetensors")  # its default name
    assert kept == {name: data for name, data in content("single").items() if not name.startswith("out/")}
    assert sorted(path.name for path in here.iterdir()) == ["judge", "kept", "model", "out", "single", "text"]
    stock = len({len(kept) for kept in PruningPlan.load("single/plan.json").keep}) == 1
    assert found["stock"] == stock


@pytest.mark.parametrize("method", ["thin", "search"])
def test_before_and_after_are_what_eval_finds(method: str, here: Path) -> None:
    found = answer(
        f"compress model --text text --judge judge --out out {METHODS[method]} --method {method} --window 16"
    )
    judged = answer("eval out --text judge --reference model --window 16")
    assert found["after"]["perplexity"] == judged["perplexity"]
    assert found["tokens"] == judged["tokens"]
    assert found["skip_rate"] == judged["skip_rate"] > 0
    assert found["top1"] == judged["top1"]
    # The reference's probabilities waited in float16.
    assert found["kl"] == pytest.approx(judged["kl"], rel=5e-3)
    before = answer("eval model --text judge --window 16")
    assert found["before"]["perplexity"] == pytest.approx(before["perplexity"], rel=1e-6)
    assert found["before"]["parameters"] == before["parameters"]
    assert found["after"]["weight_bytes"] == judged["weight_bytes"] < before["weight_bytes"]


def test_the_last_tenth_of_every_domain_is_judged_on_and_not_calibrated_on(here: Path) -> None:
    found = answer("compress model --text text --size 0.5 --multiple 4 --window 16 --out out")
    for part in ("first", "last"):
        Path(part).mkdir()
    for domain, text in read_domains([Path("text")]).items():
        cut = len(text) - len(text) // 10
        Path("first", f"{domain}.txt").write_text(text[:cut])
        Path("last", f"{domain}.txt").write_text(text[cut:])
    single_commands("thin", "first", "single")
    assert content("out") == content("single/out")
    assert found["held_back"] == 0.1
    judged = answer("eval out --text last --window 16")
    assert (found["tokens"], found["after"]["perplexity"]) == (judged["tokens"], judged["perplexity"])


def test_what_is_not_wanted_is_left_out_and_the_table_says_what_is_known(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "compress model --text text --size 0.5 --multiple 4 --window 16"
    assert inside(*f"{asked} --no-refit --no-skip --no-judge --out plain".split()) == 0
    assert "perplexity" not in capsys.readouterr().out
    run("calibrate model --text text --channels energy --window 16 --sequential --out s.safetensors")
    run("plan s.safetensors --size 0.5 --multiple 4 --out plan.json")
    run("prune model plan.json --out single")
    assert content("plain") == content("single")
    capsys.readouterr()
    assert inside(*f"{asked} --out out".split()) == 0
    said = capsys.readouterr().out
    for part in ("weights", "parameters", "perplexity, a", "KL", "top-1 alike", "slots skipped", "the last 10%"):
        assert part in said
    assert "stock transformers loads it" in said
    loaded, _ = load_checkpoint("out")
    assert f"{loaded.num_parameters() / 1e6:.2f}M" in said


def test_bytes_to_fit_are_what_the_plan_command_takes(here: Path) -> None:
    fits = sum(each.numel() * each.element_size() for each in small_model().parameters()) * 3 // 4
    found = answer(f"compress model --text text --fit {fits}B --multiple 2 --no-judge --window 16 --out out")
    assert found["after"]["weight_bytes"] <= fits < found["before"]["weight_bytes"]


def test_the_python_twin_takes_texts_and_returns_what_the_command_prints(here: Path) -> None:
    options: Any = {"method": "experts", "keep": 3, "refit": False, "skip": False, "judge": None, "progress": False}
    found = moe_ext.compress("model", read_domains([Path("text")]), "out", window=16, **options)
    printed = answer(
        "compress model --text text --method experts --keep 3 --no-refit --no-skip --no-judge --window 16 --out o"
    )
    assert content("out") == content("o")
    assert json.loads(found.to_json()) == {**printed, "checkpoint": str(here / "out")}


def test_a_name_on_the_hub_is_compressed_from_its_snapshot(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = here / "hub" / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    for file in Path("model").iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="there is no folder a/c, and the Hub gives no such checkpoint"):
        moe_ext.compress("a/c", {"a": "abc"}, "out", size=0.5)
    asked = "--text text --size 0.5 --multiple 4 --no-judge --window 16"
    run(f"compress a/b {asked} --out of-hub")
    run(f"compress model {asked} --out out")
    assert content("of-hub") == content("out")


def killing(target: Any, name: str, at: int, *, after: bool = False) -> Callable[[pytest.MonkeyPatch], None]:
    """A kill before or after the call of that number of a function."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        whole, calls = getattr(target, name), list[None]()

        def killed(*args: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) == at and not after:
                raise KeyboardInterrupt
            result = whole(*args, **options)
            if len(calls) == at and after:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(target, name, killed)

    return patch


KILLS: dict[str, dict[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "thin": {
        "in the calibration": killing(calibration, "take", 2),
        "once the statistics are written": killing(ExpertStatistics, "save", 1, after=True),
        "once planned": killing(PruningPlan, "save", 1, after=True),
        "in the refit": killing(refit_layers._Refit, "fit", 2),
        "once pruned": killing(stages, "prune_checkpoint", 1, after=True),
        "in the second calibration": killing(calibration, "take", 2),
        "once the thresholds are written": killing(stages, "write_thresholds", 1, after=True),
        "before judging": killing(stages, "judged", 1),
        "before the result is in place": killing(work_folder, "put_in_place", 1),
        "once the result is in place": killing(work_folder.WorkFolder, "end", 1),
        "once the files are kept": killing(work_folder, "_remove", 1),
        "amid cleaning up": killing(work_folder, "_remove", 2),
    },
    "search": {
        "in the search": killing(LayerSearch, "search", 2),
        "once searched": killing(stages, "search", 1, after=True),
        "in the refit": killing(refit_layers._Refit, "fit", 2),
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "thin": {"size": 0.5, "multiple": 4},
    "search": {"keep": 3},
}


@pytest.mark.parametrize("method", KILLS)
def test_killed_in_every_stage_and_run_again_it_ends_with_the_same_bytes_and_nothing_else(
    method: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = read_domains([Path("text")])

    def job(folder: str) -> moe_ext.Compressed:
        Path(folder).mkdir(exist_ok=True)
        places = {"out": f"{folder}/out", "keep_files": f"{folder}/kept"}
        asked: Any = {"method": method, **SIZES[method], **places, "window": 16, "progress": False}
        return moe_ext.compress("model", texts, **asked)

    source, expected, placed = content("model"), job("whole"), False
    for when, kill in KILLS[method].items():
        with monkeypatch.context() as patched:
            kill(patched)
            with pytest.raises(KeyboardInterrupt):
                job("killed")
        placed = placed or when == "once the result is in place"
        assert Path("killed/out").exists() == placed, when
    again = job("killed")
    assert json.loads(again.to_json()) == {**json.loads(expected.to_json()), "checkpoint": str(here / "killed/out")}
    ours, theirs = content("killed"), content("whole")
    ours["kept/result.json"] = ours["kept/result.json"].replace(b"killed/out", b"whole/out")
    assert ours == theirs
    assert sorted(path.name for path in Path("killed").iterdir()) == ["kept", "out"]
    assert content("model") == source
    with pytest.raises(FileExistsError):
        job("killed")


def test_finished_stages_do_not_run_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def noted(name: str, whole: Callable[..., Any], stops: bool) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            ran.append(name)
            if stops:
                raise OSError("the disk is full")
            return whole(*args, **options)

        return call

    def job() -> None:
        moe_ext.compress("model", read_domains([Path("text")]), "out", size=0.5, multiple=4, window=16, progress=False)

    for stop in ("prune_checkpoint", "calibrate", "record_reference", "judged"):
        with monkeypatch.context() as patched:
            for name in ("calibrate", "prune_checkpoint", "record_reference", "judged"):
                patched.setattr(stages, name, noted(name, vars(stages)[name], name == stop))
            with pytest.raises(OSError, match="the disk is full"):
                job()
    first, once_more = ["calibrate", "prune_checkpoint"], ["prune_checkpoint", "calibrate"]
    assert ran == [*first, *once_more, "calibrate", "record_reference", "record_reference", "judged"]
    job()
    assert Path("out").is_dir()


def test_another_job_does_not_go_on_with_what_a_killed_one_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = read_domains([Path("text")])
    options: Any = {"multiple": 4, "window": 16, "judge": None, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(stages, "write_thresholds", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            moe_ext.compress("model", texts, "out", size=0.5, **options)
    assert Path(".out.compress/checkpoint").is_dir()
    moe_ext.compress("model", texts, "out", size=0.75, **options)
    moe_ext.compress("model", texts, "fresh", size=0.75, **options)
    assert content("out") == content("fresh")
    assert not Path(".out.compress").exists()


def test_what_comes_to_the_place_meanwhile_is_not_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vars(stages)["judged"]

    def taken(*args: Any) -> Any:
        with replace_folder("out") as temporary:
            (temporary / "mine").write_text("mine")
        return whole(*args)

    monkeypatch.setattr(stages, "judged", taken)
    with pytest.raises(FileExistsError, match="already exists"):
        moe_ext.compress("model", read_domains([Path("text")]), "out", size=0.5, multiple=4, window=16, progress=False)
    assert content("out") == {"mine": b"mine"}
    assert sorted(path.name for path in here.iterdir()) == ["judge", "model", "out", "text"]


REFUSED = {
    "--size 0": (1, "size: expected a share in (0, 1), got 0.0"),
    "--size 1.5": (1, "size: expected a share in (0, 1), got 1.5"),
    "--size nan": (1, "size: expected a share in (0, 1), got nan"),
    "--size 0.1": (1, "leaves fewer than 64 of 24 channels"),
    "--size 0.5 --multiple 0": (1, "multiple: expected a whole number of 1 or more, got 0"),
    "--size 0.5 --multiple 4 --blocks 5": (1, "blocks: expected a divisor of the 24 channels"),
    "--size 0.5 --fit 1GB": (2, "give --size or --fit, one of them"),
    "--fit 12": (1, "fit: expected a number of bytes such as 48GB"),
    "--fit 1GB": (1, "no channel has to go"),
    "--fit 1kB --multiple 4": (1, "fit: expected"),
    "": (1, "method 'thin': expected one of size and fit, got size=None, fit=None"),
    "--keep 3": (1, "method 'thin': expected one of size and fit"),
    "--size 0.5 --multiple 4 --keep 3": (1, "method 'thin': takes none of keep and ratio, got keep=3, ratio=None"),
    "--method experts": (1, "method 'experts': expected one of keep and ratio"),
    "--method experts --keep 3 --ratio 0.5": (2, "give --keep or --ratio, one of them"),
    "--method experts --keep 3 --size 0.5": (1, "method 'experts': takes none of size and fit"),
    "--method experts --keep 1": (1, "keep: 1 keeps 1 of 4 experts"),
    "--method experts --keep 0": (1, "keep: expected a whole number of 1 or more, got 0"),
    "--method experts --ratio 1": (1, "ratio: expected a share in (0, 1), got 1.0"),
    "--method search --keep 5": (1, "keep: 5 keeps 5 of 4 experts"),
    "--method experts+thin --keep 3 --multiple 4 --size 0.8": (1, "is no less than what the kept experts have"),
    "--method magic --size 0.5": (2, "magic"),
    "--size 0.5 --multiple 4 --judge judge --no-judge": (2, "give --judge or --no-judge, one of them"),
    "--size 0.5 --multiple 4 --text short.txt": (1, "'short' is too short to hold a tenth back"),
    "--size 0.5 --multiple 4 --judge missing.txt": (1, "text missing.txt does not exist"),
    "--size 0.5 --multiple 4 --window 64": (1, "window: expected no more than the model's 32 positions, got 64"),
    "--size 0.5 --multiple 4 --out full": (1, "already exists; expected a new or an empty folder"),
    "--size 0.5 --multiple 4 --out model": (2, "is what the command reads (model)"),
    "--size 0.5 --multiple 4 --out model/inside": (2, "is in the folder that the command reads"),
    "--size 0.5 --multiple 4 --out nowhere/out": (1, "does not exist"),
    "--size 0.5 --multiple 4 --keep-files out": (2, "--out and --keep-files are both"),
    "--size 0.5 --multiple 4 --keep-files full": (1, "already exists; expected a new or an empty folder"),
}


@pytest.mark.parametrize("options", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(
    options: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("short.txt").write_text("abcdefgh")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    before = content(here)
    monkeypatch.setattr(stages, "locked", lambda *args: pytest.fail("the job began"))
    code, says = REFUSED[options]
    words = options.split()
    for option, value in (("--text", "text"), ("--out", "out"), ("--window", "16")):
        words += [] if option in words else [option, value]
    assert inside("compress", "model", *words) == code
    assert says in " ".join(capsys.readouterr().err.split())
    assert content(here) == before


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("float8", "--blocks 8", "are not fitted; refit=False (--no-refit)"),
        ("float8", "--blocks 8 --no-refit", "do not run in memory; judge=None (--no-judge)"),
        ("float8", "--no-refit --no-judge", "blocks"),
        ("float8", "--no-refit --no-judge --method thin-obs", "blocks"),
        ("one", "", "has one expert a token, which is never skipped; skip=False (--no-skip)"),
        ("uneven", "", "its layers differ already"),
        ("no/where/model", "", "there is no checkpoint folder no/where/model"),
        ("judge", "", "holds neither model.safetensors nor"),
    ],
)
def test_models_that_cannot_be_compressed_so_are_refused(
    model: str, options: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_model(model)
    before = content(here)
    words = f"compress {model} --text text --out out --size 0.67 --multiple 8 --window 16 {options}".split()
    assert inside(*words) == 1
    assert says in " ".join(capsys.readouterr().err.split())
    assert content(here) == before


def float8_model() -> Qwen3MoeForCausalLM:
    """In bfloat16, before it is made float8."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 24, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3MoeConfig(
        vocab_size=len(LETTERS) + 1, num_experts=4, num_experts_per_tok=2, initializer_range=0.5, **sizes, **heads
    )
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def made_model(name: str) -> None:
    """The checkpoint of that name, if it is one that has to be made."""
    if name == "one":
        save_checkpoint(small_model(top_k=1), letter_tokenizer(bos=True), name)
    elif name == "uneven":
        run("search model --text text --keep 3,4 --window 16 --out plan.json")
        run("prune model plan.json --out uneven")
        for file in Path().glob("plan.*"):
            file.unlink()
    elif name == "float8":
        save_checkpoint(float8_model(), letter_tokenizer(bos=True), name)
        rewritten(Path(name), lambda tensors: quantise(tensors, 8))
        declare_float8(Path(name), 8)


def test_float8_is_thinned_by_whole_blocks_without_refit_and_judge(here: Path) -> None:
    made_model("float8")
    asked = "--size 0.67 --multiple 8 --blocks 8 --window 16"
    found = answer(f"compress float8 --text text --out out {asked} --no-refit --no-judge")
    run("calibrate float8 --text text --channels energy --window 16 --sequential --out s.safetensors")
    run("plan s.safetensors --size 0.67 --multiple 8 --blocks 8 --out plan.json")
    run("prune float8 plan.json --out single")
    single, ours = content("single"), content("out")
    assert "skip_thresholds" not in single["config.json"].decode()
    assert "moe_ext" in json.loads(ours.pop("config.json"))
    single.pop("config.json")
    assert ours == single
    assert found["before"]["parameters"] > found["after"]["parameters"]
    assert found["kl"] is None


def test_whole_documents_are_held_back_where_a_domain_has_ten() -> None:
    tokenizer = letter_tokenizer(bos=False)
    many = [f"{letter * 9}" for letter in "abcdefghabcdefghabcd"]
    few = ["a" * 40, Templated("b" * 20)]
    first, last = held_back({"many": many, "few": few, "one": "c" * 30}, tokenizer)
    assert (first["many"], last["many"]) == (many[:18], many[18:])
    assert (first["few"], last["few"]) == (["a" * 36, "b" * 18], ["a" * 4, "b" * 2])
    assert isinstance(last["few"][1], Templated)
    assert (first["one"], last["one"]) == ("c" * 27, "c" * 3)
    with pytest.raises(ValueError, match="texts: 'few' is too short to hold a tenth back"):
        held_back({"few": ["a" * 40, "b" * 9]}, tokenizer)
    with pytest.raises(ValueError, match="judge: 'x' has fewer than 2 tokens"):
        check_judged({"x": ["ab", "a"]}, tokenizer, 8, None)
