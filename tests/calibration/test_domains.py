"""Statistics by domain: those of each text alone, in one run and one file; balanced; merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moe_ext
from moe_ext.calibration import progress
from moe_ext.calibration.statistics import FORMAT, ExpertStatistics, StatisticsFileError
from moe_ext.storage.formats import FileFormatError
from moe_ext.storage.tensor_file import read_tensors
from tests.support.batches import five_batches
from tests.support.mixtral import MixtralFactory

DOMAINS = ("code", "chat", "code", "math", "chat")


def named() -> list[dict[str, Any]]:
    return [{**batch, "domain": domain} for batch, domain in zip(five_batches(), DOMAINS, strict=True)]


def calibrated(model: Any, batches: Any, **options: Any) -> ExpertStatistics:
    return moe_ext.calibrate(model, batches, progress=False, dataset="all", **options)


def same(one: ExpertStatistics, other: ExpertStatistics) -> None:
    assert one.every_tensor().keys() == other.every_tensor().keys()
    for name, tensor in one.every_tensor().items():
        assert torch.equal(tensor, other.every_tensor()[name]), name


@pytest.mark.parametrize("options", [{}, {"outputs": True, "channels": "energy"}, {"channels": "gram"}])
def test_one_run_gives_every_domain_what_a_run_over_it_alone_does(
    tiny_mixtral: MixtralFactory, options: dict[str, Any]
) -> None:
    model = tiny_mixtral()
    stats = calibrated(model, named(), **options)
    assert sorted(stats.domains) == ["chat", "code", "math"]
    for domain, part in stats.domains.items():
        alone = [batch for batch, name in zip(five_batches(), DOMAINS, strict=True) if name == domain]
        expected = calibrated(model, alone, **options)
        for name, tensor in part.tensors().items():
            assert torch.equal(tensor, getattr(expected, name)), (domain, name)
    whole = calibrated(model, five_batches(), **options)
    for name, tensor in stats.tensors().items():
        if tensor.is_floating_point():  # float64, added in another order
            torch.testing.assert_close(tensor, getattr(whole, name), rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(tensor, getattr(whole, name)), name


def test_a_folder_gives_the_same_domains_and_goes_on_with_them(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "model")
    expected = calibrated(model, named())
    same(calibrated(tmp_path / "model", named()), expected)
    with pytest.MonkeyPatch.context() as patch:

        def stop(self: Any, layer: int) -> None:
            write(self, layer)
            if layer == 2:
                raise KeyboardInterrupt

        write = progress.CalibrationProgress.write
        patch.setattr(progress.CalibrationProgress, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrated(tmp_path / "model", named(), resume=tmp_path / "partial")
    same(calibrated(tmp_path / "model", named(), resume=tmp_path / "partial"), expected)


def test_a_file_keeps_the_domains_and_one_without_is_as_before(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    stats = calibrated(tiny_mixtral(), named(), outputs=True, channels="energy")
    stats.save(tmp_path / "a.safetensors")
    loaded = ExpertStatistics.load(tmp_path / "a.safetensors")
    same(loaded, stats)
    assert list(loaded.domains) == ["chat", "code", "math"]
    tensors, metadata = read_tensors(tmp_path / "a.safetensors", FORMAT)
    assert metadata["format_version"] == "3"
    assert tensors["domain_moments"].shape == (3, *stats.moments.shape)
    calibrated(tiny_mixtral(), five_batches()).save(tmp_path / "b.safetensors")
    tensors, metadata = read_tensors(tmp_path / "b.safetensors", FORMAT)
    assert metadata["format_version"] == "2"
    assert "domains" not in metadata
    assert not any(name.startswith("domain_") for name in tensors)


def rewritten(file: Path, **changes: Any) -> None:
    tensors, metadata = read_tensors(file, FORMAT)
    for name, change in changes.items():
        if name in ("domains", "format_version"):
            metadata[name] = change
        elif change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name].clone())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain_tokens": lambda tensor: tensor + 1}, "domain_tokens: does not add up to tokens"),
        ({"domain_moments": lambda tensor: tensor * 1.001}, "domain_moments: does not add up to moments"),
        ({"domain_moments": lambda tensor: tensor[:2]}, "domain_moments: has shape"),
        ({"domain_tokens": lambda tensor: tensor.int()}, r"domain_tokens: has shape .* and torch.int32; expected"),
        ({"domain_coactivation": None}, "domains: expected names, each once, and tensors"),
        ({"domains": json.dumps(["a", "b"])}, "domain_moments: has shape"),
        ({"domains": json.dumps(["a", "b", "a"])}, "domains: expected names, each once"),
        ({"domains": "[1]"}, "'domains' is '.1.'; expected a JSON list of names"),
        ({"format_version": "2"}, "tensor 'domain_coactivation' is not part of format version 2"),
    ],
)
def test_a_file_whose_domains_make_no_sense_is_refused(
    tiny_mixtral: MixtralFactory, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    calibrated(tiny_mixtral(num_hidden_layers=1), named()).save(tmp_path / "a.safetensors")
    rewritten(tmp_path / "a.safetensors", **changes)
    with pytest.raises(StatisticsFileError, match=message):
        ExpertStatistics.load(tmp_path / "a.safetensors")


def test_domains_merge_by_name_and_a_file_without_is_one_of_its_label(tiny_mixtral: MixtralFactory) -> None:
    model, batches = tiny_mixtral(), named()
    first, second = calibrated(model, batches[:3]), calibrated(model, batches[3:])
    both = first + second
    whole = calibrated(model, batches)
    assert both.domains.keys() == whole.domains.keys()
    for name, tensor in whole.every_tensor().items():
        torch.testing.assert_close(both.every_tensor()[name], tensor, rtol=1e-12, atol=1e-12)
    unnamed = moe_ext.calibrate(model, five_batches()[:2], progress=False, dataset="prose")
    for merged in (first + unnamed, unnamed + first):
        assert list(merged.domains) == ["chat", "code", "prose"]
        assert torch.equal(merged.domains["prose"].moments, unnamed.moments)
    assert (unnamed + unnamed).domains == {}


def test_balanced_statistics_weigh_every_domain_alike(tiny_mixtral: MixtralFactory, tmp_path: Path) -> None:
    stats = calibrated(tiny_mixtral(), named())
    balanced = stats.balanced()
    shares = [part.moments / part.tokens[:, None, None, None] for part in stats.domains.values()]
    expected = torch.stack(shares).mean(0) * stats.tokens[:, None, None, None]
    torch.testing.assert_close(balanced.moments, expected, rtol=1e-12, atol=0)
    assert torch.equal(balanced.tokens, stats.tokens)
    assert balanced.domains == {}
    scores = moe_ext.score(balanced, "frequency").values
    routed = torch.stack([part.routing_counts() / part.tokens[:, None] for part in stats.domains.values()])
    torch.testing.assert_close(scores / scores.sum(1, keepdim=True), routed.mean(0) / 2, rtol=1e-9, atol=0)  # K = 2
    balanced.save(tmp_path / "balanced.safetensors")
    same(ExpertStatistics.load(tmp_path / "balanced.safetensors"), balanced)


def test_what_cannot_be_balanced_or_chosen_is_refused(tiny_mixtral: MixtralFactory) -> None:
    model = tiny_mixtral()
    stats = calibrated(model, named()[:1])
    with pytest.raises(ValueError, match="expected statistics of two or more domains, got 1; calibrate with several"):
        stats.balanced()
    with pytest.raises(ValueError, match="domain: there is no 'prose' in the statistics; they have 'code'"):
        stats.domain("prose")
    stats.of_domain("prose")
    with pytest.raises(ValueError, match="the domain 'prose' has no tokens"):
        stats.balanced()
    assert issubclass(StatisticsFileError, FileFormatError)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (("code", None), "batch 1: names None as its domain, and batch 0 'code'"),
        ((None, "code"), "batch 1: names 'code' as its domain, and batch 0 None"),
        ((3,), "batch 0: 'domain' is 3; expected one name"),
        ((["a", "b"],), "batch 0: 'domain' is .'a', 'b'.; expected one name: a batch is of one domain"),
        (("\ud800",), "'domain': .* holds half of a character"),
    ],
)
@pytest.mark.parametrize("channels", [None, "gram"])
def test_batches_of_no_clear_domain_are_refused(
    tiny_mixtral: MixtralFactory, domains: tuple[Any, ...], message: str, channels: Any
) -> None:
    batches = [
        {**batch, **({} if domain is None else {"domain": domain})}
        for batch, domain in zip(five_batches(), domains, strict=False)
    ]
    with pytest.raises(ValueError, match=message):
        calibrated(tiny_mixtral(num_hidden_layers=1), batches, channels=channels)
