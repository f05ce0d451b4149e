"""Every kernel configuration compiles without a GPU, and none runs out of registers."""

import pytest

aot = pytest.importorskip("adq.quant.kernels.aot", reason="triton is not installed")


def test_no_kernel_spills(capsys: pytest.CaptureFixture[str]) -> None:
    status = aot.main()
    table = capsys.readouterr().out
    print(table)  # seen with pytest -s, and when the test fails
    assert status == 0
    for target in aot.TARGETS:
        for kernel in ("edges", "forward", "backward", "finish"):
            for bits in range(2, 9):
                assert f"{target:7} {'n2uq ' + kernel:16} {bits} bits" in table
        for dtype in aot.DTYPES:
            assert f"{target:7} weights forward  {dtype} statistics" in table
            for rule in ("straight", "lsq", "pact"):
                assert f"{target:7} weights backward {dtype} {rule}" in table
        assert f"{target:7} codebooks step" in table


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_that_spills_is_found_out(target: str) -> None:
    # 2 · 64 · 256 sums for 128 (on AMD 256) threads: more registers than a thread can have
    constants = {"BITS": 6, "LANES": 256 if target == "sm_90" else 1024}
    types = {"place_ptr": "*u8", "numel": "i32"}
    config = aot.Config("n2uq", "backward_kernel", target, "fp32", constants, types)
    report = aot.compile_report(config)
    assert any(report.spills.values())
    assert "none" not in str(report)
