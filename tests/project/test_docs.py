"""The README and the manual say what is true: commands, output, options, links, documents.

Every command of a ``console`` block runs, in order, in one folder for each page, and what it prints
must be what the page shows. There ``...`` stands for any lines, and seconds, rates and sizes of
memory may differ. Python blocks run as doctests. A JSON or TOML block after a line that ends in
"`name`:" becomes the file of that name in the page's folder, where later commands read it.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path

import pytest
from kit.command import run_cli
from kit.files import FIXTURES, read_json

from moe_ckpt import Limits, Options, Plan, Result, errors
from moe_ckpt.cli.commands import cli
from moe_ckpt.cli.process import run
from moe_ckpt.report.catalogue import formats_document

ROOT = FIXTURES.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = "https://github.com/moe-ckpt/moe-ckpt/blob/main/"

# What a page calls a checkpoint of the reader's -> the fixture that stands for it, with a model
# type of its own.
STANDS_FOR = {"new_model": ("qwen3_moe/source", "new_moe")}

# Commands beside moe-ckpt that pages may show with their output.
HELPERS = ("cat", "echo", "ls", "rm", "truncate")

# What differs from run to run, or from machine to machine.
VARIES = (
    (r"\d+\.\d s on (cpu|cuda\S*), [\d.]+ [kMGT]?B/s", "# s on #, # B/s"),
    (r"at most [\d.]+ [kMG]B of memory", "at most # of memory"),
    (r'"(seconds|peak_memory_nbytes)": [\d.]+', r'"\1": #'),
    (r"\b[0-9a-f]{64}\b", "#"),
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``before`` is the last line of text above it."""

    kind: str
    text: str
    line: int
    before: str


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the output that the page shows."""

    text: str
    shown: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    kind, start, before, inside = None, 0, "", []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if kind is not None and line == "```":
            yield Block(kind, "".join(f"{each}\n" for each in inside), start, before)
            kind, inside = None, []
        elif kind is not None:
            inside.append(line)
        elif line.startswith("```"):
            kind, start = line[3:], number
        elif line.strip():
            before = line
    assert kind is None, f"{page.name}:{start}: a block without an end"


def commands(block: Block) -> Iterator[Command]:
    parts = re.split(r"(?m)^\$ ", block.text)
    assert not parts[0], f"line {block.line}: output without a command"
    line = block.line + 1
    for part in parts[1:]:
        text, _, shown = part.replace("\\\n", "").partition("\n")
        yield Command(text, shown, line)
        line += part.count("\n")


def all_commands() -> Iterator[tuple[Path, Command]]:
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "console":
                yield from ((page, command) for command in commands(block))


class Session:
    """What a reader does with one page, in a folder of its own.

    ``as_process``: run the installed command, as a reader does; else its code is called, which is
    several times faster.
    """

    def __init__(self, page: Path, *, as_process: bool = False) -> None:
        self.page = page
        self.as_process = as_process
        self.code = 0
        self.names: dict[str, object] = {"__name__": "page"}

    def take(self, block: Block) -> None:
        if block.kind == "console":
            for command in commands(block):
                self.run(command)
        elif block.kind == "python":
            self.run_python(block)
        elif block.kind in ("json", "toml") and block.before.endswith("`:"):
            Path(block.before.split("`")[-2]).write_text(block.text)

    def run(self, command: Command) -> None:
        where = f"{self.page.name}:{command.line}: $ {command.text}"
        words = shlex.split(command.text)
        if words[0] == "moe-ckpt":
            target = None
            if ">" in words:
                target = Path(words[words.index(">") + 1])
                words = words[: words.index(">")]
            self.code, out, printed = (self._process if self.as_process else self._call)(words[1:])
            if target is not None:
                target.write_text(out)
            else:
                printed = out + printed
            # Whatever "..." leaves out of an output, whether the command failed is shown.
            assert (self.code != 0) == ("rror: " in command.shown), f"{where}\n{printed}"
        else:
            assert words[0] in HELPERS, where
            text = command.text.replace("$?", str(self.code))
            printed = subprocess.run(
                ["/bin/sh", "-c", text], check=True, capture_output=True, text=True
            ).stdout
        assert agrees(command.shown, printed), (
            f"{where}\n--- the page shows\n{command.shown}--- and it prints\n{printed}"
        )

    def _process(self, words: list[str]) -> tuple[int, str, str]:
        done = run_cli(*words)
        return done.returncode, done.stdout, done.stderr

    def _call(self, words: list[str]) -> tuple[int, str, str]:
        out, printed = StringIO(), StringIO()
        before = sys.argv
        sys.argv = ["moe-ckpt", *words]
        try:
            with redirect_stdout(out), redirect_stderr(printed):
                code = run(cli)
        finally:
            sys.argv = before
        return code, out.getvalue(), printed.getvalue()

    def run_python(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(
            block.text, self.names, self.page.name, str(self.page), block.line
        )
        assert test.examples, f"{self.page.name}:{block.line}: no >>> in a python block"
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
        report = StringIO()
        runner.run(test, out=report.write, clear_globs=False)
        self.names.update(test.globs)
        assert not runner.failures, report.getvalue()


def agrees(shown: str, printed: str) -> bool:
    """Whether an output is what a page shows; "..." stands there for any lines."""
    shown_lines = [
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(settled(line)) + "\n"
        for line in shown.splitlines()
        if line.strip()
    ]
    got = "".join(
        f"{settled(line)}\n"
        for line in printed.splitlines()
        if line.strip() and not line.startswith("note: ")  # of the machine, such as: no numba
    )
    return re.fullmatch("".join(shown_lines), got) is not None


def settled(line: str) -> str:
    for pattern, instead in VARIES:
        line = re.sub(pattern, instead, line)
    return line.rstrip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_print_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    os.symlink(FIXTURES, "fixtures")
    for name, (fixture, model_type) in STANDS_FOR.items():
        shutil.copytree(FIXTURES / fixture, name)
        config = read_json(Path(name, "config.json")) | {"model_type": model_type}
        Path(name, "config.json").write_text(json.dumps(config))
    session = Session(page, as_process=page == README)
    for block in blocks(page):
        session.take(block)


def test_every_command_is_in_a_block_that_is_run():
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "console" or page.name == "cli.md":
                continue
            found = re.search(r"(?m)^\s*(\$ |moe-ckpt )", block.text)
            assert not found, f"{page.name}:{block.line}: a command in a block of {block.kind!r}"
        outside = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
        assert not re.search(r"(?m)^ {4,}(\$ |moe-ckpt )", outside), page.name
    assert sum(command.text.startswith("moe-ckpt") for _, command in all_commands()) > 30


def test_outputs_that_differ_are_noticed():
    assert agrees("one\n...\nfour\n", "one\ntwo\nthree\nfour\n")
    assert agrees("0.3 s on cpu, 1.4 MB/s; x\n", "12.9 s on cpu, 941.0 kB/s; x\n")
    assert not agrees("one\nfour\n", "one\ntwo\nfour\n")
    assert not agrees("48 matrices\n", "49 matrices\n")
    assert not agrees("one\n...\nfour\n", "one\nfour\nfive\n")


def test_blocks_of_json_and_toml_parse():
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "json":
                json.loads(block.text)
            elif block.kind == "jsonl":
                assert [json.loads(line) for line in block.text.splitlines()]
            elif block.kind == "toml":
                tomllib.loads(block.text)


def generator(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_loaders_is_what_they_did():
    generate = generator("generate_loads")
    assert generate.PAGE.read_text() == generate.page(), "run python docs/generate_loads.py"


def test_the_page_of_commands_is_what_the_commands_say():
    generate = generator("generate")
    assert generate.PAGE.read_text() == generate.page(), "run python docs/generate.py"
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    codes = {str(kind.exit_code) for kind in kinds} | {"0", "129", "130", "143"}
    assert codes == generate.EXIT_CODES.keys()


def test_options_that_pages_name_exist():
    known = {"--version", "--help", "--quantization"}  # the last is vLLM's
    known |= {name for command in cli.commands.values() for p in command.params for name in p.opts}
    for page in PAGES:
        text = re.sub(r"(?ms)^```sh$.*?^```$", "", page.read_text())  # of other programs
        for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text):
            assert name in known, f"{page.name}: {name}"


def test_targets_of_make_that_pages_name_exist():
    targets = set(re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text()))
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"[`\n]make ([a-z-]+)", text))
    assert named
    assert named <= targets


def test_names_of_the_python_interface_exist():
    text = (ROOT / "docs" / "python.md").read_text()
    for kind in (Plan, Result):
        row = re.search(rf"(?m)^\| `{kind.__name__}` \|(.*)$", text)[1]
        assert set(re.findall(r"`(\w+)`", row)) <= set(dir(kind))
    for kind in (Options, Limits):
        assert all(f"`{field.name}`" in text for field in fields(kind))


def test_the_table_of_formats_is_that_of_the_catalogue():
    text = (ROOT / "docs" / "formats.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    table = {name: row for row in rows for name in re.findall(r"`([\w-]+)`", row[0])}
    for known in formats_document()["formats"]:
        _, block, bits, _, sizes, dialects, runtimes = table[known["name"]]
        spelled = sorted(known["dialects"], key=lambda each: not each["default"])
        assert re.findall(r"`([\w-]+)`", dialects) == [each["name"] for each in spelled]
        read = {runtime for each in spelled for runtime in each["loads_in"]}
        assert set(re.findall(r"vLLM|SGLang|TensorRT-LLM|transformers", runtimes)) == read
        assert known["sizes"] in sizes or sizes.strip() == "the block"
        assert known["block"] in block or known["name"] == "bf16"
        assert f"{known['bits_per_weight']:g}" in bits


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
        names = dict(re.findall(r"(?m)^\[([\w-]+)\]: (\S+)$", text))
        assert set(re.findall(r"\]\[([\w-]+)\]", text)) == names.keys()
        for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *names.values()]:
            path, _, anchor = target.partition("#")
            if path.startswith(PROJECT):
                file = ROOT / path.removeprefix(PROJECT)
            elif "://" in path:
                continue
            else:
                # A package page shows the README where its neighbours are not.
                assert page != README, f"{page.name}: {target} is relative"
                file = page.parent / path if path else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    found = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", text):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower()
        found.add(re.sub(r"\s", "-", plain))
    return found


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 9_000


# ---- the documents in docs/file-formats.md


def described(schema: str) -> tuple[int, list[tuple[str, ...]]]:
    """Version and fields of a document, as the page has them: a name in capitals is any name."""
    text = (ROOT / "docs" / "file-formats.md").read_text()
    sections = re.split(r"(?m)^## ", text)
    section = next(part for part in sections if f"`moe-ckpt/{schema}`" in part.partition("\n")[0])
    version = int(re.search(r"version (\d+)", section.partition("\n")[0])[1])
    named = []
    for row in re.findall(r"(?m)^\| (`.*?) \|", section):
        names = re.findall(r"`([^`]+)`", row)
        named += [tuple(name.replace("[]", ".[]").split(".")) for name in names]
    return version, named


def paths(value: object, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to each value; an empty list or object is one."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from paths(each, (*at, key))
    elif isinstance(value, list) and value:
        for each in value:
            yield from paths(each, (*at, "[]"))
    else:
        yield at


def fits(path: tuple[str, ...], field: tuple[str, ...]) -> bool:
    return all(b.isupper() or a == b for a, b in zip(path, field, strict=False))


def documents(tmp_path: Path, monkeypatch) -> dict[str, list[dict]]:
    """Documents of every schema, with as many of their fields in use as the fixtures can give."""
    monkeypatch.chdir(tmp_path)
    source, stats = FIXTURES / "qwen3_moe" / "source", FIXTURES / "qwen3_moe" / "stats.json"
    session = Session(README)

    def printed(*words: object) -> dict:
        _, out, _ = session._call([str(word) for word in words])
        return json.loads(out)

    converted = printed("convert", source, "out", "--json", "-q")
    session._call(["scan", str(source), "-o", "amax.json", "-q"])
    journal = Path("out/.moe-ckpt/journal.jsonl").read_text().splitlines()
    llmc = FIXTURES / "qwen3_moe" / "llm-compressor-nvfp4a16"
    return {
        "plan": [
            converted,
            printed("inspect", FIXTURES / "mixtral" / "source", "--json"),
            printed("convert", source, "x", "--json", "--stats", stats, "--dry-run"),
        ],
        "verification": [
            printed("verify", "out", "--source", source, "--json"),
            printed("verify", llmc, "--json"),
        ],
        "repair": [
            printed("repair", llmc, "mended", "--json", "-q"),
            printed("repair", FIXTURES / "gpt_oss" / "source", "x", "--json", "--dry-run"),
        ],
        "formats": [printed("formats", "--json")],
        "layouts": [printed("layouts", "--json")],
        "stats": [json.loads(stats.read_text())],
        "weight-amax": [json.loads(Path("amax.json").read_text())],
        "journal": [json.loads(line) for line in journal],
    }


def test_the_page_of_file_formats_has_every_field(tmp_path, monkeypatch):
    for schema, samples in documents(tmp_path, monkeypatch).items():
        version, named = described(schema)
        assert samples[0]["schema"] == f"moe-ckpt/{schema}"
        assert samples[0]["version"] == version
        real = [path for sample in samples for path in paths(sample)]
        for path in real:
            ok = any(fits(path, field) and len(path) <= len(field) for field in named)
            assert ok, f"{schema}: {'.'.join(path)} is not on the page"
        if schema in ("stats", "journal"):
            continue  # their optional fields are not in every file
        for field in named:
            ok = any(fits(path, field) for path in real)
            assert ok, f"{schema}: {'.'.join(field)} is on the page only"
