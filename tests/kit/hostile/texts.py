"""Texts that are no JSON, or none that any file may hold."""

from __future__ import annotations

BIG = 10**4000
JSON_TEXTS: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", "not valid JSON"),
    "cut short": ('{"a": [1, 2', "not valid JSON"),
    "not JSON": ("a: b\n", "not valid JSON"),
    "a page": ("<!DOCTYPE html>", "HTML"),
    "a pointer of LFS": ("version https://git-lfs.github.com/spec/v1\noid x", "Git LFS"),
    "a pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0.", "pickle"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "BOM": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "NUL": (b'{"a": 1}\0', "not valid JSON"),
    "two documents": ('{"a": 1}{"a": 2}', "not valid JSON"),
    "a list": ("[1]", "must be a JSON object, found a list"),
    "null": ("null", "must be a JSON object, found null"),
    "deep lists": ("[" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', 'a["b"] appears twice'),
    "a key twice, then broken": ('{"a": {"b": 1, "b": 2}, ', "b appears twice"),
    "a key twice, then 6,000 digits": ('{"b": 1, "b": 2, "c": %s}' % ("9" * 6000), "digits"),
    "6,000 digits": ('{"a": %s}' % ("9" * 6000), "digits"),
}
