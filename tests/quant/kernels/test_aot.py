"""The ahead-of-time compiler; `make kernels` runs it on every configuration."""

import re
from pathlib import Path

import pytest

PACKED = ("packed_words", "packed_vector", "packed_matrix")
aot = pytest.importorskip("adq.quant.kernels.aot", reason="triton is not installed")


def test_every_kernel_is_compiled_for_every_target() -> None:
    listed = {(c.target, c.module, c.kernel) for c in aot.configurations()}
    for module in ("n2uq", "weights", "codebooks", "inputs", *PACKED):
        source = Path(str(aot.__file__)).with_name(f"{module}.py").read_text()
        kernels = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
        assert kernels
        for kernel in kernels:
            assert {(target, module, kernel) for target in aot.TARGETS} <= listed
    bits = {c.constants["BITS"] for c in aot.configurations() if c.kernel == "forward_kernel"
            and c.module == "n2uq"}  # fmt: skip
    assert bits == set(range(2, 9))


def test_a_kernel_that_fits_is_reported_with_what_it_takes() -> None:
    for target in aot.TARGETS:
        [config] = [
            c for c in aot.configurations() if (c.target, c.module) == (target, "codebooks")
        ]
        report = aot.compile_report(config)
        assert report.registers > 0
        assert report.shared_bytes > 0
        assert not any(report.spills.values())
        assert str(report).endswith("spills: none")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_that_spills_is_found_out(target: str) -> None:
    # 2 · 64 · 256 sums for 128 (on AMD 256) threads: more registers than a thread can have
    constants = {"BITS": 6, "LANES": 256 if target == "sm_90" else 1024}
    types = {"place_ptr": "*u8", "numel": "i32"}
    config = aot.Config("n2uq", "backward_kernel", target, "fp32", constants, types)
    report = aot.compile_report(config)
    assert any(report.spills.values())
    assert "none" not in str(report)
