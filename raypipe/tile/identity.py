"""What a result was made of, as hashes: by them a later call knows whether it may go on with it.

Functions by their code and by the values that they use; other callables by what they are pickled to;
models by structure and weights. Code in other modules than the function's own counts by name only.
"""

from __future__ import annotations

import dis
import functools
import pickle
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from raypipe.errors import ConfigError

_PLAIN = (bool, int, float, complex, str, bytes, range, slice, type(None), type(...), np.generic)


def digest_of_model(model: nn.Module) -> str:
    """Hash of its structure as printed, and of all parameters and buffers."""
    hasher = xxhash.xxh3_128(f"{type(model).__module__}.{model!r}".encode())
    for name, value in model.state_dict().items():
        hasher.update(name.encode())
        if isinstance(value, Tensor):
            hasher.update(_bytes(value))
    return hasher.hexdigest()


def digest_of_function(function: Any) -> str:
    """ "" for None. Raises ConfigError for a callable that can be neither read nor pickled."""
    if function is None:
        return ""
    feeder = _Feeder()
    feeder.feed(function)
    return feeder.hasher.hexdigest()


class _Feeder:
    """Feeds values to ``hasher``; functions of the first one's module by their code."""

    def __init__(self) -> None:
        self.hasher, self._seen = xxhash.xxh3_128(), set[int]()
        self._home: str | None = None

    def _say(self, *words: object) -> None:
        self.hasher.update(repr(words).encode())

    def feed(self, value: Any) -> None:
        """Whatever a function may hold."""
        self._say(type(value).__qualname__)
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._all((value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._all((value.func, value.args, value.keywords))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._say(value.shape, value.dtype.str)
            self.hasher.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Tensor):
            self._say(tuple(value.shape), value.dtype)
            self.hasher.update(_bytes(value))
        elif isinstance(value, nn.Module):
            self._say(digest_of_model(value))
        elif isinstance(value, _PLAIN):
            self._say(value)
        elif isinstance(value, (ModuleType, BuiltinFunctionType, type)):
            self._say(getattr(value, "__module__", ""), value.__name__)
        else:
            self._collection(value)

    def _collection(self, value: Any) -> None:
        if type(value) in (tuple, list):
            self._all(value)
        elif type(value) is dict:
            self._all(value.items())
        elif type(value) in (set, frozenset):
            self._all(sorted(value, key=repr))  # their own order changes from process to process
        elif isinstance(value, CodeType):
            self._code(value)
        else:
            self.hasher.update(_pickled(value))

    def _all(self, values: Any) -> None:
        values = list(values)
        self._say(len(values))
        for value in values:
            self.feed(value)

    def _function(self, function: FunctionType) -> None:
        self._home = self._home or function.__module__
        if function.__module__ != self._home:
            self._say(function.__module__, function.__qualname__)
        elif id(function) not in self._seen:  # it may call itself
            self._seen.add(id(function))
            self._code(function.__code__)
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
            self._all((function.__defaults__, function.__kwdefaults__, cells))
            for name in sorted(_global_names(function.__code__)):
                if name in function.__globals__:
                    self._say(name)
                    self.feed(function.__globals__[name])

    def _code(self, code: CodeType) -> None:
        self.hasher.update(code.co_code)
        self._all((code.co_names, code.co_varnames, code.co_freevars, code.co_consts))


def _global_names(code: CodeType) -> set[str]:
    """Names that ``code``, and the functions written in it, take from their module."""
    names = {str(at.argval) for at in dis.get_instructions(code) if at.opname == "LOAD_GLOBAL"}
    inner = [_global_names(value) for value in code.co_consts if isinstance(value, CodeType)]
    return names.union(*inner)


def _bytes(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"prepare or after holds a {type(value).__qualname__} that cannot be pickled ({error}), so a "
            "result cannot say what it was made of; give a function of plain values"
        ) from error
