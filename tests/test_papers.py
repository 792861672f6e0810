"""nets/PAPERS.md is in step with the sources, and what it is made of."""

import re

import pytest

from tests.papers import CITATION, FOLDERS, ID, PAGE, ROOT, Citation, citations, citations_of, page, papers

SOURCE = '''"""A net (Ho & Salimans
2022, "A title,
on two lines", arXiv:2207.12598, eqs. 3 and 4). Another: LeCun et
al. 1998."""

# A comment on van den Oord et al. 2017 (VQ-VAE, arXiv:1711.00937),
# eq. 3.


def f():
    """Nothing."""
    x = 1  # Kim's 2016 method
    return x  # ImageNet 2012; CVPR 2017
'''


def test_citations():
    assert list(citations_of("a.py", SOURCE)) == [
        Citation("Ho and Salimans", 2022, "A title, on two lines", "2207.12598", "a.py", 1, "", ("eqs. 3 and 4",)),
        Citation("LeCun et al.", 1998, "", "", "a.py", 3, "", ()),
        Citation("van den Oord et al.", 2017, "", "1711.00937", "a.py", 6, "", ("eq. 3",)),
        Citation("Kim", 2016, "", "", "a.py", 12, "f", ()),
    ]


def test_numbers_without_a_citation_belong_to_the_paper_of_the_module():
    source = '"""A net.\n\nHo et al. 2020 (arXiv:2006.11239); equations are its.\n"""\n\n\n'
    source += 'def f():\n    """x (equation 4)."""\n'
    first, second = citations_of("a.py", source)
    assert second == first._replace(line=8, name="f", parts=("equation 4",))
    assert len(list(citations_of("a.py", source.replace("; equations are its", "")))) == 1


def test_a_citation_without_an_id_is_of_the_paper_of_its_authors():
    def cite(authors, file, id="", title=""):
        return Citation(authors, 1901, title, id, file, 1, "", ())

    cites = [
        cite("A and B", "a", id="1"),
        cite("A and B", "b"),
        cite("C et al.", "a", id="2"),
        cite("C et al.", "b", id="3"),
    ]
    cites += [cite("C, D and E", "b"), cite("A et al.", "a"), cite("F", "a", title="T"), cite("F", "b")]
    out = {paper.places[0]: [place.file for place in paper.places] for paper in papers(cites)}
    assert out == {cites[0]: ["a", "b"], cites[2]: ["a"], cites[3]: ["b", "b"], cites[5]: ["a"], cites[6]: ["a", "b"]}


def test_page_is_in_step():
    """`python -m tests.papers` writes it again."""
    assert PAGE.read_text(encoding="utf-8") == page(citations())


def test_lines_of_the_page_cite_the_paper():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    years = [int(re.search(r"(?:19|20)\d\d", row)[0]) for row in rows]
    assert years == sorted(years) and len(years) > 200
    for row, year in zip(rows, years, strict=True):
        surname = re.search(r"[\w’-]+", re.sub(r"^\| \[?(?:(?:van|von|den|der|de|la) )*", "", row))[0]
        places = re.findall(r"\]\(\.\./([\w/.]+)#L(\d+)\)", row)
        cited = [
            " ".join((ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1 :][:3])
            for file, line in places
        ]
        assert cited and all(cited), row
        assert any(surname in text and str(year) in text for text in cited), row


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_id_has_authors_and_a_year(folder):
    """An arXiv id alone would not be on the page."""
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = re.sub(r"\n *#", "\n", path.read_text(encoding="utf-8"))
        ids = {match["id"] for match in re.finditer(ID, text)} if "arXiv:" in text else set()
        wrong += [f"{path}: arXiv:{id}" for id in ids - {match["id"] for match in CITATION.finditer(text)}]
    assert not wrong, "\n".join(wrong)
