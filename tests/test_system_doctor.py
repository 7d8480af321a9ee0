"""The doctor finds what is broken, says how to mend it, and reports what really ran."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import threadpoolctl
import torch

from sepconv.kernels.halide.jit import code_cache, runtime, threads
from sepconv.ops import explain
from sepconv.system import environment
from sepconv.system.doctor import Finding

# The name in the package is the function.
doctor = importlib.import_module("sepconv.system.doctor")


def _finding(name: str) -> Finding:
    return next(finding for finding in doctor.doctor().findings if finding.name == name)


def test_every_operation_and_gradient_is_tried() -> None:
    assert doctor.doctor().kernels.keys() == {
        "depthwise_conv",
        "depthwise_stage_gradients",
        "pointwise_conv",
        "separable_conv",
    }


def test_kernels_are_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = explain.Explanation("some_op", "torch", {}, {"halide": "it is Tuesday"})
    monkeypatch.setattr(explain, "explain", lambda function: [choice])
    assert doctor.doctor().kernels == {"some_op": "torch (not halide: it is Tuesday)"}


def test_diagnosis_is_plain_data_and_text() -> None:
    found = doctor.doctor()
    record = json.loads(json.dumps(found.as_dict()))
    assert record["kernels"] == found.kernels
    assert record["machine"]["cores"] == environment.cores()
    assert record["versions"]["torch"] == torch.__version__
    for finding in found.findings:
        assert finding.detail in str(found)


def test_missing_halide_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "missing", lambda: "there is no wheel")
    finding = _finding("halide")
    assert finding.status == "missing"
    assert "there is no wheel; PyTorch's kernels run instead" in finding.detail
    assert "pip install halide" in finding.remedy


def test_kernels_of_one_thread_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "missing", lambda: "no way to share them out")
    finding = _finding("threads")
    assert finding.status == "slow"
    assert finding.detail.endswith("could use one only: no way to share them out")
    assert "OMP_NUM_THREADS=1" in finding.remedy


def test_missing_package_comes_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: "" if name == "onnxscript" else installed(name))
    assert _finding("onnxscript").remedy == "pip install 'sepconv[onnx]'"
    assert _finding("onnx").status == "ok"


@pytest.mark.parametrize(
    ("api", "variable"), [("openblas", "OPENBLAS_NUM_THREADS"), ("mkl", "MKL_NUM_THREADS"), ("blis", "OMP_NUM_THREADS")]
)
def test_spinning_pool_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch, api: str, variable: str) -> None:
    pools = [
        {"user_api": "blas", "internal_api": api, "num_threads": 2},
        {"user_api": "openmp", "internal_api": "openmp", "num_threads": 2},
    ]
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: pools)
    finding = _finding(f"{api} threads")
    assert finding.status == "slow"
    assert finding.remedy == f"set {variable}=1"
    assert not [found for found in doctor.doctor().findings if found.name == "openmp threads"]


def test_quiet_pool_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [{"user_api": "blas", "internal_api": "openblas", "num_threads": 1}]
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: pools)
    assert not [found for found in doctor.doctor().findings if found.name.endswith(" threads")]


def test_more_threads_than_cores_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(environment, "cores", lambda: 3)
    finding = _finding("threads")
    assert (finding.status, finding.remedy) == ("slow", "set OMP_NUM_THREADS=3")


def test_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path / "file"))
    finding = _finding("cache")
    assert finding.status == "slow"
    assert "anew in every process: " in finding.detail
    assert finding.detail.endswith("kernels cannot be written")
    assert code_cache.VARIABLE in finding.remedy


def test_cache_folder_that_does_not_exist_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path / "deep"))
    finding = _finding("cache")
    assert finding.status == "ok"
    assert finding.detail.endswith(f" kernels in {tmp_path / 'deep' / 'kernels'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_one_would_need() -> None:
    found = _finding("gpu")
    assert found.status == "ok"
    assert found.detail.startswith("none that this PyTorch can use")
    assert "need a build of PyTorch for it and the package triton" in found.detail


def test_on_a_gpu_it_says_what_is_missing_and_what_was_proven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 1000")
    monkeypatch.setattr(doctor.triton_kernels, "missing", lambda: "the package triton cannot be imported")
    found = doctor._gpu()
    assert (found.status, found.remedy) == ("missing", "pip install 'sepconv[gpu]'")
    assert "PyTorch's kernels alone run there; the package triton cannot be imported" in found.detail
    monkeypatch.setattr(doctor.triton_kernels, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=6, minor=1))
    assert doctor._gpu().detail.endswith("capability 7.0 and later, and this device has 6.1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path))
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "one.json").touch()
    assert f"depthwise kernels are tried there; 1 proofs in {tmp_path / 'gpu'}" in doctor._gpu().detail
    monkeypatch.setenv(code_cache.VARIABLE, "")
    assert doctor._gpu().detail.endswith("proofs are not kept on disk")
