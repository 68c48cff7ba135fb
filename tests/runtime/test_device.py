"""What the names of devices and precisions stand for."""

from __future__ import annotations

import pytest
import torch

from attribution.errors import InputError
from attribution.runtime.device import resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_the_processor_is_found_by_name() -> None:
    assert resolve_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_where_there_is_none_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"device={name}: .*device=cpu"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_is_the_processor_where_there_is_no_gpu() -> None:
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:x", "tpu\n"])
def test_an_unknown_device_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_device(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_precision_is_what_the_hardware_computes_in(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == resolve_precision("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve_precision("auto", CPU) == torch.float32
    with pytest.raises(InputError, match="^feature_precision=bfloat16: this cpu has no"):
        resolve_precision("bfloat16", CPU, "feature_precision")
