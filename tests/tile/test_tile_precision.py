"""TF32 is off inside, and afterwards as it was, whichever of torch's two sets of switches was used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import raypipe
from raypipe.tile.precision import exact_float32

B = torch.backends
CUDA = torch.device("cuda")  # the switches are there without one


def get(backend: str, op: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, op)


def put(backend: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, value)


OPS = [("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul"), ("mkldnn", "matmul")]
ALL = [("generic", "all"), ("cuda", "all"), *OPS]


def tried(read: Any) -> Any:
    try:
        return read()
    except RuntimeError:
        return "refused"


def settings() -> list[Any]:
    """All that can be seen, also what each follows when the one above it changes."""
    seen: list[Any] = [get(*key) for key in ALL]
    seen += [tried(lambda: B.cudnn.allow_tf32), tried(lambda: B.cuda.matmul.allow_tf32)]
    seen.append(tried(torch.get_float32_matmul_precision))
    generic = get("generic", "all")
    for value in ("ieee", "tf32"):
        put("generic", "all", value)
        seen += [get(*key) for key in ALL]
    put("generic", "all", generic)
    return seen


@pytest.fixture(autouse=True)
def torchs_own() -> Iterator[None]:
    """TF32 as a process begins with, afterwards."""
    yield
    for key in (("generic", "all"), ("cuda", "all"), ("mkldnn", "matmul")):
        put(*key, "none")
    B.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def old_off() -> None:
    B.cudnn.allow_tf32 = False


def old_on() -> None:
    B.cuda.matmul.allow_tf32 = True


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def conv_ieee() -> None:
    B.cudnn.conv.fp32_precision = "ieee"


def matmul_tf32() -> None:
    B.cuda.matmul.fp32_precision = "tf32"


def everything_tf32() -> None:
    B.fp32_precision = "tf32"


def backend_tf32() -> None:
    B.cudnn.fp32_precision = "tf32"


def backend_and_op() -> None:
    B.fp32_precision = "ieee"
    B.cudnn.fp32_precision = "tf32"
    B.cudnn.conv.fp32_precision = "none"


def both_kinds() -> None:
    torch.set_float32_matmul_precision("medium")
    B.cuda.matmul.fp32_precision = "ieee"
    B.mkldnn.matmul.fp32_precision = "tf32"
    B.cudnn.allow_tf32 = False
    B.cudnn.rnn.fp32_precision = "tf32"


SET = [
    lambda: None, old_off, old_on, medium, conv_ieee, matmul_tf32, everything_tf32, backend_tf32,
    backend_and_op, both_kinds,
]  # fmt: skip


@pytest.mark.parametrize("set_by_the_user", SET)
def test_tf32_is_off_inside_and_as_it_was_after(set_by_the_user: Any) -> None:
    set_by_the_user()
    before = settings()
    with pytest.raises(KeyError), exact_float32(CUDA):
        assert [get(*key) for key in OPS[:3]] == ["ieee"] * 3
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("set_by_the_user", SET)
def test_a_cpu_is_indifferent_to_them(set_by_the_user: Any) -> None:
    set_by_the_user()
    before, cudnn = settings(), B.cudnn.enabled
    image = np.random.default_rng(0).standard_normal((60, 50)).astype(np.float32)
    model = nn.Conv2d(1, 1, 3, padding=1).eval()
    got = raypipe.process_large_image(image, model, 32)
    with torch.no_grad():
        want = model(torch.from_numpy(image)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert settings() == before and B.cudnn.enabled == cudnn


def test_a_process_that_set_nothing_still_has_nothing_set() -> None:
    """In torch 2.15 convolutions begin in a state that no setter comes back to."""
    code = """
import torch
from raypipe.tile.precision import exact_float32
with exact_float32(torch.device("cuda")):
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
print(torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32)
torch.backends.cudnn.fp32_precision = "ieee"
print(torch.backends.cudnn.conv.fp32_precision)
"""
    plain = code.replace('with exact_float32(torch.device("cuda")):', "if False:")
    told = [
        subprocess.run([sys.executable, "-c", each], check=True, capture_output=True, text=True)
        for each in (code, plain)
    ]
    assert told[0].stdout == told[1].stdout
