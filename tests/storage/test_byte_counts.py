"""Numbers of bytes as people write them."""

import pytest

from moe_ext.storage.byte_counts import bytes_in


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1B", 1),
        ("48GB", 48_000_000_000),
        ("48 gb", 48_000_000_000),
        ("44.7GiB", 47_996_259_532),  # 44.7 * 2^30 = 47996259532.8
        ("0.3 kB", 300),
        ("1.1MB", 1_100_000),  # not what float64 makes of it
        ("2TiB", 2 << 40),
        ("3PB", 3 * 10**15),
    ],
)
def test_a_number_and_its_unit_are_bytes(text: str, count: int) -> None:
    assert bytes_in(text) == count


@pytest.mark.parametrize(
    "text", ["", "48", "GB", "48G", "-1GB", "+1GB", "1e3GB", "1,5GB", "4 8GB", "0GB", "0.4B", "٣GB", "infGB"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a number of bytes such as 48GB or 44\.7GiB, got"):
        bytes_in(text)
