"""The public names."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_task
import torch
from torch import nn

import adq
from adq.quant.evaluate import evaluate
from adq.quant.export.loading import read_metadata
from adq.quant.export.packed import packed_tensors
from adq.quant.modules import AdaptiveWeight, weight_quantizer
from adq.search.config import make_config


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> adq.Front:
    return adq.search(
        tiny_task.make_task(),
        adq.Budget(bits=3.5),
        out=str(tmp_path_factory.mktemp("runs")),
        bits=(2, 4),
        trials=3,
        epochs=1,
        final_epochs=2,
        device="cpu",
    )


def test_every_public_name_is_there_and_none_other() -> None:
    assert len(adq.__all__) <= 14
    for name in adq.__all__:
        assert getattr(adq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        adq.serach  # noqa: B018


def test_search_is_a_function_and_a_package_whatever_was_imported_first() -> None:
    code = "import adq, adq.search.pareto; assert callable(adq.search); adq.search.pareto"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import adq; f = adq.search; import adq.search.pareto; assert callable(f)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_loaded_point_gives_the_metric_that_the_front_reports(front: adq.Front) -> None:
    task = tiny_task.make_task()
    for point in (*front.points, *front.uniform):
        model = adq.load(Path(front.folder) / point.weights, task.model())
        assert not model.training
        result = evaluate(model, task.test, task.loss, task.metric)
        assert result.metric == pytest.approx(point.metric, abs=1e-12)
    best = adq.load(front.folder, task.model())
    assert evaluate(best, task.test, task.loss, task.metric).metric == front.best.metric
    assert adq.BitVector.load(front.folder + "/best.bits.json").weight == front.best.weight_bits


def test_loading_without_a_model_needs_a_task_by_name(front: adq.Front, tmp_path: Path) -> None:
    with pytest.raises(adq.InputError, match=r"names no task.*pass model="):
        adq.load(front.folder)
    with pytest.raises(adq.InputError, match="not a readable adq model"):
        adq.load(tmp_path)
    by_name = adq.search(
        "tiny_task:make_task", adq.Budget(bits=3.5), out=str(tmp_path), bits=(2, 4), trials=1,
        epochs=0, final_epochs=0, device="cpu",
    )  # fmt: skip
    assert isinstance(adq.load(by_name.folder), tiny_task.TinyNet)
    assert read_metadata(tmp_path / "tiny_task-1/best.safetensors")["point"] == by_name.best.id


def test_a_study_of_a_task_object_resumes_with_that_object(front: adq.Front) -> None:
    out, name = Path(front.folder).parent, front.study
    assert adq.resume(name, tiny_task.make_task(), out=out) == front
    with pytest.raises(adq.InputError, match=r"resume it from Python, with adq.resume"):
        adq.resume(name, out=out)


def test_a_study_fetched_without_all_of_it_says_how_to_resume_it(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "study.toml").write_text(make_config({"budget_bits": 3.0, "study": "s"}).to_toml())
    (folder / "fetched.json").write_text("{}")
    said = r"'s' was fetched without {}, which .*'adq-search fetch s --all'.*--executor local$"
    with pytest.raises(adq.InputError, match=said.format(r"study\.db and fp32\.safetensors")):
        adq.resume("s", out=tmp_path)
    (folder / "study.db").touch()
    with pytest.raises(adq.InputError, match=said.format(r"fp32\.safetensors")):
        adq.resume("s", out=tmp_path)
    assert not (folder / "lock").exists()  # so that it may be fetched again


def test_unknown_options_and_missing_budgets_are_named(tmp_path: Path) -> None:
    with pytest.raises(adq.InputError, match="unknown option 'trails'; allowed: task, model"):
        adq.search("digits", adq.Budget(bits=3), trails=3, out=str(tmp_path))
    with pytest.raises(adq.InputError, match="no budget"):
        adq.search("digits", out=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_found_bit_vector_trains_in_somebody_elses_loop(front: adq.Front) -> None:
    task = tiny_task.make_task()
    torch.manual_seed(0)
    plain = task.model()
    model = adq.quantize(plain, Path(front.folder) / "best.bits.json", task.train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        total = 0.0
        for inputs, targets in task.train:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adq.update_codebooks(model)
            optimizer.step()
            total += loss.item()
        losses.append(total)
    assert losses[-1] < losses[0]
    for name, bits in front.best.weight_bits.items():
        layer = model.get_submodule(name)
        quantizer = weight_quantizer(layer)
        assert isinstance(quantizer, AdaptiveWeight)
        codes = layer.weight.flatten(1) / quantizer.log_scale.exp()[:, None]  # type: ignore[operator]
        assert len(codes.detach().mul(1e4).round().unique()) <= 2**bits
    assert {k for k in packed_tensors(model) if k.endswith(".weight.codes")} == {
        f"{name}.weight.codes" for name in front.best.weight_bits
    }
