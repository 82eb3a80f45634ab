import bz2
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def wiki_text() -> ModuleType:
    script = Path(__file__).parents[2] / "scripts" / "wiki_text.py"
    spec = importlib.util.spec_from_file_location("wiki_text", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_markup_becomes_prose(wiki_text: ModuleType) -> None:
    markup = """{{Infobox|a={{nested|b}}}}<!-- note -->
'''Anarchism''' is a [[political philosophy|philosophy]] of [[self-governance]]<ref name="x">cited {{cite}}</ref>.<ref/>
It is {{convert|10|km}} wide&nbsp;&amp; {{lang|fr|libre}}. See [http://example.org the site].
{| class="table"
| cell {| inner |}
|}
== History ==
[[File:a.jpg|thumb|A [[caption]]]]
* first
== See also ==
* [[Other]]
== Later ==
End."""
    assert wiki_text.plain_text(markup).split("\n") == [
        "Anarchism is a philosophy of self-governance.",
        "It is 10 km wide & libre. See the site.",
        "",
        "History",
        "first",
        "Later",
        "End.",
    ]


def test_redirects_stubs_and_other_namespaces_are_left_out(wiki_text: ModuleType, tmp_path: Path) -> None:
    def page(title: str, space: int, text: str) -> str:
        return f"<page><title>{title}</title><ns>{space}</ns><revision><text>{text}</text></revision></page>"

    pages = [
        page("Redirect", 0, "#REDIRECT [[X]] " + "word " * 200),
        page("Stub", 0, "short"),
        page("Talk", 1, "word " * 200),
        page("Kept", 0, "word " * 200),
    ]
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    (tmp_path / "dump.bz2").write_bytes(bz2.compress(xml.encode()))
    (article,) = wiki_text.articles(tmp_path / "dump.bz2")
    assert article.startswith("Kept\n\nword word")
