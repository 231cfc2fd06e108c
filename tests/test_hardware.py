"""What utilisation is measured against."""

import pytest

from pipeline.hardware import known_peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 209),
        ("NVIDIA B200", 2250),
    ],
)
def test_a_card_has_its_makers_peak(name: str, teraflops: int) -> None:
    """Dense products in bf16; by NVIDIA's data sheets."""
    assert known_peak(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name", ["NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"]
)
def test_what_is_not_known_is_measured(name: str) -> None:
    assert known_peak(name) is None
