"""Hostile inputs made from good ones: values of the wrong kind in the right places, and damaged bytes.

Everything is drawn from the generator that is passed in, so one number gives one input again. That, and speed, is why
these are not hypothesis strategies, which the properties in test_fuzz.py are: one of those takes 1.2 ms an input where
these take 0.05, and is reproducible as a whole run only, not by the number of one input.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["damaged", "json_input", "lines_input", "safetensors_input", "tar_input", "toml_input"]


class _Raw(str):
    """A piece of a document that is written as it is."""


class _Pairs(list[Any]):
    """An object as [name, value] lists, so that a name may come twice."""


_DEEP = _Raw("[" * 3000 + "]" * 3000)
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-300, 3, 99, 2**31, 2**63, -(2**63) - 1),
    *("", " ", "\x00", "\x1b[31m", "\u202e", "a" * 2000, "nan", "1", "-9999", "../../up", "~nobody/x", "/nowhere"),
    *("{prompt.__class__}", "{text:>99999999}", "{", "<script>alert(1)</script>", "é" * 40, "\r\n", "user", "file\x00"),
    *(_Raw("1e999"), _Raw("-1e999"), _Raw("NaN"), _Raw("Infinity"), _Raw("1" + "0" * 400), _Raw("9" * 5000)),
    *(_Raw('"\\ud800"'), _Raw('"\\udc00x"'), _Raw("1979-05-27"), _Raw("inf"), _Raw("nan"), _Raw("0x7f"), _DEEP),
    *(_Raw("-"), _Raw('"\\x"'), _Raw('"open'), _Raw("{"), _Raw("01"), [], _Pairs(), [[]], [None], ["a", 1]),
    *([_Pairs([["role", "user"], ["content", "x"]])], _Pairs([["role", []], ["content", "x"]]), _Pairs([["", 0]])),
)
_PIECES: tuple[bytes, ...] = (
    *b'\x00|\xff|\xef\xbb\xbf|\xff\xfe|\n|\r\n|\n\n| |"|\\|{|}|[|]|,|:|null|true|-|1e999'.split(b"|"),
    *(b"9" * 400, b"\\ud800", b"\xed\xa0\x80", b"\xc0\x80", b"\x1f\x8b", b"PK\x03\x04", b"[" * 3000, b"\xe2\x80\xae"),
    *(b"\x1b[2J", b"#", b"'''", b"=", b"[[a]]\n", b"\x7f\xff\xff\xff"),
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some flipped, cut out, doubled, put in, or cut off."""
    out = bytearray(data)
    for _ in range(1 + int(rng.expovariate(0.6))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + 1 + int(rng.expovariate(0.1)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at:end]
        elif kind == 3:
            out[at:at] = out[at:end]
        elif kind == 4:
            out[at:at] = rng.choice(_PIECES)
        elif kind == 5:
            out[at:end] = rng.choice(_PIECES)
        else:
            del out[at + (len(out) - at) // 2 * rng.randrange(2) :]
    return bytes(out)


def json_input(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """One JSON document: mostly a seed with some values, names or kinds changed, sometimes with damaged bytes."""
    return _perhaps_damaged(rng, _json_text(_changed(rng, seeds)))


def lines_input(rng: random.Random, seeds: Sequence[Sequence[Any]]) -> bytes:
    """A JSON lines file; each seed is the rows of one."""
    rows = [_tree(row) for row in rng.choice(seeds)]
    for _ in range(1 + int(rng.expovariate(0.8))):
        at = rng.randrange(len(rows)) if rows else 0
        kind = rng.randrange(8)
        if kind == 0 and rows:
            rows.insert(at, copy.deepcopy(rows[at]))
        elif kind == 1 and rows:
            del rows[at]
        elif kind == 2:
            rows.insert(at, rng.choice(_ODD))
        elif rows:
            rows[at] = _changed(rng, [rows[at]])
    end = rng.choice(("\n", "\n", "\n", "\r\n", "\n\n"))
    text = end.join(map(_json_text, rows)) + rng.choice((end, end, end, ""))
    return _perhaps_damaged(rng, text)


def toml_input(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """A TOML file of an object of scalars, lists and objects."""
    return _perhaps_damaged(rng, _toml_text(_changed(rng, seeds)))


def safetensors_input(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A safetensors file: header changed as JSON, or any byte damaged."""
    data = rng.choice(seeds)
    if rng.random() < 0.5:
        return damaged(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    text = _json_text(_changed(rng, [header])).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**63, 2**64 - 1, len(text) + 8, 10**8))
    if rng.random() < 0.3:
        body = damaged(rng, body)
    return struct.pack("<Q", claimed) + text + body


def tar_input(rng: random.Random, name: str, content: bytes) -> bytes:
    """A gzipped tar archive with a member of this name (perhaps), links, devices, paths that lead out, and damage."""
    packed = io.BytesIO()
    kinds = [tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    kinds += [tarfile.DIRTYPE, tarfile.CONTTYPE, b"S", b"x", b"g", b"L", b"?"]
    names = (name, name, "/etc/hosts", "../up", "a/../../up", f"./{name}", "x" * 90)
    with tarfile.open(fileobj=packed, mode="w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for _ in range(rng.randrange(1, 5)):
            member = tarfile.TarInfo(rng.choice(names))
            member.type = rng.choice(kinds)
            member.linkname = rng.choice(("", name, "/etc/hosts", "../../up", "."))
            body = content if member.isreg() else b""
            member.size = len(body)
            member.mode = rng.choice((0o644, 0o4777, 0))
            tar.addfile(member, io.BytesIO(body))
    data = packed.getvalue()
    if rng.random() < 0.4:  # a header with a good checksum and a wrong size, or any bytes
        data = _resized(rng, data) if rng.random() < 0.5 else damaged(rng, data[:2048]) + data[2048:]
    if rng.random() < 0.5:
        data = data[:4096]
    whole = gzip.compress(data, compresslevel=1, mtime=0)
    return damaged(rng, whole) if rng.random() < 0.3 else whole


def _resized(rng: random.Random, data: bytes) -> bytes:
    header = bytearray(data[:512])
    sizes = (b"77777777777\x00", b"\x80" + b"\x00" * 10 + b"\x7f", b"\xff" * 12, b"-1\x00" + b" " * 9)
    header[124:136] = rng.choice(sizes)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    return bytes(header) + data[512:]


def _perhaps_damaged(rng: random.Random, text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return damaged(rng, data) if rng.random() < 0.25 else data


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return _Pairs([name, _tree(item)] for name, item in value.items())
    return [_tree(item) for item in value] if type(value) is list else value


def _changed(rng: random.Random, seeds: Sequence[Any]) -> Any:
    """A seed's tree after some changes, each at a place drawn evenly from all its values."""
    root = [_tree(copy.deepcopy(rng.choice(seeds)))]
    for _ in range(1 + int(rng.expovariate(0.7))):
        places: list[tuple[Any, int]] = []
        _collect(root, places)
        holder, key = rng.choice(places)
        other, there = rng.choice(places)
        value = holder[key]
        kind = rng.randrange(9)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
        elif kind == 3:
            holder[key] = copy.deepcopy(other[there])
        elif kind == 4:
            text = value if isinstance(value, str) else _json_text(value)
            holder[key] = rng.choice(([value], _Pairs([["a", value]]), text))
        elif kind == 5 and isinstance(value, _Pairs) and value:
            del value[rng.randrange(len(value))]
        elif kind == 6 and isinstance(value, _Pairs) and value:
            name, item = rng.choice(value)
            value.append([rng.choice((name, f"{name}x", "", "prompt", "meta", "\x00", "step")), copy.deepcopy(item)])
        elif kind == 7 and type(value) is list:
            value[:] = value[1:] if rng.random() < 0.5 else value * 2
        elif isinstance(value, str):
            holder[key] = damaged(rng, value.encode("utf-8", "replace")).decode("utf-8", "replace")
        elif isinstance(value, int | float):
            holder[key] = rng.choice((value + 1, -value, value * 1000, float(value), str(value)))
    return root[0]


def _collect(holder: Any, places: list[tuple[Any, int]]) -> None:
    """All places of a tree as (list, index)."""
    for key, value in enumerate(holder):
        place = (value, 1) if isinstance(holder, _Pairs) else (holder, key)
        places.append(place)
        inner = place[0][place[1]]
        if isinstance(inner, list):
            _collect(inner, places)


def _json_text(value: Any) -> str:
    return _text(value, lambda name: json.dumps(name) + ": ")


def _text(value: Any, named: Callable[[str], str]) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, _Pairs):
        return "{" + ", ".join(named(str(name)) + _text(item, named) for name, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(item, named) for item in value) + "]"
    return json.dumps(value, ensure_ascii=len(str(value)) % 2 == 0)


def _toml_text(value: Any) -> str:
    def named(name: str) -> str:
        return (name if name.isidentifier() and name.isascii() else json.dumps(name)) + " = "

    if not isinstance(value, _Pairs):
        return _text(value, named)

    def lines(pairs: Sequence[Any]) -> list[str]:
        return [named(str(name)) + _text(item, named) for name, item in pairs]

    plain = lines([pair for pair in value if not isinstance(pair[1], _Pairs)])
    tables = [(named(str(name))[:-3], item) for name, item in value if isinstance(item, _Pairs)]
    return "\n".join(plain + [f"[{name}]\n" + "\n".join(lines(item)) for name, item in tables]) + "\n"
