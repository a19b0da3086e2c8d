"""Reads quantization_config of config.json in compressed-tensors' format.

Two formats are supported: "pack-quantized" (integers in 32-bit words) and "int-quantized" (one byte
per integer; "naive-quantized" is its older name). Unknown settings that would change an answer are
errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from smolstack.errors import ConfigError

KEY, OLDER_KEY = "quantization_config", "compression_config"
METHOD = "compressed-tensors"
PACKED_FORM = "pack-quantized"
FORMS = (PACKED_FORM, "int-quantized", "naive-quantized")
BITS = (4, 8)
# Keys in folders written by smolstack, per config group: bits of the activations, and the groups
# used in computation, whose scales may be repeated over several stored groups.
OWN = "smolstack"
STRATEGIES = ("group", "channel", "tensor")
# Settings that change what is computed; they must be absent.
_ABSENT = {
    "kv_cache_scheme": "keys and values of rounded numbers",
    "transform_config": "rotations of weights and activations",
}


@dataclass(frozen=True)
class Scheme:
    """How the weights of one config group's layers are stored, and the bits of their activations.

    Attributes:
        form: one of FORMS.
        bits: bits per weight, 4 or 8.
        symmetric: whether there are no zero points.
        group: input channels that share a scale; None: all of an output channel, or of the tensor.
        whole: whether the tensor has a single scale.
        activation_bits: 8, or 16 if activations stay floats.
        own: whether smolstack wrote it; activation_bits is then exact.
        computed: input channels of the groups used in computation; None: the stored groups.
    """

    form: str
    bits: int
    symmetric: bool
    group: int | None
    whole: bool
    activation_bits: int
    own: bool = False
    computed: int | None = None


@dataclass(frozen=True)
class Schemes:
    """The config groups of a checkpoint: the layers that they target and ignore."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...] = ()
    ignore: tuple[str, ...] = ()

    def of(self, layer: str, kind: str) -> Scheme | None:
        """Return the scheme of a layer (its name in the files) of a class ("Linear"), or None.

        The most specific target wins: a name, then a regular expression, then a class.
        """
        names = (layer, layer.removeprefix("model."))
        if any(name in self._ignored for name in (*names, kind)):
            return None
        if any(_matches(target, names) for target in self.ignore):
            return None
        # Of several targets, the first counts. A folder that smolstack saved names every layer.
        named = [self._named[name] for name in names if name in self._named]
        if named:
            return min(named, key=lambda each: each[0])[1]
        for targets, scheme in self.groups:
            if any(_matches(target, names) for target in targets):
                return scheme
        return self._named[kind][1] if kind in self._named else None

    @cached_property
    def _ignored(self) -> frozenset[str]:
        return frozenset(self.ignore)

    @cached_property
    def _named(self) -> Mapping[str, tuple[int, Scheme]]:
        """The scheme of every target that is no pattern, with its place among them."""
        found: dict[str, tuple[int, Scheme]] = {}
        for targets, scheme in self.groups:
            for target in targets:
                if not _is_pattern(target):
                    found.setdefault(target, (len(found), scheme))
        return found


def read_schemes(config: Mapping[str, Any]) -> Schemes:
    """Return the schemes of a config.json; empty if its weights are floats.

    Raises:
        ConfigError: the quantization method or a setting is not supported.
    """
    data = config.get(KEY, config.get(OLDER_KEY))
    if data is None:
        return Schemes()
    method = data.get("quant_method") if isinstance(data, Mapping) else data
    if method == "smolstack":
        raise ConfigError(
            f"config.json's {KEY} has an older smolstack format; create the folder again from its "
            "float checkpoint: smolstack.load(MODEL, dtype=…).save(FOLDER)"
        )
    if method != METHOD:
        raise ConfigError(
            f"config.json {KEY}.quant_method is {method!r:.80}, expected none (float weights) or "
            f"{METHOD!r}"
        )
    for key, what in _ABSENT.items():
        if data.get(key):
            raise ConfigError(
                f"config.json {KEY}.{key} is {data[key]!r:.80}, expected null: {what} are not "
                "supported"
            )
    sparsity = data.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
        raise ConfigError(
            f"config.json {KEY}.sparsity_config is {sparsity!r:.80}, expected null or dense"
        )
    status = data.get("quantization_status", "compressed")
    if status != "compressed":
        raise ConfigError(
            f"config.json {KEY}.quantization_status is {status!r:.80}, expected 'compressed'"
        )
    groups = data.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"config.json {KEY}.config_groups is {groups!r:.80}, expected an object")
    own, computed = _own(data.get(OWN), groups)
    return Schemes(
        tuple(
            (
                tuple(_strings(group, "targets", f"config_groups.{name}")),
                _scheme(str(name), group, data.get("format"), own.get(name), computed.get(name)),
            )
            for name, group in groups.items()
        ),
        tuple(_strings(data, "ignore", "")) if data.get("ignore") is not None else (),
    )


def _scheme(name: str, group: Any, form: Any, own: int | None, computed: int | None) -> Scheme:
    where = f"config.json {KEY}.config_groups.{name}"
    form = group.get("format") or form
    if form not in FORMS:
        raise ConfigError(f"{where} has the format {form!r:.80}, expected one of {list(FORMS)}")
    if group.get("output_activations"):
        raise ConfigError(
            f"{where}.output_activations is {group['output_activations']!r:.80}, expected null"
        )
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}.weights is {weights!r:.80}, expected an object")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if type(bits) is not int or bits not in BITS or kind != "int":
        raise ConfigError(
            f"{where}.weights are {bits!r:.40} bits, {kind!r:.40}, expected int of 4 or 8"
        )
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool:
        raise ConfigError(f"{where}.weights.symmetric is {symmetric!r:.80}, expected true or false")
    size = weights.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or default
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"{where}.weights.strategy is {strategy!r:.80}, expected one of {list(STRATEGIES)}"
        )
    if strategy == "group" and (type(size) is not int or size < 1):
        raise ConfigError(
            f"{where}.weights.group_size is {size!r:.80}, expected a positive integer"
        )
    if computed is not None and strategy == "group" and computed % int(size or 1):
        raise ConfigError(
            f"{where}.weights.group_size is {size}, expected a divisor of {computed}, the groups "
            f"that {OWN} names"
        )
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise ConfigError(
            f"{where}.weights.actorder is {weights['actorder']!r:.80}, expected null or 'weight': "
            "groups of reordered channels are not supported"
        )
    return Scheme(
        form,
        bits,
        symmetric,
        size if strategy == "group" else None,
        strategy == "tensor",
        _activation_bits(where, group.get("input_activations")) if own is None else own,
        own is not None,
        computed,
    )


def _activation_bits(where: str, data: Any) -> int:
    """Return the bits that activations are rounded to at run time; 16 if they stay floats."""
    if data is None:
        return 16
    found = data if isinstance(data, Mapping) else {}
    bits, kind = found.get("num_bits"), found.get("type", "int")
    if bits not in (8, 16) or kind != "int" or found.get("dynamic", False) is not True:
        raise ConfigError(
            f"{where}.input_activations is {data!r:.160}, expected null, or int of 8 bits with "
            "dynamic true"
        )
    return int(bits)


def _own(
    data: Any, groups: Mapping[str, Any]
) -> tuple[Mapping[str, int], Mapping[str, int | None]]:
    """Return the activation bits and computed groups per config group; empty in folders written by
    other programs.
    """
    if data is None:
        return {}, {}
    found = data.get("activation_bits") if isinstance(data, Mapping) else None
    if not isinstance(found, Mapping) or not all(found.get(name) in (8, 16) for name in groups):
        raise ConfigError(
            f"config.json {KEY}.{OWN} is {data!r:.80}, expected activation_bits of 8 or 16 for "
            "every config group"
        )
    computed = data.get("groups", {})  # missing in older folders: the stored groups are used
    sizes = computed.values() if isinstance(computed, Mapping) else [computed]
    if not all(type(size) is int and size % 16 == 0 < size <= 1024 for size in sizes):
        raise ConfigError(
            f"config.json {KEY}.{OWN}.groups is {computed!r:.80}, expected a multiple of 16 up to "
            "1,024 for config groups"
        )
    return found, computed


def _strings(data: Any, key: str, where: str) -> Iterator[str]:
    found = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        place = ".".join(part for part in (KEY, where, key) if part)
        raise ConfigError(f"config.json {place} is {found!r:.80}, expected a list of names")
    for target in found:
        if _is_pattern(target):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise ConfigError(
                    f"config.json {KEY} has {target!r:.80}, not a regular expression: {error}"
                ) from error
        yield target


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _matches(target: str, names: Sequence[str]) -> bool:
    """Return whether a target is a pattern that matches one of a layer's names."""
    return _is_pattern(target) and any(re.match(target[3:], name) for name in names)
