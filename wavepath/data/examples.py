"""`tf.train.Example` in bytes that are always the same: written and read here, without TensorFlow.

A protobuf library may order map fields differently from run to run; here they are sorted by name.
"""

import functools
import struct
from collections.abc import Iterator, Mapping
from typing import Any

# Name -> kind of each field of a tile, in the (sorted) order of its bytes.
FIELDS = {"energy": "float", "id": "int", "mpp": "float", "region": "int", "slide": "bytes", "tile": "bytes", "x": "int", "y": "int"}
TEXTS = ("file", "label", "slide")  # the fields of bytes that hold text
_VARINT, _BYTES = 0, 2
_ENTRY = 1 << 3 | _BYTES  # the tag of each entry of the map
_LIST_FIELD = {"bytes": 1, "float": 2, "int": 3}  # tf.train.Feature: bytes_list, float_list, int64_list


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative int64 in two's complement, as protobuf has it
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(payload)) + payload


def encode_example(fields: Mapping[str, Any], kinds: Mapping[str, str] = FIELDS) -> bytes:
    """Serialises one example as `tf.train.Example`, always to the same bytes: fields sorted by name, one value each.

    Args:
        fields: a value for each name of `kinds`: encoded images are bytes, text a str or UTF-8 bytes, positions and ids are ints.
        kinds: name -> bytes, float or int; of a tile by default.
    """
    entries = []
    for name, kind in sorted(kinds.items()):
        value = fields[name]
        if kind == "bytes":
            payload = _delimited(1, value.encode() if isinstance(value, str) else value)
        elif kind == "float":
            payload = _delimited(1, struct.pack("<f", value))
        else:
            payload = _delimited(1, _varint(int(value)))
        entries.append(_delimited(1, _delimited(1, name.encode()) + _delimited(2, _delimited(_LIST_FIELD[kind], payload))))
    return _delimited(1, b"".join(entries))


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value, at = data[at], at + 1
    if value < 128:
        return value, at
    value, shift = value & 127, 7
    while (byte := data[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def _messages(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number, start and end of each length-delimited field in data[start:end]."""
    while start < end:
        tag, start = _read_varint(data, start)
        if tag & 7 != _BYTES:
            raise ValueError("not a tf.train.Example that wavepath wrote")
        size, start = _read_varint(data, start)
        yield tag >> 3, start, start + size
        start += size


def _features(record: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of the Feature of each field."""
    for _, begin, end in _messages(record, 0, len(record)):
        for _, entry, entry_end in _messages(record, begin, end):
            (_, k0, k1), (_, v0, v1) = _messages(record, entry, entry_end)
            yield record[k0:k1].decode(), v0, v1


def _span(data: bytes, at: int) -> tuple[int, int]:
    """Start and end of the contents of the length-delimited field whose tag is at `at`."""
    if data[at] & 135 != _BYTES:  # numbers of fields are small here: a tag is one byte
        raise ValueError("not a tf.train.Example that wavepath wrote")
    size, at = data[at + 1], at + 2
    if size > 127:
        size, at = _read_varint(data, at - 1)
    return at, at + size


def _value(record: bytes, start: int, end: int) -> Any:
    """The one value of the Feature in record[start:end]."""
    kind = record[start] >> 3
    start, list_end = _span(record, start)
    start, value_end = _span(record, start)
    if not value_end == list_end == end:
        raise ValueError("not a tf.train.Example that wavepath wrote: a field has more than one value")
    if kind == _LIST_FIELD["bytes"]:
        return record[start:end]
    if kind == _LIST_FIELD["float"]:
        return struct.unpack("<f", record[start:end])[0]
    value, _ = _read_varint(record, start)
    return value - (1 << 64) if value >> 63 else value


def decode_example(record: bytes) -> dict[str, Any]:
    """The fields of a record that `encode_example` wrote; text comes back as str, images as bytes."""
    fields = {name: _value(record, start, end) for name, start, end in _features(record)}
    return fields | {name: fields[name].decode() for name in TEXTS if name in fields}


@functools.cache
def _key(name: str) -> bytes:
    return _delimited(1, name.encode())


def field_of(record: bytes, wanted: str) -> Any:
    """One field of a record, without a look at what is in the others: training asks every record for its image."""
    key = _key(wanted)
    at, end = _span(record, 0)
    while at < end:
        # `_span`, written out: a call costs as much as all that is in it.
        if record[at] != _ENTRY:
            raise ValueError("not a tf.train.Example that wavepath wrote")
        size, at = record[at + 1], at + 2
        if size > 127:
            size, at = _read_varint(record, at - 1)
        if record.startswith(key, at):
            return _value(record, *_span(record, at + len(key)))
        at += size
    raise ValueError(f"the record has no field `{wanted}`")


def tile_of(record: bytes) -> bytes:
    """The encoded image of a tile's record."""
    return field_of(record, "tile")
