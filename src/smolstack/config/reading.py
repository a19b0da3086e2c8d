"""Typed, validated access to config values; every error names the file, the key and the value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolstack.errors import ConfigError

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")


class Reader:
    """Typed access to one JSON object; every error names the file, the key and the value."""

    def __init__(self, where: str, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.where, self.data, self.defaults = where, data, defaults

    def value(self, key: str) -> Any:
        if self.data.get(key) is not None:
            return self.data[key]
        if key in self.defaults:
            return self.defaults[key]
        raise ConfigError(f"{self.where} has no {key}; it changes results, so there is no default")

    def integer(self, key: str) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected an integer")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected a number")
        return float(value)

    def string(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected a string")
        return value

    def square(self, key: str) -> int:
        """An edge length that may be written as one integer or as two equal ones."""
        value = self.value(key)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.where}.{key} is {value!r}, expected one integer (square)")
        return value


def activation_name(name: str) -> str:
    return "silu" if name == "swish" else name


def positive(config: object, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{where}.{name} is {value}, expected a positive integer")


def divides(where: str, name: str, total: int, parts: int) -> None:
    if parts < 1 or total % parts:
        kind = "key/value heads" if name == "num_attention_heads" else "attention heads"
        raise ConfigError(f"{where}.{name} {total} is not divisible by its {parts} {kind}")


def refuse_other_values(where: str, data: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise for a key whose value differs from the only supported one."""
    for key, value in known.items():
        found = data.get(key)
        if found is not None and found != value:
            raise ConfigError(f"{where}.{key} is {found!r}; only {value!r} is supported")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}, expected one of {list(allowed)}")


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids from a config value that may be null, one id or a list of ids."""
    if value is None:
        return ()
    ids = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise ConfigError(f"token ids are {value!r}, expected an integer or a list of integers")
    return tuple(ids)
