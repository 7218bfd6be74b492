"""Units of code: what counts as one, what makes two equal, and that growing text gives what fresh text gives."""

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undersong.generation.code_lexer import CodeLexer
from undersong.generation.grammar_tree import LANGUAGES
from undersong.generation.grammar_units import GrammarUnits, similar

CODE = {
    "python": '''import os
def f(x, y):
    """Reads it, once.

    Not twice.
    """
    # first, this
    if x == 1:  # one
        return 'a, b'; pass
    elif x == 2:
        return f"{y}, {x}"
    d = {'a': [1, 2],
         'b': [3, 4]}
    return g(1,
             2)
''',
    "javascript": """const a = 1
function f(x) {
  // go
  if (x == 1) { return `a, ${x}`; }
  else if (x == 2) { return 2 }
  items.push({a: 1, b: [1, 2]});
  switch (x) {
    case 1: g(); break;
    default: h()
  }
}
""",
    "java": """public class A {
  /** Does it,
   * well. */
  @Override
  public int f(int x) {
    for (int i = 0; i < 3; i++) { g(i); }
    int[] a = {1, 2, 3};
    return 'c';
  }
}
""",
    "c": """#include <a.h>
#define X 1
enum { A, B };
int f(int x) {
  if (x == 1) return 1;
  do { g("a;", 'b'); } while (x);
}
""",
    "cpp": """#include <a>
template <typename T> T f(std::vector<T> x) {
  auto s = R"(a; "b)";
  for (auto &y : x) { g(y); }
  return {1, 2};
}
""",
    "go": """package main
import (
  "a"
)
func f(a int, b int) int {
  x := `a, b`
  if x == 1 {
    return 1
  }
  return 2
}
""",
    "rust": """#[derive(Debug)]
struct A { a: i32, b: u8 }
fn f<'a>(x: &'a str) -> i32 {
  let c = 'c'; let s = r#"a, "b"#;
  match x { "1" => 2, _ => 3 }
}
""",
}


def units(code, language="python"):
    found = GrammarUnits(language)
    found.update(code.encode())
    return found


def state(found):
    """All that others can see."""
    listed = [(u.start, u.depth, u.digest, u.element, u.text, u.runs) for u in found.units()]
    places = [(p.last.start, p.last.runs, p.indent, p.is_statement) for p in found.places()]
    return listed, places, found.in_string, found.in_bracket, found.statement_start


def starts(code, language="python"):
    """First word of each unit with its depth."""
    return [(unit.depth, code.encode()[unit.start :].split()[0].decode()) for unit in units(code, language).units()]


def equal(a, b, language="python"):
    """Whether two statements are equal units."""
    first, second = (units(code, language).units()[0] for code in (a, b))
    return first.equals(second)


def test_units_of_python_in_document_order_with_their_depth():
    assert starts(CODE["python"]) == [
        (0, "import"), (0, "def"), (1, "x,"), (1, "y):"),
        (1, '"""Reads'), (1, "Not"), (1, '"""'), (1, "#"),
        (1, "if"), (2, "return"), (2, "pass"), (1, "elif"), (2, "return"),
        (1, "d"), (2, "'a':"), (3, "1,"), (3, "2],"), (2, "'b':"), (3, "3,"), (3, "4]}"),
        (1, "return"), (2, "1,"), (2, "2)"),
    ]  # fmt: skip


def test_units_of_braces():
    assert starts(CODE["javascript"], "javascript") == [
        (0, "const"), (0, "function"), (1, "x)"), (1, "//"), (1, "if"), (2, "return"), (1, "else"), (2, "return"),
        (1, "items.push({a:"), (3, "a:"), (3, "b:"), (4, "1,"), (4, "2]});"),
        (1, "switch"), (2, "case"), (3, "g();"), (3, "break;"), (2, "default:"), (3, "h()"),
    ]  # fmt: skip
    assert [word for _, word in starts(CODE["c"], "c")] == [
        "#include", "#define", "enum", "A,", "B", "int", "if", "do", "g(\"a;\",", "while",
    ]  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_that_grows_byte_by_byte_gives_the_units_of_fresh_text(language):
    code = (CODE[language] * 2).encode()
    growing = GrammarUnits(language)
    for end in range(1, len(code) + 1):
        growing.update(code[:end], end - 1)
        if end % 7 == 0 or end > len(code) - 40:
            assert state(growing) == state(units(code[:end].decode(), language)), code[:end][-60:]


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_that_is_taken_back_and_replaced_gives_the_units_of_fresh_text(language):
    rng = random.Random(0)
    code = CODE[language].encode()
    other = CODE[language].replace("x", "value").replace("1", "x + 1").encode()
    found, text = GrammarUnits(language), b""
    for _ in range(60):
        keep = rng.randrange(max(0, len(text) - 90), len(text) + 1) if text else 0
        new = rng.choice([code, other])
        text = text[:keep] + new[keep : keep + rng.randrange(1, 60)]
        found.update(text, keep)
        assert state(found) == state(units(text.decode(), language)), text[-60:]


@pytest.mark.parametrize("language", LANGUAGES)
def test_long_text_needs_only_a_window(language):
    """Units depend on the text, not on where the window lay; the sizes make it move several times."""
    loop = {
        "python": ("def f(x):\n", "    if x == {}:\n        return [{}, 'a', g(x)]\n"),
        "javascript": ("class A {{\n  f(x) {{\n", "    if (x == {}) {{\n      return [{}, 'a'];\n    }}\n"),
        "java": ("class A {{\n  int f(int x) {{\n", "    if (x == {}) {{\n      return g({}, 'a');\n    }}\n"),
        "c": ("int f(int x) {{\n", "  if (x == {}) return g({}, x);\n"),
        "cpp": ("int f(int x) {{\n", '  std::cout << {} << ", {}" << x;\n'),
        "go": ("package main\nfunc f(x int) int {{\n  switch x {{\n", "  case {}:\n    return {}\n"),
        "rust": ("fn f(x: i32) -> i32 {{\n  match x {{\n", "    {} => {},\n"),
    }[language]
    code = (loop[0].format() + "".join(loop[1].format(i, i + 1) for i in range(450))).encode()
    growing, end = GrammarUnits(language), 0
    rng = random.Random(1)
    while end < len(code):
        keep, end = end, min(len(code), end + rng.randrange(1, 9))
        growing.update(code[:end], keep)
    assert len(code) > 6000
    assert state(growing) == state(units(code.decode(), language))
    assert max(place.last.runs[0] for place in growing.places() if place.last.runs) == 449


@given(st.integers(0, 10**6))
def test_how_the_text_was_cut_does_not_matter(seed):
    rng = random.Random(seed)
    code = CODE["python"].encode()
    growing, end = GrammarUnits("python"), 0
    while end < len(code):
        keep, end = end, min(len(code), end + rng.randrange(1, 30))
        growing.update(code[:end], keep)
    assert state(growing) == state(units(CODE["python"]))


@pytest.mark.parametrize(
    ("a", "b", "language"),
    [
        ("if x == 3: return 4\n", "if name == 12: return total\n".replace("total", "7"), "python"),
        ("x = 'a'\n", 'other = """b, c"""\n', "python"),
        ("f(a, b)  # one\n", "g(c, d)  # two, three\n", "python"),
        ("x.push('a');\n", 'list.push("b c");\n', "javascript"),
        ("int x = 'a';\n", "int y = 'b';\n", "c"),
        ("x := `a`\n", 'y := "b"\n', "go"),
    ],
)
def test_other_names_and_literals_leave_units_unchanged(a, b, language):
    assert equal(a, b, language)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("if x == 3: return 4\n", "if x != 3: return 4\n"),
        ("x = 1\n", "x += 1\n"),
        ("f(a)\n", "f(a, b)\n"),
        ("if x: pass\n", "while x: pass\n"),
        ("return x\n", "return 1\n"),  # a name is no literal
        ("x[1]\n", "x(1)\n"),
    ],
)
def test_another_operator_or_shape_makes_another_unit(a, b):
    assert not equal(a, b)


def test_what_a_unit_holds_counts():
    same, other = "if a:\n    f(1)\n", "if b:\n    f(2)\n    g(2)\n"
    assert equal(same, same.replace("a", "b")) is True
    first, second = (units(code).places()[-1].last for code in (same, other))
    assert not first.equals(second)


def test_comment_lines_are_compared_by_their_text():
    code = "# HINT {}: use a counter\n"
    last = units("".join(map(code.format, range(4)))).places()[0].last
    assert last.runs == [3, 2, 1]
    assert units("# use a counter\n# sort the list first\n# why not\n").places()[0].last.runs == [0, 0]
    assert similar(b"# step 1, then rest", b"# step 2, then rest")
    assert not similar(b"# one", b"# something else")


def test_lines_of_an_open_docstring_are_units():
    found = units('def f():\n    """Does it.\n' + "".join(f"    Line {i} of text.\n" for i in range(5)))
    (place,) = found.places()
    assert place.is_statement
    assert place.last.runs[:2] == [4, 3]
    assert not found.in_string


@pytest.mark.parametrize("tail", ["x = 'a, b\\", 'f("a;', 'x = """a\n', "f(`"])
def test_text_that_ends_in_a_string_has_no_place_for_a_unit(tail):
    found = units(tail, "javascript" if "`" in tail else "python")
    assert found.in_string
    assert found.places() == []


@pytest.mark.parametrize(
    ("tail", "indents"),
    [
        ("if x:\n    f()\n", [4, 0]),
        ("if x:\n", []),  # a header: its block comes next
        ("x = [1, 2, ", [None]),
        ("x = [1, 2", []),
        ("f(1, 2, ", []),  # arguments within a line are no units
        ("def f(a, b, ", [None]),
        ("f(1,\n  2,\n", [None]),
        ("x = 1 \\\n", []),  # the line goes on
        ("x = 1; ", [0]),
        ("x = 1", []),
    ],
)
def test_places_where_a_unit_could_begin(tail, indents):
    assert [place.indent for place in units(tail).places()] == indents


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("junk", ["", "\n", ")]}", "}}}\n{", "é\n", "\x00\n", "'''", "\t\t\tx\r\n", "((((\n[[["])
def test_nothing_makes_it_fail(language, junk):
    found = units(junk, language)
    found.update((junk + CODE[language]).encode(), len(junk.encode()))
    assert state(found) == state(units(junk + CODE[language], language))
    found.update(junk.encode() + b"x = '\xc3", len(junk.encode()))
    found.update(junk.encode() + b"x = '\xc3\xa9';\n", len(junk.encode()) + 6)
    assert state(found) == state(units(junk + "x = 'é';\n", language))


def test_line_ends_and_tabs():
    code = "if x:\n    f(1)\n    f(2)\n    f(3)\n"
    want = [(unit.depth, unit.runs) for unit in units(code).units()]
    for other in (code.replace("\n", "\r\n"), code.replace("    ", "\t")):
        assert [(unit.depth, unit.runs) for unit in units(other).units()] == want


def test_a_line_of_100000_characters():
    line = "x = [" + "1, " * 33_333
    found = units(line)
    assert found.places()[0].last.runs[0] == 33_332
    found.update((line + "2, ").encode(), len(line))
    assert found.places()[0].last.runs[0] == 33_333


@pytest.mark.parametrize("language", ["cobol", "Python", ""])
def test_unknown_languages_are_refused(language):
    with pytest.raises(ValueError, match=rf"language \('{language}'\) must be one of python, javascript"):
        GrammarUnits(language)


def test_a_missing_grammar_says_what_to_install(monkeypatch):
    from undersong.generation.grammar_tree import grammar

    monkeypatch.setitem(sys.modules, "tree_sitter_rust", None)
    grammar.cache_clear()
    with pytest.raises(ImportError, match=r"language 'rust' needs tree-sitter .* pip install 'undersong\[code\]'"):
        GrammarUnits("rust")


@pytest.mark.parametrize(
    ("language", "code", "spans"),
    [
        ("python", "x = 'a\\'b' # c", ["'a\\'b'", "# c"]),
        ("python", 'x = """a"b\n""" + "c', ['"""a"b\n"""', '"c']),
        ("python", "x = 'a\ny = 'b'", ["'a", "'b'"]),  # a line break ends what was never closed
        ("python", "x = '' + ''", ["''", "''"]),
        ("javascript", "a = `x\n\\`` // y", ["`x\n\\``", "// y"]),
        ("c", "a = '\"'; /* b\n */ c", ["'\"'", "/* b\n */"]),
        ("cpp", 'a = R"x(a")x"; 1\'000', ['R"x(a")x"']),
        ("go", "a = `\\` + `b`", ["`\\`", "`b`"]),
        ("rust", 'fn f<\'a>(x: &\'a str) { \'c\' r#"a"b"# "x\ny"', ["'c'", 'r#"a"b"#', '"x\ny"']),
    ],
)
def test_strings_and_comments_are_found_however_the_text_arrives(language, code, spans):
    lexer = CodeLexer(language)
    for end in range(1, len(code) + 1):
        lexer.update(code[:end].encode(), end - 1)
    assert [code[span.start : span.end] for span in lexer.spans] == spans
    lexer.update(code.encode())
    assert [code[span.start : span.end] for span in lexer.spans] == spans
