"""How train_gpt.py is written, in numbers: dense code and late explanations are defects like any
other."""

import ast
import io
import re
import tokenize

import pytest
from helpers import ROOT

SECTIONS = [
    "Configuration",
    "Files",
    "Runtime",
    "Data",
    "Quantisation grid",
    "Model",
    "Calibration",
    "Optimisers",
    "Evaluation",
    "Training",
    "Quantiser",
    "Compression",
    "Legality",
    "main",
]
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Source:
    """A module's text, syntax tree, comments, and the lines that hold code."""

    def __init__(self, text):
        self.text = text
        self.lines = text.splitlines()
        self.tree = ast.parse(text, feature_version=(3, 10))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = [token for token in tokens if token.type == tokenize.COMMENT]
        self.docstrings = self.lines_of_docstrings()
        whole = {token.start[0] for token in self.comments if self.is_whole_line(token)}
        self.code = {
            number
            for number, line in enumerate(self.lines, 1)
            if line.strip() and number not in whole and number not in self.docstrings
        }

    def is_whole_line(self, comment):
        return self.lines[comment.start[0] - 1].lstrip().startswith("#")

    def lines_of_docstrings(self):
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (*DEFINITION, ast.Module)) and ast.get_docstring(node) is not None:
                found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        return found

    def functions(self):
        """{name and first line: number of lines}."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, DEFINITION[:2])]
        return {f"{n.name} (line {n.lineno})": n.end_lineno - n.lineno + 1 for n in nodes}

    def nodes_per_line(self):
        """Syntax nodes per line of code: how much there is to read in a line."""
        nodes = [node for node in ast.walk(self.tree) if hasattr(node, "lineno")]
        return sum(node.lineno not in self.docstrings for node in nodes) / len(self.code)

    def comments_per_100_lines(self):
        rules = r"#\s*[=\-]{20,}.*"  # lines that only separate
        notes = [token for token in self.comments if not re.fullmatch(rules, token.string)]
        return 100 * len(notes) / len(self.code)

    def section_starts(self):
        """{name: first line} of the titles between two rules."""
        titles = {}
        for token in self.comments:
            above = self.lines[token.start[0] - 2]
            name = token.string.removeprefix("# ")
            if above.startswith("# ====") and name in SECTIONS:
                titles[name] = token.start[0]
        return titles


@pytest.fixture(scope="module")
def source():
    return Source((ROOT / "train_gpt.py").read_text())


def test_it_parses_as_python_3_10(source):
    assert len(source.code) > 1000  # and is measured at all


def test_a_line_holds_one_thought(source):
    assert source.nodes_per_line() <= 7.5


def test_there_are_notes_for_a_newcomer(source):
    assert source.comments_per_100_lines() >= 12


def test_no_function_is_longer_than_a_screen(source):
    assert {name: lines for name, lines in source.functions().items() if lines > 45} == {}
    mains = [lines for name, lines in source.functions().items() if name.startswith("main (")]
    assert len(mains) == 1 and mains[0] <= 40


def test_no_line_is_wider_than_100_columns(source):
    assert [n for n, line in enumerate(source.lines, 1) if len(line) > 100] == []


def test_the_sections_come_in_the_order_of_a_runs_life(source):
    assert list(source.section_starts()) == SECTIONS


def calls_to_later_sections(source):
    """["where (line): name"] of uses, in code that runs later, of what a later section defines."""
    starts = list(source.section_starts().values())

    def section(line):
        return sum(line >= start for start in starts)

    defined = {}
    for node in source.tree.body:
        names = [node.name] if isinstance(node, DEFINITION) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and is_target(n)]
        defined.update((name, section(node.lineno)) for name in names)
    uses = [name for node in source.tree.body for name in global_names(node, frozenset())]
    late = [name for name in uses if defined.get(name.id, 0) > section(name.lineno)]
    return [f"line {name.lineno}: {name.id}" for name in late]


def global_names(node, local):
    """Names that are read in a tree and that no function around them binds."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        inside = list(ast.walk(node))
        local = local | {n.arg for n in inside if isinstance(n, ast.arg)}
        local = local | {n.id for n in inside if isinstance(n, ast.Name) and is_target(n)}
    if isinstance(node, ast.Name) and not is_target(node) and node.id not in local:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from global_names(child, local)


def is_target(name):
    return isinstance(name.ctx, ast.Store)


def test_no_section_uses_what_a_later_one_defines(source):
    assert calls_to_later_sections(source) == []


RULE = "# " + "=" * 40
BACKWARDS = f'''"""Two sections, the first of which calls the second."""
{RULE}
# Files
{RULE}
def read(again):
    return check(again, lambda write: write)  # of a later section


def again(x): return [(y, y + 1) for y in (x, x * 2, x * 3) if y > 0 and y < 7]
{RULE}
# Data
{RULE}
def check(value, write):
    return value, write


def write():
    pass
'''


def test_the_measures_see_what_they_should():
    """On a text that is short enough to count by hand."""
    text = Source(BACKWARDS)
    assert calls_to_later_sections(text) == ["line 6: check"]
    assert len(text.code) == 7 and text.docstrings == {1}
    assert text.comments_per_100_lines() == 100 * 3 / 7  # two titles and one note
    assert text.functions() == {
        "read (line 5)": 2,
        "again (line 9)": 1,
        "check (line 13)": 2,
        "write (line 17)": 2,
    }
    assert text.nodes_per_line() == 43 / 7
